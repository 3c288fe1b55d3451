"""The JSON Schema of documents, with every installed kind, for editors and validators."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from regkit.adapters import GATE_ALIASES
from regkit.document.spec import Spec
from regkit.registry.entries import Entry
from regkit.registry.names import Family
from regkit.registry.registry import Registry, default

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def schema(registry: Registry | None = None) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a document.

    registry: the kinds, roles and gates that the schema allows; left out, those of everything installed.

    Each kind is one branch of a `oneOf` with the discriminator `kind`, beside the shorthand that stands for the kind.
    """
    registry = registry or default()
    entries = registry.entries()
    models: list[type[BaseModel]] = [Spec, *(entry.kind for entry in entries)]
    names, generated = models_json_schema([(model, "validation") for model in models])
    definitions: dict[str, Any] = generated["$defs"]
    references = {entry.name: names[entry.kind, "validation"] for entry in entries}
    for entry in entries:
        definition = definitions[references[entry.name]["$ref"].rpartition("/")[2]]
        definition["required"] = sorted({*definition.get("required", []), "kind"})
    unions: dict[str, Any] = {}
    root = definitions.pop("Spec")
    definitions = _fill(definitions, unions, registry, references)
    root = _fill(root, unions, registry, references)
    root["anyOf"] = [{"required": ["rules"]}, {"required": ["layers"]}]
    return {"$schema": _DIALECT, **root, "title": "regkit", "$defs": {**definitions, **unions}}


def _fill(node: Any, unions: dict[str, Any], registry: Registry, references: dict[str, Any]) -> Any:
    """A part of the schema with the registry's kinds, roles and gates in the places that are open."""
    if isinstance(node, list):
        return [_fill(item, unions, registry, references) for item in node]
    if not isinstance(node, dict):
        return node
    if "x-names" in node:
        known = registry.roles if node["x-names"] == "roles" else [*registry.gates, *GATE_ALIASES]
        return {"enum": list(dict.fromkeys(known))}
    if "x-open-union" in node:
        families: list[Family] = node["x-open-union"]
        name = "any " + " or ".join(families)
        unions.setdefault(name, _union(registry.entries(*families), families, references))
        rest = {key: value for key, value in node.items() if key != "x-open-union"}
        return {**rest, "$ref": f"#/$defs/{name.replace(' ', '%20')}"}
    return {key: _fill(value, unions, registry, references) for key, value in node.items()}


def _union(entries: list[Entry], families: list[Family], references: dict[str, Any]) -> dict[str, Any]:
    if not entries:
        return {"not": {}}
    canonical: dict[str, Any] = {
        "oneOf": [references[entry.name] for entry in entries],
        "discriminator": {
            "propertyName": "kind",
            "mapping": {entry.name: references[entry.name]["$ref"] for entry in entries},
        },
    }
    short = {entry.name: entry for entry in entries}
    if families == ["activity penalty"]:
        # Under `activity_regularizer` the prefix may be left out, in `kind` too.
        short |= {name.removeprefix("activity_"): entry for name, entry in short.items()}
        canonical = {"anyOf": [canonical, _kind_of(short)]}
    return {"anyOf": [canonical, _call(short), _single_key(short), *_fields(entries)]}


def _kind_of(names: Iterable[str]) -> dict[str, Any]:
    return {"type": "object", "properties": {"kind": {"enum": sorted(names)}}, "required": ["kind"]}


def _call(names: Iterable[str]) -> dict[str, Any]:
    pattern = "|".join(re.escape(name) for name in sorted(names))
    return {"type": "string", "pattern": rf"^\s*({pattern})\s*(\([\s\S]*\))?\s*$"}


def _single_key(names: Iterable[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: {"type": ["number", "object"]} for name in sorted(names)},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }


def _fields(entries: list[Entry]) -> list[dict[str, Any]]:
    """The objects with exactly the options of a kind's shorthand for keys: `{"l1": 1e-5, "l2": 1e-4}`."""
    return [
        {
            "type": "object",
            "properties": {option: {"type": "number"} for option in entry.kind.shorthand},
            "required": list(entry.kind.shorthand),
            "additionalProperties": False,
        }
        for entry in entries
        if len(entry.kind.shorthand) > 1
    ]
