"""What workers have said while they ran a trial's packs: their tables of attempts beside their last lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.errors import SpecError
from orchestrator.worker import attempt_line
from storage.query import open_sweep

_ATTEMPTS = """
SELECT attempt, trial, spec, job, state, worker, host, device, loaded, started, finished - started AS seconds,
    reason
FROM attempts WHERE {condition} ORDER BY started, attempt
"""


def worker_log(folder: Path, worker: str) -> Path:
    """File of what a worker says, in the folder of its sweep."""
    return folder / "logs" / f"{worker}.log"


def attempts_of(folder: Path, what: str, *, lines: int) -> list[dict[str, Any]]:
    """Every try at a trial or a spec, the oldest first, with the last lines (`lines`) that its worker said.

    Args:
        folder: The sweep's folder.
        what: Number of a trial, or the beginning of a spec's id, such as that of a prerequisite.
        lines: Most lines of each.

    Raises:
        SpecError: If the folder holds no sweep, or nothing of this name was tried.
    """
    sweep = open_sweep(folder)
    number = int(what) if what.isdecimal() and len(what) < _LONGEST_NUMBER else None
    if number is not None and (known := sweep.rows(f"SELECT spec FROM trials WHERE trial = {number}")):
        condition = f"spec = '{known[0]['spec']}' OR trial = {number}"
    elif what.isalnum():
        condition = f"starts_with(spec, '{what}')"
    else:
        raise SpecError(f"{what!r} is neither the number of a trial nor the beginning of a spec's id")
    rows = sweep.rows(_ATTEMPTS.format(condition=condition))
    if not rows:
        tried = [row["trial"] for row in sweep.rows("SELECT trial FROM attempts WHERE trial IS NOT NULL")]
        has = f"one of the trials {min(tried)} to {max(tried)} that were" if tried else "a trial once one was"
        raise SpecError(
            f"nothing was tried yet under {what!r}; give {has} tried, or the beginning of a spec's id"
        )
    return [{**row, "lines": _said(folder, row, lines)} for row in rows]


_LONGEST_NUMBER = 12


def _said(folder: Path, attempt: Mapping[str, Any], most: int) -> Sequence[str]:
    """The last lines of an attempt in its worker's log; none if the log is not on this machine."""
    path = worker_log(folder, str(attempt["worker"]))
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    begin, ends = attempt_line(attempt["attempt"]), attempt_line("")
    if begin not in lines:
        return []
    said = lines[lines.index(begin) + 1 :]
    until = next((index for index, line in enumerate(said) if line.startswith(ends)), len(said))
    return said[:until][-most:]
