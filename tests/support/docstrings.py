"""Every docstring of regkit and of the standard kinds, as it stands in the source: no module is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("regkit", "plugins/regkit_standard")
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Docstring:
    """The docstring of a module, a class or a function.

    name: the qualified name, empty for a module.
    """

    module: str
    name: str
    text: str

    @property
    def first_line(self) -> str:
        return self.text.partition("\n")[0]

    def __str__(self) -> str:
        return f"{self.module}.{self.name}".rstrip(".")


def docstrings(path: Path) -> Iterator[Docstring]:
    """The docstrings of a file."""
    parts = path.with_suffix("").parts
    parts = parts[1:] if parts[0] == "plugins" else parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    yield from _within(ast.parse((ROOT / path).read_text(encoding="utf-8")), module, "")


def _within(node: ast.AST, module: str, name: str) -> Iterator[Docstring]:
    if isinstance(node, (ast.Module, *DEFINITIONS)) and (text := ast.get_docstring(node)) is not None:
        yield Docstring(module, name, text)
    for child in ast.iter_child_nodes(node):
        yield from _within(
            child, module, f"{name}.{child.name}".lstrip(".") if isinstance(child, DEFINITIONS) else name
        )


EVERY = [one for path in FILES for one in docstrings(path)]
