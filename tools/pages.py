"""Self-contained HTML pages from the templates in `tools/templates`, which share one base."""

import base64
import json
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"
# Not printable to Python, but part of good text: line ends, wide spaces, joiners.
PRINTABLE = "\n\t\u00a0\u3000\u200c\u200d"


def render(template: str, **values: Any) -> str:
    """Fill a template. All text is escaped, except `Markup`."""
    return _environment().get_template(template).render(values)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"printable": printable, "data_uri": data_uri}
    environment.filters["text"] = partial(printable, keep=PRINTABLE)
    return environment


def printable(value: Any, limit: int | None = None, keep: str = "") -> str:
    """Escape unprintable letters, and those that change the writing direction, in the first `limit` letters.

    Letters of `keep` stay. None is –; other values that are no text are JSON.
    """
    if value is None:
        return "–"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() or c in keep else f"\\u{ord(c):04x}" for c in text[:limit])


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
