"""Labels that people give completions: a file to fill in that says nothing of trials, and what comes back."""

import csv
import io
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jobs.errors import SpecError
from jobs.scoring.statistics import cohens_kappa
from jobs.spec import content_hash
from storage.durable import publish
from storage.query import open_sweep
from storage.scores import scoring
from storage.store import Store

LABEL = "label"
"""In the place of a scorer's name in the table `scores`."""
_COLUMNS = ("key", "prompt", "text", "label")
_WORDS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of a formula."""
_MOST_CLASSES = 10
_RESAMPLES = 1000
_Place = tuple[str, str, int]


class Agreement(NamedTuple):
    """How far labels agree with another score of the same completions.

    Attributes:
        with_: The other score: a scorer with its options, a metric of the job, or another annotator.
        items: Different completions that have both.
        agreed: Share of them with equal values.
        kappa: Cohen's; None where all have the same one value.
        low: Lower end of its interval of 95 %, by a bootstrap over the completions; None where undefined.
        high: Upper end.
    """

    with_: str
    items: int
    agreed: float
    kappa: float | None
    low: float | None
    high: float | None


def export_texts(folder: Path, out: Path, *, most: int | None, seed: int) -> int:
    """Write the sweep's different completions in random order, with an empty column `label`.

    A completion is one line however many trials say it, and nothing tells which ones do.

    Args:
        folder: The sweep's folder.
        out: A new `.csv` file.
        most: So many of them at most, drawn at random; None takes all.
        seed: Of order and draw.

    Returns:
        The number of lines.

    Raises:
        SpecError: If the folder holds no sweep or no completions, or the file is there or cannot be written.
    """
    if out.suffix != ".csv":
        raise SpecError(f"{out}: labels are given in a .csv file")
    if out.exists():
        raise SpecError(f"{out} is there already, perhaps with labels in it; give another name")
    texts = {_key(row): (row["prompt"], row["text"]) for row in _completions(folder)}
    keys = sorted(texts)
    random.Random(seed).shuffle(keys)
    kept = keys[:most]
    sheet = io.StringIO()
    writer = csv.writer(sheet)
    writer.writerow(_COLUMNS)
    writer.writerows([key, *map(_harmless, texts[key]), ""] for key in kept)
    publish(out, sheet.getvalue().encode())
    return len(kept)


def _completions(folder: Path) -> list[dict[str, Any]]:
    open_sweep(folder)  # says what is wrong with a folder that holds none
    if found := Store(folder).rows("completions"):
        return found
    raise SpecError(
        f"{folder} holds no completions yet; jobs such as jobs.generate and jobs.steer write them"
    )


def _key(row: Mapping[str, Any]) -> str:
    """Equal for equal texts after equal prompts, whatever trial says them."""
    return content_hash([row["prompt"], row["text"]])[:12]


def _harmless(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def import_labels(folder: Path, file: Path, *, annotator: str) -> dict[str, Any]:
    """Keep the labels of a file beside the sweep's scores, and say how far they agree with those.

    Labels stand in the table `scores` as the scorer `label`, whose options name the annotator. Each import
    that changes something is a new version; the latest counts.

    Args:
        folder: The sweep's folder.
        file: As `export_texts` wrote it, with numbers, or yes and no, in the column `label`; lines without
            one are passed over.
        annotator: Who gave them.

    Returns:
        annotator; version; labels, how many texts have one; completions, how many rows that makes; is_new,
        whether they were not there before; agreement, an `Agreement` with every other score of at most ten
        different values.

    Raises:
        SpecError: If a line cannot be read or means no completion of this sweep, or there is no label;
            nothing is stored then. Also if somebody else scores the sweep now.
    """
    labels = _read_labels(file)
    places: dict[str, list[_Place]] = {}
    for row in _completions(folder):
        places.setdefault(_key(row), []).append((row["spec"], row["split"], row["item"]))
    if unknown := sorted(labels.keys() - places.keys()):
        raise SpecError(
            f"{file}: {len(unknown)} keys mean no completion of this sweep, such as {unknown[0]!r}; they "
            "come from `steersweep label DIR --out FILE` of the same sweep"
        )
    options = json.dumps({"annotator": annotator})
    with scoring(folder) as scores:
        known = _known_scores(folder)
        own = {name: values for name, values in known.items() if name[:2] == (LABEL, options)}
        version = max((name[2] for name in own), default=0)
        given = {place: value for key, value in labels.items() for place in places[key]}
        is_new = own.get((LABEL, options, version)) != given
        if is_new:
            version += 1
            head = {"scorer": LABEL, "version": version, "options": options, "parsed": 1}
            scores.add(
                [
                    {**head, "spec": spec, "split": split, "item": item, "value": value}
                    for (spec, split, item), value in given.items()
                ]
            )
    others = {**_latest(known, but=options), **_items(folder)}
    firsts = {places[key][0]: value for key, value in labels.items()}
    return {
        "annotator": annotator,
        "version": version,
        "labels": len(labels),
        "completions": len(given),
        "is_new": is_new,
        "agreement": [
            found._asdict() for name, values in others.items() if (found := _agreement(name, firsts, values))
        ],
    }


def _read_labels(file: Path) -> dict[str, float]:
    """Key -> label, of the lines that have one."""
    try:
        rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SpecError(f"{file} cannot be read: {error}") from error
    labels: dict[str, float] = {}
    for line, row in enumerate(rows, start=1):
        if missing := [name for name in ("key", "label") if row.get(name) is None]:
            raise SpecError(f"{file}, entry {line}: no column {missing[0]!r}; it takes {', '.join(_COLUMNS)}")
        if not (text := row["label"].strip()):
            continue
        value = _WORDS.get(text.lower(), math.nan)
        try:
            value = float(text) if math.isnan(value) else value
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise SpecError(f"{file}, entry {line}: label {text!r}; it takes a number, or yes or no")
        if labels.setdefault(row["key"], value) != value:
            raise SpecError(f"{file}, entry {line}: the key {row['key']!r} has two different labels")
    if not labels:
        raise SpecError(f"{file}: the column label is empty; fill in numbers, or yes and no")
    return labels


_Scores = dict[_Place, float]


def _known_scores(folder: Path) -> dict[tuple[str, str, int], _Scores]:
    """Scorer, options and version -> what was scored so far."""
    found: dict[tuple[str, str, int], _Scores] = {}
    rows = open_sweep(folder).rows("SELECT DISTINCT * EXCLUDE (trial) FROM scores WHERE value IS NOT NULL")
    for row in rows:
        name = (row["scorer"], row["options"], row["version"])
        found.setdefault(name, {})[row["spec"], row["split"], row["item"]] = row["value"]
    return found


def _latest(known: Mapping[tuple[str, str, int], _Scores], *, but: str) -> dict[str, _Scores]:
    """The latest version of each score but the labels with certain options, by a name for people."""
    latest = {(scorer, options): version for scorer, options, version in sorted(known)}
    return {
        scorer + ("" if options == "{}" else options): known[scorer, options, version]
        for (scorer, options), version in latest.items()
        if (scorer, options) != (LABEL, but)
    }


def _items(folder: Path) -> dict[str, _Scores]:
    """What the job itself has scored of each completion in a few classes, by the score's name.

    A job may number its choices and its open prompts both from 0, so the prompts have to fit.
    """
    rows = open_sweep(folder).rows(
        "SELECT DISTINCT items.spec, items.split, items.item, items.name, items.value FROM items "
        "JOIN completions said USING (spec, split, item) "
        "WHERE items.value IS NOT NULL AND contains(said.prompt, items.prompt) AND items.name IN ("
        f"SELECT name FROM items GROUP BY name HAVING count(DISTINCT value) <= {_MOST_CLASSES})"
    )
    found: dict[str, _Scores] = {}
    for row in rows:
        found.setdefault(row["name"], {})[row["spec"], row["split"], row["item"]] = row["value"]
    return found


def _agreement(name: str, labels: _Scores, others: _Scores) -> Agreement | None:
    """None where too few have both, or either has too many values to be classes."""
    both = sorted(labels.keys() & others.keys())
    mine, theirs = [labels[place] for place in both], [others[place] for place in both]
    if len(both) < 2 or max(len(set(mine)), len(set(theirs))) > _MOST_CLASSES:
        return None
    kappa = cohens_kappa(mine, theirs)
    agreed = float(np.mean([one == other for one, other in zip(mine, theirs, strict=True)]))
    if math.isnan(kappa):
        return Agreement(name, len(both), agreed, None, None, None)
    low, high = _interval(mine, theirs)
    return Agreement(name, len(both), agreed, kappa, low, high)


def _interval(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(_RESAMPLES):
        places = generator.integers(0, len(mine), size=len(mine)).tolist()
        drawn.append(cohens_kappa([mine[place] for place in places], [theirs[place] for place in places]))
    low, high = np.nanquantile(drawn, [0.025, 0.975]).tolist()
    return low, high
