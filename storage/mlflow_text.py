"""What MLflow's pages say of a sweep in words: names of runs, and the description with its front."""

from collections.abc import Mapping, Sequence
from typing import Any

from storage.pareto import pareto
from storage.query import StoredSweep

_MAX_NAME_CHARACTERS = 120
_MAX_NOTE_CHARACTERS = 5000  # old servers refuse more


def run_name(trial: int, params: Mapping[str, Any]) -> str:
    """A trial's name: its number and its parameters."""
    shown = (f"{name}={_shown(value)}" for name, value in params.items())
    return cut(" ".join([f"{trial}:", *shown]), _MAX_NAME_CHARACTERS)


def note(sweep: StoredSweep) -> str:
    """The sweep's description and, as far as there is room, its front as a Markdown table."""
    identity, trials = sweep.identity, pareto(sweep)
    objectives = [f"{objective['metric']} ({objective['direction']})" for objective in identity["objectives"]]
    reports = [f"{objective['metric']} on report" for objective in identity["objectives"]]
    header = ["trial", *identity["parameters"], *objectives, *reports]
    rows = [
        [trial["trial"], *trial["params"].values(), *trial["objectives"].values(), *trial["report"].values()]
        for trial in trials
    ]
    lines = [
        f"\nTrials that no other trial beats: {len(rows)}\n",
        _table_row(header),
        "|---" * len(header) + "|",
    ]
    text = cut(identity["description"], 1000)
    for line in [*lines, *map(_table_row, rows)] if rows else []:
        if len(text) + len(line) < _MAX_NOTE_CHARACTERS:
            text += "\n" + line
    return text


def cut(text: str, limit: int) -> str:
    """The text, or as much of it as fits and an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _table_row(cells: Sequence[Any]) -> str:
    texts = ["" if cell is None else _shown(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(texts)} |"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
