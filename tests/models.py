"""Tiny models with random weights and a real tokenizer, and a context to run jobs on them: no network.

Every weight is drawn from a generator seeded by the weight's own name, so that a deeper model
of the same architecture begins with the same blocks.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from jobs.engine.replica import Replica
from jobs.engine.sites import Place, picked
from jobs.resolve import load_job, locate_data
from jobs.spec import Outcome, Requirement, Row

LAYERS = 4
HIDDEN = 32
WINDOW = 6
"""Tokens that a sliding-window layer sees; prompts in the tests are longer."""

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which every continuation of the project's choices is one token."""
    choices = [json.loads(line) for line in locate_data("tone_choices").read_text().splitlines()]
    words = sorted({choice[side] for choice in choices for side in ("positive", "negative")})
    pieces = dict.fromkeys([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    merges: dict[tuple[str, str], None] = {}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for word in words:
        [(letters, _)] = byte_level.pre_tokenize_str(word)
        for end in range(1, len(letters)):
            merges[letters[:end], letters[end]] = None
            pieces[letters[: end + 1]] = None
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _llama_like(architecture: str, **changes: Any) -> Callable[[dict[str, Any]], PreTrainedModel]:
    def build(common: dict[str, Any]) -> PreTrainedModel:
        config = getattr(transformers, f"{architecture}Config")(
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=HIDDEN // 4,
            **common | changes,
        )
        name = "Gemma3" if architecture == "Gemma3Text" else architecture
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return build


def _gpt2(common: dict[str, Any]) -> PreTrainedModel:
    layers = common.pop("num_hidden_layers")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=HIDDEN, n_layer=layers, n_head=4, **common)
    )


def _gpt_neox(common: dict[str, Any]) -> PreTrainedModel:
    size = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_attention_heads": 4}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**size, **common))


def _phi(common: dict[str, Any]) -> PreTrainedModel:
    size = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_attention_heads": 4}
    return transformers.PhiForCausalLM(transformers.PhiConfig(**size, **common))


def _opt(common: dict[str, Any]) -> PreTrainedModel:
    size = {
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": 2 * HIDDEN,
        "num_attention_heads": 4,
    }
    return transformers.OPTForCausalLM(transformers.OPTConfig(**size, **common))


_BUILDERS: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "llama": _llama_like("Llama"),
    "mistral": _llama_like("Mistral", sliding_window=WINDOW),
    "qwen2": _llama_like("Qwen2"),
    "qwen3": _llama_like("Qwen3"),
    "gemma2": _llama_like("Gemma2", sliding_window=WINDOW, query_pre_attn_scalar=HIDDEN // 4),
    "gemma3": _llama_like(
        "Gemma3Text", sliding_window=WINDOW, query_pre_attn_scalar=HIDDEN // 4, sliding_window_pattern=2
    ),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "phi": _phi,
    "opt": _opt,
    # The default, torch.nn.functional.grouped_mm, takes no float64.
    "mixtral": _llama_like(
        "Mixtral", num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"
    ),
}
ARCHITECTURES = tuple(_BUILDERS)
FLOAT32_ONLY = ("gemma2",)
"""Eager attention softmaxes in float32, where the mask's smallest float64 overflows: padding becomes NaN."""


def tiny_model(name: str, *, layers: int = LAYERS) -> PreTrainedModel:
    """A random model of an architecture in float64, or float32 where it has to be."""
    tokenizer = tiny_tokenizer()
    common = {
        "num_hidden_layers": layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = _BUILDERS[name](common).to(torch.float32 if name in FLOAT32_ONLY else torch.float64).eval()
    with torch.no_grad():
        for weight, parameter in model.named_parameters():
            parameter.copy_(_drawn(weight, parameter))
    return model


def _drawn(name: str, parameter: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if parameter.ndim == 1:
        return parameter + 0.1 * noise
    return noise if "embed" in name or "wte" in name else noise / parameter.shape[-1] ** 0.5


def tiny_replica(name: str) -> Replica:
    """A random model of an architecture with its tokenizer."""
    return Replica(tiny_model(name), tiny_tokenizer())


def save_tiny(path: Path) -> Path:
    """Save a tiny Llama and its tokenizer as a Hugging Face folder in float32; gives the folder."""
    tiny_model("llama").float().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@contextmanager
def recorded(replica: Replica) -> Iterator[dict[int, torch.Tensor]]:
    """A dictionary that holds, after the block, what each block put out in its last pass."""
    outputs: dict[int, torch.Tensor] = {}
    places = [Place(layer, "after") for layer in range(replica.layers)]
    with picked(replica, places, lambda state: state) as found:
        yield outputs
    outputs.update({place.layer: state for place, state in found.items()})


class Artifacts:
    """The context of a running job: requirements are computed at once by the same replica, and kept.

    Attributes:
        written: Row, table and chunk of every `write`.
    """

    stop_requested = False

    def __init__(self, replica: Replica, *, seed: int = 0) -> None:
        self.replica = replica
        self.seed = seed
        self.written: list[tuple[int, str, Mapping[str, Any]]] = []
        self._kept: dict[str, Mapping[str, np.ndarray]] = {}

    def write(self, row: int, name: str, chunk: Mapping[str, Any]) -> None:
        """Keep a chunk as it was given."""
        self.written.append((row, name, chunk))

    def artifact(self, requirement: Requirement) -> Mapping[str, np.ndarray]:
        """Read-only arrays, as a worker hands them to a job."""
        if requirement.key not in self._kept:
            [outcome] = self.run(requirement.job, [requirement.params])
            for array in outcome.tensors.values():
                array.flags.writeable = False
            self._kept[requirement.key] = outcome.tensors
        return self._kept[requirement.key]

    def run(self, job: str, params: Sequence[Any]) -> list[Outcome]:
        """Outcomes of one pack, in the order of its rows."""
        rows = [Row(each, self.seed) for each in params]
        outcomes = dict(load_job(job).run(self.replica, rows, self))
        return [outcomes[index] for index in range(len(rows))]
