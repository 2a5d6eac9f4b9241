"""Which slice of the model, which vectors and how they are learned: what jobs share. No torch."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from jobs.asking import check_asking
from jobs.checks import above_zero, at_least
from jobs.data.prompts import OpenPrompt, load_open_prompts

RadiusUnit = Literal["stream", "residual_norm", "calibrated"]
Sliceds = TypeVar("Sliceds", bound="Sliced")
Some = TypeVar("Some", bound="Learning")


@dataclass(frozen=True, kw_only=True)  # no slots: two bases that have them cannot be combined
class Sliced:
    """Which blocks of the model, which of their tokens, and on which prompts.

    Attributes:
        source: Block to whose output vectors are added, at every token, counted from 0.
        target: Block at whose output the change is measured; above `source`. The `target_layer_idx` of the
            original MELBO is one more.
        target_site: `after` the target block, or what its `attention` adds.
        counted: Tokens whose change counts: `all`, all `but_first` (the first token of many models carries
            huge states, and would be the whole objective), or the `last` few.
        last: How many, where `counted` is `last`.
        prompts: Dataset of open prompts; those of the split extract are learned from.
        learn_from: How many of them.
        learn_after: How many of them are passed over first.
        chat: Whether prompts are asked in the model's chat template; otherwise they stand raw.
        system: System message; None leaves what the model's template does by itself.
    """

    source: int = 7
    target: int = 22
    target_site: Literal["after", "attention"] = "after"
    counted: Literal["all", "but_first", "last"] = "but_first"
    last: int = 3
    prompts: str = "elicitation_prompts"
    learn_from: int = 1
    learn_after: int = 0
    chat: bool = True
    system: str | None = None

    def check_slice(self) -> None:
        """Raises ValueError if such a slice cannot be meant."""
        check_asking(self)
        if not 0 <= self.source < self.target:
            raise ValueError(f"source={self.source}, target={self.target}; 0 <= source < target")
        at_least(self, 1, "last", "learn_from")
        at_least(self, 0, "learn_after")

    def read_prompts(self, *, read_on: int = 0) -> list[OpenPrompt]:
        """The prompts that are learned from, then the first of select and of report. Raises SpecError."""
        return load_open_prompts(
            self.prompts, read_on, read_on, extract=self.learn_from, after=self.learn_after
        )


@dataclass(frozen=True, kw_only=True)
class Learning(Sliced):
    """How vectors are learned.

    Attributes:
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
            angles to those learned before it. `soft_vectors`, `soft_deltas`: learned together, with a penalty
            where two vectors, or the changes of the target that they make, are not at right angles. `none`.
        apart: Weight of that penalty: the objectives are multiplied by exp(-apart x the sum of a vector's
            squared cosines to the others, in the mean over the vectors).
        contrast: Weight of the contrastive term: the objectives are multiplied by exp(contrast x (mean cosine
            of a vector's mean changes on two prompts, minus that to the other vectors', in the mean)).
        span: Vectors stay in the span of so many first right singular vectors of the activations of the
            counted tokens at the source; 0 leaves them free.
        start: What the optimiser starts from: `random` vectors, or the first right singular vectors of the
            slice's `jacobian`.
        draw: Which of several draws of the random start, from 0.
        optimiser: `fixed_point`; `amsgrad`, as in the original; `none`: vectors stay where they start.
        steps: Most looks at each vector; the first of `fixed_point` is at its start, so that it takes 2. None
            is 20 for `fixed_point` and 300 for `amsgrad`, which hardly leaves its start in fewer.
        tolerance: Relative rise of the objective at which the fixed point has settled.
        learning_rate: Of AMSGrad, in residual-stream units an element and step.
    """

    vectors: int = 16
    radius: float = 0.2
    radius_in: RadiusUnit = "calibrated"
    power: float = 2.0
    root: float = 1.0
    norm_over: Literal["hidden", "tokens"] = "hidden"
    orthogonality: Literal["joint", "sequential", "soft_vectors", "soft_deltas", "none"] = "joint"
    apart: float = 1.0
    contrast: float = 0.0
    span: int = 0
    start: Literal["random", "jacobian"] = "random"
    draw: int = 0
    optimiser: Literal["fixed_point", "amsgrad", "none"] = "fixed_point"
    steps: int | None = None
    tolerance: float = 5e-3
    learning_rate: float = 1e-3

    def check_learning(self) -> None:
        """Raises ValueError if such vectors cannot be meant."""
        self.check_slice()
        at_least(self, 1, "vectors", "power", "root")
        # The fixed point's first look only says where to go.
        if self.steps is not None:
            at_least(self, 2 if self.optimiser == "fixed_point" else 1, "steps")
        above_zero(self, "radius", "tolerance", "learning_rate")
        at_least(self, 0, "apart", "contrast", "span", "draw")
        if self.contrast and self.orthogonality == "sequential":
            raise ValueError(
                f"contrast={self.contrast} with orthogonality='sequential'; it compares vectors that are "
                "learned together"
            )

    @property
    def most_steps(self) -> int:
        """The number that `steps` means."""
        if self.steps is not None:
            return self.steps
        return {"fixed_point": 20, "amsgrad": 300, "none": 0}[self.optimiser]

    @property
    def is_random(self) -> bool:
        """Whether the vectors are random ones."""
        return self.optimiser == "none" and self.start == "random"


TOGETHER = (
    *("source", "target", "target_site", "counted", "last", "norm_over"),
    *("optimiser", "steps", "tolerance", "learning_rate"),
)
"""Sets that agree in these are learned in shared batches."""
_UNLEARNED = (
    *("power", "root", "norm_over", "apart", "contrast"),
    *("steps", "tolerance", "learning_rate"),
)
_DEFAULT = {field.name: field.default for field in fields(Learning)}


def canonical_slice(params: Sliceds) -> Sliceds:
    """How many last tokens count matters only where they do."""
    return params if params.counted == "last" else replace(params, last=Sliced.last)


def canonical_learning(params: Some) -> Some:
    """What the rest makes irrelevant, as it is by default: the same vectors, the same parameters."""
    unused: set[str] = set()
    params = canonical_slice(params)
    if params.optimiser != "fixed_point":
        unused.add("tolerance")
    if params.optimiser != "amsgrad":
        unused.add("learning_rate")
    if params.optimiser == "none":
        unused |= set(_UNLEARNED)
    else:
        params = replace(params, steps=params.most_steps)
    if params.power == 2:
        unused.add("norm_over")
    if not params.orthogonality.startswith("soft"):
        unused.add("apart")
    if params.start == "jacobian":
        unused.add("draw")
    changes: dict[str, Any] = {name: _DEFAULT[name] for name in unused}
    if params.optimiser == "none" and params.orthogonality == "sequential":
        changes["orthogonality"] = "joint"
    return replace(params, **changes)
