"""The report of hand-made sweeps: what it says, what it escapes, what it leaves out."""

import base64
import hashlib
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.errors import SpecError
from orchestrator.report import direction_figures, figures
from orchestrator.report.canvas import DARK, LIGHT, Measure, to_png
from orchestrator.report.directions import read_section
from orchestrator.report.figures import Plot
from orchestrator.report.writing import write_report
from storage.artifacts import write_artifact
from storage.manifest import StoredResult
from storage.parquet import write_table
from storage.query import open_sweep
from storage.store import Part, Store

LAYERS = (10, 14, 18)
DOSES = (-0.3, -0.15, 0.0, 0.15, 0.3)
METRICS = {
    "log_odds": {"unit": "nats", "meaning": "log-odds of kind over grim words"},
    "effect": {"unit": "nats", "meaning": "shift of log_odds in the dose's direction"},
    "nll": {"unit": "nats/token", "meaning": "surprise of the unsteered model"},
    "repetition": {"unit": "share", "meaning": "share of repeated trigrams"},
    "damage": {"unit": "nats/token", "meaning": "rise of nll plus rise of repetition"},
}
OBJECTIVES = ({"metric": "effect", "direction": "maximize"}, {"metric": "damage", "direction": "minimize"})
PROMPTS = (
    ("select", "How was your day?"),
    ("select", "Describe <b>Monday</b>."),
    ("report", "Tell me about rain."),
)
NASTY = (
    '<script>alert("owned")</script><img src=x onerror=alert(1)>',
    "emoji 👩‍🔬🎉 & \x1b[31mred\x00 \x9b bell\x07\r\n\u202egnirts",
    '"><style>@import url(https://evil.example/x.css)</style>{{ 7 * 7 }} <a href="http://evil.example">',
)


class Trial(NamedTuple):
    params: dict[str, Any]
    metrics: dict[str, dict[str, float | None]]
    state: str = "completed"
    reason: str | None = None
    texts: tuple[str, ...] = ()


def make_sweep(
    folder: Path,
    trials: list[Trial],
    *,
    parameters: dict[str, str],
    objectives: tuple[dict[str, str], ...] = OBJECTIVES,
    metrics: dict[str, dict[str, str]] = METRICS,
    baseline: tuple[str, ...] = (),
    asked: int = 0,
) -> Path:
    """Write a sweep as the orchestrator would; `asked` further trials wait in the ledger."""
    identity = {
        "sweep": "tone_grid-12345678",
        "space": "tone_grid",
        "description": "Which layer and which dose change the tone?",
        "job": "jobs.steer",
        "parameters": parameters,
        "objectives": list(objectives),
        "metrics": metrics,
        "model": {"id": "smollm2-135m", "revision": None, "dtype": "float32", "trust_remote_code": False},
        "seed": 7,
        "config": {"workers": 2, "sampler": None, "trials": None},
        "provenance": {
            "git_revision": "0a1b2c3d",
            "packages": {"torch": "2.13.0"},
            "note": "</pre><script>x</script>",
        },
    }
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(identity))
    seen: dict[str, int] = {}
    tables: dict[str, list[dict[str, Any]]] = {"metrics": [], "completions": [], "trials": [], "attempts": []}
    if baseline:
        tables["completions"] += _completions("base", baseline)
        tables["metrics"] += _metric_rows(
            "base", {"select": {"log_odds": 0.3, "nll": 1.1}, "report": {"log_odds": 0.2}}
        )
        tables["attempts"].append(_attempt("base", None, "jobs.steer", 0))
    for number, trial in enumerate(trials):
        spec = "unsteered" if trial.params.get("dose") == 0 else f"spec{number}"
        first = seen.setdefault(spec, number)
        if first == number:
            tables["metrics"] += _metric_rows(spec, trial.metrics)
            tables["completions"] += _completions(spec, trial.texts)
            tables["attempts"].append(_attempt(spec, number, "jobs.steer", number))
        tables["trials"].append(
            {
                "trial": number,
                "spec": spec,
                "state": trial.state,
                "reason": trial.reason,
                "reused_from": None if first == number else first,
                "seconds": 1.5 if first == number else None,
                "finished": 1.7e9 + number,
                "params": json.dumps(trial.params),
            }
        )
    files = tuple(
        write_table(folder, table, tables[table]) for table in ("metrics", "completions") if tables[table]
    )
    results = tuple(StoredResult(spec, "completed", None) for spec in seen)
    Store(folder).commit([Part(files, results)], trials=tables["trials"], attempts=tables["attempts"])
    _ask(folder, range(len(trials), len(trials) + asked))
    return folder


def _metric_rows(spec: str, metrics: dict[str, dict[str, float | None]]) -> list[dict[str, Any]]:
    return [
        {"spec": spec, "split": split, "name": name, "value": value}
        for split, values in metrics.items()
        for name, value in values.items()
    ]


def _completions(spec: str, texts: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {
            "spec": spec,
            "split": split,
            "item": item,
            "prompt": prompt,
            "text": text,
            "tokens": 9,
            "nll": 1.2,
            "repetition": 0.05,
        }
        for item, ((split, prompt), text) in enumerate(zip(PROMPTS, texts, strict=False))
    ]


def _attempt(spec: str, trial: int | None, job: str, number: int) -> dict[str, Any]:
    return {
        "attempt": f"a{number}",
        "pack": "p",
        "trial": trial,
        "spec": spec,
        "job": job,
        "state": "ok",
        "worker": "w0",
        "host": "h",
        "started": 1.7e9 + number,
        "finished": 1.7e9 + number + 1.5,
    }


def _ask(folder: Path, numbers: range) -> None:
    spec = {"job": "jobs.steer", "code": "c", "params": {}, "model": {"id": "m"}, "data": {}, "seed": 0}
    events = [
        {
            "event": "asked",
            "trial": number,
            "params": {},
            "spec": {**spec, "seed": number},
            "seen": 0,
            "fixed": [],
        }
        for number in numbers
    ]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def tone_trials(layers: tuple[int, ...] = LAYERS, doses: tuple[float, ...] = DOSES) -> list[Trial]:
    """A grid whose middle layers steer best and whose large doses break the text."""
    noise = random.Random(0)
    trials = []
    for layer in layers:
        gain = 9 * math.exp(-(((layer - 16) / 5) ** 2))
        for dose in doses:
            metrics = {}
            for split in ("select", "report"):
                shift = math.tanh(gain * dose / 2) * 4 + (noise.gauss(0, 0.08) if dose else 0.0)
                damage = max(0.0, 14 * abs(dose) ** 2 + noise.gauss(0, 0.05)) if dose else 0.0
                metrics[split] = {
                    "log_odds": 0.3 + shift,
                    "effect": math.copysign(1, dose) * shift if dose else 0.0,
                    "nll": 1.1 + damage,
                    "repetition": min(1.0, 0.02 + abs(dose) / 3),
                    "damage": damage,
                }
            texts = tuple(
                f"{'A grim' if dose < 0 else 'A lovely'} reply, layer {layer}, dose {dose}." for _ in PROMPTS
            )
            trials.append(Trial({"layer": layer, "dose": dose}, metrics, texts=texts))
    return trials


GRID = {"layer": "BIGINT", "dose": "DOUBLE"}
VOID = {"img", "link", "meta", "source", "br", "hr", "input"}


class Page(HTMLParser):
    """A page as a browser takes it: elements with attributes, and the text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == [], f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in self.inline:
            self.inline[self._open[-1]].append(data)
            return
        self.text += data
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data

    def attributes(self, *names: str) -> list[str]:
        """Values of attributes, wherever they stand."""
        return [value or "" for _, found in self.elements for name, value in found.items() if name in names]

    def row(self, *start: str) -> list[str]:
        """The only row that starts with these cells, white space folded."""
        folded = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        [row] = [row for row in folded if tuple(row[: len(start)]) == start]
        return row


def report(folder: Path) -> Page:
    return Page(write_report(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unfinished tone sweep; the middle layer's strongest positive dose says nasty things."""
    trials = tone_trials()
    trials[3] = Trial(trials[3].params, {}, "failed", "ZeroDivisionError: <b>division</b> by zero")
    trials[4] = Trial(trials[4].params, {}, "infeasible", "effect is not defined")
    trials[9] = trials[9]._replace(texts=NASTY)
    path = make_sweep(
        tmp_path_factory.mktemp("sweeps") / "tone",
        trials,
        parameters=GRID,
        baseline=("Fine.", "The first day of the week.", "Water that falls."),
        asked=2,
    )
    lost = {**_attempt("base", None, "jobs.steer", 99), "state": "lost", "reason": "the worker died"}
    Store(path).commit([], attempts=[lost])
    return path


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return report(folder)


class TestSafety:
    def test_model_text_is_shown_as_written_and_never_as_markup(self, page: Page) -> None:
        assert NASTY[0] in page.text
        assert "{{ 7 * 7 }}" in page.text
        assert "Describe <b>Monday</b>." in page.text
        assert "ZeroDivisionError: <b>division</b> by zero" in page.text
        assert "</pre><script>x</script>" in page.text
        tags = [tag for tag, _ in page.elements]
        assert tags.count("script") == 2, "the results, as JSON, and what shows them"
        assert tags.count("style") == 1
        assert not re.search("[<>&]", page.inline["script"][0])
        assert "b" not in tags
        assert not [name for _, found in page.elements for name in found if name.startswith("on")]

    def test_nothing_is_loaded_from_elsewhere(self, page: Page) -> None:
        targets = page.attributes("src", "srcset", "href", "data", "action", "poster")
        assert targets
        assert all(target.startswith(("#", "data:")) for target in targets)
        assert not re.search(
            r"https?:|@import|url\(", "".join(page.inline["style"] + page.inline["script"][1:])
        )

    def test_only_the_page_s_own_script_may_run(self, page: Page) -> None:
        [policy] = [found["content"] for _, found in page.elements if "http-equiv" in found]
        digest = base64.b64encode(hashlib.sha256(page.inline["script"][1].encode()).digest()).decode()
        assert policy is not None
        assert "default-src 'none'" in policy
        assert f"script-src 'sha256-{digest}'" in policy

    def test_control_characters_are_spelled_out_and_emoji_stay_whole(self, page: Page) -> None:
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page.source)
        assert "emoji 👩‍🔬🎉 & ␛[31mred␀ ⟨U+009B⟩ bell␇␍\n⟨U+202E⟩gnirts" in page.text


class TestContent:
    def test_facts_say_what_ran(self, page: Page) -> None:
        text = " ".join(page.text.split())
        for fact in (
            "tone_grid",
            "Which layer and which dose change the tone?",
            "smollm2-135m, float32",
            "13 completed, 1 infeasible, 1 failed, 2 waiting",
            "Unfinished: 2 of 17 trials",
            "0a1b2c3d",
        ):
            assert fact in text

    def test_front_shows_select_and_report_side_by_side(self, page: Page) -> None:
        trials = tone_trials()
        kept = [number for number in range(len(trials)) if number not in (3, 4)]
        points = {
            n: (trials[n].metrics["select"]["effect"], -trials[n].metrics["select"]["damage"]) for n in kept
        }
        best = [
            n
            for n, point in points.items()
            if not any(other != point and all(np.greater_equal(other, point)) for other in points.values())
        ]
        listed = {row[0] for row in page.rows if row and row[0].isdigit() and len(row) == 7}
        assert listed <= {str(number) for number in best}
        for number in best:
            if trials[number].params["dose"]:
                select, held_out = (trials[number].metrics[split] for split in ("select", "report"))
                expected = [select["effect"], held_out["effect"], select["damage"], held_out["damage"]]
                assert page.row(str(number))[3:] == [f"{value:.3f}" for value in expected]

    def test_trials_of_the_same_work_share_a_point_of_the_front(self, page: Page) -> None:
        assert page.row("2the same work as 7, 12")[1:3] == ["10", "0"]
        assert page.row("7front", "completedas trial 2")[4:8] == ["0.000"] * 4

    def test_steered_replies_stand_beside_unsteered_ones(self, page: Page) -> None:
        assert "Trial 9: layer 14, dose 0.3" in page.text
        assert "strongest positive dose at layer 14" in page.text
        assert "strongest negative dose at layer 14" in page.text
        grim = [
            row
            for row in page.rows
            if row and row[-1].strip().startswith("A grim reply, layer 14, dose -0.3.")
        ]
        assert [row[1].split("nll")[0].strip() for row in grim] == [
            "Fine.",
            "The first day of the week.",
            "Water that falls.",
        ]

    def test_failures_are_listed_with_their_reasons(self, page: Page) -> None:
        assert page.row("3", "failed", "10", "0.15", "ZeroDivisionError: <b>division</b> by zero")
        assert page.row("4", "infeasible", "10", "0.3", "effect is not defined")
        assert page.row("lost", "jobs.steer") == [
            "lost",
            "jobs.steer",
            "1",
            "a prerequisite",
            "the worker died",
        ]

    def test_metrics_come_with_units_meanings_and_unsteered_values(self, page: Page) -> None:
        assert page.row("log_odds")[1:] == [
            "nats",
            METRICS["log_odds"]["meaning"],
            "not an objective",
            "0.300",
            "0.200",
        ]
        assert page.row("damage")[3:] == ["smaller", "–", "–"]

    def test_figures_lie_beside_the_page_whole(self, folder: Path, page: Page) -> None:
        files = {path.name: path.read_bytes() for path in (folder / "report").iterdir()}
        assert set(files) == {"index.html", "heatmap.png", "curves.png", "pareto.png"}
        for name in ("heatmap.png", "curves.png", "pareto.png"):
            assert files[name].startswith(b"\x89PNG")
            assert base64.b64encode(files[name]).decode() in page.source

    def test_page_is_navigable_without_seeing_it(self, page: Page) -> None:
        tags = [tag for tag, _ in page.elements]
        ids = page.attributes("id")
        assert len(ids) == len(set(ids))
        assert {target[1:] for target in page.attributes("href") if target.startswith("#")} <= set(ids)
        assert set(page.attributes("aria-labelledby")) <= set(ids)
        assert all(found.get("alt") for tag, found in page.elements if tag == "img")
        assert tags.count("table") == tags.count("caption")
        assert [tag for tag in tags if re.fullmatch("h[1-6]", tag)][:2] == ["h1", "h2"]
        assert tags.count("h1") == tags.count("main") == 1
        headers = [found for tag, found in page.elements if tag == "th"]
        assert all("scope" in found for found in headers)


class TestAnySweep:
    @pytest.fixture(autouse=True)
    def _unpainted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Figures are built but not painted: that is most of a report's time, and seen above."""
        monkeypatch.setattr("orchestrator.report.writing.to_png", lambda figure: b"PNG")

    def test_nothing_completed_is_said_so(self, tmp_path: Path) -> None:
        page = report(make_sweep(tmp_path / "empty", [], parameters=GRID, asked=3))
        assert "No trial has completed yet" in page.text
        assert "3 waiting" in page.text
        assert "img" not in [tag for tag, _ in page.elements]
        assert [path.name for path in (tmp_path / "empty" / "report").iterdir()] == ["index.html"]

    def test_nothing_asked_is_said_so(self, tmp_path: Path) -> None:
        assert "none yet" in report(make_sweep(tmp_path / "new", [], parameters=GRID)).text

    def test_undefined_values_are_counted_and_kept_off_the_front(self, tmp_path: Path) -> None:
        trials = [
            Trial({"mode": "a"}, {"select": {"effect": math.nan, "damage": 0.0}}),
            Trial({"mode": "b"}, {"select": {"effect": 1.0, "damage": 0.5}}),
            Trial({"mode": "c"}, {"select": {"effect": None, "damage": 0.0}, "report": {}}),
        ]
        page = report(make_sweep(tmp_path / "nan", trials, parameters={"mode": "VARCHAR"}))
        assert "2 completed trials have no value of effect" in page.text
        assert page.row("1", "b") == ["1", "b", "1.000", "–", "0.500", "–"]
        assert page.row("0", "completed")[3] == "–"

    def test_a_single_objective_shows_its_best_trial_and_intervals(self, tmp_path: Path) -> None:
        metrics = {
            name: {"unit": "share", "meaning": meaning}
            for name, meaning in (
                ("accuracy", "right"),
                ("accuracy_low", "lower end"),
                ("accuracy_high", "upper end"),
            )
        }
        trials = [
            Trial({"layer": 3, "dose": dose}, {split: _interval(value) for split in ("select", "report")})
            for dose, value in ((0.1, 0.6), (0.2, 0.8), (0.3, 0.77))
        ]
        best = ({"metric": "accuracy", "direction": "maximize"},)
        path = make_sweep(tmp_path / "honest", trials, parameters=GRID, objectives=best, metrics=metrics)
        page = report(path)
        listed = [row for row in page.rows if row and row[0] in ("0", "1", "2") and len(row) == 6]
        assert [row[0] for row in listed] == ["1", "2"], "the second best is on the front in some draws"
        assert page.row("1")[1:5] == ["3", "0.2", "0.800 [0.700, 0.850]", "0.800 [0.700, 0.850]"]
        shares = [float(row[5].split()[0]) for row in listed]
        assert shares[0] > 0.5 > shares[1] >= 0.1
        assert "nearly" in listed[1][5]
        assert "only for having been chosen" in page.text
        assert "flattering" in page.text
        assert "Bars span the intervals" in page.text
        assert "heatmap.png" in [file.name for file in (path / "report").iterdir()]

    def test_a_job_that_only_extracts_shows_its_metrics_on_the_split_extract(self, tmp_path: Path) -> None:
        trials = [Trial({"layer": 3, "dose": dose}, {"extract": {"effect": dose}}) for dose in (0.1, 0.3)]
        page = report(make_sweep(tmp_path / "extracted", trials, parameters=GRID, objectives=OBJECTIVES[:1]))
        assert page.row("1")[1:] == ["3", "0.3", "0.300"]
        assert page.row("0", "completed")[4] == "0.100"
        assert "chosen on the split extract" in page.text
        assert "split select" not in page.text
        assert "split report" not in page.text
        assert "Curves of effect over dose, a colour for each layer." in page.attributes("alt")

    def test_other_parameters_take_the_place_of_layer_and_dose(self, tmp_path: Path) -> None:
        trials = [
            Trial({"R": r, "q": q, "mode": "a"}, {"select": {"effect": r * q, "damage": r}})
            for r in (0.5, 2.0, 8.0)
            for q in (1, 2)
        ]
        page = report(
            make_sweep(
                tmp_path / "melbo", trials, parameters={"q": "BIGINT", "R": "DOUBLE", "mode": "VARCHAR"}
            )
        )
        assert (
            "Heat-map of effect by q and R: highest 16 at q 2, R 8; lowest 0.5 at q 1, R 0.5."
            in page.attributes("alt")
        )
        assert "Curves of effect, damage over R, a colour for each q." in page.attributes("alt")
        assert "There are no replies of steered trials" in page.text

    def test_without_numeric_parameters_only_the_scatter_is_drawn(self, tmp_path: Path) -> None:
        trials = [Trial({"mode": mode}, {"select": {"effect": 1.0, "damage": 0.1}}) for mode in ("a", "b")]
        path = make_sweep(tmp_path / "modes", trials, parameters={"mode": "VARCHAR"})
        report(path)
        assert {file.name for file in (path / "report").iterdir()} == {"index.html", "pareto.png"}

    def test_a_dose_of_zero_stands_in_for_a_missing_baseline(self, tmp_path: Path) -> None:
        trials = [
            Trial({"dose": dose}, {"select": {"effect": dose, "damage": dose}}, texts=(f"reply {dose}",))
            for dose in (0.0, 0.2)
        ]
        page = report(make_sweep(tmp_path / "zero", trials, parameters={"dose": "DOUBLE"}))
        [row] = [row for row in page.rows if "How was your day?" in row[0]]
        assert "reply 0.0" in row[1]
        assert "reply 0.2" in row[2]

    def test_a_folder_without_a_sweep_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match="holds no sweep"):
            write_report(tmp_path)

    def test_a_pack_is_in_vain_if_nothing_of_it_counts(self, tmp_path: Path) -> None:
        path = make_sweep(tmp_path / "packs", [], parameters=GRID)
        states = {0: ("ok", "failed"), 10: ("lost", "lost"), 20: ("ok", "ok")}
        attempts = [
            {**_attempt("base", trial, "jobs.steer", began), "state": state}
            for began, of_pack in states.items()
            for trial, state in enumerate(of_pack)
        ]
        Store(path).commit([], attempts=attempts)
        assert report(path).row("jobs.steer") == ["jobs.steer", "3", "4.500", "1.500"]

    def test_writing_it_again_gives_the_same_bytes(self, tmp_path: Path) -> None:
        path = make_sweep(tmp_path / "again", [], parameters=GRID, asked=2)
        assert write_report(path).read_bytes() == write_report(path).read_bytes()


def _interval(value: float) -> dict[str, float | None]:
    return {"accuracy": value, "accuracy_low": value - 0.1, "accuracy_high": value + 0.05}


def direction_arrays(*, best: int = 2, layers: int = 4, positions: int = 4) -> dict[str, np.ndarray]:
    """An extraction as `jobs.extract` stores it: layer 0 has no direction, `best` tells best apart."""
    noise = np.random.default_rng(best)
    auc = np.array([np.nan, *[0.6] * (layers - 1)], np.float32)
    auc[best] = 0.875
    directions = noise.normal(size=(layers, 8)).astype(np.float32)
    directions[0] = np.nan
    words = [[["\n", " kind", "<b>"], ["\u202e", "", "\u00a0x"]] for _ in range(layers - 1)]
    texts = {"params": {"pairs": "tone <i>", "count": 0}, "layers": [*range(1, layers)], "lens": words}
    cosines = np.corrcoef(noise.normal(size=(layers, 8))).astype(np.float32)
    cosines[0] = cosines[:, 0] = np.nan
    shown = noise.uniform(-1, 1, (positions, layers, 5)).astype(np.float32)
    shown[:, 0] = shown[:, :, 0] = np.nan
    return {
        "directions": directions,
        "separability": auc + np.float32(0.1),
        "held_out_auc": auc,
        "held_out_accuracy": auc,
        "projections": noise.normal(size=(layers, 6, 2)).astype(np.float32),
        "cosine_profile": cosines,
        "histogram_edges": np.tile(np.linspace(-2, 2, 5), (layers, 1)).astype(np.float32),
        "histogram_positive": np.tile([0, 1, 2, 3], (layers, 1)),
        "histogram_negative": np.tile([3, 2, 1, 0], (layers, 1)),
        "pca_coordinates": noise.normal(size=(layers, 12, 2)).astype(np.float32),
        "pca_is_positive": np.repeat([1, 0], 6).astype(np.uint8),
        "pca_variance_shares": np.full((layers, 2), 0.25, np.float32),
        "position_cosines": shown,
        "position_columns": np.arange(5) - 3,
        "position_is_positive": (np.arange(positions) % 2 == 0).astype(np.uint8),
        "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8).copy(),
    }


def keep_directions(folder: Path, *extractions: dict[str, np.ndarray]) -> list[Path]:
    """Store extractions as a worker would; gives their files."""
    kept = [write_artifact(folder, arrays) for arrays in extractions]
    rows = [
        {"spec": f"x{number}", "job": "jobs.extract", "hash": a.sha256, "path": a.path, "bytes": a.bytes}
        for number, a in enumerate(kept)
    ]
    Store(folder).commit([Part((write_table(folder, "artifacts", rows),), ())])
    return [folder / artifact.path for artifact in kept]


class TestDirections:
    @pytest.fixture(scope="class")
    def page(self, tmp_path_factory: pytest.TempPathFactory) -> Page:
        path = make_sweep(tmp_path_factory.mktemp("kept") / "tone", tone_trials(), parameters=GRID)
        keep_directions(path, direction_arrays())
        return report(path)

    def test_the_best_layer_its_figures_and_its_tokens_are_shown(self, page: Page) -> None:
        text = " ".join(page.text.split())
        assert "1 stored extraction of directions." in text
        assert "6 pairs. Best layer: 2, area under the curve 0.875 over unseen pairs." in text
        alternatives = " ".join(page.attributes("alt"))
        for said in (
            "area under the curve over unseen pairs, there 0.88; chance is 0.5",
            "heat-map of the cosines between the layers' directions",
            "Layer 2. Left, histograms of both sides",
            "scatter plot of 12 activations",
            "the last 3 tokens of 4 prompts and up to 2 new ones",
        ):
            assert said in alternatives
        assert "#directions" in page.attributes("href")

    def test_of_layers_whose_area_is_1_the_one_with_the_widest_margin_is_best(self, tmp_path: Path) -> None:
        arrays = direction_arrays()
        distances = np.array([9.0, 1.0, 2.0, 3.0])  # layer 0 has no direction, layer 3 a smaller area
        sides = np.stack([np.arange(6) + 10 * distances[:, None], np.arange(6) + np.zeros((4, 1))], axis=-1)
        tied = np.array([np.nan, 1, 1, 0.99], np.float32)
        # that of layer 1 is farther apart in units of the stream, and less far in units of its spread
        sides[1] = 20 * (sides[1] - sides[1].mean())
        path = make_sweep(tmp_path / "tied", [], parameters=GRID)
        changes = {"held_out_auc": tied, "projections": sides.astype(np.float32), "held_out_accuracy": -tied}
        keep_directions(path, arrays | changes)
        [shown] = read_section(open_sweep(path)).shown
        spread = np.std(np.arange(6), ddof=1)
        assert (shown.best, shown.at_ceiling, shown.auc) == (2, 2, 1)
        assert shown.margin == pytest.approx(20 / spread)
        text = " ".join(report(path).text.split())
        assert "over unseen pairs. The area is at its ceiling of 1 at 2 layers" in text
        assert "of these, the best layer is the one where the two sides lie farthest apart" in text

    def test_an_area_below_1_or_1_at_a_single_layer_is_not_called_a_ceiling(self, tmp_path: Path) -> None:
        for number, auc in enumerate((0.9, 1.0)):
            arrays = direction_arrays()
            arrays["held_out_auc"][2] = auc
            path = make_sweep(tmp_path / str(number), [], parameters=GRID)
            keep_directions(path, arrays)
            assert "ceiling" not in report(path).text

    def test_tokens_are_escaped_and_their_white_space_is_seen(self, page: Page) -> None:
        assert [row[0] for row in page.rows if len(row) == 3 and "␣kind" in row[1]] == ["1", "2", "3"]
        assert page.row("2", "␊ ␣kind <b>")[2] == "⟨U+202E⟩ ∅ ⟨U+00A0⟩x"
        assert "pairs tone <i>" in page.text
        assert {"b", "i"}.isdisjoint(tag for tag, _ in page.elements)

    def test_the_page_stays_navigable(self, page: Page) -> None:
        ids, tags = page.attributes("id"), [tag for tag, _ in page.elements]
        assert len(ids) == len(set(ids))
        assert set(page.attributes("aria-labelledby")) <= set(ids)
        assert tags.count("table") == tags.count("caption")
        assert all(found.get("alt") for tag, found in page.elements if tag == "img")

    def test_of_many_extractions_a_few_are_shown_and_all_are_counted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("orchestrator.report.writing.to_png", lambda figure: b"PNG")
        path = make_sweep(tmp_path / "many", [], parameters=GRID)
        files = keep_directions(path, *(direction_arrays(best=layer, layers=6) for layer in range(1, 6)))
        files[1].unlink()
        page = report(path)
        text = " ".join(page.text.split())
        assert "5 stored extractions of directions; 2 are shown." in text
        assert f"{files[1].name} is gone" in text
        assert {file.name for file in (path / "report").glob("direction-*")} == {
            f"direction-{number}-{name}.png" for number in (1, 2) for name in ("layers", "pairs", "positions")
        }

    def test_directions_without_diagnostics_are_counted_only(self, tmp_path: Path) -> None:
        path = make_sweep(tmp_path / "old", [], parameters=GRID)
        keep_directions(path, {"directions": np.ones((3, 4), np.float32)})
        assert "1 stored extraction of directions; 0 are shown." in " ".join(report(path).text.split())

    def test_without_prompts_there_is_no_figure_of_positions(self, tmp_path: Path) -> None:
        path = make_sweep(tmp_path / "short", [], parameters=GRID)
        keep_directions(path, direction_arrays(positions=0))
        [shown] = read_section(open_sweep(path)).shown
        assert [*shown.images] == ["direction-1-layers", "direction-1-pairs"]

    def test_a_single_pair_has_no_area_and_an_empty_plane(self, tmp_path: Path) -> None:
        path = make_sweep(tmp_path / "single", [], parameters=GRID)
        arrays = direction_arrays()
        unknown = ("held_out_auc", "held_out_accuracy", "pca_coordinates", "pca_variance_shares")
        keep_directions(path, arrays | {name: np.full_like(arrays[name], np.nan) for name in unknown})
        page = report(path)
        assert "Best layer: 2." in " ".join(page.text.split())
        assert not re.search(r"\bnan\b", " ".join([page.text, *page.attributes("alt")]))


class TestDirectionFigures:
    def test_curves_and_profile_show_every_layer_and_name_their_units(self) -> None:
        arrays = direction_arrays()
        values = arrays["separability"], arrays["held_out_auc"], arrays["cosine_profile"]
        curves, profile, scale = direction_figures.layers_figure(*values, 2, LIGHT).axes
        lines = {line.get_label(): line for line in curves.lines}
        np.testing.assert_array_equal(lines["AUC, held out"].get_ydata(), arrays["held_out_auc"])
        np.testing.assert_array_equal(lines["in order, fitted on"].get_ydata(), arrays["separability"])
        assert curves.get_xlabel() == profile.get_ylabel() == "layer (block, from 0)"
        [mesh] = profile.collections
        np.testing.assert_array_equal(np.ma.getmaskarray(mesh.get_array()), np.isnan(values[2]))
        assert mesh.get_clim() == (-1, 1)
        assert scale.get_ylabel() == "cosine between directions"

    def test_both_sides_are_counted_and_scattered_apart(self) -> None:
        arrays = direction_arrays()
        points, sides = arrays["pca_coordinates"][2], arrays["pca_is_positive"].astype(bool)
        counts = arrays["histogram_positive"][2], arrays["histogram_negative"][2]
        figure = direction_figures.pairs_figure(
            arrays["histogram_edges"][2], counts, points, sides, np.array([0.25, 0.1]), DARK
        )
        along, plane = figure.axes
        assert along.get_xlabel() == "projection on the direction (residual-stream units)"
        assert [text.get_text() for text in along.get_legend().get_texts()] == ["positive", "negative"]
        for drawn, chosen in zip(plane.collections, (sides, ~sides), strict=True):
            np.testing.assert_allclose(drawn.get_offsets(), points[chosen])
        assert plane.get_ylabel() == "component 2 (10% of the variance)"

    def test_positions_are_means_over_the_prompts_that_have_the_token(self) -> None:
        cosines = np.array([[[np.nan, 0.2, 0.4]], [[np.nan, np.nan, -0.4]], [[np.nan, 0.6, 0.2]]])
        figure = direction_figures.positions_figure(
            np.array([-2, -1, 0]), cosines, np.array([True, False, True]), LIGHT
        )
        positive, negative, difference = (axes.collections[0].get_array() for axes in figure.axes[:3])
        np.testing.assert_allclose(positive, [[0.4, 0.3]])
        np.testing.assert_array_equal(np.ma.getmaskarray(negative), [[True, False]])
        np.testing.assert_allclose(difference[0, 1], 0.7)
        assert [axes.get_title() for axes in figure.axes[:3]] == [
            "positive",
            "negative",
            "positive − negative",
        ]
        assert figure.axes[0].get_xlabel() == "token (0 = first new one)"
        assert to_png(figure).startswith(b"\x89PNG")


EFFECT, DAMAGE = Measure("effect", "nats", "maximize"), Measure("damage", "nats/token", "minimize")


def cell_texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


class TestFigures:
    def test_heatmap_cells_are_means_and_colours_are_centred_between_the_signs(self) -> None:
        x, y = np.array([0.1, 0.1, 0.2, 0.1]), np.array([3.0, 3.0, 3.0, 5.0])
        values = np.array([1.0, 2.0, -4.0, 0.25])
        measures = (Measure("dose"), Measure("layer"), EFFECT)
        figure = figures.heatmap_figure(x, y, values, measures, LIGHT)
        assert cell_texts(figure) == ["1.50", "−4.00", "0.25"]
        [mesh] = figure.axes[0].collections
        assert mesh.get_clim() == (-4.0, 4.0)
        assert mesh.get_cmap().name == LIGHT.diverging
        [mesh] = figures.heatmap_figure(x, y, np.abs(values), measures, DARK).axes[0].collections
        assert mesh.get_clim() == (0.25, 4.0)
        assert mesh.get_cmap().name == DARK.sequential

    def test_heatmap_gathers_sampled_values_into_ranges(self) -> None:
        noise = np.random.default_rng(0)
        x, y, values = noise.uniform(-1, 1, 200), noise.integers(0, 8, 200).astype(float), np.ones(200)
        axes = figures.heatmap_figure(x, y, values, (Measure("dose"), Measure("layer"), EFFECT), LIGHT).axes[
            0
        ]
        assert len(axes.get_xticks()) == figures.BINS
        assert len(axes.get_yticks()) == 8

    def test_axes_name_units_and_the_way_to_better(self) -> None:
        figure = figures.pareto_figure(np.eye(2), np.array([True, True]), [0, 1], [EFFECT, DAMAGE], LIGHT)
        assert figure.axes[0].get_xlabel() == "effect (nats)   better →"
        assert figure.axes[0].get_ylabel() == "← better   damage (nats/token)"

    def test_labels_of_a_crowded_front_do_not_overlap(self) -> None:
        noise = np.random.default_rng(1)
        points = np.sort(noise.normal(size=(60, 2)) * 0.01, axis=0)
        figure = figures.pareto_figure(points, np.ones(60, bool), range(60), [EFFECT, DAMAGE], LIGHT)
        axes: Axes = figure.axes[0]
        boxes = [text.get_window_extent() for text in axes.texts]
        assert 5 < len(boxes) <= 60
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])

    def test_each_further_objective_has_its_own_scatter(self) -> None:
        measures = [EFFECT, DAMAGE, Measure("kl", "nats", "minimize")]
        points = np.random.default_rng(2).normal(size=(5, 3))
        assert len(figures.pareto_figure(points, np.ones(5, bool), range(5), measures, DARK).axes) == 2

    def test_curves_have_a_line_a_layer_and_bars_where_there_are_intervals(self) -> None:
        x, layers = np.tile([-1.0, 0.0, 1.0], 2), np.repeat([3.0, 7.0], 3)
        nothing = np.full(6, np.nan)
        panels = [
            Plot(EFFECT, x * layers, x * layers - 1, x * layers + 2, None),
            Plot(DAMAGE, np.array([1.0, 0, np.nan, 4, 0, 5]), nothing, nothing, 0.5),
        ]
        figure = figures.curves_figure(x, layers, panels, (Measure("dose"), Measure("layer")), LIGHT)
        top, bottom = figure.axes
        assert [bars.get_label() for bars in top.containers] == ["7", "3"]
        np.testing.assert_array_equal(top.containers[1].lines[0].get_xydata(), [[-1, -3], [0, 0], [1, 3]])
        [segments] = top.containers[1].lines[2]
        np.testing.assert_array_equal(segments.get_segments()[0], [[-1, -4], [-1, -1]])
        assert len(bottom.containers[1].lines[0].get_xdata()) == 2
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["7", "3", "unsteered"]

    def test_many_sampled_values_are_points_with_a_colour_scale(self) -> None:
        noise = np.random.default_rng(3)
        x, layers = 10 ** noise.uniform(-1, 1, 80), noise.integers(0, 30, 80).astype(float)
        nothing = np.full(80, np.nan)
        panels = [Plot(EFFECT, x, nothing, nothing, None)]
        figure = figures.curves_figure(x, layers, panels, (Measure("R"), Measure("layer")), DARK)
        assert figure.axes[0].get_xscale() == "log"
        assert figure.axes[0].containers[0].lines[0].get_linestyle() == "None"
        assert figure.legends == []
        assert to_png(figure).startswith(b"\x89PNG")
