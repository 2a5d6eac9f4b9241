"""The steering that jobs share: what its parameters mean as interventions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import extract, steer
from jobs.directions.vector_files import write_safetensors
from jobs.engine.interventions import Add, Clamp, ProjectOut, Replace
from jobs.errors import SpecError
from jobs.steering import canonical_steering, extraction_of, interventions, vector_rows, without_steering
from tests.models import HIDDEN, Artifacts, tiny_replica

EXTRACTION = extract.Params(pairs="tone_pairs", count=4)


@pytest.fixture(scope="module")
def context() -> Artifacts:
    return Artifacts(tiny_replica("llama"))


@pytest.fixture(scope="module")
def directions(context: Artifacts) -> tuple[np.ndarray, np.ndarray]:
    [outcome] = context.run("jobs.extract", [EXTRACTION])
    return outcome.tensors["directions"], outcome.tensors["residual_norms"]


def params(**values: Any) -> steer.Params:
    return steer.Params(**{"layer": 1, **values})


def test_a_dose_counts_residual_norms_and_a_multiplier_nothing(
    context: Artifacts, directions: tuple[np.ndarray, np.ndarray]
) -> None:
    unit, norms = directions
    [dosed] = interventions(context, params(dose=-0.5), EXTRACTION)
    [raw] = interventions(context, params(multiplier=4.0), EXTRACTION)
    assert isinstance(dosed, Add)
    assert isinstance(raw, Add)
    np.testing.assert_allclose(dosed.vector, -0.5 * norms[1] * unit[1], rtol=1e-6)
    np.testing.assert_allclose(raw.vector, 4 * unit[1], rtol=1e-6)


def test_every_layer_takes_its_own_direction_norm_and_weight(
    context: Artifacts, directions: tuple[np.ndarray, np.ndarray]
) -> None:
    unit, norms = directions
    found = interventions(context, params(dose=0.5, layers=(3, 0), weights=(1.0, -2.0, 0.5)), EXTRACTION)
    assert [change.layer for change in found] == [1, 3, 0]
    for change, layer, weight in zip(found, (1, 3, 0), (1, -2, 0.5), strict=True):
        assert isinstance(change, Add)
        np.testing.assert_allclose(change.vector, 0.5 * weight * norms[layer] * unit[layer], rtol=1e-6)


def test_operations_sites_and_tokens_become_those_of_the_engine(
    context: Artifacts, directions: tuple[np.ndarray, np.ndarray]
) -> None:
    unit, norms = directions
    [clamped] = interventions(context, params(dose=2.0, operation="clamp", site="mlp"), EXTRACTION)
    [removed] = interventions(context, params(operation="project_out", tokens="last"), EXTRACTION)
    [replaced] = interventions(
        context, params(multiplier=3.0, operation="replace", tokens="prompt"), EXTRACTION
    )
    assert isinstance(clamped, Clamp)
    assert (clamped.site, clamped.tokens) == ("mlp", "all")
    assert clamped.value == pytest.approx(2 * norms[1])
    assert isinstance(removed, ProjectOut)
    assert removed.tokens == (-1,)
    assert isinstance(replaced, Replace)
    np.testing.assert_allclose(replaced.vector, 3 * unit[1], rtol=1e-6)
    rows = vector_rows([clamped, removed, replaced])
    assert [row["name"] for row in rows] == ["Clamp", "ProjectOut", "Replace"]
    assert [row["norm"] for row in rows] == pytest.approx([1, 1, 3], rel=1e-5)


def test_only_an_addition_of_nothing_is_unsteered(context: Artifacts) -> None:
    assert interventions(context, params(dose=0.0), EXTRACTION) == []
    assert params(multiplier=0.0).is_unsteered
    for operation in ("clamp", "replace", "project_out"):
        assert len(interventions(context, params(dose=0.0, operation=operation), EXTRACTION)) == 1


def test_equal_steering_has_one_form() -> None:
    assert canonical_steering(params(dose=0.1, component=3), shared=()) == params(dose=0.1)
    assert canonical_steering(params(dose=0.1, component=3, direction="pca"), shared=()).component == 3
    strengths: list[dict[str, float]] = [{"dose": 1.0}, {"multiplier": 5.0}, {}]
    forms = {canonical_steering(params(operation="project_out", **each), shared=()) for each in strengths}
    assert len(forms) == 1
    shared = ("max_new_tokens",)
    unsteered = {
        without_steering(params(**each), shared=shared)
        for each in ({"dose": 0.0}, {"multiplier": 0.0}, {"dose": 0.0, "direction": "pca", "site": "mlp"})
    }
    assert len(unsteered) == 1
    assert without_steering(params(dose=1.0, max_new_tokens=7), shared=shared).max_new_tokens == 7


def test_the_effect_counts_towards_the_side_that_is_steered_to() -> None:
    assert params(dose=0.2).sign == params(multiplier=1.0).sign == 1
    assert params(dose=-0.2).sign == params(operation="project_out").sign == -1


def test_options_of_the_extraction_pass_through_and_equal_ones_are_equal() -> None:
    wanted = params(
        dose=0.1, combine=("formality_pairs",), without=("tone_pairs",), without_words=(" good",), component=2
    )
    found = extraction_of(wanted, pairs="tone_pairs")
    assert found == extract.Params(
        pairs="tone_pairs",
        combine=("formality_pairs",),
        combine_weights=(1.0,),
        without=("tone_pairs",),
        without_words=(" good",),
    )
    assert canonical_steering(wanted, shared=()) == params(
        dose=0.1,
        combine=("formality_pairs",),
        combine_weights=(1.0,),
        without=("tone_pairs",),
        without_words=(" good",),
    )


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"component": -1}, "component=-1"),
        ({"mixture": (1.0, 2.0)}, "mixture"),
        ({"combine": ("a", "b"), "combine_weights": (1.0,)}, "combine_weights"),
    ],
)
def test_options_that_do_not_go_together_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        params(dose=0.1, **values)


def test_an_imported_vector_steers_as_it_stands_in_its_file(context: Artifacts, tmp_path: Path) -> None:
    vector = np.random.default_rng(0).normal(size=HIDDEN)
    path = tmp_path / "mine.safetensors"
    write_safetensors(path, {2: vector / np.linalg.norm(vector)}, model="tiny", method="by hand")
    wanted = params(layer=2, multiplier=3.0, vectors=str(path))
    [change] = interventions(context, wanted, extraction_of(wanted, pairs="tone_pairs"))
    assert isinstance(change, Add)
    np.testing.assert_allclose(change.vector, 3 * vector / np.linalg.norm(vector), rtol=1e-5)
    other = extraction_of(wanted, pairs="formality_pairs")
    assert other.pairs == "formality_pairs", "what a file's vectors are judged on is the user's choice"
    elsewhere = replace(wanted, layer=1)
    with pytest.raises(SpecError, match="layer 1 has no direction"):
        interventions(context, elsewhere, extraction_of(elsewhere, pairs="tone_pairs"))
