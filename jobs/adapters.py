"""Job: learn low-rank changes of a block's feed-forward output that move a later layer most; read them.

Source: Mack and Turner, "Mechanistically eliciting latent behaviors in language models", 2024, section on
unsupervised steering adapters.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from jobs import sample
from jobs.asking import encode_prompt
from jobs.checks import above_zero, at_least
from jobs.data.prompts import OpenPrompt
from jobs.reading.behaviours import (
    FROM_UNSTEERED,
    OVER_RANDOM,
    Reading,
    from_unsteered,
    over_random,
    stored_means,
)
from jobs.reading.behaviours import METRICS as BEHAVIOURS
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status
from jobs.unsupervised.params import Sliced, canonical_slice

if TYPE_CHECKING:
    import numpy as np

    from jobs.engine.replica import Replica
    from jobs.reading.behaviours import Said
    from jobs.unsupervised.adapters import AdapterGoal, AdapterGround, LearnedAdapters


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(Sliced, Reading):
    """Which adapters of the source's feed-forward output matrix W are learned, and how large: W + R B A^T.

    Attributes:
        adapters: How many are learned, none dependent on another.
        rank: Columns of A and of B.
        radius: R, a factor without unit; what it does depends on `normalised`.
        normalised: What has norm 1: every `column` of A and B, as in the write-up's formula; the matrices, up
            to a factor sqrt(rank) that columns would give them (`frobenius`); the product's largest singular
            value (`spectral`). `notebook` is what the original code does: R / rank in place of R, and the
            rows of A.
        power: p of the objective, at least 1.
        root: q of the objective, at least 1.
        norm_over: What the norm inside of the objective is taken over: `hidden` or, as in the original code,
            `tokens`.
        few_tokens: Weight of the penalty on changes that many tokens share: an objective is multiplied by
            exp(-few_tokens x entropy of the tokens' shares over the largest possible).
        optimiser: `amsgrad`, or `none` for random adapters.
        steps: Steps of AMSGrad.
        learning_rate: An element and step.
        compare: Whether random adapters of the same size are read too.
    """

    counted: Literal["all", "but_first", "last"] = "last"
    adapters: int = 8
    rank: int = 8
    radius: float = 1.0
    normalised: Literal["column", "frobenius", "spectral", "notebook"] = "column"
    power: float = 2.0
    root: float = 2.0
    norm_over: Literal["hidden", "tokens"] = "hidden"
    few_tokens: float = 0.0
    optimiser: Literal["amsgrad", "none"] = "amsgrad"
    steps: int = 100
    learning_rate: float = 1e-3
    compare: bool = True

    def __post_init__(self) -> None:
        self.check_slice()
        self.check_reading()
        at_least(self, 1, "adapters", "rank", "steps", "power", "root")
        above_zero(self, "radius", "learning_rate")
        at_least(self, 0, "few_tokens")


METRICS = {
    "objective": Metric("stream units^(p/q)", "mean over the adapters of what they are to maximise"),
    "objective_start": Metric("stream units^(p/q)", "the same where they start"),
    "held_out_objective": Metric("stream units^(p/q)", "mean of it a prompt, over the split's prompts"),
    "spread": Metric("share", "entropy of the tokens' shares of the objective over the largest possible"),
    **BEHAVIOURS,
    **FROM_UNSTEERED,
    **OVER_RANDOM,
}
PACK_BY = None
DATA = ("prompts",)
LAYERS = ("source", "target")
CONTROL = "random adapters"


def size(params: Params) -> Size:
    """About 45 tokens a prompt: each step reads half the model twice, completions are read twice."""
    steps = 1 if params.optimiser == "none" else params.steps
    learned = params.learn_from * params.adapters
    read = params.adapters * (params.learn_from + 2 * params.read_on)
    return Size(learned + read, 45 * learned * steps + 2 * read * (45 + params.max_new_tokens))


def requires(params: Params) -> Sequence[Requirement]:
    """Unsteered replies; random adapters of the same size, if they are asked for."""
    unsteered = sample.unsteered_reply(params)
    return [unsteered, control(params)] if _is_compared(params) else [unsteered]


def _is_compared(params: Params) -> bool:
    return params.compare and params.optimiser != "none"


def control(params: Params) -> Requirement:
    """Random adapters."""
    return Requirement(job=__name__, params=canonical(replace(params, optimiser="none")))


def check(params: Params) -> None:
    """The prompts can be read. Raises SpecError if not."""
    params.read_prompts(read_on=params.read_on)


def canonical(params: Params) -> Params:
    """What is not used does not matter; random adapters are compared with nothing."""
    changes: dict[str, Any] = {}
    if params.power == 2:
        changes["norm_over"] = "hidden"
    if params.optimiser == "none":
        changes |= {"steps": 1, "learning_rate": 1e-3, "compare": True}
    return replace(canonical_slice(params), **changes)


def weight_changes(
    params: Params, tensors: Mapping[str, "np.ndarray"]
) -> "list[dict[str | int, tuple[np.ndarray, np.ndarray]]]":
    """The adapters of an artifact, one by one."""
    factor = tensors["radius"][0]
    both = zip(factor * tensors["b"], tensors["a"], strict=True)
    return [{params.source: (b_DQ, a_HQ.T)} for b_DQ, a_HQ in both]


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Learn each row's adapters at once, and complete all prompts under one after another.

    Tensors of the outcome, float32: `a` (adapters, inner, rank) and `b` (adapters, hidden, rank), `radius`
    (1,), which their product is multiplied with; `objectives` (adapters,); `history` (steps, adapters);
    `shares` (adapters, prompts, tokens), each token's share of its prompt's sum of |delta|^p; and what
    `behaviours.Behaviours` has. Table: `completions`, whose `item` is prompt x
    adapters + adapter, each from 0.

    Raises:
        SpecError: If a layer or a token does not exist.
        ModelError: If there is no chat template, the encoder is absent, the blocks cannot run alone, or the
            block has no single output matrix in floating point.
    """
    for index, row in enumerate(rows):
        yield index, _run(replica, row, context)


_NOT_FINITE = "the objective of an adapter is not finite; use a smaller radius, or a wider dtype"


def _run(replica: "Replica", row: Row, context: Context) -> Outcome:
    from jobs.engine.slices import Slice
    from jobs.unsupervised.adapters import AdapterGoal, AdapterGround, learn_adapters
    from jobs.unsupervised.objective import counted_tokens

    params: Params = row.params
    prompts = params.read_prompts(read_on=params.read_on)
    encoded = [encode_prompt(replica, prompt.prompt, params) for prompt in prompts]
    goal = AdapterGoal(
        radius=params.radius,
        rank=params.rank,
        normalised=params.normalised,
        power=params.power,
        root=params.root,
        over=params.norm_over,
        few_tokens=params.few_tokens,
    )
    slice_ = Slice(replica, encoded, source=params.source - 1, target=params.target, site=params.target_site)
    counted_NT = counted_tokens(slice_.positions_NT, params.counted, last=params.last)
    ground = AdapterGround(slice_, counted_NT, goal)
    steps = 0 if params.optimiser == "none" else params.steps
    learned = learn_adapters(
        ground,
        ground.drawn(params.adapters, row.seed),
        range(params.learn_from),
        steps=steps,
        learning_rate=params.learning_rate,
    )
    if not bool(learned.values_K.isfinite().all()):
        return Outcome(status=Status.FAILED, reason=_NOT_FINITE)
    said_PK = _said(replica, encoded, params, goal, learned)
    if isinstance(said_PK, str):
        return Outcome(status=Status.FAILED, reason=said_PK)
    return _outcome(prompts, said_PK, params, ground, learned, context)


def _said(
    replica: "Replica",
    prompts: Sequence[list[int]],
    params: Params,
    goal: "AdapterGoal",
    learned: "LearnedAdapters",
) -> "list[list[Said]] | str":
    """What is said under each adapter to each prompt; or why nothing can be said of it."""
    from jobs.engine.adapting import adapted
    from jobs.engine.decoding import Decoding, Work, generate
    from jobs.engine.tables import row_tables
    from jobs.reading.completions import flaw_of
    from jobs.reading.sayings import said

    work = [Work(prompt, 0) for prompt in range(len(prompts))]
    replies = []
    for adapter in range(params.adapters):
        with adapted(replica, params.source, learned.adapters.change(goal, adapter)):
            found = dict(
                generate(
                    replica,
                    prompts,
                    row_tables(replica, [[]]),
                    work,
                    Decoding(max_new_tokens=params.max_new_tokens),
                )
            )
        replies += [found[prompt] for prompt in range(len(prompts))]
    flaw = next(filter(None, map(flaw_of, replies)), None)
    return flaw or said(replica, prompts, replies, params.max_new_tokens)


def _outcome(
    prompts: Sequence[OpenPrompt],
    said_PK: "Sequence[Sequence[Said]]",
    params: Params,
    ground: "AdapterGround",
    learned: "LearnedAdapters",
    context: Context,
) -> Outcome:
    from jobs.reading.sayings import completion_rows

    read = params.behaviours(prompts, said_PK)
    history_SK = learned.history_SK
    start_K = history_SK[0] if len(history_SK) else learned.values_K
    common = {
        "objective": float(learned.values_K.double().mean()),
        "objective_start": float(start_K.double().mean()),
        "spread": float(learned.spread_KN.double().mean()),
    }
    random = context.artifact(control(params)) if _is_compared(params) else None
    unsteered = context.artifact(sample.unsteered_reply(params))
    metrics = {}
    for split, means in read.metrics.items():
        of = [number for number, prompt in enumerate(prompts) if prompt.split == split]
        held_out_K, _, _ = ground.look(learned.adapters, of)
        metrics[split] = {
            **common,
            "held_out_objective": float(held_out_K.double().mean()) / len(of),
            **means,
            **from_unsteered(read.tensors, unsteered, split),
            **over_random(means, None if random is None else stored_means(random, split)),
        }
    tensors = {
        "a": learned.adapters.a_KHQ,
        "b": learned.adapters.b_KDQ,
        "radius": learned.values_K.new_full((1,), ground.goal.factor),
        "objectives": learned.values_K,
        "history": history_SK,
        "shares": learned.shares_KNT,
    }
    return Outcome(
        metrics=metrics,
        tables={"completions": completion_rows(prompts, said_PK, "adapter")},
        tensors={
            **{name: tensor.float().cpu().numpy() for name, tensor in tensors.items()},
            **read.tensors,
        },
    )
