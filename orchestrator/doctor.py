"""Whether ledger, study, tables, artifacts and MLflow of a sweep say the same; and mending it."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jobs.errors import SpecError, first_line
from orchestrator.budget import Budget
from orchestrator.config import RunConfig
from orchestrator.planning import planned_trials
from orchestrator.progress import Tally
from orchestrator.reopening import journal_path, load_kept, open_sampler
from orchestrator.results import Results
from search_spaces.base import Space
from storage.artifacts import Artifact, is_whole
from storage.durable import StoreError, drop_torn_line, is_torn, staging_files
from storage.ledger import Asked, ledger_path, read_asked
from storage.lock import driver, driving
from storage.mlflow_log import Mirror
from storage.parquet import is_as_written
from storage.query import open_sweep
from storage.scores import scores_of
from storage.store import Store

_EXAMPLES = 5


@dataclass(slots=True)
class Finding:
    """Something that is not as it should be.

    Attributes:
        where: logs, tables, trials, study, artifacts, mlflow or leftovers.
        what: In words.
        count: How often.
        examples: The first few.
        is_mended: Whether it is as it should be by now.
    """

    where: str
    what: str
    count: int = 1
    examples: list[str] = field(default_factory=list)
    is_mended: bool = False


@dataclass(frozen=True, slots=True)
class _Examination:
    """Findings of one kind, and what mends them; None if nothing does but computing again."""

    finding: Finding
    mend: Callable[[], object] | None


class _Kept(NamedTuple):
    """What is compared, read once."""

    folder: Path
    space: Space
    config: RunConfig
    store: Store
    asked: Sequence[Asked]


def examine(folder: Path, *, repair: bool) -> dict[str, Any]:
    """Compare what a sweep has kept, and mend what can be mended.

    Args:
        folder: The sweep's folder; nobody may drive it.
        repair: Whether to mend; without it nothing is written, but an empty study where a database has none.

    Returns:
        consistent: whether nothing is left to mend, leftovers aside, which nobody reads; findings.

    Raises:
        SpecError: If the folder holds no sweep, or somebody drives it.
        StoreError: If the ledger is not what was written, which nothing here can mend.
    """
    file, config = load_kept(folder)
    if (owner := driver(folder)) is not None:
        raise SpecError(f"{folder} is being run by {owner}; wait for it or stop it")
    with ExitStack() as stack:
        if repair:
            stack.enter_context(driving(folder))
        try:
            store = Store(folder)
        except StoreError as error:
            findings = _found("tables", _DAMAGED, [error], None)
            return {"consistent": False, "findings": [asdict(each.finding) for each in findings]}
        kept = _Kept(folder, file.space, config, store, read_asked(folder))
        looks: tuple[Callable[[_Kept], list[_Examination]], ...] = (_torn_logs, _tables)
        if not _tables(kept):  # the others read them
            looks = (*looks, _trials, _study, _artifacts, _leftovers, _mlflow)
        seen: list[Finding] = []
        for look in looks:
            for found in look(kept):
                if repair and found.mend is not None:
                    found.mend()
                    found.finding.is_mended = True
                seen.append(found.finding)
    left = [each for each in seen if not each.is_mended and each.where != "leftovers"]
    return {"consistent": not left, "findings": [asdict(each) for each in seen]}


def _found(
    where: str, what: str, examples: Iterable[object], mend: Callable[[], object] | None
) -> list[_Examination]:
    """One finding if there is any example."""
    every = [str(each) for each in examples]
    return [_Examination(Finding(where, what, len(every), every[:_EXAMPLES]), mend)] if every else []


def _torn_logs(kept: _Kept) -> list[_Examination]:
    torn = [path for path in (ledger_path(kept.folder), journal_path(kept.folder)) if is_torn(path)]

    def cut() -> None:
        for path in torn:
            drop_torn_line(path)

    return _found("logs", "the last line is torn", [path.name for path in torn], cut)


def _trials(kept: _Kept) -> list[_Examination]:
    asked = {trial.trial: trial.spec.id for trial in kept.asked}
    specs = [(row["trial"], row["spec"]) for row in kept.store.rows("trials")]
    times = Counter(trial for trial, _ in specs)
    wrong = {
        "more than one result was accepted": [trial for trial in times if times[trial] > 1],
        "the ledger lacks them": sorted(times.keys() - asked.keys()),
        "the ledger has them with another spec": [t for t, spec in specs if asked.get(t, spec) != spec],
        "their result is not there": [trial for trial, spec in specs if spec not in kept.store.results],
    }
    return [found for what, trials in wrong.items() for found in _found("trials", what, trials, None)]


def _study(kept: _Kept) -> list[_Examination]:
    try:
        sampler = open_sampler(kept.folder, kept.space, kept.config)
    except StoreError as error:
        if kept.config.storage is not None:
            raise
        return _found("study", "it cannot be read", [str(error)], lambda: _write_study(kept))
    budget = Budget(kept.config, kept.space.objectives)
    results = Results(kept.store, kept.space, sampler, Tally(total=0), budget, lambda: None)
    rows = {row["trial"]: row for row in kept.store.rows("trials")}
    asked = {trial.trial: trial.params for trial in kept.asked}
    ended = {number: results.end_of(row) for number, row in rows.items() if number in asked}
    wrong = sampler.disagreements(asked, ended)
    withdrawn = {trial for trial, _ in kept.store.withdrawn_trials()}
    gone = set(sampler.without_result(ended)) - withdrawn
    # Where tables or ledger have lost something, the study may be the last that knows of it.
    restate = None if gone or rows.keys() - asked.keys() else lambda: sampler.restate(asked, ended)

    def tell() -> None:
        for number in sampler.untold(ended):
            sampler.tell(number, *ended[number])
        sampler.flush()

    cut_short = ["the study"] if sampler.was_cut_short else []
    return [
        *_found("trials", "they ended, by the study; `resume` computes them again", sorted(gone), None),
        *_found("study", "writing it anew was cut short", cut_short, restate),
        *_found("study", "it differs from what is kept", _lines(wrong), restate),
        *_found(
            "study", "trials that have ended run there", sampler.untold(ended) if not wrong else [], tell
        ),
        *_found(
            "leftovers",
            "trials of the study that nobody recorded",
            sampler.unrecorded(asked) if not wrong else [],
            restate,
        ),
    ]


def _write_study(kept: _Kept) -> None:
    """Write the study's file anew, and keep the one that cannot be read."""
    path = journal_path(kept.folder)
    _set_aside(kept.folder, [path])
    for found in _study(kept):
        if found.mend is not None:
            found.mend()


def _set_aside(folder: Path, paths: Iterable[Path]) -> None:
    """Move files where nothing reads them."""
    for path in paths:
        place = folder / "set_aside" / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)


_DAMAGED = (
    "files are gone or not what was written; bring them back from a copy, such as `steersweep fetch` has, or "
    "run the sweep into another folder"
)


def _tables(kept: _Kept) -> list[_Examination]:
    wrong = [file.path for file in kept.store.files() if not is_as_written(kept.folder, file)]
    return _found("tables", _DAMAGED, wrong, None)


def _lines(wrong: Mapping[Any, str]) -> list[str]:
    return [f"{trial}: {what}" for trial, what in wrong.items()]


def _artifacts(kept: _Kept) -> list[_Examination]:
    rows = kept.store.rows("artifacts")
    listed = {row["path"]: Artifact(row["hash"], row["path"], row["bytes"]) for row in rows}
    absent = [path for path in listed if not (kept.folder / path).is_file()]
    damaged = [path for path in listed if path not in absent and not is_whole(kept.folder, listed[path])]

    def remove() -> None:
        for path in damaged:
            (kept.folder / path).unlink()

    return [
        *_found("leftovers", "artifacts are gone; what needs them computes them again", absent, None),
        *_found("artifacts", "files are not what was written", damaged, remove),
    ]


def _leftovers(kept: _Kept) -> list[_Examination]:
    stores = (kept.store, scores_of(kept.folder))
    listed = {path for store in stores for path in (*(file.path for file in store.files()), *store.replaced)}
    written = {str(path.relative_to(kept.folder)) for path in kept.folder.glob("tables/**/*.parquet")}
    tables = [kept.folder / path for path in sorted(written - listed)]
    halves = staging_files(kept.folder)

    def remove() -> None:
        _set_aside(kept.folder, tables)
        for path in halves:
            path.unlink(missing_ok=True)

    names = [path.relative_to(kept.folder) for path in (*tables, *halves)]
    return _found("leftovers", "files of writers that died", names, remove)


def _mlflow(kept: _Kept) -> list[_Examination]:
    mirror = Mirror(kept.folder, kept.config.mlflow)
    is_over = open_sweep(kept.folder).has_ended(planned_trials(kept.space, kept.config))

    def write() -> None:
        mirror.sync()
        mirror.finish(is_complete=is_over)

    try:
        differences = mirror.differences()
    except Exception as error:  # noqa: BLE001 - whatever MLflow raises of a server or a database
        return _found("mlflow", "it cannot be read", [first_line(error)], None)
    return _found("mlflow", "it differs from the tables", _lines(differences), write)
