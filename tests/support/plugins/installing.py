"""Distributions that are installed for a test: their code, and how an installer would leave them behind."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

PLUGIN = """
from typing import Literal
import regkit

class {title}(regkit.Penalty):
    '''The sum of {name}.'''
    kind: Literal["{name}"] = "{name}"

    def value(self, w):
        return w.sum()

@regkit.hookimpl
def regkit_penalties():
    return [{title}]
"""


class Install(Protocol):
    """Make a distribution with one module and entry points for it."""

    def __call__(
        self, distribution: str, version: str, module: str, code: str, points: Mapping[str, str] | None = None
    ) -> None: ...


def installer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    monkeypatch.syspath_prepend(str(folder))

    def install(
        distribution: str, version: str, module: str, code: str, points: Mapping[str, str] | None = None
    ) -> None:
        (folder / f"{module}.py").write_text(textwrap.dedent(code))
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = "\n".join(f"{name} = {target}" for name, target in (points or {module: module}).items())
        (info / "entry_points.txt").write_text(f"[regkit]\n{lines}\n")
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, module, raising=False)

    yield install
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


def imported(module: str) -> bool:
    return module in sys.modules
