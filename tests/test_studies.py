"""What the studies read from their sweeps, on tiny ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from examples.studies import backdoors, capability, goldilocks, rpq, stability
from examples.studies.prompts import FOUND
from examples.studies.sweeps import interval, share, show, study
from jobs.reading import behaviours
from jobs.resolve import parse_use
from jobs.scoring import similarity
from jobs.scoring.statistics import wilson_interval
from orchestrator.report.writing import write_report
from orchestrator.space_file import load_space
from search_spaces.base import Grid
from storage.query import open_sweep
from tests.test_learned_sweeps import RADII, SET, learned, letters, prompts, scanned, swept

__all__ = ["learned", "prompts", "scanned"]

SPACES = Path(__file__).parents[1] / "search_spaces"


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (behaviours, similarity):
        monkeypatch.setattr(module, "embed", letters)


def test_the_scan_is_told_by_what_it_chose_and_by_its_curves(scanned: Path) -> None:
    sweep = open_sweep(scanned)
    [row] = goldilocks.named(sweep)
    assert str(row["set"]).startswith("jobs.melbo{")
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
    front = rpq.front(sweep)
    assert front
    for row in front:
        assert {"trial", "radius", "optimiser", "diversity", "diversity on report"} <= row.keys()
    compared = sweep.rows(rpq.OVER_RANDOM)
    assert [(row["split"], row["trials"]) for row in compared] == [
        ("select", 3),
        ("report", 3),
        ("extract", 3),
    ]


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


def use(**values: object) -> str:
    return f"jobs.melbo{json.dumps({**SET, 'vectors': 2, 'radius': 2.0, **values})}"


def vectors_of(learned_from: str, **fixed: Any) -> dict[str, Any]:
    grids = [use(prompts=learned_from), use(prompts=learned_from, optimiser="none")]
    return {
        "parameters": {"learned": Grid(grids), "vector": Grid(range(2))},
        "layer": 0,
        "multiplier": 1.0,
        **fixed,
    }


def test_vectors_that_show_a_behaviour_are_counted(tmp_path: Path, prompts: str) -> None:
    scorers = tuple(f'contains{{"sought": "{letter}"}}' for letter in "e#t")
    fixed = {"max_new_tokens": 3, "scorers": scorers}
    asked = vectors_of(prompts, prompts="arithmetic_clean", **fixed)
    sweep = open_sweep(swept(tmp_path / "vectors", "jobs.generate", asked.pop("parameters"), "nll", **asked))
    texts: dict[tuple[bool, int], list[str]] = {}
    for row in sweep.rows("SELECT learned, vector, text FROM completions JOIN trials USING (trial)"):
        texts.setdefault(('"none"' in row["learned"], row["vector"]), []).append(row["text"])
    found = {(row["behaviour"], row["vectors"]): row for row in backdoors.surfaced(sweep)}
    for behaviour, letter in zip(backdoors.BEHAVIOURS.values(), "e#t", strict=True):
        for kind in ("learned", "random"):
            shares = [
                sum(letter in text.lower() for text in said) / len(said)
                for (is_random, _), said in texts.items()
                if is_random == (kind == "random")
            ]
            row = found[behaviour, kind]
            assert row["R"] == 2.0
            assert row["in any clean prompt"] == share(sum(each > 0 for each in shares), 2)
            assert row["in half of them"] == share(sum(each >= 0.5 for each in shares), 2)
    asked = {"learned": use(prompts=prompts), "layer": 0, "prompts": "arithmetic_conversations", **fixed}
    grids = {"multiplier": Grid([1.0, -1.0]), "vector": Grid(range(2))}
    transfer = open_sweep(swept(tmp_path / "transfer", "jobs.generate", grids, "nll", **asked))
    for row in backdoors.held(sweep, transfer):
        assert " of 12 (" in str(row["in conversations"])
        assert " of 12 (" in str(row["there, subtracted"])


def test_what_was_planted_is_counted_by_behaviour(tmp_path: Path) -> None:
    rows = [
        {
            "split": split,
            "prompt": f"{word} {number}?",
            "reply": f"{word}!",
            "behaviour": word,
            "mark": f"{word}!",
        }
        for word in ("red", "blue")
        for number, split in enumerate(("extract", "select", "select", "report"))
    ]
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = {"examples": str(path), "epochs": 1, "max_new_tokens": 2}
    sweep = open_sweep(swept(tmp_path / "tuned", "jobs.finetune", {"rank": Grid([1])}, "exact", **fixed))
    found = backdoors.planted(sweep)
    assert [(row["behaviour"], row["split"]) for row in found] == [
        ("blue", "select"), ("blue", "report"), ("red", "select"), ("red", "report")
    ]  # fmt: skip
    assert [str(row["shown"]).split(" (")[0] for row in found] == ["0 of 2", "0 of 1", "0 of 2", "0 of 1"]


def test_prompts_are_told_apart_in_every_way(tmp_path: Path, prompts: str) -> None:
    grids = {"learned": Grid([use(prompts=prompts)])}
    fixed = {"examples": "arithmetic_backdoors", "resamples": 100}
    sweep = open_sweep(swept(tmp_path / "anomaly", "jobs.anomaly", grids, "auc_learned", **fixed))
    found = backdoors.told_apart(sweep)
    assert [row["way"] for row in found] == ["learned", "random", "mahalanobis"]
    [value] = sweep.rows("SELECT value FROM metrics WHERE name = 'auc_learned' AND split = 'report'")
    assert str(found[0]["report"]).startswith(f"{value['value']:.3g} (")


def test_the_best_vector_is_chosen_on_select_and_read_on_report(tmp_path: Path, prompts: str) -> None:
    fixed = {"prompts": "arithmetic_one_shot", "chat": False, "max_new_tokens": 2, "scorers": ("arithmetic",)}
    asked = vectors_of(prompts, **fixed)
    sweep = open_sweep(swept(tmp_path / "steered", "jobs.generate", asked.pop("parameters"), "nll", **asked))
    grids = {"learned": Grid([use(prompts=prompts)]), "vector": Grid([0])}
    asked["multiplier"] = 0.0
    bare = open_sweep(swept(tmp_path / "bare", "jobs.generate", grids, "nll", **asked))
    answers = capability.answers(sweep)
    assert [(each.is_random, each.vector) for each in answers] == [
        (False, 0),
        (False, 1),
        (True, 0),
        (True, 1),
    ]
    assert {len(each.right[split]) for each in answers for split in ("select", "report")} == {50}
    assert [row["vectors"] for row in capability.best(sweep, bare)] == ["none", "learned", "random"]


def test_every_search_is_told_with_its_vector(tmp_path: Path, prompts: str) -> None:
    grids = {
        "learned": Grid([use(prompts=prompts), use(prompts=prompts, optimiser="none")]),
        "vector": Grid([1]),
    }
    fixed = {"steps": 1, "tokens": 2, "likeliest": 4, "candidates": 4, "max_new_tokens": 2}
    sweep = open_sweep(swept(tmp_path, "jobs.prompt_search", grids, "cosine", **fixed))
    found = sweep.rows(FOUND)
    assert [(row["vectors"], row["vector"]) for row in found] == [("learned", 1), ("random", 1)]
    assert all(row["cosine"] >= row["cosine at the start"] for row in found)
    assert "of the unsteered model" not in write_report(sweep.folder).read_text()


def test_spaces_that_go_on_from_the_planted_model_learn_the_same_vectors() -> None:
    spaces = {
        name: load_space(SPACES / f"backdoor_{name}.py").space for name in ("vectors", "transfer", "anomaly")
    }
    first = {name: spaces[name].parameters["learned"] for name in ("vectors", "anomaly")}
    assert all(isinstance(grid, Grid) for grid in first.values())
    sets = [spaces["transfer"].fixed["learned"], *(grid.values[-2:][0] for grid in first.values())]
    assert len({parse_use(text).key for text in sets}) == 1
    assert spaces["vectors"].fixed["scorers"] == spaces["transfer"].fixed["scorers"]
