"""What the storage benchmark keeps and asks, at a size that plain loops can answer."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import activations
from benchmarks.filling import METRICS, OBJECTIVES, fill
from benchmarks.storage import answer
from storage import compaction
from storage.query import open_sweep
from storage.store import Store

TRIALS = 700


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compaction, "MANY", 4)
        found = fill(folder, TRIALS)
    assert len(found["write_ms_tenths"]) == 10
    return folder


def points(folder: Path) -> dict[int, tuple[float, float]]:
    rows = Store(folder).rows("metrics")
    chosen = {(row["spec"], row["name"]): row["value"] for row in rows if row["split"] == "select"}
    return {
        row["trial"]: (chosen[row["spec"], "m0"], chosen[row["spec"], "m1"])
        for row in Store(folder).rows("trials")
    }


def test_everything_is_kept_once(filled: Path) -> None:
    store = Store(filled)
    assert [row["trial"] for row in store.rows("trials")] == list(range(TRIALS))
    assert len(store.rows("metrics")) == TRIALS * (len(METRICS) + len(OBJECTIVES))
    assert len(store.results) == TRIALS
    assert open_sweep(filled).counts()["completed"] == TRIALS


def test_the_answers_are_those_of_plain_loops(filled: Path) -> None:
    known = points(filled)
    beaten = {
        one
        for one, (gain, cost) in known.items()
        if any(g >= gain and c <= cost and (g, c) != (gain, cost) for g, c in known.values())
    }
    assert set(answer(filled, "pareto")["answer"]) == known.keys() - beaten
    layers = {
        row["trial"]: row["layer"] for row in open_sweep(filled).rows("SELECT trial, layer FROM trials")
    }
    best: dict[int, int] = {}
    for trial, (gain, _) in known.items():
        if layers[trial] not in best or gain > known[best[layers[trial]]][0]:
            best[layers[trial]] = trial
    found: list[dict[str, Any]] = answer(filled, "best_per_layer")["answer"]
    assert {row["layer"]: row["trial"] for row in found} == best
    said = answer(filled, "completions")["answer"]
    assert [(row["trial"], row["item"]) for row in said] == [(TRIALS // 2, 0), (TRIALS // 2, 1)]


def test_a_dose_response_is_the_mean_over_its_trials(filled: Path) -> None:
    rows = open_sweep(filled).rows("SELECT trial, layer, dose FROM trials")
    known = points(filled)
    found = answer(filled, "dose_response")["answer"]
    one = next(row for row in found if row["split"] == "select" and row["trials"] > 1)
    there = [
        known[row["trial"]][0] for row in rows if (row["layer"], row["dose"]) == (one["layer"], one["dose"])
    ]
    assert one["trials"] == len(there)
    assert one["mean"] == pytest.approx(sum(there) / len(there))
    assert (one["least"], one["most"]) == pytest.approx((min(there), max(there)))


def test_states_that_are_kept_are_those_that_were_given_and_one_layer_is_read_alone(tmp_path: Path) -> None:
    states = np.random.default_rng(0).normal(size=(5, 2 * activations.PROMPT, 8)).astype(np.float16)
    path = activations.write(tmp_path, states, times=2)
    assert activations.layer_share(path, 3) == pytest.approx(1 / 5, rel=0.05)
    read = pq.read_table(path, filters=[("layer", "==", 3)])
    kept = np.stack([np.frombuffer(each, np.float16) for each in read["vector"].to_pylist()])
    np.testing.assert_array_equal(kept, np.concatenate([states[3]] * 2))
    assert read["item"].to_pylist() == [item for item in range(4) for _ in range(activations.PROMPT)]
