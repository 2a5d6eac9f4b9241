"""The model as something that a space may vary: which weights a configuration runs on."""

import itertools
from collections.abc import Mapping
from typing import Any

from jobs.errors import SpecError
from jobs.spec import ModelRef
from orchestrator.config import RunConfig, make_config
from search_spaces.base import Grid, Space

MODEL_FIELDS = ("model", "dtype", "tuned")
"""Fields of the run configuration that a space may vary or fix, beside the job's parameters."""


def job_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are parameters of the job."""
    return {name: value for name, value in values.items() if name not in MODEL_FIELDS}


def varied_models(space: Space, config: RunConfig) -> list[ModelRef]:
    """All weights that configurations of a space run on.

    Raises:
        SpecError: If one of the model's fields takes more than listed values, or one that is not allowed.
        ModelError: If a file of a model's folder cannot be read.
    """
    grids: dict[str, list[Any]] = {}
    for name in MODEL_FIELDS:
        domain = space.parameters.get(name)
        if domain is not None and not isinstance(domain, Grid):
            raise SpecError(f"parameter {name}: list its values as Grid([...])")
        if domain is not None or name in space.fixed:
            grids[name] = list(domain.values) if domain is not None else [space.fixed[name]]
    models = Models(config)
    return [models.of(dict(zip(grids, values, strict=True))) for values in itertools.product(*grids.values())]


class Models:
    """The weights that configurations of one sweep run on.

    Args:
        config: Which ones, where a configuration does not say.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._known: dict[tuple[Any, ...], ModelRef] = {}

    def of(self, values: Mapping[str, Any]) -> ModelRef:
        """The weights of a configuration.

        Raises:
            SpecError: If a value is none that the run configuration takes.
            ModelError: If a file of the model's folder cannot be read.
        """
        changed = {name: values[name] for name in MODEL_FIELDS if name in values}
        if wrong := {name: value for name, value in changed.items() if not isinstance(value, str)}:
            raise SpecError(f"{wrong}: a model, a dtype and a tuning are named by texts")
        key = tuple(changed.items())
        if key not in self._known:
            config = make_config(**self._config.model_dump() | changed) if changed else self._config
            self._known[key] = config.pinned().model_ref
        return self._known[key]
