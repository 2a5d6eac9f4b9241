"""Job: learn vectors that change a later layer most, without pairs; read what they make the model say.

MELBO: Mack and Turner, "Mechanistically eliciting latent behaviors in language models", 2024. Random vectors
of the same norm are read beside every set: the same job without an optimiser.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs import sample
from jobs.asking import encode_prompt
from jobs.calibrate import radius_unit, unit_of
from jobs.data.prompts import OpenPrompt
from jobs.errors import SpecError
from jobs.reading.behaviours import (
    FROM_UNSTEERED,
    OVER_RANDOM,
    Behaviours,
    Reading,
    at_nll,
    from_unsteered,
    over_random,
    stored_means,
)
from jobs.reading.behaviours import METRICS as BEHAVIOURS
from jobs.resolve import parse_use
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size, Status
from jobs.unsupervised.params import Learning, canonical_learning

if TYPE_CHECKING:
    from jobs.engine.replica import Replica
    from jobs.reading.behaviours import Said
    from jobs.unsupervised.sets import VectorSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(Learning, Reading):
    """Which vectors are learned, what they are read on, and what they are compared with.

    Attributes:
        compare: Whether random vectors of the same norm are read too.
        random_norms: Further norms, in units of the set's own, at which random vectors are read, to compare
            with random ones of equal nll.
        temperatures: Temperatures at which the unsteered model is sampled, to compare with texts of equal
            nll.
    """

    compare: bool = True
    random_norms: tuple[float, ...] = ()
    temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self.check_learning()
        self.check_reading()
        for name in ("random_norms", "temperatures"):
            values = getattr(self, name)
            if not all(0 < value < math.inf for value in values):
                raise ValueError(f"{name}={values}; each takes more than 0")


def parse(learned: str) -> Params:
    """The parameters of this job as another one names them, such as `jobs.melbo{"source": 7}`.

    Raises:
        ValueError: If it is not that, or the parameters cannot be meant.
    """
    try:
        found = parse_use(learned).params
    except SpecError as error:
        raise ValueError(f"learned: {error}") from error
    if not isinstance(found, Params):
        raise ValueError(f"learned={learned!r} is another job; it takes {__name__}")
    return found


def check_vector(learned: str, vector: int) -> None:
    """Raises ValueError if a set that another job names has no such vector."""
    vectors = parse(learned).vectors
    if not 0 <= vector < vectors:
        raise ValueError(f"vector={vector}; the set has the vectors 0 to {vectors - 1}")


METRICS = {
    "objective": Metric("stream units^(p/q)", "mean over the vectors of what they are to maximise"),
    "objective_start": Metric(
        "stream units^(p/q)", "the same where they start, times the factor of a penalty if there is one"
    ),
    "delta_cosine": Metric("cosine", "mean absolute cosine between two vectors' changes of the target"),
    "radius": Metric("stream units", "norm of every vector"),
    "on_manifold": Metric("share", "mean share of squared norm in the span of the prompt's activations"),
    "on_manifold_random": Metric("share", "the same of random vectors"),
    "identity": Metric("share", "change of the target that no vector makes, over its largest state"),
    "settled": Metric("share", "vectors whose optimiser stopped by its own test"),
    "steps": Metric("steps", "mean number of steps of a vector"),
    "start_cosine": Metric("cosine", "mean between a vector and its start: 1 where it was not moved"),
    **BEHAVIOURS,
    **FROM_UNSTEERED,
    **OVER_RANDOM,
    "diversity_over_random_at_nll": Metric(
        "1 - cosine", "diversity less that of random vectors of the norm at which they have the same nll"
    ),
    "diversity_over_sampling_at_nll": Metric(
        "1 - cosine", "diversity less that of unsteered samples at the temperature of the same nll"
    ),
}
PACK_BY = (
    *("vectors", "prompts", "learn_from", "read_on", "chat", "system", "max_new_tokens"),
    *("most_nll", "most_repetition", "encoder"),
)
DATA = ("prompts",)
LAYERS = ("source", "target")
CONTROL = "random vectors"


def size(params: Params) -> Size:
    """About 45 tokens a prompt: each step reads half the model twice, completions are read twice."""
    steps = {"fixed_point": 10, "none": 1}.get(params.optimiser, params.most_steps)
    learned, read = params.learn_from * params.vectors, 2 * params.read_on * params.vectors
    tokens = 45 * learned * steps + (learned + read) * 2 * (45 + params.max_new_tokens)
    return Size(learned + read, tokens)


def requires(params: Params) -> Sequence[Requirement]:
    """The unit of the radius, unsteered replies, and what is asked for of random vectors and samples."""
    always = [*unit_of(params), sample.unsteered_reply(params)]
    return always if params.is_random else [*always, *_random(params), *_sampled(params)]


def _random(params: Params) -> list[Requirement]:
    norms = dict.fromkeys([*((1.0,) if params.compare else ()), *params.random_norms])
    return [random_of(params, norm=norm) for norm in norms]


def random_of(params: Params, *, norm: float = 1.0) -> Requirement:
    """Random vectors that are read as the set is, of so many times its norm."""
    random = replace(params, optimiser="none", start="random", contrast=0.0, radius=norm * params.radius)
    return Requirement(job=__name__, params=canonical(random))


def _sampled(params: Params) -> list[Requirement]:
    return [
        Requirement(
            job="jobs.sample",
            params=sample.Params(
                samples=params.vectors,
                temperature=temperature,
                **{name: getattr(params, name) for name in sample.SHARED},
            ),
        )
        for temperature in params.temperatures
    ]


def learned_vectors(params: Params) -> int:
    """How many vectors the artifact has."""
    return params.vectors


def orthogonal(params: Params) -> int:
    """So many directions are at right angles to each other."""
    return params.vectors if params.orthogonality in ("joint", "sequential") else 1


def control(params: Params) -> Requirement | None:
    """Random vectors of the set's own norm, if they are read."""
    return random_of(params) if params.compare and not params.is_random else None


def check(params: Params) -> None:
    """The prompts can be read. Raises SpecError if not."""
    params.read_prompts(read_on=params.read_on)


def canonical(params: Params) -> Params:
    """What an optimiser does not use does not matter to it; random vectors are compared with nothing."""
    if params.is_random:
        params = replace(params, compare=True, random_norms=(), temperatures=())
    return canonical_learning(params)


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Learn the vectors of every row of the pack in shared batches, complete all prompts under each.

    Tensors of the outcome, float32: `vectors` (vectors, hidden), in stream units; `objectives` (vectors,);
    `history` (steps, vectors), what each step found before it moved, NaN after the last; `shares` (vectors,
    prompts, tokens), each token's share of its prompt's sum of |delta|^p, for the prompts that were learned
    from, padded on the left; `on_manifold` (vectors,); and what `behaviours.Behaviours` has. Tables:
    `vectors`, `completions`.

    A row fails alone if the objective of a vector is not finite where it starts, or the logits under one are
    not.

    Raises:
        SpecError: If a layer or a token does not exist, or so many orthogonal vectors do not.
        ModelError: If there is no chat template, the encoder is absent, or the blocks cannot run alone.
    """
    from jobs.engine.interventions import Add
    from jobs.engine.tables import row_tables
    from jobs.reading.sayings import sayings
    from jobs.unsupervised.sets import learn_sets

    params = rows[0].params
    prompts = [row.params.read_prompts(read_on=params.read_on) for row in rows]
    encoded = [[encode_prompt(replica, each.prompt, params) for each in of_row] for of_row in prompts]
    units = [radius_unit(row.params, context) for row in rows]
    for of_row in encoded:
        for ids in of_row:
            replica.check_text(ids, new_tokens=params.max_new_tokens)
    sets = learn_sets(replica, [of_row[: params.learn_from] for of_row in encoded], rows, units)
    whole = [index for index, found in enumerate(sets) if found.is_whole]
    for index in set(range(len(rows))) - set(whole):
        yield index, Outcome(status=Status.FAILED, reason=_NOT_FINITE)
    for index in [index for index in whole if sets[index].is_nothing]:
        whole.remove(index)
        yield index, Outcome(status=Status.FAILED, reason=NOTHING)
    if not whole:
        return
    changes = [
        [Add(layer=rows[index].params.source, vector=theta_D.cpu().numpy())]
        for index in whole
        for theta_D in sets[index].learned.theta_VD
    ]
    said = sayings(
        replica,
        [encoded[index] for index in whole],
        row_tables(replica, changes),
        vectors=params.vectors,
        max_new_tokens=params.max_new_tokens,
    )
    for place, found in said:
        index = whole[place]
        params = rows[index].params
        if found.flaw is not None:
            yield index, Outcome(status=Status.FAILED, reason=found.flaw)
        else:
            read = params.behaviours(prompts[index], found.said_PV)
            done = _outcome(prompts[index], found.said_PV, read, params, sets[index])
            yield index, replace(done, metrics=_compared(done, params, context))


_NOT_FINITE = (
    "the objective is not finite where a vector starts: too large a radius overflows, and too small a one "
    "vanishes in the dtype; use another radius, or a wider dtype"
)
NOTHING = (
    "vectors of this radius are too short for the dtype to change anything at the target; use a larger "
    "radius, or a wider dtype"
)


def _outcome(
    prompts: Sequence[OpenPrompt],
    said_PV: "Sequence[Sequence[Said]]",
    read: Behaviours,
    params: Params,
    found: "VectorSet",
) -> Outcome:
    from jobs.reading.sayings import completion_rows

    assert found.effects is not None
    learned = _learned_metrics(found)
    tensors = {
        "vectors": found.learned.theta_VD,
        "objectives": found.effects.objectives_V,
        "history": found.learned.history_SV,
        "shares": found.effects.shares_VNT,
        "on_manifold": found.on_manifold_V,
    }
    return Outcome(
        metrics={split: {**learned, **means} for split, means in read.metrics.items()},
        tables={
            "completions": completion_rows(prompts, said_PV, "vector"),
            "vectors": _vectors(params, found),
        },
        tensors={
            **{name: tensor.float().cpu().numpy() for name, tensor in tensors.items()},
            **read.tensors,
        },
    )


def _learned_metrics(found: "VectorSet") -> dict[str, float]:
    assert found.effects is not None
    cosines_VV = found.effects.cosines_VV.abs().numpy()
    pairs = cosines_VV[np.triu_indices(len(cosines_VV), k=1)]
    history_SV = found.learned.history_SV
    start_V = history_SV[0] if len(history_SV) else found.learned.values_V
    return {
        "objective": float(found.effects.objectives_V.mean()),
        "objective_start": float(start_V.double().mean()),
        "delta_cosine": float(pairs.mean()) if len(pairs) else math.nan,
        "radius": found.radius,
        "on_manifold": float(found.on_manifold_V.double().mean()),
        "on_manifold_random": found.on_manifold_random,
        "identity": found.effects.identity,
        "settled": float(found.learned.settled_V.double().mean()),
        "start_cosine": found.start_cosine,
        "steps": float(found.learned.history_SV.isfinite().sum(dim=0).double().mean()),
    }


def _compared(done: Outcome, params: Params, context: Context) -> dict[str, dict[str, float]]:
    """The metrics with those that compare them to random vectors, the unsteered reply and samples."""
    unsteered = context.artifact(sample.unsteered_reply(params))
    random, sampled = (
        [] if params.is_random else [context.artifact(each) for each in needed(params)]
        for needed in (_random, _sampled)
    )
    return {
        split: {
            **means,
            **from_unsteered(done.tensors, unsteered, split),
            **_over(means, params, *(_means(each, split) for each in (random, sampled))),
        }
        for split, means in done.metrics.items()
    }


def _means(artifacts: Sequence[Mapping[str, np.ndarray]], split: str) -> list[dict[str, float]]:
    return [stored_means(each, split) for each in artifacts]


def _over(
    found: Mapping[str, float],
    params: Params,
    random: Sequence[Mapping[str, float]],
    sampled: Sequence[Mapping[str, float]],
) -> dict[str, float]:
    diversity, nll = found["diversity"], found["nll"]
    return {
        **over_random(found, random[0] if params.compare and random else None),
        "diversity_over_random_at_nll": diversity - at_nll(random, "diversity", nll),
        "diversity_over_sampling_at_nll": diversity - at_nll(sampled, "diversity", nll),
    }


def _vectors(params: Params, found: "VectorSet") -> list[dict[str, Any]]:
    return [
        {
            "name": f"melbo_{number}",
            "layer": params.source,
            "norm": float(theta_D.double().norm()),
            "vector": theta_D.float().cpu().numpy(),
        }
        for number, theta_D in enumerate(found.learned.theta_VD)
    ]
