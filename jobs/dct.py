"""Job: deep causal transcoding: features of a slice, ranked; read what the first ones make the model say.

Source: Mack, "Deep causal transcoding", 2024. Features are trained and steered at the same site: the output
of the source block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from jobs import melbo, sample
from jobs.asking import encode_prompt
from jobs.calibrate import radius_unit, unit_of
from jobs.checks import above_zero, at_least
from jobs.errors import SpecError
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
from jobs.unsupervised.params import RadiusUnit, Sliced, canonical_slice

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.engine.replica import Replica
    from jobs.unsupervised.ground import Ground
    from jobs.unsupervised.transcoding import Factors


@dataclass(frozen=True, slots=True, kw_only=True)
class Params(Sliced, Reading):
    """Which features are learned, how they are ranked, and how many are read.

    Attributes:
        kind: `linear`: singular vectors of the Jacobian. `quadratic`: of its derivative. `exponential`.
        factors: Number of features, at most the residual stream's width.
        radius: Norm at which vectors steer, and at which exponential features are learned, in the unit
            `radius_in` (see `unsupervised.params.Learning`).
        radius_in: `stream`, `residual_norm` or `calibrated`.
        iterations: Updates of all features.
        mix: Share of the new direction in each update of an exponential feature, above 0 and at most 1.
        start: What the features start from: `random` vectors, or the first right singular vectors of the
            slice's `jacobian`.
        towards: A word of one token; with `away`, features are ranked by how far they push the last block's
            output at the last token along the difference of both words' unembeddings. Empty ranks them by
            strength.
        away: See `towards`.
        read: How many of the first features are read.
        compare: Whether random vectors of the same norm are read too.
    """

    counted: Literal["all", "but_first", "last"] = "last"
    kind: Literal["linear", "quadratic", "exponential"] = "exponential"
    factors: int = 64
    radius: float = 1.0
    radius_in: RadiusUnit = "calibrated"
    iterations: int = 10
    mix: float = 1.0
    start: Literal["random", "jacobian"] = "jacobian"
    towards: str = ""
    away: str = ""
    read: int = 16
    compare: bool = True

    def __post_init__(self) -> None:
        self.check_slice()
        self.check_reading()
        at_least(self, 1, "factors", "iterations", "read")
        above_zero(self, "radius")
        if not 0 < self.mix <= 1:
            raise ValueError(f"mix={self.mix}; it takes more than 0, at most 1")
        if self.read > self.factors:
            raise ValueError(f"read={self.read}; there are {self.factors} factors")
        if bool(self.towards) != bool(self.away):
            raise ValueError(f"towards={self.towards!r}, away={self.away!r}; give both words or neither")


METRICS = {
    "explained": Metric(
        "stream units", "mean over the features of what an iteration found last: see `transcoding.Factors`"
    ),
    "radius": Metric("stream units", "norm of every vector"),
    "top_score": Metric("as ranked", "score of the first feature: its strength, or its push along the words"),
    **BEHAVIOURS,
    **FROM_UNSTEERED,
    **OVER_RANDOM,
}
PACK_BY = None
DATA = ("prompts",)
LAYERS = ("source", "target")
CONTROL = "random vectors"


def size(params: Params) -> Size:
    """About 45 tokens a prompt: an iteration reads half the model twice, completions are read twice."""
    learned = params.learn_from * params.factors
    read = params.read * (params.learn_from + 2 * params.read_on)
    tokens = 45 * learned * (params.iterations + 10) + 2 * read * (45 + params.max_new_tokens)
    return Size(learned + read, tokens)


def requires(params: Params) -> Sequence[Requirement]:
    """The unit of the radius, unsteered replies; random vectors of the same norm, if they are asked for."""
    always = [*unit_of(params), sample.unsteered_reply(params)]
    return [*always, *([control(params)] if params.compare else [])]


def learned_vectors(params: Params) -> int:
    """How many vectors the artifact has: the features that are read."""
    return params.read


def orthogonal(params: Params) -> int:
    """So many directions are at right angles to each other."""
    return params.factors


def control(params: Params) -> Requirement:
    """Random vectors, as many as are read, of the same norm."""
    same = (
        *(each.name for each in (*fields(Sliced), *fields(Reading))),
        *("radius", "radius_in"),
    )
    random = melbo.Params(
        vectors=params.read, optimiser="none", **{name: getattr(params, name) for name in same}
    )
    return Requirement(job="jobs.melbo", params=melbo.canonical(random))


def check(params: Params) -> None:
    """The prompts can be read. Raises SpecError if not."""
    params.read_prompts(read_on=params.read_on)


def canonical(params: Params) -> Params:
    """What a kind does not use does not matter to it."""
    params = canonical_slice(params)
    return params if params.kind == "exponential" else replace(params, mix=1.0)


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Learn the features of each row, rank them, complete all prompts under the first.

    Tensors of the outcome, float32: `inputs` and `outputs` (factors, hidden), of norm 1, in the order of
    their rank; `vectors` (read, hidden), the first inputs times the radius; `strengths` and `scores`
    (factors,); `history` (iterations,); and what
    `behaviours.Behaviours` has. Tables: `vectors`, `completions`.

    Raises:
        SpecError: If a layer, a token or a word does not exist, or so many features do not.
        ModelError: If there is no chat template, the encoder is absent, or the blocks cannot run alone.
    """
    for index, row in enumerate(rows):
        yield index, _run(replica, row, context)


def _run(replica: "Replica", row: Row, context: Context) -> Outcome:
    from jobs.engine.interventions import Add
    from jobs.engine.tables import row_tables
    from jobs.reading.sayings import completion_rows, sayings
    from jobs.unsupervised.ground import Ground

    params: Params = row.params
    prompts = params.read_prompts(read_on=params.read_on)
    encoded = [encode_prompt(replica, prompt.prompt, params) for prompt in prompts]
    place = {name: getattr(params, name) for name in ("source", "target", "counted", "last")}
    ground = Ground(replica, encoded[: params.learn_from], site=params.target_site, **place)
    radius = params.radius * radius_unit(params, context)
    factors = _factors(ground, params, radius, row.seed)
    if not bool(factors.inputs_VD.isfinite().all() and factors.strengths_V.isfinite().all()):
        return Outcome(status=Status.FAILED, reason=_NOT_FINITE)
    if not bool(factors.inputs_VD.any(dim=1).all()):
        return Outcome(status=Status.FAILED, reason=melbo.NOTHING)
    scores_V = _scores(replica, encoded[: params.learn_from], params, radius, factors)
    order = scores_V.argsort(descending=True)
    vectors_VD = (radius * factors.inputs_VD[order[: params.read]]).float().cpu().numpy()
    if not np.isfinite(vectors_VD).all():
        return Outcome(status=Status.FAILED, reason=_NOT_FINITE)
    tables = row_tables(replica, [[Add(layer=params.source, vector=vector_D)] for vector_D in vectors_VD])
    [(_, found)] = sayings(
        replica, [encoded], tables, vectors=params.read, max_new_tokens=params.max_new_tokens
    )
    if found.flaw is not None:
        return Outcome(status=Status.FAILED, reason=found.flaw)
    read = params.behaviours(prompts, found.said_PV)
    learned = {
        "explained": float(factors.history_S[-1]),
        "radius": radius,
        "top_score": float(scores_V[order[0]]),
    }
    random = context.artifact(control(params)) if params.compare else None
    unsteered = context.artifact(sample.unsteered_reply(params))
    tensors = {
        "inputs": factors.inputs_VD[order],
        "outputs": factors.outputs_VD[order],
        "strengths": factors.strengths_V[order.to(factors.strengths_V.device)],
        "scores": scores_V[order],
        "history": factors.history_S,
    }
    return Outcome(
        metrics={
            split: {
                **learned,
                **means,
                **from_unsteered(read.tensors, unsteered, split),
                **over_random(means, None if random is None else stored_means(random, split)),
            }
            for split, means in read.metrics.items()
        },
        tables={
            "completions": completion_rows(prompts, found.said_PV, "feature"),
            "vectors": [
                {"name": f"dct_{number}", "layer": params.source, "norm": radius, "vector": vector_D}
                for number, vector_D in enumerate(vectors_VD)
            ],
        },
        tensors={
            **{name: tensor.float().cpu().numpy() for name, tensor in tensors.items()},
            "vectors": vectors_VD,
            **read.tensors,
        },
    )


_NOT_FINITE = "the features are not finite; use a smaller radius, or a wider dtype"


def _factors(ground: "Ground", params: Params, radius: float, seed: int) -> "Factors":
    from jobs.unsupervised.causal_map import CausalMap
    from jobs.unsupervised.sphere import Surface
    from jobs.unsupervised.transcoding import exponential_factors, linear_factors, quadratic_factors

    hidden = ground.slice_.inputs_NTD.shape[-1]
    surface = Surface(radius=1.0, orthogonal=True)
    surface.check(params.factors, hidden)
    causal = CausalMap(ground.slice_, ground.counted_NT)
    if params.start == "jacobian":
        start_VD = ground.jacobian(params.factors, ground.everything)
    else:
        start_VD = surface.drawn(params.factors, hidden, seed).to(ground.slice_.wide)
    match params.kind:
        case "linear":
            return linear_factors(causal, start_VD, iterations=params.iterations)
        case "quadratic":
            return quadratic_factors(causal, start_VD, iterations=params.iterations)
        case "exponential":
            return exponential_factors(causal, start_VD, radius, iterations=params.iterations, mix=params.mix)


def _scores(
    replica: "Replica",
    prompts: Sequence[Sequence[int]],
    params: Params,
    radius: float,
    factors: "Factors",
) -> "Tensor":
    """What features are ranked by, float64, on the device of the factors."""
    if not params.towards:
        return factors.strengths_V.abs().double().to(factors.inputs_VD.device)
    if params.source >= replica.layers - 1:
        raise SpecError(f"source={params.source} is the last block; words cannot rank what steers there")
    from jobs.unsupervised.causal_map import CausalMap
    from jobs.unsupervised.ground import Ground

    words = [replica.single_token(word) for word in (params.towards, params.away)]
    towards_D, away_D = replica.model.get_output_embeddings().weight[words].double()
    end = Ground(replica, prompts, source=params.source, target=replica.layers - 1, counted="last", last=1)
    pushed_VD = CausalMap(end.slice_, end.counted_NT).at(radius * factors.inputs_VD)
    scores_V: Tensor = pushed_VD.double() @ (towards_D - away_D).to(pushed_VD.device)
    return scores_V
