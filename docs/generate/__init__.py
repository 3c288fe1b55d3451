"""Pages of the documentation that are made of what the code knows: `python -m docs.generate` writes them."""

from __future__ import annotations

from collections.abc import Mapping

from docs.generate.api import api
from docs.generate.cli import cli
from docs.generate.kinds import kinds
from docs.generate.laws import laws

NOTICE = "<!-- Written by `python -m docs.generate`. Do not edit. -->"


def pages() -> Mapping[str, str]:
    """The text of every generated page, by its path in docs/."""
    made = {"kinds.md": kinds(), "laws.md": laws(), "cli.md": cli(), **api()}
    return {path: f"{NOTICE}\n\n{text.strip()}\n" for path, text in made.items()}
