"""What MLflow gets of a sweep besides its runs, and all of it once more."""

from pathlib import Path

from jobs.errors import SpecError, first_line
from orchestrator.control_vectors import write_front_vectors
from orchestrator.planning import planned_trials
from orchestrator.reopening import load_kept
from orchestrator.report.writing import write_report
from storage.background_mirror import without_credentials
from storage.durable import StoreError
from storage.lock import driving
from storage.mlflow_log import Mirror
from storage.query import open_sweep


def write_pages(folder: Path) -> list[Path]:
    """Write the report, its figures and the vectors of the front; gives the files.

    Raises:
        SpecError: If the folder holds no sweep.
        StoreError, OSError: If the disk refuses.
    """
    page = write_report(folder)
    return [page, *sorted(page.parent.glob("*.png")), *write_front_vectors(folder)]


def mirror_again(folder: Path, uri: str | None = None) -> int:
    """Write what MLflow lacks of a sweep that nobody drives; gives how many trials that were.

    Args:
        folder: The sweep's folder.
        uri: MLflow store or server; None takes the one that the sweep was configured with.

    Raises:
        SpecError: If the folder holds no sweep, or somebody drives it.
        StoreError: If MLflow refuses; the next call goes on where this one ended.
    """
    if uri == "":
        raise SpecError('--to "": give an MLflow store or server, such as sqlite:////shared/runs.db')
    file, config = load_kept(folder)
    with driving(folder):
        is_complete = open_sweep(folder).has_ended(planned_trials(file.space, config))
        mirror = Mirror(folder, uri or config.mlflow)
        pages = write_pages(folder)
        try:
            written = mirror.sync()
            mirror.finish(pages, is_complete=is_complete)
        except Exception as error:  # whatever MLflow raises of a server or a database
            raise StoreError(f"MLflow refuses: {without_credentials(first_line(error))}") from error
    return written
