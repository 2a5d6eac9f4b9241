"""Texts that a model reads: paragraphs of a plain file, or rows of a table."""

from typing import NamedTuple

from jobs.data.files import read_rows, read_split
from jobs.errors import SpecError
from jobs.resolve import locate_data


class Text(NamedTuple):
    """A text and its split."""

    split: str
    text: str


def load_texts(name: str) -> list[Text]:
    """Texts of a dataset, in its order.

    A `.txt` file holds paragraphs between blank lines, which belong to select and report in turn. A `.jsonl`
    or `.csv` file has the column `text` and, where it likes, `split`, which is select where it is absent.

    Args:
        name: One of the project's own datasets or a path.

    Raises:
        SpecError: As `read_rows` does, if the file is no text or has none, or if a split does not exist.
    """
    path = locate_data(name)
    if path.suffix == ".txt":
        return _paragraphs(name, path.read_bytes())
    return [
        Text(read_split(f"{name}, text {number} (from 0)", row), row["text"])
        for number, row in enumerate(read_rows(name, ["text"]))
    ]


def _paragraphs(name: str, content: bytes) -> list[Text]:
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SpecError(f"{name} cannot be read as UTF-8 text: {error}") from error
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    texts = ["\n".join(paragraph) for paragraph in paragraphs if paragraph]
    if not texts:
        raise SpecError(f"{name} holds no text; it takes paragraphs between blank lines")
    return [Text("report" if number % 2 else "select", text) for number, text in enumerate(texts)]
