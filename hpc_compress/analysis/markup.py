"""HTML in which a stranger's text can't become markup or code. Knows nothing of runs."""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from hpc_compress import door


class Markup(str):
    """Text that is HTML already. Every other text is escaped."""


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element. `class_` gives the attribute class, and `data_id` data-id; an attribute that is None is left out."""
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opened = "".join([name, *(f' {key}="{html.escape(str(value))}"' for key, value in named.items())])
    return Markup(f"<{opened}>{joined(children)}</{name}>")


def joined(children: Iterable[object]) -> Markup:
    """Children one after another; None is nothing."""
    return Markup("".join(_escaped(child) for child in children if child is not None))


def _escaped(child: object) -> str:
    return child if isinstance(child, Markup) else html.escape(_printable(str(child)))


def _printable(text: str) -> str:
    """Terminal escapes and marks that turn the direction of writing are shown as `?`."""
    return "\n".join(door.one_line(line, most=20_000) for line in text.split("\n"))


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table that scrolls by itself where the page is narrow."""
    head = tag("tr", *(tag("th", name, scope="col") for name in header))
    body = (tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll", tabindex="0")


def data(value: Any) -> str:
    """JSON for a script element of type application/json: no text in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def hash_of(script: str) -> str:
    """By which a Content-Security-Policy knows a script, and no other one runs."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
