"""Job: learn vectors that change a later layer most, without pairs; read what they make the model say.

MELBO: Mack and Turner, "Mechanistically eliciting latent behaviors in language models", 2024.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from jobs.data.prompts import OpenPrompt, load_open_prompts
from jobs.reading.behaviours import METRICS as BEHAVIOURS
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.engine.decoding import Continuation
    from jobs.engine.replica import Replica
    from jobs.engine.slices import Slice
    from jobs.engine.tables import RowTables
    from jobs.reading.behaviours import Said
    from jobs.unsupervised.effects import Effects
    from jobs.unsupervised.learned import Learned


RadiusUnit = Literal["stream", "residual_norm", "calibrated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Where vectors act and are read, how they are learned, and the prompts.

    Attributes:
        source: Block to whose output vectors are added, at every token, counted from 0.
        target: Block at whose output the change is measured; above `source`. The original's
            `target_layer_idx` is one more.
        target_site: `after` the target block, or what its `attention` adds.
        counted: Tokens whose change counts: `all`, all `but_first` (the first token of many models carries
            huge states, and would be the whole objective), or the `last` few.
        last: How many, where `counted` is `last`.
        vectors: Number of vectors of the set.
        radius: R, the norm of each vector, in the unit `radius_in`.
        radius_in: `stream`: units of the residual stream. `residual_norm`: the mean norm of the residual
            stream at the source over the counted tokens. `calibrated`: the norm at which random vectors begin
            to act nonlinearly (`unsupervised.calibration`).
        power: p of the objective, at least 1.
        root: q of the objective, at least 1.
        norm_over: What the norm inside of the objective is taken over: `hidden`, as in the formula, or
            `tokens`, as in the original code.
        orthogonality: `joint`: all vectors at right angles, learned together. `sequential`: each at right
            angles to those learned before it. `none`.
        optimiser: `fixed_point`; `amsgrad`, as in the original; `random`: vectors that are not learned.
        steps: Most steps of each vector.
        tolerance: Relative rise of the objective at which the fixed point has settled.
        learning_rate: Of AMSGrad, in residual-stream units an element and step.
        prompts: Dataset of open prompts. Vectors are learned from those of the split extract, and read on
            all of them.
        learn_from: How many prompts of the split extract vectors are learned from.
        read_on: How many prompts of each of the splits select and report they are read on.
        system: System message; None leaves what the model's template does by itself.
        max_new_tokens: Most tokens of a completion.
        most_nll: A completion is fluent up to so many nats a token under the unsteered model.
        most_repetition: A completion is fluent up to this share of repeated trigrams.
        encoder: Of the sentence embeddings that diversity is measured with.
    """

    source: int = 7
    target: int = 22
    target_site: Literal["after", "attention"] = "after"
    counted: Literal["all", "but_first", "last"] = "but_first"
    last: int = 3
    vectors: int = 16
    radius: float = 0.2
    radius_in: RadiusUnit = "calibrated"
    power: float = 2.0
    root: float = 1.0
    norm_over: Literal["hidden", "tokens"] = "hidden"
    orthogonality: Literal["joint", "sequential", "none"] = "joint"
    optimiser: Literal["fixed_point", "amsgrad", "random"] = "fixed_point"
    steps: int = 40
    tolerance: float = 1e-3
    learning_rate: float = 1e-3
    prompts: str = "elicitation_prompts"
    learn_from: int = 1
    read_on: int = 2
    system: str | None = None
    max_new_tokens: int = 30
    most_nll: float = 3.0
    most_repetition: float = 0.3
    encoder: str = "all-minilm-l6-v2"

    def __post_init__(self) -> None:
        if not 0 <= self.source < self.target:
            raise ValueError(f"source={self.source}, target={self.target}; 0 <= source < target")
        for name in ("last", "vectors", "learn_from", "read_on", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it takes 1 or more")
        for name in ("power", "root"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; it takes 1 or more")
        for name in ("radius", "tolerance", "learning_rate", "most_nll"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; it takes more than 0")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}; it takes 1 or more")
        if not 0 <= self.most_repetition <= 1:
            raise ValueError(f"most_repetition={self.most_repetition}; it takes a share from 0 to 1")


METRICS = {
    "objective": Metric("stream units^(p/q)", "mean over the vectors of what they are to maximise"),
    "delta_cosine": Metric("cosine", "mean absolute cosine between two vectors' changes of the target"),
    "radius": Metric("stream units", "norm of every vector"),
    "settled": Metric("share", "vectors whose optimiser stopped by its own test"),
    "steps": Metric("steps", "mean number of steps of a vector"),
    **BEHAVIOURS,
}
PACK_BY = (
    *("vectors", "prompts", "learn_from", "read_on", "system", "max_new_tokens"),
    *("most_nll", "most_repetition", "encoder"),
)
DATA = ("prompts",)
LAYERS = ("source", "target")


def size(params: Params) -> Size:
    """About 45 tokens a prompt: each step reads half the model twice, completions are read twice."""
    steps = 10 if params.optimiser == "fixed_point" else params.steps
    learned, read = params.learn_from * params.vectors, 2 * params.read_on * params.vectors
    tokens = 45 * learned * steps + (learned + read) * 2 * (45 + params.max_new_tokens)
    return Size(learned + read, tokens)


def requires(params: Params) -> Sequence[Requirement]:
    """Nothing."""
    return ()


def check(params: Params) -> None:
    """The prompts can be read. Raises SpecError if not."""
    _read_prompts(params)


def canonical(params: Params) -> Params:
    """What an optimiser does not use does not matter to it."""
    unused: dict[str, Any] = {}
    if params.counted != "last":
        unused["last"] = 1
    if params.optimiser != "fixed_point":
        unused["tolerance"] = 1e-3
    if params.optimiser != "amsgrad":
        unused["learning_rate"] = 1e-3
    if params.optimiser == "random":
        unused["steps"] = 1
    if params.power == 2:
        unused["norm_over"] = "hidden"
    return replace(params, **unused)


def _read_prompts(params: Params) -> list[OpenPrompt]:
    return load_open_prompts(params.prompts, params.read_on, params.read_on, extract=params.learn_from)


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Learn the vectors of every row of the pack in shared batches, complete all prompts under each.

    Tensors of the outcome, float32: `vectors` (vectors, hidden), in stream units; `objectives` (vectors,);
    `history` (steps, vectors), the objective before each step, NaN after the last; `shares` (vectors,
    prompts, tokens), each token's share of its prompt's sum of |delta|^p, for the prompts that were learned
    from, padded on the left. Tables: `vectors`, `completions`.

    A row fails alone if the objective of a vector is not finite where it starts, or the logits under one are
    not.

    Raises:
        SpecError: If a layer or a token does not exist, or so many orthogonal vectors do not.
        ModelError: If there is no chat template, the encoder is absent, or the blocks cannot run alone.
    """
    from jobs.engine.interventions import Add
    from jobs.engine.tables import row_tables
    from jobs.reading.completions import flaw_of

    params = rows[0].params
    prompts = _read_prompts(params)
    encoded = [replica.encode_chat(prompt.prompt, system=params.system) for prompt in prompts]
    sets = _learn(replica, encoded[: params.learn_from], rows)
    whole = [index for index, found in sets.items() if found.is_whole]
    for index in sets.keys() - whole:
        yield index, Outcome(status=Status.FAILED, reason=_NOT_FINITE)
    changes = [
        [Add(layer=rows[index].params.source, vector=theta_D.cpu().numpy())]
        for index in whole
        for theta_D in sets[index].learned.theta_VD
    ]
    for place, replies in _completed(replica, encoded, row_tables(replica, changes), params):
        index = whole[place]
        flaw = next(filter(None, map(flaw_of, replies)), None)
        if flaw is not None:
            yield index, Outcome(status=Status.FAILED, reason=flaw)
        else:
            said = _said(replica, encoded, replies, params)
            yield index, _outcome(prompts, said, rows[index].params, sets[index])


_NOT_FINITE = "the objective is not finite where a vector starts; use a smaller radius, or a wider dtype"
_TOGETHER = (
    *("source", "target", "target_site", "counted", "last", "norm_over"),
    *("optimiser", "steps", "tolerance", "learning_rate"),
)
"""Rows that agree in these learn in shared batches."""


class _Set(NamedTuple):
    """The vectors of a row.

    Attributes:
        learned: As they were learned.
        radius: Their norm, in stream units.
        effects: What they do to the prompts they were learned from; None where a vector is not finite.
    """

    learned: "Learned"
    radius: float
    effects: "Effects | None"

    @property
    def is_whole(self) -> bool:
        """Whether every vector is finite."""
        return self.effects is not None


def _learn(replica: "Replica", prompts: Sequence[Sequence[int]], rows: Sequence[Row]) -> dict[int, _Set]:
    """The vectors of every row, in the order of the rows."""
    together: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        together.setdefault(tuple(getattr(row.params, name) for name in _TOGETHER), []).append(index)
    found: dict[int, _Set] = {}
    for indices in together.values():
        chosen = [rows[index] for index in indices]
        found |= zip(indices, _learn_together(replica, prompts, chosen), strict=True)
    return dict(sorted(found.items()))


def _learn_together(replica: "Replica", prompts: Sequence[Sequence[int]], rows: Sequence[Row]) -> list[_Set]:
    from jobs.unsupervised.effects import effects
    from jobs.unsupervised.landscape import Goal
    from jobs.unsupervised.objective import counted_tokens
    from jobs.unsupervised.search import Method, Search, learn

    params: Params = rows[0].params
    slice_ = _slice(replica, prompts, params)
    counted_NT = counted_tokens(slice_.positions_NT, params.counted, last=params.last)
    everything = tuple(range(len(prompts)))
    units = {name: _unit(slice_, counted_NT, name) for name in {row.params.radius_in for row in rows}}
    searches = [
        Search(
            vectors=row.params.vectors,
            goal=Goal(
                radius=row.params.radius * units[row.params.radius_in],
                power=row.params.power,
                root=row.params.root,
                prompts=everything,
            ),
            orthogonality=row.params.orthogonality,
            seed=row.seed,
        )
        for row in rows
    ]
    method = Method(
        optimiser=params.optimiser,
        steps=params.steps,
        tolerance=params.tolerance,
        learning_rate=params.learning_rate,
    )
    found = []
    for search, learned in zip(
        searches, learn(slice_, counted_NT, searches, method, over=params.norm_over), strict=True
    ):
        done = None
        if bool(learned.theta_VD.isfinite().all()):
            done = effects(slice_, counted_NT, learned.theta_VD, prompts=everything, power=search.goal.power)
        found.append(_Set(learned, search.goal.radius, done))
    return found


def _slice(replica: "Replica", prompts: Sequence[Sequence[int]], params: Params) -> "Slice":
    from jobs.engine.slices import Slice

    place = (params.source, params.target, params.target_site)
    return replica.keep(
        (__name__, tuple(map(tuple, prompts)), place),
        lambda: Slice(replica, prompts, source=params.source, target=params.target, site=params.target_site),
    )


def _unit(slice_: "Slice", counted_NT: "Tensor", radius_in: RadiusUnit) -> float:
    """What a radius of 1 means, in stream units."""
    from jobs.unsupervised.calibration import calibrated_radius, residual_norm

    match radius_in:
        case "stream":
            return 1.0
        case "residual_norm":
            return residual_norm(slice_, counted_NT)
        case "calibrated":
            return calibrated_radius(slice_, counted_NT)


def _completed(
    replica: "Replica", prompts: Sequence[list[int]], tables: "RowTables", params: Params
) -> "Iterator[tuple[int, list[Continuation]]]":
    """Completions under the vectors of each row: those of a vector to all prompts, one after another."""
    from jobs.engine.decoding import Decoding, Work, generate
    from jobs.engine.groups import in_parts

    work = [Work(prompt, vector) for vector in range(tables.rows) for prompt in range(len(prompts))]
    decoding = Decoding(max_new_tokens=params.max_new_tokens)
    found = generate(replica, prompts, tables, work, decoding)
    return in_parts(found, params.vectors * len(prompts))


def _said(
    replica: "Replica", prompts: Sequence[list[int]], replies: "Sequence[Continuation]", params: Params
) -> "list[list[Said]]":
    """For each prompt what is said under each vector."""
    from jobs.reading.behaviours import Said
    from jobs.reading.rereading import unsteered_nll
    from jobs.scoring.text import repeated_ngrams

    tokens = [reply.tokens for reply in replies]
    nll = unsteered_nll(replica, [*prompts] * params.vectors, tokens)
    said = [
        Said(new, replica.decode(new), score, repeated_ngrams(new), len(new) < params.max_new_tokens)
        for new, score in zip(tokens, nll, strict=True)
    ]
    return [said[prompt :: len(prompts)] for prompt in range(len(prompts))]


def _outcome(
    prompts: Sequence[OpenPrompt], said_PV: "Sequence[Sequence[Said]]", params: Params, found: _Set
) -> Outcome:
    from jobs.reading.behaviours import Fluency, behaviours

    fluency = Fluency(most_nll=params.most_nll, most_repetition=params.most_repetition)
    learned = _learned_metrics(found)
    metrics = {}
    for split in dict.fromkeys(prompt.split for prompt in prompts):
        chosen = [said for prompt, said in zip(prompts, said_PV, strict=True) if prompt.split == split]
        metrics[split] = {**learned, **behaviours(chosen, fluency, params.encoder)}
    assert found.effects is not None
    tensors = {
        "vectors": found.learned.theta_VD,
        "objectives": found.learned.values_V,
        "history": found.learned.history_SV,
        "shares": found.effects.shares_VNT,
    }
    return Outcome(
        metrics=metrics,
        tables={"completions": _completions(prompts, said_PV), "vectors": _vectors(params, found)},
        tensors={name: tensor.float().cpu().numpy() for name, tensor in tensors.items()},
    )


def _learned_metrics(found: _Set) -> dict[str, float]:
    assert found.effects is not None
    cosines_VV = found.effects.cosines_VV.abs().numpy()
    pairs = cosines_VV[np.triu_indices(len(cosines_VV), k=1)]
    return {
        "objective": float(found.learned.values_V.double().mean()),
        "delta_cosine": float(pairs.mean()) if len(pairs) else math.nan,
        "radius": found.radius,
        "settled": float(found.learned.settled_V.double().mean()),
        "steps": float(found.learned.history_SV.isfinite().sum(dim=0).double().mean()),
    }


def _completions(prompts: Sequence[OpenPrompt], said_PV: "Sequence[Sequence[Said]]") -> list[dict[str, Any]]:
    """Rows of the table `completions`; `item` is prompt x vectors + vector, each from 0."""
    return [
        {
            "split": prompt.split,
            "item": number * len(said_V) + vector,
            "prompt": prompt.prompt,
            "text": said.text,
            "tokens": len(said.tokens),
            "nll": said.nll,
            "repetition": said.repetition,
        }
        for number, (prompt, said_V) in enumerate(zip(prompts, said_PV, strict=True))
        for vector, said in enumerate(said_V)
    ]


def _vectors(params: Params, found: _Set) -> list[dict[str, Any]]:
    return [
        {
            "name": f"melbo_{number}",
            "layer": params.source,
            "norm": float(theta_D.double().norm()),
            "vector": theta_D.float().cpu().numpy(),
        }
        for number, theta_D in enumerate(found.learned.theta_VD)
    ]
