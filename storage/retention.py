"""Give back the room of large results that nobody needs any more: artifacts and activations.

Every other row stays, so a trial that has lost its vectors still has its metrics, texts and lineage.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from jobs.spec import Retention
from storage.durable import remove_staging
from storage.query import StoredSweep, open_sweep
from storage.store import Store
from storage.views import listed

LARGE = "activations"
"""The table whose rows go; those of other tables are small."""
_MOST = 2**62
"""What SQL takes as a limit."""
_ENDED = "state NOT IN ('waiting', 'running')"


class Collected(NamedTuple):
    """What was given back.

    Attributes:
        specs: Ids of the specs whose artifacts and activations go.
        artifacts: Their artifacts, and those that writers who died have left.
        rows: Their rows of the table activations.
        bytes: What is free now; if only tried, what the artifacts take.
        waiting: Bytes of files of tables that stay for ten minutes for those who are reading them; the next
            `collect`, or the sweep's next driver, removes them.
    """

    specs: list[str]
    artifacts: list[Path]
    rows: int
    bytes: int
    waiting: int


def collect(folder: Path, retention: Retention, *, is_tried: bool = False) -> Collected:
    """Remove the artifacts and activations of trials that the retention does not keep.

    What the result of any trial or prerequisite was made of stays, and so does all of trials that have not
    ended. Nobody else may drive the sweep meanwhile.

    Args:
        folder: The sweep's folder.
        retention: `all` trials are kept, those of the `front`, or the so many that ended last.
        is_tried: Whether to say only what would go.

    Raises:
        SpecError: If the folder holds no sweep.
        StoreError: If a table is not what was written, or the disk refuses; nothing is lost then that the
            retention keeps.
    """
    store = Store(folder)
    with open_sweep(folder).moment() as sweep:
        unneeded = set() if retention == "all" else _unneeded(sweep, retention)
        # A row stands there once for each trial that shares the result.
        counted = sweep.rows(
            f"SELECT spec, count(*) // greatest(1, count(DISTINCT trial)) AS rows FROM {LARGE} "
            f"WHERE spec IN ({listed(unneeded)}) GROUP BY spec"
        )
    rows = {row["spec"]: row["rows"] for row in counted}
    made = [(folder / row["path"], row["spec"]) for row in store.rows("artifacts")]
    # Equal content is one file.
    needed = {path for path, spec in made if spec not in unneeded}
    artifacts = [path for path in sorted((folder / "artifacts").glob("*.safetensors")) if path not in needed]
    going = {spec for path, spec in made if path in artifacts} | rows.keys()
    freed = _size(artifacts)
    if not is_tried:
        store.remove(LARGE, rows.keys())
        for path in artifacts:
            path.unlink()
        remove_staging(folder)
        replaced = [folder / path for path in store.replaced]
        freed += _size(replaced)
        store.tidy(keeps_entries=True)  # a backup elsewhere may go on from any of them
        freed -= _size(replaced)
    waiting = _size(folder / path for path in store.replaced)
    return Collected(sorted(going), artifacts, sum(rows.values()), freed, waiting)


def _size(paths: Iterable[Path]) -> int:
    """Bytes of those that are there."""
    return sum(path.stat().st_size for path in paths if path.is_file())


def _unneeded(sweep: StoredSweep, retention: Literal["front"] | int) -> set[str]:
    """Specs of trials that have ended, are not kept, and are nobody's prerequisite."""
    last = f"SELECT trial FROM trials WHERE {_ENDED} ORDER BY finished DESC, trial DESC"
    chosen = "SELECT trial FROM pareto" if retention == "front" else f"{last} LIMIT {min(retention, _MOST)}"
    kept = {row["trial"] for row in sweep.rows(chosen)}
    # A trial of several stages has a result of each, all but the last of them in attempts alone.
    made = sweep.rows(
        f"SELECT trial, spec, {_ENDED} AS has_ended FROM trials UNION "
        f"SELECT trial, attempts.spec, {_ENDED.replace('state', 'trials.state')} FROM attempts "
        "JOIN trials USING (trial)"
    )
    spared = {row["spec"] for row in made if row["trial"] in kept or not row["has_ended"]}
    needs = sweep.rows(
        "SELECT DISTINCT unnest(from_json(requires, '[\"VARCHAR\"]')) AS spec FROM specs "
        "UNION SELECT control FROM specs WHERE control IS NOT NULL"
    )
    return {row["spec"] for row in made} - spared - {row["spec"] for row in needs}
