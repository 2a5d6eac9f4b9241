"""Two trials side by side, against their tables."""

from pathlib import Path

import numpy as np
import pytest

from jobs.errors import SpecError
from orchestrator.comparing import compare_trials
from orchestrator.printing import print_comparison
from storage.query import open_sweep
from storage.store import Store
from tests.fakes import StoredTrial, write_sweep

VALUES = np.random.default_rng(0).normal(size=(2, 40)) + np.array([[0.0], [0.5]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trials 0 and 1, whose total is a mean of items and whose spread is not, and trial 2, which failed."""
    place = tmp_path_factory.mktemp("compared")
    trials = [
        StoredTrial(
            {"x": number, "y": "same"},
            {"select": {"total": float(VALUES[number].mean()), "spread": 1.0 + number, "odd": None}},
        )
        for number in range(2)
    ]
    trials.append(StoredTrial({"x": 2, "y": "same"}, {}, state="failed"))
    write_sweep(place, trials, objectives={"total": "maximize"}, parameters={"x": "BIGINT", "y": "VARCHAR"})
    head = {"split": "select", "prompt": "Say it."}
    items = [
        {**head, "spec": f"spec{trial}", "item": item, "name": "total", "value": value}
        for trial in range(2)
        for item, value in enumerate(VALUES[trial].tolist())
    ]
    texts = [
        {**head, "spec": f"spec{trial}", "item": item, "text": f"\x1b[2J{trial} {item}"}
        for trial in range(2)
        for item in range(4)
    ]
    Store(place).commit([], items=items, completions=texts)
    return place


def test_parameters_are_told_apart_from_those_that_are_shared(folder: Path) -> None:
    found = compare_trials(folder, 1, 0, texts=0)
    assert found["same"] == {"y": "same"}
    assert found["params"] == [{"name": "x", "values": [1, 0]}]
    assert found["states"] == ["completed", "completed"]


def test_a_difference_has_the_interval_of_the_items_that_it_is_a_mean_of(folder: Path) -> None:
    found = {each["name"]: each for each in compare_trials(folder, 0, 1, texts=0)["metrics"]}
    total = found["total"]
    differences = VALUES[1] - VALUES[0]
    assert total["difference"] == pytest.approx(differences.mean())
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    assert total["low"] == pytest.approx(differences.mean() - 1.96 * error, abs=0.2 * error)
    assert total["high"] == pytest.approx(differences.mean() + 1.96 * error, abs=0.2 * error)
    assert (found["spread"]["difference"], found["spread"]["low"]) == (1.0, None)
    assert (found["odd"]["values"], found["odd"]["difference"]) == ([None, None], None)
    turned = {each["name"]: each for each in compare_trials(folder, 1, 0, texts=0)["metrics"]}["total"]
    assert (turned["low"], turned["high"]) == pytest.approx((-total["high"], -total["low"]), abs=0.1 * error)


def test_texts_of_the_same_place_stand_together_and_command_no_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare_trials(folder, 0, 1, texts=3)
    assert [each["item"] for each in found["texts"]] == [0, 1, 2]
    assert [each["texts"] for each in found["texts"]][1] == ["\x1b[2J0 1", "\x1b[2J1 1"]
    print_comparison(found)
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "the same in both: y = same" in said


def test_a_trial_without_a_result_is_shown_so_and_one_that_is_not_there_is_refused(folder: Path) -> None:
    found = compare_trials(folder, 0, 2, texts=3)
    assert found["states"] == ["completed", "failed"]
    assert all(each["values"][1] is None and each["difference"] is None for each in found["metrics"])
    turned = compare_trials(folder, 2, 0, texts=3)["metrics"]
    assert [each["name"] for each in turned] == [each["name"] for each in found["metrics"]]
    assert turned[0]["values"] == [None, found["metrics"][0]["values"][0]]
    with pytest.raises(SpecError, match=r"no trial 7; .* has trials 0 to 2"):
        compare_trials(folder, 0, 7, texts=3)
    assert len(open_sweep(folder).rows("SELECT * FROM trials")) == 3
