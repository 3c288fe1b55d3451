"""The patterns of dotted names in targets."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable


def glob(pattern: str) -> Callable[[str], bool]:
    """A function that tells whether a pattern covers a dotted name.

    `*` and `?` stand for characters within a part, `**` for any number of parts, even none. The model itself, of no
    name, is covered by `**` alone.
    """
    wanted = [None if part == "**" else _part(part) for part in pattern.split(".")]

    def covers(name: str) -> bool:
        parts = name.split(".") if name else []
        reached = {0}  # the numbers of parts that may be used up so far; all at once, where a regex would backtrack
        for fits in wanted:
            if fits is None:
                reached = set(range(min(reached, default=len(parts) + 1), len(parts) + 1))
            else:
                reached = {i + 1 for i in reached if i < len(parts) and fits(parts[i])}
        return len(parts) in reached

    return covers


def _part(wanted: str) -> Callable[[str], object]:
    if literal(wanted):
        return wanted.__eq__
    return re.compile(fnmatch.translate(wanted.replace("[", "[[]"))).match  # fnmatch' sets are no part of the language


def literal(pattern: str) -> bool:
    """Whether a pattern covers its own name alone."""
    return "*" not in pattern and "?" not in pattern
