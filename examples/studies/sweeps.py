"""What the studies share: run a space as a user does, and print what was found as a table."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs.scoring.statistics import wilson_interval
from storage.query import StoredSweep, open_sweep

SPACES = Path(__file__).parents[2] / "search_spaces"


class Study(NamedTuple):
    """Where a study keeps its sweeps, and how they are run.

    Attributes:
        out: Folder; a second run takes up what is there.
        settings: Given to every sweep with `--set`.
    """

    out: Path
    settings: Sequence[str]

    def sweep(
        self, space: str, *, name: str = "", settings: Sequence[str] = (), reuse: Sequence[Path] = ()
    ) -> StoredSweep:
        """Run a space of `search_spaces/` and open what it has kept.

        Args:
            space: Its name.
            name: Of its folder; the space's without.
            settings: `key=value`, beside those of the study.
            reuse: Folders of sweeps that have stored some of the work.

        Trials that failed stand in its tables; they stop no study.

        Raises:
            subprocess.CalledProcessError: If the sweep could not be run.
        """
        folder = self.out / (name or space)
        options = [f"--set={each}" for each in (*self.settings, *settings)]
        options += [f"--reuse={each}" for each in reuse]
        command = [sys.executable, "-m", "orchestrator.cli", "run", str(SPACES / f"{space}.py")]
        done = subprocess.run([*command, "--out", str(folder), *options], stdout=sys.stderr)
        if done.returncode > 1:
            done.check_returncode()
        return open_sweep(folder)


def study(description: str, arguments: Sequence[str] | None = None) -> Study:
    """The study that the command line asks for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder of its sweeps")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="given to every sweep"
    )
    options = parser.parse_args(arguments)
    return Study(options.out, options.set)


def share(number: int, of: int) -> str:
    """A count as `3 of 32 (0.09, 0.03 to 0.24)`, with Wilson's interval of 95 %."""
    low, high = wilson_interval(number, of)
    return f"{number} of {of} ({number / max(1, of):.2f}, {low:.2f} to {high:.2f})"


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """A value with the ends of its interval."""
    shown = ["none" if each is None else f"{each:.3g}" for each in (value, low, high)]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table in Markdown."""
    columns = list(rows[0]) if rows else []
    print(f"\n### {title}\n")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(_cell(row[column]) for column in columns)} |")
    sys.stdout.flush()


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "none" if value is None else str(value)
