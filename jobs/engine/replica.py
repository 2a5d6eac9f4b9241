"""A loaded model with its tokenizer: what a worker keeps warm.

Knows no job, no storage, no Ray.
"""

import copy
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from threading import Event, Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from jobs.engine.blocks import Parts, find_blocks, find_parts
from jobs.errors import ModelError, SpecError

Kept = TypeVar("Kept")
MOST_KEPT = 4


class LaneStopped(Exception):
    """Nobody waits for what this lane finds."""


class Replica:
    """One model, on one device or with its blocks spread over several.

    Attributes:
        model: The decoder-only language model, in evaluation mode, weights frozen. Of a model that also
            takes images, the part for text.
        tokenizer: Its tokenizer, padding on the left.
        blocks: The decoder blocks in order; layer `l` means the output of `blocks[l]`, counted from 0.
        token_budget: Most tokens (sequences x padded length) of one forward pass.
        memory: Most bytes of keys, values and activations that are kept from pass to pass.
        positions_ST: Of the pass that is running or ran last, the position of each token in its text,
            from 0; -1 marks padding.
        has_lanes: Held while lanes run.
        separable: Whether a block can compute a part of its batch; None until `skipping` has tried it out.
    """

    def __init__(self, model: Any, tokenizer: Any, *, token_budget: int = 8192, memory: int = 2**30) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.blocks: nn.ModuleList = find_blocks(model.get_decoder())
        # A slice of the hidden states reaches the unembedding strided, which costs a slow batched product.
        self.model.get_output_embeddings().register_forward_pre_hook(
            lambda unembedding, inputs: (inputs[0].contiguous(), *inputs[1:])
        )
        self.token_budget = token_budget
        self.memory = memory
        self.positions_ST = torch.zeros((0, 0), dtype=torch.int64)
        self.has_lanes = Lock()
        self.separable: bool | None = None
        self._kept: dict[Hashable, Any] = {}
        self._kept_by_lanes: dict[int, dict[Hashable, Any]] = {}
        self._stopped = Event()

    def lane(self, number: int, *, of: int, stopped: Event) -> "Replica":
        """The same weights in modules of its own, so that it can run beside the other lanes.

        Hooks that are on the model are on the lane's too. What a lane keeps, it keeps for the next one of its
        number.

        Args:
            number: Which lane, from 0.
            of: Number of lanes, which share the memory.
            stopped: Once it is set, the lane's passes raise `LaneStopped`.
        """
        hooks = [hook for _, hook in self._hooks()]
        same = chain(self.model.parameters(), self.model.buffers(), hooks)
        lane = copy.copy(self)
        lane.__dict__.pop("parts", None)
        lane.model = copy.deepcopy(self.model, {id(each): each for each in same})
        lane.blocks = find_blocks(lane.model.get_decoder())
        lane.memory = self.memory // of
        lane._kept = self._kept_by_lanes.setdefault(number, {})
        lane._stopped = stopped
        return lane

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
    def context(self) -> int | None:
        """Most tokens of a text that the model was made for; None where its configuration states none.

        A model whose rotary embedding has factors of its own for long texts (longrope) takes them for all
        texts of a batch that holds a long one; its context is that of the short ones.
        """
        config = self.model.config.get_text_config()
        stated = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            stated = rope.get("original_max_position_embeddings", stated)
        return None if stated is None else int(stated)

    @property
    def has_windows(self) -> bool:
        """Whether some attention sees only a stretch of the text, which padding inside of it would shift."""
        config = self.model.config.get_text_config()
        return any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))

    def check_length(self, tokens: int) -> None:
        """Raises SpecError if a text of so many tokens, new ones included, is longer than the context."""
        if self.context is not None and tokens > self.context:
            raise SpecError(
                f"a text of {tokens} tokens, new ones included, is longer than the model's context of "
                f"{self.context}; use shorter prompts, fewer new tokens or a model with a longer context"
            )

    def check_text(self, tokens: Sequence[int], *, new_tokens: int = 0) -> None:
        """Raises SpecError if a text is empty, longer than the context, or of tokens that do not exist."""
        if not tokens:
            raise SpecError("the text has no token; it takes at least one")
        known = self.model.get_input_embeddings().weight.shape[0]
        if not 0 <= min(tokens) <= max(tokens) < known:
            raise SpecError(
                f"tokens from {min(tokens)} to {max(tokens)}; the model has the tokens 0 to {known - 1}"
            )
        self.check_length(len(tokens) + new_tokens)

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
        known = self.model.get_input_embeddings().weight.shape[0]
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and token < known:
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
        """What `build` makes, kept for the next pack while it is among the few asked for last.

        It is made anew where hooks were added or removed, or weights were changed in place.
        """
        key = key, self._as_it_is()
        kept: Kept = self._kept.pop(key) if key in self._kept else build()
        self._kept[key] = kept
        while len(self._kept) > MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        return kept

    def _as_it_is(self) -> Hashable:
        """Differs where hooks or weights do, except for weights that were changed through `data`."""
        weights = tuple(
            (id(weight), 0 if weight.is_inference() else weight._version)
            for weight in self.model.parameters()
        )
        return weights, tuple(number for number, _ in self._hooks())

    def _hooks(self) -> list[tuple[int, Any]]:
        """Number and function of all hooks on the model."""
        return [
            hook
            for module in self.model.modules()
            for hook in chain(module._forward_hooks.items(), module._forward_pre_hooks.items())
        ]

    @contextmanager
    def other_weights(self) -> Iterator[None]:
        """Inside the block the weights may differ; what is kept there and what is kept outside stay apart."""
        outside = self._kept, self._kept_by_lanes
        self._kept, self._kept_by_lanes = {}, {}
        try:
            yield
        finally:
            self._kept, self._kept_by_lanes = outside

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
            ModelError: If the tokenizer has no chat template, or its template refuses the turn.
        """
        messages = [{"role": "user", "content": user}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return self.encode_messages(messages, answer=answer)

    def encode_messages(self, messages: Sequence[Mapping[str, str]], *, answer: str = "") -> list[int]:
        """Token ids of a conversation, ready for the model's reply, which may already have begun.

        Args:
            messages: Each with its `role` (system, user or assistant) and its `content`.
            answer: Beginning of the reply, appended after the template's generation prompt.

        Raises:
            ModelError: If the tokenizer has no chat template, or its template refuses the conversation.
        """
        text = self.chat_text(messages) + answer
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def chat_text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation in the model's chat template, ready for its reply; takes and raises the same."""
        if self.tokenizer.chat_template is None:
            raise ModelError(
                "the model has no chat template, and this job asks in chat form; choose an instruct model"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            )
        except Exception as error:  # a template is a program, and raises what it likes
            roles = [message["role"] for message in messages]
            raise ModelError(
                f"the model's chat template refuses the roles {roles}: {error}; leave the system message "
                "out, or choose another model"
            ) from error

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that continues another one: no start token."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def single_token(self, text: str) -> int:
        """The one token of a text that continues another one. Raises SpecError if it is several."""
        tokens = self.encode_continuation(text)
        if len(tokens) != 1:
            raise SpecError(f"{text!r} is {len(tokens)} tokens of this model; it takes a text of one token")
        return tokens[0]

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
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        *,
        keep: int | Tensor,
        cache: Cache | None = None,
    ) -> Tensor:
        """One pass over the model.

        Args:
            ids: Token ids of shape (sequences, tokens).
            mask: Attention mask of shape (sequences, cached + tokens), 1 where a token is real; or, of a pass
                without a cache, (sequences, 1, tokens, tokens), which is added to the attention's logits.
            positions: Positions of shape (sequences, tokens).
            keep: Number of last positions whose logits are wanted, or which positions, int64.
            cache: Keys and values of the tokens before, extended in place; None for a pass without.

        Returns:
            Logits of shape (sequences, kept positions, vocabulary), in the model's dtype.
        """
        if self._stopped.is_set():
            raise LaneStopped
        self.positions_ST = positions
        if mask.dim() == 2:
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
        logits: Tensor = output.logits
        if isinstance(keep, int):
            return logits[:, -keep:]
        return logits if extra else logits[:, keep]


def position_ids(mask: Tensor) -> Tensor:
    """Positions counted from each sequence's first real token; padding gets 0.

    Args:
        mask: Attention mask of shape (sequences, tokens), 1 where a token is real.
    """
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
