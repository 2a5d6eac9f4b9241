"""One trial once more, on the real engine with a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import SpecError
from jobs.reading import effects
from orchestrator.printing import print_drift
from orchestrator.replaying import replay
from storage.query import open_sweep
from tests.command import steersweep

pytestmark = pytest.mark.ray


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("takes_stored", [True, False])
def test_what_has_not_changed_comes_out_as_it_was(
    finished: dict[str, Any], place: Path, takes_stored: bool
) -> None:
    folder = place / "finished"
    before = contents(folder / "tables") | contents(folder / "artifacts")
    for trial in (0, 1, 5):
        found = replay(folder, trial, takes_stored=takes_stored)
        assert found["is_same"], found
        assert (found["changed"], found["other_texts"], found["device"]) == ([], [], "cpu")
        stored = open_sweep(folder).rows(f"SELECT split, name, value FROM metrics WHERE trial = {trial}")
        assert {(each["split"], each["name"]): each["then"] for each in found["metrics"]} == {
            (row["split"], row["name"]): row["value"] for row in stored
        }
        assert found["texts"] == len(open_sweep(folder).completions(trial)) > 0
    assert contents(folder / "tables") | contents(folder / "artifacts") == before


def test_what_has_changed_is_told(
    finished: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = effects.effect

    def moved(*arguments: Any) -> dict[str, float]:
        return {name: value + 0.25 for name, value in real(*arguments).items()}

    monkeypatch.setattr(effects, "effect", moved)
    monkeypatch.setattr("jobs.resolve.code_version", lambda job: "other")
    found = replay(place / "finished", 0)
    assert not found["is_same"]
    assert [each["name"] for each in found["changed"]] == ["code"]
    other = {
        (each["name"], each["split"]): each["difference"] for each in found["metrics"] if not each["is_same"]
    }
    ends = ("effect", "effect_low", "effect_high")
    assert other == {(name, split): pytest.approx(0.25) for name in ends for split in ("select", "report")}
    print_drift(found)
    said = capsys.readouterr().out
    assert "code is 'other' now" in said
    assert "6 of " in said


def test_a_trial_that_is_not_there_is_refused(finished: dict[str, Any], place: Path) -> None:
    with pytest.raises(SpecError, match="there is no trial 99"):
        replay(place / "finished", 99)


def test_the_command_ends_with_0_where_nothing_is_other(finished: dict[str, Any], place: Path) -> None:
    done = steersweep("replay", place / "finished", "4", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["is_same"]
