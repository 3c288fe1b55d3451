"""Warnings of plugins, as sentences for the one who runs a command."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from regkit.errors import PluginWarning


@contextmanager
def plugin_warnings(tell: Callable[[str], None]) -> Iterator[None]:
    """A context that gives the text of each PluginWarning to `tell`, and leaves every other warning alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", PluginWarning)
        show = warnings.showwarning

        def showwarning(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, PluginWarning):
                tell(str(message))
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = showwarning
        yield
