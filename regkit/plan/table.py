"""Plain-text tables, for a terminal and for `print`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Final

from regkit.errors import printable

_NARROWEST: Final = 12


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, wrap: Sequence[int] = (), width: int | None = None
) -> str:
    """A table of left-aligned columns under a ruled header.

    wrap: the columns of which long cells go on in the lines below. width: the width that these columns are narrowed to
    meet, as far as they can be.
    """
    rows = [list(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        widest = max(wrap, key=widths.__getitem__)
        if widths[widest] <= _NARROWEST:
            break
        widths[widest] -= 1
    lines = [line for row in rows for line in _lines(row, widths, wrap)]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    whole = [header, ["─" * one for one in widths], *lines]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in whole)


def _lines(row: Sequence[str], widths: Sequence[int], wrap: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """The lines of a row, in which long cells go on."""
    cells = [
        textwrap.wrap(cell, widths[n], break_long_words=False, break_on_hyphens=False) if n in wrap else [cell]
        for n, cell in enumerate(row)
    ]
    return zip_longest(*cells, fillvalue="")
