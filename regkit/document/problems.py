"""The problems of a document: pydantic's errors as sentences in the words of JSON, each at its place in the text."""

from __future__ import annotations

import json
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from regkit import errors
from regkit.adapters import OUTPUT_ROLES
from regkit.document import json_text
from regkit.document.context import ReadingContext
from regkit.document.spec import Layer, Provenance, Rule, Spec
from regkit.document.target import Target
from regkit.errors import Problem
from regkit.kinds import Penalty
from regkit.registry.registry import Registry

_IN_WORDS_OF_JSON: Final = {
    **dict.fromkeys(("tuple_type", "list_type", "set_type", "frozen_set_type"), "must be a list"),
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "string_too_short": "must not be empty",
    "string_too_long": "is too long",
    "string_pattern_mismatch": "must have no control characters",
    "none_required": "must be null",
}


def problems(error: ValidationError, source: json_text.Source, reading: ReadingContext) -> list[Problem]:
    """The problems that pydantic's errors tell, each once, in the order of the text."""
    found: list[tuple[str, str]] = []
    for one in error.errors(include_url=False):
        place = _place(one["loc"], source.value)
        sentence = _sentence(dict(one), source, reading)
        if place != one["loc"] and isinstance(one["loc"][-1], str) and one["type"] != "missing":
            sentence = f"`{one['loc'][-1]}` {sentence}"  # the document does not show the option's name
        found.append((json_text.pointer(place), sentence))
    problems = [source.problem(pointer, sentence) for pointer, sentence in dict.fromkeys(found)]
    return sorted(problems, key=lambda p: (p.line or 0, p.column or 0))


def _place(path: tuple[str | int, ...], value: Any) -> tuple[str | int, ...]:
    """The path in the document as written to the value at a path of the canonical form.

    An option of a kind in shorthand is in the shorthand's string, or under the kind's name: /penalty/l2 for
    /penalty/strength.
    """
    place: list[str | int] = []
    for part in path:
        if isinstance(value, dict):
            if part not in value and "kind" not in value and len(value) == 1:
                name, value = next(iter(value.items()))
                place.append(name)
                if not isinstance(value, dict):
                    break
            value = value.get(part)
        elif isinstance(value, (list, tuple)) and isinstance(part, int):
            value = value[part]
        else:
            break  # a scalar is the place of all values that the canonical form has below
        place.append(part)
    return tuple(place)


def _sentence(error: dict[str, Any], source: json_text.Source, reading: ReadingContext) -> str:
    kind, path, given, registry = error["type"], error["loc"], error["input"], reading.registry
    if kind == "extra_forbidden":
        key, at = str(path[-1]), path[:-1]
        if errors.hints_left() and (right := _right_place(key, at, source.value, registry)):
            return f"unknown key {errors.quoted(key)} here: it belongs {right}"
        return errors.unknown("key", key, _known_keys(at, source.value, registry))
    if kind == "missing":
        return f"`{path[-1]}` is missing"
    if kind == "regkit_role":
        return errors.unknown("role", given, _roles_at(path, source.value, reading))
    if kind == "regkit":
        return str(error["msg"])
    if kind in _IN_WORDS_OF_JSON:
        return f"{_IN_WORDS_OF_JSON[kind]}, got {_shown(given)}"
    if kind == "value_error":  # a kind's own validator raised this, with the value in its sentence
        return str(error["ctx"]["error"])
    message = str(error["msg"]).replace("Input should be", "must be")
    return f"{message}, got {_shown(given)}"


def _shown(value: Any) -> str:
    """A value, shortened: the words null, true and false as in JSON, others as in Python."""
    return json.dumps(value) if value is None or isinstance(value, bool) else errors.quoted(value)


def _roles_at(path: tuple[str | int, ...], value: Any, reading: ReadingContext) -> list[str]:
    """The roles that a target at a path may name: of weights alone, where its rule is about weights."""
    rule = _at(path[:2], value)
    cls = _kind_at((*path[:2], "penalty"), value, reading.registry) if "penalty" in rule else None
    of_weights = "constraint" in rule or (cls is not None and issubclass(cls, Penalty))
    return [role for role in reading.roles if not of_weights or role not in OUTPUT_ROLES]


def _right_place(key: str, path: tuple[str | int, ...], value: Any, registry: Registry) -> str | None:
    """The place where a key that is unknown at a path would be right; None where that is nowhere around."""
    names = [part for part in path if isinstance(part, str)]
    in_rule = names[:1] == ["rules"]
    if in_rule and len(names) == 1 and key in Target.model_fields:
        return "into `target`"
    if in_rule and len(names) == 1:
        for field in ("penalty", "constraint", "schedule"):
            if field in _at(path, value) and key in _known_keys((*path, field), value, registry):
                return f"into `{field}`"
    if in_rule and len(names) > 1 and key in Rule.model_fields:
        return f"into the rule, beside `{names[1]}`"
    if in_rule and len(names) > 1 and key in Target.model_fields:
        return "into the rule's `target`"
    if not in_rule and key in Rule.model_fields and key not in Spec.model_fields:
        return "into a rule, in the list `rules`"
    if names[:1] != ["layers"] and key in Layer.model_fields:
        return "into a layer, in the list `layers`"
    return "at the top of the document" if path and key in ("rules", "layers", "version", "provenance") else None


def _at(path: tuple[str | int, ...], value: Any) -> Any:
    for part in path:
        value = value[part]
    return value


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
    value = _at(path, value)
    name = value.get("kind") if isinstance(value, dict) else value
    if name is None and isinstance(value, dict):
        name = next(iter(value), None)
    bare = str(name).partition("(")[0].strip()
    under = "activity_" if path[-1:] == ("activity_regularizer",) else ""  # where l2 means activity_l2
    entry = registry.find(under + bare) or registry.find(bare)
    return None if entry is None else entry.kind
