"""Read the rows of a JSONL or CSV file, with errors that name the line."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.errors import SpecError
from jobs.resolve import locate_data
from jobs.spec import SPLITS


def read_rows(name: str, texts: Sequence[str], labels: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of a dataset.

    Args:
        name: One of the project's own datasets or a path to a `.jsonl` or `.csv` file.
        texts: Columns in which every row must have a text.
        labels: Columns in which every row must have a text, a whole number or a truth value.

    Raises:
        SpecError: If the file is missing, empty, of another kind, or a row lacks what it must have.
    """
    path = locate_data(name)
    columns = [*texts, *labels]
    rows = []
    for line, row in _parse(path):
        for column in columns:
            if why := _flaw(row.get(column), (str, int) if column in labels else (str,)):
                raise SpecError(f"{path.name}, line {line}: {column!r} {why}; each row needs {columns}")
        rows.append(dict(row))
    if not rows:
        raise SpecError(f"{path.name} holds no rows; it needs at least one row with {columns}")
    return rows


def read_split(where: str, row: Mapping[str, Any]) -> str:
    """The split of a row, which is select where the row names none.

    Args:
        where: Which row it is, for the error.
        row: The row.

    Raises:
        SpecError: If it names one that does not exist.
    """
    split = row.get("split")
    if split in (None, ""):
        return "select"
    if split not in SPLITS:
        raise SpecError(f"{where}: split={split!r}; it takes one of {list(SPLITS)}, or none, which is select")
    return str(split)


def _flaw(value: Any, types: tuple[type, ...]) -> str | None:
    """What is wrong with a cell; None if nothing is."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return "is absent or empty"
    if not isinstance(value, types):
        return f"is {str(value)[:40]!r}, a {type(value).__name__}"
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return "holds half a surrogate pair, which is no character"
    return None


def _parse(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        if path.suffix == ".jsonl":
            yield from _parse_jsonl(path)
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte-order mark
                reader = csv.DictReader(file)
                for row in reader:
                    yield reader.line_num, row
        else:
            raise SpecError(f"{path.name} is a {path.suffix or 'nameless'} file; datasets are .jsonl or .csv")
    except (UnicodeDecodeError, csv.Error) as error:
        raise SpecError(f"{path.name} cannot be read as UTF-8 {path.suffix[1:]}: {error}") from error


def _parse_jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # not splitlines(): JSON text may hold U+2028 and other line ends as they are
    for line, text in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            what = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise SpecError(
                f"{path.name}, line {line}: not JSON ({what}); write one object a line"
            ) from error
        if not isinstance(row, dict):
            raise SpecError(
                f"{path.name}, line {line}: {text[:40]!r} is not an object; write one object a line"
            )
        yield line, row
