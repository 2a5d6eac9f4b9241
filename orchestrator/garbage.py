"""Large results that a sweep's retention does not keep are removed, and the sweep says so."""

from pathlib import Path
from typing import Any

from jobs.spec import Retention
from orchestrator.results import event_row
from storage.retention import collect
from storage.store import Store


def collect_garbage(folder: Path, retention: Retention, *, is_tried: bool = False) -> dict[str, Any]:
    """Remove artifacts and activations as `storage.retention.collect` does, and note it in the table events.

    Args:
        folder: The sweep's folder; nobody else may drive it.
        retention: What is kept.
        is_tried: Whether to say only what would go.

    Returns:
        retention; results, of how many specs something goes; artifacts, how many files; activations, rows;
        bytes, which are free now (if only tried, what the artifacts take); waiting, bytes of files that stay
        for their readers a while.

    Raises:
        SpecError, StoreError: As `collect` does.
    """
    found = collect(folder, retention, is_tried=is_tried)
    said = {
        "retention": retention,
        "results": len(found.specs),
        "artifacts": len(found.artifacts),
        "activations": found.rows,
        "bytes": found.bytes,
        "waiting": found.waiting,
    }
    if not is_tried and (found.artifacts or found.rows):
        kept = f"the last {retention}" if isinstance(retention, int) else retention
        gone = f"{len(found.artifacts)} artifacts, {found.rows} activations, {found.bytes} bytes freed"
        detail = f"{gone}; kept: {kept}"
        Store(folder).commit([], events=[event_row("collected", detail)])
    return said
