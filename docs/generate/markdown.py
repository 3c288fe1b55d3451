"""Tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from docs.docstrings import escaped


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, a line for each row."""
    return "\n".join(_line(row) for row in [header, ["---"] * len(header), *rows])


def _line(cells: Sequence[str]) -> str:
    told = (escaped(" ".join(cell.split())).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(told)} |"
