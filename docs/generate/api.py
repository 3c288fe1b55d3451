"""The pages of the API: each public name on exactly one of them. mkdocstrings fills them in when the site is built."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import regkit


@dataclass(frozen=True)
class Page:
    """A page: its title, names of `regkit` by the sections they are in, and modules that have a section each."""

    title: str
    sections: Mapping[str, Sequence[str]] = field(default_factory=dict)
    modules: Sequence[str] = ()


PAGES: Final[Mapping[str, Page]] = {
    "use": Page(
        "Attach and plan",
        {
            "Attach": ["attach", "attachments", "Attachment"],
            "Plan": ["resolve", "Plan", "Site", "WeightSite", "OutputSite"],
        },
    ),
    "documents": Page("Documents", {"Read": ["load", "schema"], "What a document says": ["Spec", "Rule", "Target"]}),
    "plugins": Page(
        "Kinds and plugins",
        {
            "Contracts": ["Penalty", "ActivityPenalty", "Constraint", "Schedule"],
            "Plugins": ["register", "Registry", "hookimpl"],
        },
        ["regkit.kinds", "regkit.fields", "regkit.buckets"],
    ),
    "adapters": Page(
        "Adapters and activities",
        {
            "Adapters": ["Adapter", "Weight", "Output", "Form", "Example"],
            "Activities": ["Activity", "Segment", "Validity"],
        },
        ["regkit.activity"],
    ),
    "testing": Page("Laws and tests", modules=["regkit.testing"]),
    "integrations": Page(
        "Trainers",
        modules=["regkit.integrations.lightning", "regkit.integrations.transformers", "regkit.integrations.skorch"],
    ),
    "errors": Page(
        "Errors",
        {
            "Errors": ["RegkitError", "SpecError", "ResolveError", "AttachError", "StepError", "PluginError"],
            "Beside them": ["Problem", "RegkitWarning", "PluginWarning"],
        },
    ),
}


def api() -> dict[str, str]:
    """The pages by their paths."""
    return {f"api/{name}.md": _page(page) for name, page in PAGES.items()}


def public_names(module: str) -> list[str]:
    """The public names of a module: those in its `__all__`, or what is defined in it without an underscore."""
    tree = ast.parse(_source(module).read_text(encoding="utf-8"))
    names = [name for statement in tree.body for name in _defined(statement) if not name.startswith("_")]
    exported = [one.value for one in tree.body if isinstance(one, ast.Assign) and "__all__" in _defined(one)]
    return list(ast.literal_eval(exported[0])) if exported else names


def _source(module: str) -> Path:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{module} has no source")
    return Path(spec.origin)


def _defined(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement of a module defines, imports aside."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    yield from (target.id for target in targets if isinstance(target, ast.Name))


def _page(page: Page) -> str:
    parts = [f"# {page.title}"]
    for title, names in page.sections.items():
        parts += [f"## {title}", *(f"::: regkit.{name}" for name in names)]
    for module in page.modules:
        summary = ast.get_docstring(ast.parse(_source(module).read_text(encoding="utf-8"))) or ""
        names = [name for name in public_names(module) if name not in regkit.__all__]
        parts += [f"## {module}", summary.partition("\n\n")[0], *(f"::: {module}.{name}" for name in names)]
    return "\n\n".join(parts)
