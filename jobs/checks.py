"""Bounds of parameters, refused in the same words everywhere."""

import math
from typing import Any


def at_least(params: Any, least: float, *names: str) -> None:
    """Raises ValueError if one of the named parameters is below a bound, or not finite."""
    for name in names:
        value = getattr(params, name)
        if not least <= value < math.inf:
            raise ValueError(f"{name}={value}; it takes {least} or more")


def above_zero(params: Any, *names: str) -> None:
    """Raises ValueError if one of the named parameters is 0 or less, or not finite."""
    for name in names:
        value = getattr(params, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}; it takes more than 0")
