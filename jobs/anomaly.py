"""Job: tell prompts that trigger unusual behaviour from usual ones by what learned vectors do to a model.

The use that the authors of MELBO promise: a prompt is suspect if its activations lie, seen from those of
usual prompts, where a learned perturbation moves them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jobs import melbo
from jobs.asking import encode_prompt
from jobs.checks import at_least
from jobs.data.examples import Example, load_examples
from jobs.errors import SpecError
from jobs.spec import Context, Metric, Outcome, Requirement, Row, Size

if TYPE_CHECKING:
    from jobs.engine.replica import Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """Which vectors, which prompts, and which of them are usual.

    Attributes:
        learned: `jobs.melbo` with its parameters as JSON behind its name, such as `jobs.melbo{"source": 7}`.
        examples: Dataset with the columns of `jobs.data.examples.load_examples`; replies are not read. Usual
            prompts of the split extract say what is usual; those of select and report are told apart.
        usual: The behaviour of usual prompts; all others are to be found.
        resamples: Draws of the prompts with replacement, for the intervals.
    """

    learned: str = "jobs.melbo"
    examples: str = "arithmetic_backdoors"
    usual: str = "clean"
    resamples: int = 1000

    def __post_init__(self) -> None:
        at_least(self, 100, "resamples")
        _learned(self)


_WAYS = {
    "learned": "by the greatest cosine with what a learned vector does",
    "random": "by the greatest cosine with what a random vector of the same norm does",
    "mahalanobis": "by the Mahalanobis distance from the usual prompts, covariance by Ledoit and Wolf",
}
METRICS = {
    name: metric
    for way, meaning in _WAYS.items()
    for name, metric in {
        f"auc_{way}": Metric("probability", f"that an unusual prompt scores above a usual one, {meaning}"),
        f"auc_{way}_low": Metric("probability", f"low end of the 95 % interval of auc_{way}"),
        f"auc_{way}_high": Metric("probability", f"high end of the 95 % interval of auc_{way}"),
    }.items()
}
PACK_BY = None
DATA = ("examples",)
LAYERS: tuple[str, ...] = ()


def size(params: Params) -> Size:
    """About 500 prompts of 45 tokens, and the vectors on one prompt."""
    return Size(500, 500 * 45)


def requires(params: Params) -> Sequence[Requirement]:
    """The vectors, and random ones of the same norm."""
    learned = _learned(params)
    return [Requirement(job="jobs.melbo", params=melbo.canonical(learned)), melbo.random_of(learned)]


def _learned(params: Params) -> melbo.Params:
    found = melbo.parse(params.learned)
    if found.is_random:
        raise ValueError(
            f"learned={params.learned!r} learns nothing; random vectors are tried beside it anyway"
        )
    return found


def check(params: Params) -> None:
    """The prompts can be read, and there are both kinds of them. Raises SpecError if not."""
    melbo.check(_learned(params))
    _read_examples(params)


def canonical(params: Params) -> Params:
    """Every parameter matters."""
    return params


def _read_examples(params: Params) -> list[Example]:
    examples = load_examples(params.examples)
    for split, wanted in (("extract", (True,)), ("select", (True, False)), ("report", (True, False))):
        kinds = [each.behaviour == params.usual for each in examples if each.split == split]
        if any(kinds.count(kind) < 2 for kind in wanted):
            raise SpecError(
                f"{params.examples}, split {split!r}: {kinds.count(True)} prompts of the behaviour "
                f"{params.usual!r} and {kinds.count(False)} of others; it takes two of each (extract needs "
                "no others)"
            )
    return examples


class _Scores(NamedTuple):
    """Scores of all prompts, higher for the less usual."""

    learned: np.ndarray
    random: np.ndarray
    mahalanobis: np.ndarray


def run(replica: "Replica", rows: Sequence[Row], context: Context) -> Iterator[tuple[int, Outcome]]:
    """Score the prompts of each row's dataset.

    Table `items`: each prompt's scores by all ways, its behaviour as label.

    Raises:
        ModelError: If there is no chat template, or the blocks cannot run alone.
    """
    for index, row in enumerate(rows):
        params: Params = row.params
        examples = _read_examples(params)
        scores = _scores(replica, examples, params, context)
        metrics = {
            split: _metrics(examples, scores, split, params, row.seed) for split in ("select", "report")
        }
        yield index, Outcome(metrics=metrics, tables={"items": _items(examples, scores)})


def _scores(replica: "Replica", examples: Sequence[Example], params: Params, context: Context) -> _Scores:
    from sklearn.covariance import LedoitWolf

    from jobs.engine.capture import capture_last

    learned = _learned(params)
    encoded = [encode_prompt(replica, each.prompt, learned) for each in examples]
    states_ED = capture_last(replica, encoded)[:, learned.target].double().numpy()
    usual = [each.split == "extract" and each.behaviour == params.usual for each in examples]
    covariance = LedoitWolf().fit(states_ED[usual])
    away_ED = states_ED - covariance.location_
    found, random = (
        _nearest(away_ED, _changes(replica, learned, context.artifact(each)["vectors"]))
        for each in requires(params)
    )
    return _Scores(found, random, np.sqrt(covariance.mahalanobis(states_ED)))


def _changes(replica: "Replica", learned: melbo.Params, vectors_VD: np.ndarray) -> np.ndarray:
    """What each vector does to the target at the last token, mean over the prompts it was learned from."""
    import torch

    from jobs.unsupervised.causal_map import CausalMap
    from jobs.unsupervised.ground import Ground

    prompts = [encode_prompt(replica, each.prompt, learned) for each in learned.read_prompts()]
    ground = Ground(replica, prompts, source=learned.source, target=learned.target, counted="last", last=1)
    theta_VD = torch.tensor(vectors_VD).to(ground.slice_.wide)
    found_VD: np.ndarray = CausalMap(ground.slice_, ground.counted_NT).at(theta_VD).double().cpu().numpy()
    return found_VD


def _nearest(away_ED: np.ndarray, changes_VD: np.ndarray) -> np.ndarray:
    """The greatest cosine of each prompt's deviation with a vector's change."""
    from jobs.scoring.similarity import cosine_similarity

    found_E: np.ndarray = cosine_similarity(away_ED, changes_VD).max(axis=1)
    return found_E


def _metrics(
    examples: Sequence[Example], scores: _Scores, split: str, params: Params, seed: int
) -> dict[str, float]:
    usual, unusual = (
        [
            number
            for number, each in enumerate(examples)
            if each.split == split and (each.behaviour == params.usual) == kind
        ]
        for kind in (True, False)
    )
    found: dict[str, float] = {}
    for way, values in scores._asdict().items():
        auc, low, high = area_with_interval(
            values[unusual], values[usual], resamples=params.resamples, seed=seed
        )
        found |= {f"auc_{way}": auc, f"auc_{way}_low": low, f"auc_{way}_high": high}
    return found


def area_with_interval(
    high_N: np.ndarray, low_M: np.ndarray, *, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Area under the curve, and its 95 % interval by the percentile bootstrap over both groups.

    Args:
        high_N: Scores that should be higher.
        low_M: Scores that should be lower.
        resamples: Draws with replacement.
        seed: Of the draws.
    """
    above_NM = (high_N[:, None] > low_M).astype(float) + 0.5 * (high_N[:, None] == low_M)
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        rows = generator.integers(len(high_N), size=len(high_N))
        columns = generator.integers(len(low_M), size=len(low_M))
        drawn.append(above_NM[np.ix_(rows, columns)].mean())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(above_NM.mean()), float(low), float(high)


def _items(examples: Sequence[Example], scores: _Scores) -> list[dict[str, Any]]:
    ways: Mapping[str, np.ndarray] = scores._asdict()
    return [
        {
            "split": each.split,
            "item": number,
            "prompt": each.prompt,
            "name": way,
            "value": float(values[number]),
            "label": each.behaviour,
        }
        for way, values in ways.items()
        for number, each in enumerate(examples)
    ]
