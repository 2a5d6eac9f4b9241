"""A loaded model with its tokenizer: what a worker keeps warm.

Knows no job, no storage, no Ray.
"""

import inspect
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache

from jobs import catalog
from jobs.engine.blocks import Parts, find_blocks, find_parts
from jobs.errors import ModelError
from jobs.spec import ModelRef

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
Kept = TypeVar("Kept")
_MOST_KEPT = 4


class Replica:
    """One model on one device.

    Attributes:
        model: The decoder-only language model, in evaluation mode, weights frozen.
        tokenizer: Its tokenizer, padding on the left.
        blocks: The decoder blocks in order; layer `l` means the output of `blocks[l]`, counted from 0.
        token_budget: Most tokens (sequences x padded length) of one forward pass.
        memory: Most bytes of keys, values and activations that are kept from pass to pass.
        positions_ST: Of the pass that is running or ran last, the position of each token in its text,
            from 0; -1 marks padding.
    """

    def __init__(self, model: Any, tokenizer: Any, *, token_budget: int = 8192, memory: int = 2**30) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.blocks: nn.ModuleList = find_blocks(model)
        # A slice of the hidden states reaches the unembedding strided, which costs a slow batched product.
        self.model.get_output_embeddings().register_forward_pre_hook(
            lambda unembedding, inputs: (inputs[0].contiguous(), *inputs[1:])
        )
        self.token_budget = token_budget
        self.memory = memory
        self.positions_ST = torch.zeros((0, 0), dtype=torch.int64)
        self._kept: dict[Hashable, Any] = {}

    @cached_property
    def parts(self) -> list[Parts]:
        """Attention and feed-forward part of each block. Raises ModelError if a block has none."""
        return [find_parts(block) for block in self.blocks]

    @property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def state_bytes(self) -> int:
        """Bytes of one token's hidden state."""
        return self.hidden_size * int(self.model.dtype.itemsize)

    @cached_property
    def cache_bytes(self) -> int:
        """Bytes of one token's keys and values in all blocks, measured.

        Raises:
            ModelError: If a block keeps anything else from token to token.
        """
        cache: Any = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            one = torch.ones((1, 1), dtype=torch.int64, device=self.device)
            self.forward(one * self.pad_id, one, one - 1, keep=1, cache=cache)
        states = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
        found = [each.nbytes for each in states if each is not None]
        if len(found) != 2 * self.layers:
            raise ModelError(
                f"{type(self.model).__name__} keeps more than keys and values from token to token; "
                "steersweep takes models whose blocks all have attention"
            )
        return sum(found)

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where token ids have to be."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @cached_property
    def pad_id(self) -> int:
        """A token id to pad with; padded positions are masked, so any id would do."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a completion, from the generation config and the tokenizer."""
        configured = self.model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(int(token) for token in [*ids, self.tokenizer.eos_token_id] if token is not None)

    @cached_property
    def blocks_give_tuples(self) -> bool:
        """Whether a block's forward returns a tuple with the hidden state first, and not the state alone."""
        given: list[bool] = []
        hook = self.blocks[0].register_forward_hook(
            lambda block, inputs, output: given.append(isinstance(output, tuple))
        )
        try:
            with torch.inference_mode():
                self.logits([[self.pad_id]], keep=1)
        finally:
            hook.remove()
        return given[0]

    @cached_property
    def _takes_logits_to_keep(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def keep(self, key: Hashable, build: Callable[[], Kept]) -> Kept:
        """What `build` makes, kept for the next pack while it is among the few asked for last."""
        kept: Kept = self._kept.pop(key) if key in self._kept else build()
        self._kept[key] = kept
        while len(self._kept) > _MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        return kept

    def encode(self, text: str) -> list[int]:
        """Token ids of a raw text; the tokenizer's own start token, if it has one, is included."""
        return list(self.tokenizer(text)["input_ids"])

    def encode_chat(self, user: str, *, system: str | None = None, answer: str = "") -> list[int]:
        """Token ids of one user turn, ready for the model's reply, which may already have begun.

        Args:
            user: The user's message.
            system: System message; None leaves what the model's template does by itself.
            answer: Beginning of the reply, appended after the template's generation prompt.

        Raises:
            ModelError: If the tokenizer has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ModelError(
                "the model has no chat template, and this job asks in chat form; choose an instruct model"
            )
        messages = [{"role": "user", "content": user}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text + answer, add_special_tokens=False)["input_ids"])

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that continues another one: no start token."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def pad(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Left-pad token sequences to one length.

        Returns:
            Token ids and attention mask, both int64 of shape (sequences, longest), on the model's device.
        """
        longest = max(len(sequence) for sequence in sequences)
        ids = torch.full((len(sequences), longest), self.pad_id)
        mask = torch.zeros((len(sequences), longest), dtype=torch.int64)
        for index, sequence in enumerate(sequences):
            ids[index, longest - len(sequence) :] = torch.tensor(sequence)
            mask[index, longest - len(sequence) :] = 1
        return ids.to(self.device), mask.to(self.device)

    def logits(self, sequences: Sequence[Sequence[int]], keep: int) -> Tensor:
        """Logits of the last `keep` positions of each sequence.

        Returns:
            Shape (sequences, keep, vocabulary), the model's dtype. Where a sequence is shorter
            than `keep`, its leading positions are padding and mean nothing.
        """
        ids, mask = self.pad(sequences)
        return self.forward(ids, mask, position_ids(mask), keep=keep)

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, *, keep: int, cache: Cache | None = None
    ) -> Tensor:
        """One pass over the model.

        Args:
            ids: Token ids of shape (sequences, tokens).
            mask: Attention mask of shape (sequences, cached + tokens).
            positions: Positions of shape (sequences, tokens).
            keep: Number of last positions whose logits are wanted.
            cache: Keys and values of the tokens before, extended in place; None for a pass without.

        Returns:
            Logits of shape (sequences, keep, vocabulary), in the model's dtype.
        """
        self.positions_ST = positions.masked_fill(mask[:, -positions.shape[1] :] == 0, -1)
        extra = {"logits_to_keep": keep} if self._takes_logits_to_keep else {}
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        )
        logits: Tensor = output.logits[:, -keep:]
        return logits


def position_ids(mask: Tensor) -> Tensor:
    """Positions counted from each sequence's first real token; padding gets 0.

    Args:
        mask: Attention mask of shape (sequences, tokens), 1 where a token is real.
    """
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def load_replica(ref: ModelRef, *, device: str = "cpu", token_budget: int = 8192) -> Replica:
    """Load a model and its tokenizer.

    Raises:
        ModelError: If the model is unknown, cannot be read, or its dtype is.
    """
    if ref.dtype not in _DTYPES:
        raise ModelError(f"dtype {ref.dtype!r} is not known; it takes one of {sorted(_DTYPES)}")
    source = catalog.resolve(ref.id)
    arguments = {"revision": ref.revision, "trust_remote_code": ref.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **arguments)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=_DTYPES[ref.dtype], **arguments)
    except Exception as error:  # transformers raises whatever a broken file makes it stumble over
        raise ModelError(_not_found(ref, source, error)) from error
    return Replica(model.to(device), tokenizer, token_budget=token_budget)


def _not_found(ref: ModelRef, source: str, error: Exception) -> str:
    first_line = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    revision = f" at revision {ref.revision!r}" if ref.revision else ""
    kind = "folder" if Path(source).is_dir() else "model"
    return (
        f"cannot load {kind} {ref.id!r}{revision}: {first_line}; give a folder, a Hugging Face id that this "
        f"machine can reach, or one of {sorted(catalog.ENTRIES)}"
    )
