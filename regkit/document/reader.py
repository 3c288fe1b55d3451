"""The reader of documents: from a path, a text or plain values to a Spec, or to every problem at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regkit.document import json_text
from regkit.document.context import MissingKind, ReadingContext, Unknown, Words
from regkit.document.problems import problems
from regkit.document.spec import Spec
from regkit.errors import SpecError, few_hints
from regkit.registry.entries import Origin, canonical
from regkit.registry.registry import Registry, default


def load(
    document: str | Path | dict[str, Any] | Spec,
    *,
    registry: Registry | None = None,
    strict: bool = False,
    unknown: Unknown = "error",
) -> Spec:
    """Read the Spec in a path, a JSON text or a dict; a Spec is returned unchanged.

    registry: the kinds, roles and gates that the document may name; left out, those of everything installed.
    strict: every kind must come from the distribution and version that the document was saved with; a Spec no longer
    says which those were.
    unknown: "keep" takes rules of kinds that are not installed, for tools that edit a document and save it again: such
    rules are saved as they were written; to resolve or attach them is an error.

    Raises SpecError with every problem found, each with its JSON Pointer and, where there is a text, line and column.
    """
    return read(document, registry or default(), strict=strict, unknown=unknown)


def read(
    document: str | Path | dict[str, Any] | Spec,
    registry: Registry,
    *,
    strict: bool = False,
    unknown: Unknown = "error",
    words: Callable[[], Words] | None = None,
) -> Spec:
    """`load`, for a model: words gives the roles and gates that the model has, of which a mistake is told."""
    if unknown not in ("error", "keep"):
        raise ValueError(f"unknown is 'error' or 'keep', not {unknown!r}")
    if isinstance(document, Spec):
        if strict:
            raise ValueError("strict compares with what a document was saved with, and a Spec does not say: load that")
        return document
    if not isinstance(document, (str, Path, dict)):
        raise TypeError(f"a spec is a path, a JSON text, a dict or a Spec, not {type(document).__name__}")
    source = json_text.read(document)
    given = source.value.get("provenance") if isinstance(source.value, dict) else None
    provenance = given if isinstance(given, dict) else {}
    return _validated(source, ReadingContext(registry, provenance, unknown, words), strict)


def _validated(source: json_text.Source, reading: ReadingContext, strict: bool) -> Spec:
    if not isinstance(source.value, dict):
        raise SpecError(source.origin, [source.problem("", "a document is an object with `rules` or `layers`")])
    try:
        with few_hints():
            spec = Spec.model_validate(source.value, context={"reading": reading})
    except ValidationError as error:
        with few_hints():
            raise SpecError(source.origin, problems(error, source, reading)) from None
    if source.text is not None:
        for number, (key, rule) in enumerate(spec.keyed_rules().items()):
            where = f"rules/{number}" if number < len(source.value.get("rules", ())) else rule.name
            at = source.problem(f"/{where}", "")
            if at.line is not None and at.column is not None:
                spec._places[key] = rule, at.line, at.column
    if moved := [source.problem(*one) for one in _moved_kinds(spec, reading, strict)]:
        raise SpecError(source.origin, moved)
    return spec


def _moved_kinds(spec: Spec, reading: ReadingContext, strict: bool) -> Iterator[tuple[str, str]]:
    """The kinds of another origin than when the document was saved: a pointer and a sentence for each."""
    for name in sorted({kind.kind for kind in spec.kinds() if not isinstance(kind, MissingKind)}):
        entry, saved = reading.registry.find(name), reading.saved(name)
        if entry is None:  # Python code has made the kind: only a document that is saved needs the registry
            continue
        where = json_text.pointer(("provenance", name))
        if saved is None:
            if strict:
                yield "/provenance", f"does not say where {name!r} comes from, and strict compares it; see Spec.save()"
            continue
        was, now = Origin(saved["distribution"], saved.get("version")), entry.origin
        elsewhere = canonical(was.distribution) != canonical(now.distribution)
        if elsewhere and was.version and now.version:
            yield where, f"{name!r} was saved from {was}; here it is another kind, of {now}. If both are one, edit this"
        elif strict and (elsewhere or was.version != now.version):
            yield where, f"{name!r} was saved from {was}; installed is {now}, and strict compares them"
