"""An extension of griffe, which reads the API for the site: docstrings as regkit writes them become Markdown."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import griffe

_markdown = runpy.run_path(str(Path(__file__).with_name("docstrings.py")))["markdown"]


class Parameters(griffe.Extension):
    """Parameters that a docstring tells of, a line for each, become a list; doctests become blocks of code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            names = [parameter.name for parameter in obj.parameters] if isinstance(obj, griffe.Function) else None
            obj.docstring.value = _markdown(obj.docstring.value, names)
