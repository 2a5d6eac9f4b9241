"""Large results that a sweep's retention does not keep are removed, and the sweep says so."""

from pathlib import Path
from typing import Any

from orchestrator.results import event_row
from storage.retention import Retention, collect
from storage.store import Store


def collect_garbage(folder: Path, retention: Retention, *, is_tried: bool = False) -> dict[str, Any]:
    """Remove artifacts and activations as `storage.retention.collect` does, and note it in the table events.

    Args:
        folder: The sweep's folder; nobody else may drive it.
        retention: What is kept.
        is_tried: Whether to say only what would go.

    Returns:
        retention; results, of how many specs something goes; artifacts, how many files; activations, rows;
        bytes.

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
    }
    if not is_tried and (found.artifacts or found.rows):
        kept = f"the last {retention}" if isinstance(retention, int) else retention
        detail = (
            f"{len(found.artifacts)} artifacts, {found.rows} activations, {found.bytes} bytes; kept: {kept}"
        )
        Store(folder).commit([], events=[event_row("collected", detail)])
    return said
