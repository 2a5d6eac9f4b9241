"""What the studies read from their sweeps, on tiny ones."""

from pathlib import Path

import pytest

from examples.studies import goldilocks, rpq, stability
from examples.studies.sweeps import interval, share, show, study
from jobs.scoring.statistics import wilson_interval
from orchestrator.space_file import load_space
from storage.query import open_sweep
from tests.test_learned_sweeps import RADII, learned, prompts, scanned

__all__ = ["learned", "prompts", "scanned"]

SPACES = Path(__file__).parents[1] / "search_spaces"


def test_the_scan_is_told_by_what_it_chose_and_by_its_curves(scanned: Path) -> None:
    sweep = open_sweep(scanned)
    [row] = goldilocks.named(sweep)
    metrics = {
        (each["split"], each["name"]): each["value"]
        for each in sweep.rows("SELECT * FROM metrics WHERE trial = 0")
    }
    assert row["diversity"] == metrics["report", "diversity"]
    assert str(row["best_radius"]).startswith(f"{metrics['select', 'best_radius']:.3g} (")
    curves = sweep.rows(goldilocks.CURVES)
    assert [each["prompt"] for each in curves] == [f"R = {radius:g}" for radius in RADII]
    assert all(each["fluent"] == 1 for each in curves)


def test_the_front_stands_with_the_split_report_beside(learned: Path) -> None:
    sweep = open_sweep(learned)
    for row in rpq.front(sweep):
        assert {"trial", "radius", "optimiser", "diversity", "diversity on report"} <= row.keys()
    for row in sweep.rows(rpq.OVER_RANDOM):
        assert row["trials"] == 6


def test_each_set_is_told_by_its_norm_and_orthogonality() -> None:
    space = load_space(SPACES / "stability.py").space

    class Sweep:
        def rows(self, sql: str) -> list[dict[str, object]]:
            return [
                {"trial": trial, "learned": learned, "name": name, "value": 0.25}
                for trial, learned in enumerate(space.parameters["learned"].values)
                for each in stability.NAMES
                for name in (each, f"{each}_random")
            ]

    found = stability.matched(Sweep())  # type: ignore[arg-type]
    assert [(row["radius"], row["orthogonality"]) for row in found] == [
        (radius, orthogonality) for radius in (0.05, 0.2, 0.8) for orthogonality in ("joint", "none")
    ]
    assert found[0]["recurring"] == "0.25 (random 0.25)"


def test_counts_come_with_their_interval() -> None:
    low, high = wilson_interval(3, 32)
    assert share(3, 32) == f"3 of 32 (0.09, {low:.2f} to {high:.2f})"
    assert share(0, 0) == "0 of 0 (0.00, 0.00 to 1.00)"
    assert interval(0.5, None, 1.0) == "0.5 (none to 1)"


def test_rows_are_shown_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    show("Title", [{"a": 1, "b": 0.123456}, {"a": "x", "b": None}])
    assert capsys.readouterr().out == "\n### Title\n\n| a | b |\n| --- | --- |\n| 1 | 0.123 |\n| x | none |\n"


def test_settings_are_for_every_sweep(tmp_path: Path) -> None:
    found = study("words", ["--out", str(tmp_path), "--set", "workers=1", "--set", "seed=2"])
    assert found == (tmp_path, ["workers=1", "seed=2"])
