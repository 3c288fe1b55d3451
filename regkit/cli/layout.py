"""Text within the width of a terminal, also in a pipe."""

from __future__ import annotations

import codecs
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Final

from regkit.errors import printable

WIDTH: Final = 100
"""The width of everything printed, in columns."""

_MOST_NAMES: Final = 3


def fill(text: str, indent: str = "", hang: str = "") -> str:
    """The text in lines of the terminal's width; only spaces are broken at."""
    return textwrap.fill(
        printable(text),
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + hang,
        break_long_words=False,
        break_on_hyphens=False,
    )


def few(names: Sequence[str]) -> str:
    """The first names, and the number of further names."""
    if len(names) <= _MOST_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[: _MOST_NAMES - 1])} and {len(names) - _MOST_NAMES + 1} more"


def counted(count: int, what: str) -> str:
    """`1 problem`, `2 problems`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def listed(items: Mapping[str, str]) -> str:
    """A line for each name, with its text beside the name."""
    widest = max(map(len, items), default=0)
    return "\n".join(f"  {printable(name).ljust(widest)}  {printable(text)}" for name, text in items.items())


def as_json(value: Any) -> str:
    """JSON for standard output, with escapes where its encoding is not UTF-8, or a character would not be shown."""
    encoding = codecs.lookup(sys.stdout.encoding or "utf-8").name
    shown = json.dumps(value, indent=2, ensure_ascii=False)
    if encoding == "utf-8" and shown.replace("\n", "").isprintable():
        return shown
    return json.dumps(value, indent=2).replace("\x7f", "\\u007f")
