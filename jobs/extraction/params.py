"""What a direction is extracted from and how: the parameters of `jobs.extract`. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jobs.directions.vector_files import VECTOR_SUFFIXES

if TYPE_CHECKING:
    from jobs.directions.contrast import Rows

MethodName = Literal[
    "mean_difference", "pca", "pca_differences", "pca_centred_differences", "logistic", "lda", "random"
]
PRINCIPAL: "Mapping[str, Rows]" = {
    "pca": "activations",
    "pca_differences": "differences",
    "pca_centred_differences": "centred_differences",
}
"""Methods that take a principal component, and what of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Params:
    """How a direction is extracted, or where one is read from.

    Attributes:
        source: `text`: `pairs` is a dataset of positive and negative texts, read raw.
            `claims`: `pairs` is a dataset of labelled claims; the positive side is an honest persona
            giving the honest letter, the negative side a dishonest one giving the other letter.
            `file`: the directions are those of the file `vectors`, brought to norm 1; `pairs` is a dataset of
            texts on which they are judged, and whose activations give the residual norms that the file lacks.
        pairs: Name or path of the dataset.
        vectors: Path of a `.safetensors` or `.gguf` file of directions; with `file` only.
        count: Number of pairs, taken from the start; 0 takes all (for claims: must be given).
        correct_only: Keep only the claims that the model itself, without steering and without a persona,
            answers correctly: the honest letter is the likelier of the two. With `claims` only.
        method: `mean_difference`; a principal component of all activations (`pca`), of the pairs' differences
            (`pca_differences`) or of these around their mean (`pca_centred_differences`), with the sign by
            majority vote; the weights of a `logistic` or `lda` probe; or `random`, drawn from the seed.
        component: Principal component, counted from 0; ignored by other methods.
        mixture: Weights of the first principal components, which are added up; empty takes `component` alone.
        offset: Token whose activation is taken, counted from the end: 1 = the last one.
        combine: Further datasets, each read as `pairs` is, whose directions by the same method are added; or
            files of directions. All are brought to norm 1 first, that of `pairs` too.
        combine_weights: Factor of each of `combine`, relative to the direction of `pairs`; negative ones
            subtract. Empty means 1 each.
        without: Datasets of pairs of texts whose mean differences at the same layer and token are projected
            out; or files of directions.
        without_words: Words, each one token, whose rows of the unembedding are projected out.
    """

    source: Literal["text", "claims", "file"] = "text"
    pairs: str = "tone_pairs"
    vectors: str = ""
    count: int = 0
    correct_only: bool = False
    method: MethodName = "mean_difference"
    component: int = 0
    mixture: tuple[float, ...] = ()
    offset: int = 1
    combine: tuple[str, ...] = ()
    combine_weights: tuple[float, ...] = ()
    without: tuple[str, ...] = ()
    without_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.offset < 1:
            raise ValueError(f"offset={self.offset}; tokens are counted from the end, 1 = the last one")
        if self.count < 0 or self.component < 0:
            raise ValueError(f"count={self.count}, component={self.component}; neither may be negative")
        if self.mixture and self.method not in PRINCIPAL:
            raise ValueError(
                f"mixture={self.mixture} with method={self.method!r}; it takes one of {[*PRINCIPAL]}"
            )
        if self.source == "claims" and self.count == 0:
            raise ValueError("count=0 with source='claims'; say how many claims the direction may use")
        if (self.source == "file") != bool(self.vectors):
            raise ValueError(
                f"source={self.source!r}, vectors={self.vectors!r}; source='file' takes the path of a file, "
                "other sources take none"
            )
        if self.correct_only and self.source != "claims":
            raise ValueError(f"correct_only with source={self.source!r}; only claims have correct answers")
        self._check_weights()

    def _check_weights(self) -> None:
        given = f"combine={self.combine}, combine_weights={self.combine_weights}"
        if self.combine_weights and len(self.combine_weights) != len(self.combine):
            raise ValueError(f"{given}; give one weight for each, or none")
        if not all(math.isfinite(weight) and weight for weight in self.combine_weights):
            raise ValueError(f"{given}; weights are finite and differ from 0")
        if "" in (*self.combine, *self.without):
            raise ValueError(f"combine={self.combine}, without={self.without}; a name is empty")


def is_vector_file(name: str) -> bool:
    """Whether a name means a file of directions rather than a dataset."""
    return Path(name).suffix in VECTOR_SUFFIXES
