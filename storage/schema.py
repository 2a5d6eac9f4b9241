"""Columns of every table: name, type, unit, meaning. Plain data; the version grows with any change."""

from typing import NamedTuple

SCHEMA_VERSION = 6
STATES = ("waiting", "running", "completed", "infeasible", "failed")
"""What a trial can be; the last three are ends."""


class Column(NamedTuple):
    """One column.

    Attributes:
        name: Name in Parquet and SQL.
        kind: One of text, integer, real, real32[] (list of float32), array (numbers as bytes, of the type
            that the column `dtype` names), json (text that holds JSON).
        unit: Unit, or "" where there is none.
        meaning: What a row says here.
    """

    name: str
    kind: str
    unit: str
    meaning: str


_SPEC = Column("spec", "text", "", "id of the spec whose result this is")
_SPLIT = Column("split", "text", "", "extract, select or report")

TABLES: dict[str, tuple[Column, ...]] = {
    "trials": (
        Column("trial", "integer", "", "number of the trial, from 0 in the order of asking"),
        _SPEC,
        Column("state", "text", "", "waiting, running, completed, infeasible or failed"),
        Column("reason", "text", "", "why the trial is not completed"),
        Column(
            "reused_from", "integer", "", "earlier trial of the same spec, whose result this trial shares"
        ),
        Column(
            "seconds",
            "real",
            "s",
            "its share of the time since the pack's delivery before; null for a reused result",
        ),
        Column("finished", "real", "s since 1970", "when the result was accepted"),
        Column("params", "json", "", "the proposed parameters"),
    ),
    "specs": (
        _SPEC,
        Column("job", "text", "", "import path of the job"),
        Column("code", "text", "", "version of the job's code and of the libraries under it"),
        Column("params", "json", "", "all of the job's parameters"),
        Column("model", "json", "", "the weights: id, revision, fingerprint, dtype, tuning"),
        Column("data", "json", "", "SHA-256 of each dataset"),
        Column("seed", "integer", "", "seed of the row"),
        Column("requires", "json", "", "ids of the specs whose artifacts it takes"),
        Column("control", "text", "", "id of the spec whose texts its own are compared with"),
    ),
    "results": (
        _SPEC,
        Column("status", "text", "", "completed, infeasible or failed; withdrawn takes back what is before"),
        Column("reason", "text", "", "why it is not completed"),
    ),
    "attempts": (
        Column("attempt", "text", "", "id of the try"),
        Column("pack", "text", "", "id of the pack it belongs to"),
        Column("trial", "integer", "", "the trial, also at a cheaper stage of it; null for a prerequisite"),
        _SPEC,
        Column("job", "text", "", "import path of the job"),
        Column("state", "text", "", "ok, failed, lost or oom"),
        Column("reason", "text", "", "why it is not ok, or which sweep it was taken over from"),
        Column("worker", "text", "", "name of the worker"),
        Column("host", "text", "", "machine of the worker"),
        Column("device", "text", "", "what its replica is on, such as cpu or cuda:0"),
        Column("loaded", "integer", "", "1 if the worker had to load the model for the pack, else 0"),
        Column("started", "real", "s since 1970", "when the worker took the pack"),
        Column("finished", "real", "s since 1970", "when this row's outcome was out"),
    ),
    "events": (
        Column("time", "real", "s since 1970", "when it happened"),
        Column(
            "kind",
            "text",
            "",
            "driver started, driver ended, worker ready, worker lost, paused, pack limited, tried again or "
            "collected",
        ),
        Column("worker", "text", "", "name of the worker; null where it is the driver's"),
        Column("detail", "text", "", "why, or how much"),
    ),
    "metrics": (
        _SPEC,
        _SPLIT,
        Column("name", "text", "", "metric of the job"),
        Column("value", "real", "as the job's METRICS say", "null where it is not defined"),
    ),
    "items": (
        _SPEC,
        _SPLIT,
        Column("item", "integer", "", "number of the prompt among those of this table; others number others"),
        Column("prompt", "text", "", "what was scored"),
        Column("name", "text", "", "score"),
        Column("value", "real", "as the job's METRICS say", "null where it is not defined"),
        Column("label", "text", "", "class of the item, where it has one"),
    ),
    "completions": (
        _SPEC,
        _SPLIT,
        Column("item", "integer", "", "number of the prompt"),
        Column(
            "variant", "text", "", "which of several things it was changed by, such as vector 3, or unsteered"
        ),
        Column("prompt", "text", "", "what the model was asked"),
        Column("text", "text", "", "what it replied, special tokens left out"),
        Column("tokens", "integer", "tokens", "length of the reply"),
        Column("nll", "real", "nats/token", "mean -ln p under the unsteered model; null for an empty reply"),
        Column("repetition", "real", "share", "share of repeated trigrams"),
    ),
    "scores": (
        _SPEC,
        _SPLIT,
        Column("item", "integer", "", "number of the completion"),
        Column("scorer", "text", "", "name of the scorer"),
        Column("version", "integer", "", "its version; rises when the same text may get another value"),
        Column("options", "json", "", "all of its options"),
        Column("value", "real", "as the scorer says", "null where it is not defined"),
        Column("parsed", "integer", "", "1 if the scorer could read the text, else 0"),
    ),
    "vectors": (
        _SPEC,
        Column("name", "text", "", "which vector of the result"),
        Column("layer", "integer", "", "block whose output it belongs to, from 0"),
        Column("norm", "real", "residual-stream units", "Euclidean norm"),
        Column("vector", "real32[]", "residual-stream units", "the vector as it was added"),
    ),
    "activations": (
        _SPEC,
        _SPLIT,
        Column("item", "integer", "", "number of the prompt"),
        Column("label", "text", "", "class of the item, where it has one"),
        Column(
            "name", "text", "", "which tokens: -1 (the last one), -2, ..., all, a span's name, or generated"
        ),
        Column("position", "integer", "", "the token, from 0 over prompt and completion; null for a mean"),
        Column("step", "integer", "", "new token that the state predicted, from 0; null unless generated"),
        Column("layer", "integer", "", "block, from 0"),
        Column("site", "text", "", "before or after the block, or what its attention or its mlp adds"),
        Column("dtype", "text", "", "of the numbers in `vector` in the file: float16 or float32"),
        Column(
            "vector",
            "array",
            "residual-stream units",
            "the hidden state: a list in SQL; in the file its numbers as bytes, the lowest first",
        ),
    ),
    "artifacts": (
        _SPEC,
        Column("job", "text", "", "import path of the job that made it"),
        Column("hash", "text", "", "SHA-256 of the file"),
        Column("path", "text", "", "file, relative to the sweep's folder"),
        Column("bytes", "integer", "bytes", "size of the file"),
    ),
}
ROW_GROUPS_BY = {"activations": "layer"}
"""Column of a table whose values have row groups of their own, so that one is read without the others."""
RESULT_TABLES = ("metrics", "items", "completions", "scores", "vectors", "activations", "artifacts")
"""Tables whose rows are keyed by spec: workers write all but `scores`, which `steersweep score` adds to."""
