"""How a job steers: the parameters that jobs share, and the interventions that they mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from jobs import extract
from jobs.errors import SpecError
from jobs.resolve import load_job, parse_use
from jobs.spec import Context, Requirement

if TYPE_CHECKING:
    import numpy as np

    from jobs.engine.interventions import AnyIntervention

Some = TypeVar("Some", bound="Steering")
DATA = ("vectors", "combine", "without")
"""Parameters of every steering job that name datasets or files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """A direction, and what is done with it where and how strongly.

    Attributes:
        layer: Block whose output is steered, counted from 0.
        dose: Strength relative to the mean residual norm at that layer; negative steers backwards.
        multiplier: Strength as a raw factor of the direction of norm 1, in place of a dose.
        operation: `add` the direction times the strength; `clamp` the part along the direction to the
            strength; `replace` the activation with what would be added; or `project_out` the part along
            the direction, whatever the strength.
        site: `after` or `before` the block, or the output of its `attention` or `mlp`.
        tokens: `all` tokens, those of the `prompt`, its `last` one, or those `generated`.
        layers: Further blocks that are steered alike, each with its own direction and residual norm.
        weights: Factors of the strength, first that of `layer`, then those of `layers`; empty means 1 each.
        direction: How it is extracted; the methods of `jobs.extract`.
        component: Principal component, counted from 0; ignored by other methods.
        mixture: Weights of the first principal components, which are added up; empty takes `component` alone.
        vectors: Path of a `.safetensors` or `.gguf` file of directions, in place of extracted ones.
        learned: Job that learns vectors, with its parameters as JSON behind its name, such as
            `jobs.melbo{"source": 7}` or `jobs.dct{}`: one of its vectors takes the place of an extracted
            direction, with the norm that it was learned at, times `multiplier`; it takes no dose. `layer` is
            that job's source, unless the vector is to be tried elsewhere.
        vector: Which of them, from 0.
        combine: Datasets or files whose directions are added; see `jobs.extract`.
        combine_weights: Factor of each of `combine`, negative ones subtract; empty means 1 each.
        without: Datasets or files whose directions are projected out.
        without_words: Words, each one token, whose rows of the unembedding are projected out.
    """

    layer: int
    dose: float | None = None
    multiplier: float | None = None
    operation: Literal["add", "project_out", "clamp", "replace"] = "add"
    site: Literal["after", "before", "attention", "mlp"] = "after"
    tokens: Literal["all", "prompt", "last", "generated"] = "all"
    layers: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    direction: extract.MethodName = "mean_difference"
    component: int = 0
    mixture: tuple[float, ...] = ()
    vectors: str = ""
    learned: str = ""
    vector: int = 0
    combine: tuple[str, ...] = ()
    combine_weights: tuple[float, ...] = ()
    without: tuple[str, ...] = ()
    without_words: tuple[str, ...] = ()

    def check_steering(self, *, needs_strength: bool = True) -> None:
        """Raises ValueError if a value cannot be meant; without a strength, nothing is added."""
        places = (self.layer, *self.layers)
        if min(places) < 0:
            raise ValueError(f"layer={min(places)}; layers are counted from 0")
        if len(set(places)) < len(places):
            raise ValueError(f"layer={self.layer}, layers={self.layers}; give each layer once")
        extraction_of(self)
        self._check_learned()
        given = [value for value in (self.dose, self.multiplier) if value is not None]
        fitting = (1,) if needs_strength or self.operation != "add" else (0, 1)
        if len(given) not in fitting and self.operation != "project_out":
            raise ValueError(f"dose={self.dose}, multiplier={self.multiplier}; give one of them")
        if not all(map(math.isfinite, given)):
            raise ValueError(f"dose={self.dose}, multiplier={self.multiplier}; it takes a finite number")
        if self.weights and len(self.weights) != len(places):
            raise ValueError(f"weights={self.weights}; give one for each of {len(places)} layers, or none")

    def _check_learned(self) -> None:
        if self.vector < 0:
            raise ValueError(f"vector={self.vector}; vectors are counted from 0")
        if not self.learned:
            return
        if self.vectors or self.combine or self.without or self.without_words or self.dose is not None:
            raise ValueError(
                f"learned={self.learned!r} goes with a multiplier, and with none of dose, vectors, combine, "
                "without and without_words"
            )
        try:
            use = parse_use(self.learned)
        except SpecError as error:
            raise ValueError(f"learned: {error}") from error
        counted = getattr(load_job(use.job), "learned_vectors", None)
        if counted is None:
            raise ValueError(
                f"learned={self.learned!r}: that job gives no vectors; take jobs.melbo or jobs.dct"
            )
        if self.vector >= (number := counted(use.params)):
            raise ValueError(f"vector={self.vector}; the set has the vectors 0 to {number - 1}")

    @property
    def strength(self) -> float:
        """Dose or multiplier, whichever is given."""
        return next((value for value in (self.dose, self.multiplier) if value is not None), 0.0)

    @property
    def is_unsteered(self) -> bool:
        """Whether nothing is changed."""
        return self.operation == "add" and self.strength == 0

    @property
    def sign(self) -> float:
        """Whether the steering is meant towards the positive side, 1.0, or away from it, -1.0."""
        away = self.operation == "project_out" or self.strength < 0
        return -1.0 if away else 1.0


def extraction_of(params: Steering, **own: Any) -> extract.Params:
    """Where the directions come from.

    Args:
        params: How to steer.
        own: Fields of `extract.Params` that the job decides: what the pairs are, and which token counts.

    Raises:
        ValueError: If the parameters do not go together.
    """
    if params.vectors:
        judged_on = {"pairs": own["pairs"]} if "pairs" in own and own.get("source") != "claims" else {}
        own = {"source": "file", "vectors": params.vectors, **judged_on}
    wanted = extract.Params(
        method=params.direction,
        component=params.component,
        mixture=params.mixture,
        combine=params.combine,
        combine_weights=params.combine_weights,
        without=params.without,
        without_words=params.without_words,
        **own,
    )
    return extract.canonical(wanted)


def without_steering(params: Some, *, shared: Sequence[str]) -> Some:
    """The unsteered model under parameters that are the same work at every layer and in every direction.

    Args:
        params: Any configuration.
        shared: Names of the fields that are kept.
    """
    blank = type(params)(layer=0, dose=0.0)
    return replace(blank, **{name: getattr(params, name) for name in shared})


def canonical_steering(params: Some, *, shared: Sequence[str]) -> Some:
    """Parameters that mean the same steering as `params`, equal for equal steering.

    Args:
        params: Any configuration.
        shared: Names of the fields that matter to the unsteered model.
    """
    if params.is_unsteered:
        return without_steering(params, shared=shared)
    same = extract.Params() if params.learned else extraction_of(params)
    params = replace(
        params,
        direction=same.method,
        component=same.component,
        mixture=same.mixture,
        combine_weights=same.combine_weights,
    )
    if params.operation == "project_out":
        params = replace(params, dose=None, multiplier=None)
    return params


def directions_of(params: Steering, extraction: extract.Params) -> Requirement:
    """What the directions come from: an extraction, or a job that learns vectors."""
    if params.learned:
        return parse_use(params.learned)
    return Requirement(job="jobs.extract", params=extraction)


def interventions(context: Context, params: Steering, extraction: extract.Params) -> "list[AnyIntervention]":
    """What the parameters mean, one intervention a layer; none for the unsteered model.

    Args:
        context: The running job's context.
        params: How to steer.
        extraction: Where the directions come from; it must have been required.

    Raises:
        SpecError: If the model has no such layer.
    """
    if params.is_unsteered:
        return []
    places = (params.layer, *params.layers)
    weights = params.weights or (1.0,) * len(places)
    return [
        _intervention(context, params, extraction, layer, weight)
        for layer, weight in zip(places, weights, strict=True)
    ]


def _intervention(
    context: Context, params: Steering, extraction: extract.Params, layer: int, weight: float
) -> "AnyIntervention":
    from jobs.engine.interventions import Add, Clamp, ProjectOut, Replace, Tokens

    if params.learned:
        direction, norm = _learned(context, params), 1.0
    else:
        direction, norm = extract.load_direction(context, extraction, layer)
    strength = weight * params.strength * (norm if params.multiplier is None else 1.0)
    tokens: Tokens = (-1,) if params.tokens == "last" else params.tokens
    match params.operation:
        case "add":
            return Add(layer=layer, site=params.site, tokens=tokens, vector=direction * strength)
        case "replace":
            return Replace(layer=layer, site=params.site, tokens=tokens, vector=direction * strength)
        case "clamp":
            return Clamp(layer=layer, site=params.site, tokens=tokens, direction=direction, value=strength)
        case "project_out":
            return ProjectOut(layer=layer, site=params.site, tokens=tokens, direction=direction)


def _learned(context: Context, params: Steering) -> "np.ndarray":
    found_D: np.ndarray = context.artifact(parse_use(params.learned))["vectors"][params.vector]
    return found_D


def vector_rows(changes: "Sequence[AnyIntervention]") -> list[dict[str, Any]]:
    """Rows of the table `vectors`: what each intervention adds, puts in place or acts along."""
    import numpy as np

    from jobs.engine.interventions import Add, Replace

    found = []
    for change in changes:
        vector = change.vector if isinstance(change, (Add, Replace)) else change.direction
        name = type(change).__name__
        norm = float(np.linalg.norm(vector))
        row = {"name": name, "layer": change.layer, "norm": norm, "vector": vector.astype(np.float32)}
        found.append(row)
    return found
