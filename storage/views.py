"""Ready-made SQL views of what a sweep has found, as SELECT statements. Plain text; knows no database."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_LAYERS = ("layer", "source")
_DOSES = ("dose", "multiplier", "radius")


def views(identity: Mapping[str, Any]) -> dict[str, str]:
    """Name of each view that a sweep can have -> its SELECT statement, over the tables and earlier views.

    Args:
        identity: What `sweep.json` says: its parameters and objectives decide.
    """
    parameters, objectives = identity["parameters"], identity["objectives"]
    layer = next((name for name in _LAYERS if name in parameters), None)
    dose = next((name for name in _DOSES if name in parameters), None)
    found = {}
    if objectives:
        found["points"] = _points([each["metric"] for each in objectives])
    if objectives and layer:
        found["best_per_layer"] = _best_per_layer(layer, **objectives[0])
    if dose:
        found["dose_response"] = _dose_response([name for name in (layer, dose) if name])
        found["anti_steered"] = _anti_steered([name for name in parameters if name != dose], dose)
    found["per_vector"] = _per_vector()
    return found


def _anti_steered(others: Sequence[str], dose: str) -> str:
    """Items whose score goes against the rest: its slope over the dose has the other sign than their mean's.

    Source: Tan et al. 2024, "Analyzing the generalization and reliability of steering vectors", who call the
    share of such items the anti-steerable fraction.
    """
    groups = "".join(f"{identifier(name)}, " for name in others)
    return f"""
        WITH slopes AS (
            SELECT {groups}split, name, item, any_value(prompt) AS prompt,
                regr_slope(value, {identifier(dose)}) AS slope, count(value) AS trials
            FROM items JOIN (
                SELECT min(trial) AS trial, {groups}{identifier(dose)} FROM trials
                WHERE state = 'completed' GROUP BY spec, {groups}{identifier(dose)}
            ) USING (trial)
            WHERE value IS NOT NULL GROUP BY {groups}split, name, item
        ), means AS (
            SELECT *, avg(slope) OVER same AS mean_slope, count(slope) OVER same AS items
            FROM slopes WINDOW same AS (PARTITION BY {groups}split, name)
        )
        SELECT * FROM means WHERE slope * mean_slope < 0 ORDER BY {groups}split, name, item"""


def _per_vector() -> str:
    """What is said under each vector of each trial: how much, how fluent, how much of it different."""
    return (
        "SELECT trial, variant, count(*) AS completions, avg(nll) AS nll, avg(repetition) AS repetition, "
        "avg(tokens) AS tokens, count(DISTINCT text) AS distinct_texts FROM completions "
        "WHERE trial IS NOT NULL AND variant IS NOT NULL GROUP BY trial, variant "
        "ORDER BY trial, length(variant), variant"
    )


def _points(metrics: Sequence[str]) -> str:
    """A row for each completed trial: what it reached where trials are chosen, and on the split report.

    Which split trials are chosen on is as `jobs.spec.choosing_split` says.
    """

    def column(split: str, metric: str) -> str:
        return identifier(f"{split} {metric}")

    values = ", ".join(
        f"max(value) FILTER (name = {quoted(metric)} AND split = '{split}') AS {column(split, metric)}"
        for split in ("select", "extract", "report")
        for metric in metrics
    )
    chosen = ", ".join(
        f"CASE WHEN is_later THEN {column('select', metric)} ELSE {column('extract', metric)} END "
        f"AS {identifier(metric)}"
        for metric in metrics
    )
    report = ", ".join(
        f"{column('report', metric)} AS {identifier(f'{metric}_report')}" for metric in metrics
    )
    return f"""
        WITH measured AS MATERIALIZED (
            SELECT spec, bool_or(split <> 'extract') AS has_objectives_later, {values}
            FROM stored.metrics WHERE name IN ({listed(metrics)}) GROUP BY spec
        ), others AS (
            SELECT DISTINCT spec, true AS has_others_later FROM stored.metrics
            SEMI JOIN (SELECT spec FROM measured WHERE NOT has_objectives_later) USING (spec)
            WHERE split <> 'extract'
        ), placed AS (
            SELECT *, has_objectives_later OR has_others_later IS NOT NULL AS is_later
            FROM measured LEFT JOIN others USING (spec)
        )
        SELECT trial, CASE WHEN is_later THEN 'select' ELSE 'extract' END AS chosen_on, {chosen}, {report}
        FROM placed JOIN (
            SELECT trial, spec FROM stored.ended WHERE state = 'completed' AND reused_from IS NULL
        ) USING (spec)"""


def _best_per_layer(layer: str, metric: str, direction: str) -> str:
    """The best trial of each layer by the first objective."""
    best = "arg_max" if direction == "maximize" else "arg_min"
    return (
        f"WITH reached AS MATERIALIZED (SELECT {identifier(layer)}, points.* "
        "FROM points JOIN trials USING (trial)) "
        f"SELECT * FROM reached WHERE trial IN (SELECT {best}(trial, {identifier(metric)}) FROM reached "
        f"GROUP BY {identifier(layer)}) ORDER BY {identifier(layer)}"
    )


def _dose_response(across: Sequence[str]) -> str:
    """Mean of every metric over the results of each layer and dose, with the lowest and highest.

    A result that trials of several layers share, such as the unsteered one, stands at each of them.
    """
    groups = ", ".join(map(identifier, across))
    return (
        f"SELECT {groups}, split, name, avg(value) AS mean, min(value) AS least, max(value) AS most, "
        f"count(value) AS trials FROM metrics JOIN (SELECT min(trial) AS trial, {groups} FROM trials "
        f"WHERE state = 'completed' GROUP BY spec, {groups}) USING (trial) "
        f"GROUP BY ALL ORDER BY name, split DESC, {groups}"
    )


def quoted(text: str) -> str:
    """A text as SQL has it."""
    return "'" + text.replace("'", "''") + "'"


def listed(values: Iterable[str | int]) -> str:
    """Texts or numbers as SQL has them behind IN; of none a list that nothing is in."""
    return ", ".join(quoted(each) if isinstance(each, str) else f"{each:d}" for each in values) or "NULL"


def identifier(text: str) -> str:
    """The name of a column or table as SQL has it."""
    return '"' + text.replace('"', '""') + '"'
