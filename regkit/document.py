"""Reading a document: from a path, a text or plain values to a Spec, or to every error in it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from regkit import source
from regkit.errors import Problem, SpecError, unknown
from regkit.registry import Registry, default
from regkit.spec import Layer, Provenance, Rule, Spec
from regkit.target import Target

_LONGEST_ECHO: Final = 80


def load(document: str | Path | dict[str, Any] | Spec, *, registry: Registry | None = None) -> Spec:
    """The Spec in a path, a JSON text, a dict, or a Spec itself.

    Raises SpecError with every problem found, each with its JSON Pointer and, where there is a text, line and column.
    """
    if isinstance(document, Spec):
        return document
    if not isinstance(document, (str, Path, dict)):
        raise TypeError(f"a spec is a path, a JSON text, a dict or a Spec, not {type(document).__name__}")
    registry = registry or default()
    read = source.read(document)
    if not isinstance(read.value, dict):
        raise SpecError(read.origin, [read.problem("", "a document is an object with `rules` or `layers`")])
    context = {"registry": registry, "provenance": read.value.get("provenance")}
    try:
        return Spec.model_validate(read.value, context=context)
    except ValidationError as error:
        raise SpecError(read.origin, _problems(error, read, registry)) from None


def _problems(error: ValidationError, read: source.Source, registry: Registry) -> list[Problem]:
    found = [(source.pointer(one["loc"]), _sentence(dict(one), read, registry)) for one in error.errors()]
    problems = [read.problem(pointer, sentence) for pointer, sentence in dict.fromkeys(found)]
    return sorted(problems, key=lambda p: (p.line or 0, p.column or 0))


def _sentence(error: dict[str, Any], read: source.Source, registry: Registry) -> str:
    kind, path, given = error["type"], error["loc"], error["input"]
    if kind == "extra_forbidden":
        return unknown("key", str(path[-1]), _known_keys(path[:-1], read.value, registry))
    if kind == "missing":
        return f"`{path[-1]}` is missing"
    if kind == "regkit":
        return str(error["msg"])
    if kind == "value_error":  # raised by a kind's own validator, which says what was given
        return str(error["ctx"]["error"])
    message = str(error["msg"]).replace("Input should be", "must be")
    return f"{message}, got {_echo(given)}"


def _echo(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_ECHO else f"{text[:_LONGEST_ECHO]}…"


def _known_keys(path: tuple[str | int, ...], value: Any, registry: Registry) -> list[str]:
    """The keys that the object at this path may have."""
    shapes: dict[tuple[str, ...], type[BaseModel]] = {
        (): Spec, ("rules",): Rule, ("rules", "target"): Target, ("layers",): Layer, ("provenance",): Provenance,
    }  # fmt: skip
    names = tuple(part for part in path if isinstance(part, str))
    if names[:1] == ("provenance",):
        names = names[:1]
    model = shapes.get(names) or _kind_at(path, value, registry)
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _kind_at(path: tuple[str | int, ...], value: Any, registry: Registry) -> type[BaseModel] | None:
    """The class of the kind that stands at this path, in its canonical form or in shorthand."""
    for part in path:
        value = value[part]
    name = value.get("kind") if isinstance(value, dict) else value
    if name is None and isinstance(value, dict):
        name = next(iter(value), None)
    bare = str(name).partition("(")[0].strip()
    entry = registry.find(bare) or registry.find(f"activity_{bare}")
    return None if entry is None else entry.kind
