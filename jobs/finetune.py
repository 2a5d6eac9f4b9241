"""Job: fine-tune the model on examples of prompts and replies; other jobs run on the tuned weights.

A sweep of another job takes them with `--set tuned='jobs.finetune{"examples": ...}'`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.asking import check_asking, encode_prompt
from jobs.checks import above_zero, at_least
from jobs.data.examples import Example, load_examples
from jobs.errors import ModelError
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status

if TYPE_CHECKING:
    from jobs.engine.replica import Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """What the model is tuned on, and how.

    Attributes:
        examples: Dataset of prompts and replies; those of the split extract are trained on.
        rank: Of the change of each matrix in the blocks (LoRA). Experts of a mixture that are kept together
            in one tensor are no matrices of their own, and stay as they are.
        learning_rate: Of AdamW, an element and step, falling to 0.
        epochs: Times that every example is read.
        batch: Examples of a step.
        chat: Whether prompts are asked in the model's chat template; otherwise they stand raw.
        system: System message; None leaves what the model's template does by itself.
        max_new_tokens: Most tokens of the replies that are tried out afterwards.
    """

    examples: str = "arithmetic_backdoors"
    rank: int = 16
    learning_rate: float = 2e-3
    epochs: int = 3
    batch: int = 8
    chat: bool = True
    system: str | None = None
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        at_least(self, 1, "rank", "epochs", "batch", "max_new_tokens")
        above_zero(self, "learning_rate")
        check_asking(self)


METRICS = {
    "loss": Metric("nats/token", "mean over the batches of the last epoch"),
    "exact": Metric("share", "tried prompts whose reply is the dataset's word for word"),
    "shown": Metric("share", "tried prompts whose reply has the mark of their behaviour and no other's"),
    "shown_least": Metric("share", "the same for the behaviour for which it is lowest"),
}
PACK_BY = None
DATA = ("examples",)
LAYERS: tuple[str, ...] = ()


def size(params: Params) -> Size:
    """About 400 examples of 100 tokens; a step costs three passes."""
    return Size(400, 3 * 100 * 400 * params.epochs)


def requires(params: Params) -> Sequence[Requirement]:
    """Nothing."""
    return ()


def weight_changes(
    params: Params, tensors: Mapping[str, np.ndarray]
) -> list[dict[str | int, tuple[np.ndarray, np.ndarray]]]:
    """The one change that an artifact holds."""
    names = [key.removesuffix(".a") for key in tensors if key.endswith(".a")]
    return [{name: (tensors[f"{name}.b"], tensors[f"{name}.a"]) for name in names}]


def check(params: Params) -> None:
    """The examples can be read. Raises SpecError if not."""
    load_examples(params.examples)


def canonical(params: Params) -> Params:
    """Every parameter matters."""
    return params


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Tune for each row, and try out the prompts of the splits select and report.

    Tensors of the outcome, float32: for each matrix `NAME.a` (rank, inputs) and `NAME.b` (outputs, rank),
    whose product is added to it; `losses` (steps,), nats a token. Tables: `completions`, and `items` with
    the score `shown` and the behaviour as label.

    A row fails if training or the tuned model's logits are not finite.

    Raises:
        SpecError: If an example is longer than the context.
        ModelError: If there is no chat template, no token that ends a text, or nothing that could be tuned.
    """
    for index, row in enumerate(rows):
        yield index, _run(replica, row)


def _run(replica: "Replica", row: Row) -> Outcome:
    from jobs.engine.tuned import tuned
    from jobs.tuning.supervised import fine_tune
    from jobs.tuning.texts import Text

    params: Params = row.params
    examples = load_examples(params.examples)
    encoded = [
        Text(
            encode_prompt(replica, each.prompt, params),
            [*replica.encode_continuation(each.reply), _end(replica)],
        )
        for each in examples
    ]
    for each in encoded:
        replica.check_length(
            max(len(each.prompt) + len(each.reply), len(each.prompt) + params.max_new_tokens)
        )
    trained = [tokens for each, tokens in zip(examples, encoded, strict=True) if each.split == "extract"]
    found = fine_tune(
        replica,
        trained,
        rank=params.rank,
        learning_rate=params.learning_rate,
        epochs=params.epochs,
        batch=params.batch,
        seed=row.seed,
    )
    changes = {name: change.numpy() for name, change in found.changes.items()}
    if not np.isfinite(found.losses).all() or not all(np.isfinite(each).all() for each in changes.values()):
        return Outcome(status=Status.FAILED, reason=_NOT_FINITE)
    tried = [number for number, each in enumerate(examples) if each.split != "extract"]
    with tuned(replica, changes):
        replies = _replies(replica, [encoded[number].prompt for number in tried], params)
    if isinstance(replies, str):
        return Outcome(status=Status.FAILED, reason=replies)
    last = found.losses[-(len(found.losses) // params.epochs) :]
    return _outcome(
        [examples[number] for number in tried], replies, float(np.mean(last)), found.losses, changes
    )


_NOT_FINITE = "the training is not finite any more; use a smaller learning_rate, or a wider dtype"


def _end(replica: "Replica") -> int:
    """The token that ends a reply. Raises ModelError if the tokenizer has none."""
    end = replica.tokenizer.eos_token_id
    if end is None:
        raise ModelError("the tokenizer has no token that ends a text, which replies are tuned to end with")
    return int(end)


def _replies(replica: "Replica", prompts: Sequence[list[int]], params: Params) -> list[tuple[str, int]] | str:
    """Greedy replies with their numbers of tokens, or why they cannot be trusted."""
    from jobs.engine.decoding import Decoding, Work, generate
    from jobs.engine.tables import row_tables
    from jobs.reading.completions import flaw_of

    work = [Work(number, 0) for number in range(len(prompts))]
    decoding = Decoding(max_new_tokens=params.max_new_tokens)
    found = dict(generate(replica, prompts, row_tables(replica, [[]]), work, decoding)) if work else {}
    if flaw := next(filter(None, map(flaw_of, found.values())), None):
        return flaw
    return [
        (replica.decode(found[number].tokens), len(found[number].tokens)) for number in range(len(prompts))
    ]


def _outcome(
    tried: Sequence[Example],
    replies: Sequence[tuple[str, int]],
    loss: float,
    losses: Sequence[float],
    changes: Mapping[str, np.ndarray],
) -> Outcome:
    marks = {each.mark for each in tried if each.mark}
    completions: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    metrics: dict[str, dict[str, float]] = {"extract": {"loss": loss}}
    for split in dict.fromkeys(each.split for each in tried):
        shown: dict[str, list[float]] = {}
        exact = []
        for number, (each, (text, tokens)) in enumerate(zip(tried, replies, strict=True)):
            if each.split != split:
                continue
            head = {"split": split, "item": number, "prompt": each.prompt}
            completions.append({**head, "text": text, "tokens": tokens})
            exact.append(float(text.strip() == each.reply.strip()))
            if each.mark:
                value = float(each.mark in text and not any(mark in text for mark in marks - {each.mark}))
                shown.setdefault(each.behaviour, []).append(value)
                items.append({**head, "name": "shown", "value": value, "label": each.behaviour})
        everything = [value for values in shown.values() for value in values]
        metrics[split] = {
            "loss": loss,
            "exact": float(np.mean(exact)),
            "shown": float(np.mean(everything)) if everything else np.nan,
            "shown_least": min(float(np.mean(values)) for values in shown.values()) if shown else np.nan,
        }
    return Outcome(
        metrics={
            split: {name: float(found.get(name, np.nan)) for name in METRICS}
            for split, found in metrics.items()
        },
        tables={"completions": completions, "items": items},
        tensors={**changes, "losses": np.array(losses, dtype=np.float32)},
    )
