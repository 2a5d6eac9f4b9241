"""How the report's template shows values: escaped, in few digits, with nothing invisible."""

import base64
import hashlib
import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup


class Value(NamedTuple):
    """A metric's value and the ends of its interval, each None where there is none."""

    value: float | None
    low: float | None
    high: float | None


def page_template() -> Template:
    """The report's template; everything that it shows is escaped and made visible."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "setting": _setting,
        "value": _value,
        "embedded": _embedded,
        "sha256": lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
        "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
    }
    return environment.get_template("page.html.j2")


def _value(metrics: Mapping[str, float | None], name: str) -> Value:
    return Value(metrics.get(name), metrics.get(f"{name}_low"), metrics.get(f"{name}_high"))


def _number(value: float | None) -> str:
    """Three decimals where they say something, else three digits; a dash for none."""
    if value is None:
        return "–"
    shown = f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"
    return shown.replace("-", "\N{MINUS SIGN}")


def _setting(value: Any) -> str:
    """A parameter's value; numbers with at most six digits, a dash for none."""
    if value is None:
        return "–"
    return f"{value:g}".replace("-", "\N{MINUS SIGN}") if isinstance(value, float) else str(value)


def _embedded(value: Any) -> Markup:
    """JSON that cannot end the element that it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))


def visible(value: Any) -> Any:
    """Text with control, format and unpaired surrogate characters spelled out; emoji need their joiners."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(_spelled(character) for character in value)


def _spelled(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    if not hidden or character in "\n\t\u200c\u200d":
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"
