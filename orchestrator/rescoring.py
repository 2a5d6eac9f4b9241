"""Score the stored completions of a sweep again, without the model, while it runs or afterwards."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs.errors import SpecError
from jobs.scoring import stored
from jobs.scoring.scorers import identity
from jobs.scoring.uses import parse_uses
from orchestrator.lineage import stored_specs
from storage.query import StoredSweep, open_sweep
from storage.scores import Scored, Scores, scoring
from storage.store import Store

_ROWS_A_COMMIT = 20_000


class _Use(NamedTuple):
    """A scorer as it was asked for, and what tells its scores apart: `scorer`, `version`, `options`."""

    name: str
    use: Any
    identity: Mapping[str, Any]

    def of(self, spec: str) -> Scored:
        return Scored(spec, **self.identity)


class _Work(NamedTuple):
    """Completions of one spec, and the scorers that have not read them yet."""

    spec: str
    completions: Sequence[Mapping[str, Any]]
    uses: Sequence[_Use]


def rescore(folder: Path, scorers: Sequence[str]) -> dict[str, Any]:
    """Score what has been completed so far; what the same scorers have read before is left alone.

    Args:
        folder: The sweep's folder.
        scorers: Names, with options as JSON behind them (`jobs.scoring.uses.parse_uses`).

    Returns:
        sweep; added, the number of rows; specs, how many have completions; unchanged, pairs of spec and
        scorer that were there; scorers, each with its name, label, version and options; trials, the means and
        counts of each trial, split and scorer.

    Raises:
        SpecError: If the folder holds no sweep or no completions, a scorer is unknown or refuses its options
            or lacks a column, or somebody else scores the sweep now; nothing is stored then.
        ModelError: If a sentence encoder cannot be loaded.
        StoreError: If the disk refuses; what was scored so far is kept.
    """
    sweep = open_sweep(folder)
    uses = _read_uses(scorers)
    completions = _completions(folder)
    with scoring(folder) as scores:
        work = [_Work(spec, rows, _unread(spec, uses, scores)) for spec, rows in completions.items()]
        before = len(completions) * len(uses) - sum(len(each.uses) for each in work)
        added = _score(sweep, [each for each in work if each.uses], scores)
    return {
        "sweep": sweep.identity["sweep"],
        "added": added,
        "specs": len(completions),
        "unchanged": before,
        "scorers": [{"name": use.name, "label": _label(use, uses), **use.identity} for use in uses],
        "trials": [row for use in uses for row in _means(sweep, use)],
    }


def _read_uses(scorers: Sequence[str]) -> list[_Use]:
    found = parse_uses(scorers)
    return [_Use(name, use, identity(use)) for name, use in found.items()]


def _label(use: _Use, uses: Sequence[_Use]) -> str:
    """The scorer's name, with the options in which it differs from its other uses, if there are any."""
    scorer: str = use.identity["scorer"]
    own = json.loads(use.identity["options"])
    others = [json.loads(each.identity["options"]) for each in uses if each.identity["scorer"] == scorer]
    differing = {name: own[name] for name in own if any(each[name] != own[name] for each in others)}
    return scorer + (json.dumps(differing, ensure_ascii=False) if differing else "")


def _completions(folder: Path) -> dict[str, list[dict[str, Any]]]:
    by_spec: dict[str, list[dict[str, Any]]] = {}
    for row in Store(folder).rows("completions"):
        by_spec.setdefault(row["spec"], []).append(row)
    if not by_spec:
        raise SpecError(
            f"{folder} holds no completions yet; jobs such as jobs.generate and jobs.steer write them"
        )
    return by_spec


def _unread(spec: str, uses: Iterable[_Use], scores: Scores) -> list[_Use]:
    return [use for use in uses if use.of(spec) not in scores.done]


def _score(sweep: StoredSweep, work: Sequence[_Work], scores: Scores) -> int:
    """Score and store, some specs at a time; gives the number of rows."""
    specs = stored_specs(sweep)
    for each in work:
        stored.check_stored(specs.get(each.spec), each.completions, [use.use for use in each.uses])

    def rows(each: _Work) -> list[dict[str, Any]]:
        uses = [use.use for use in each.uses]
        found = stored.score_stored(specs.get(each.spec), each.completions, uses)
        return [{**row, "spec": each.spec} for row in found]

    added = 0
    for batch in _batches(map(rows, work)):
        scores.add(batch)
        added += len(batch)
    return added


def _batches(groups: Iterable[list[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
    """Groups put together up to about what one commit takes; no group is cut."""
    batch: list[dict[str, Any]] = []
    for group in groups:
        batch += group
        if len(batch) >= _ROWS_A_COMMIT:
            yield batch
            batch = []
    if batch:
        yield batch


def _means(sweep: StoredSweep, use: _Use) -> list[dict[str, Any]]:
    """One row a trial and split; what belongs to no trial has the trial null."""
    scorer, options = (use.identity[name].replace("'", "''") for name in ("scorer", "options"))
    rows = sweep.rows(
        "SELECT trial, spec, split, avg(value) AS mean, count(*) AS items, "
        "count(*) FILTER (parsed = 0) AS unparsed "
        f"FROM scores WHERE scorer = '{scorer}' AND version = {use.identity['version']} "
        f"AND options = '{options}' GROUP BY trial, spec, split ORDER BY trial, split"
    )
    return [{**row, "scorer": use.name} for row in rows]
