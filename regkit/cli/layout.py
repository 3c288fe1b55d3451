"""Text within the width of a terminal, also in a pipe."""

from __future__ import annotations

import codecs
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Final

WIDTH: Final = 100
"""The width of everything printed, in columns."""

_MOST_NAMES: Final = 3


def fill(text: str, indent: str = "", hang: str = "") -> str:
    """The text in lines of the terminal's width; only spaces are broken at."""
    return textwrap.fill(
        text,
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
    return "\n".join(f"  {name.ljust(widest)}  {text}" for name, text in items.items())


def as_json(value: Any) -> str:
    """JSON for standard output, with escapes where that has another encoding than UTF-8."""
    encoding = codecs.lookup(sys.stdout.encoding or "utf-8").name
    return json.dumps(value, indent=2, ensure_ascii=encoding != "utf-8")
