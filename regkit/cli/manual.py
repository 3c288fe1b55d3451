"""The manual of one kind: meaning, options with ranges, action, an example, and source."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Final, get_args

from pydantic.errors import PydanticInvalidForJsonSchema

from regkit import ActivityPenalty, Constraint, Penalty, PluginError
from regkit.cli.layout import WIDTH, fill, listed
from regkit.kinds import Kind, Via
from regkit.plan.table import table
from regkit.registry.entries import Entry

_SHORT: Final = re.compile(r"[A-Za-z_]\w*|-?\d+(\.\d+)?([eE][+-]?\d+)?|true|false|null")
_GOES_ON: Final = re.compile(r"(?!\w+:)\S")
"""A line of a docstring that begins neither a paragraph nor something with a name, such as `prox: ...`."""

_LARGEST: Final = 2**53
"""The largest whole number that JSON holds exactly; a limit as large is not worth telling."""


def manual(entry: Entry) -> str:
    """The manual of a kind as text."""
    parts = [
        f"{entry.name}: a kind of {entry.family}, from {entry.origin}",
        "\n".join(_meaning(entry.kind)),
        f"options\n{textwrap.indent(_options(entry), '  ')}",
        f"how it acts\n{listed(dict(acts(entry.kind)))}",
        "\n".join(["in a document", *(textwrap.indent(one, "  ") for one in _in_a_document(entry))]),
        f"source\n{listed(_source(entry))}",
    ]
    return "\n\n".join(parts)


def word(value: Any) -> str:
    """An option's value as in documents, but words without quotation marks."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _meaning(kind: type[Kind]) -> Iterator[str]:
    """The lines of the docstring; lines that are too long are broken anew, with the rest of their paragraph."""
    lines = inspect.cleandoc(kind.__doc__ or "It has no docstring.").splitlines()
    while lines:
        line = lines.pop(0)
        while len(line) > WIDTH and lines and _GOES_ON.match(lines[0]):
            line += f" {lines.pop(0)}"
        yield line if len(line) <= WIDTH else fill(line.lstrip(), line[: len(line) - len(line.lstrip())])


def _options(entry: Entry) -> str:
    rows = option_rows(entry)
    return table(["name", "type", "default", "meaning"], rows, wrap=[1, 3], width=WIDTH - 2) if rows else "none"


def option_rows(entry: Entry) -> list[list[str]]:
    """The name, type, default and meaning of each option. Raises PluginError where a kind has no JSON Schema."""
    try:
        schema = entry.kind.model_json_schema()
    except PydanticInvalidForJsonSchema as error:
        raise PluginError(f"{entry.name}, of plugin {entry.origin}, has no JSON Schema: {error}") from error
    rows = []
    for name, field in entry.kind.model_fields.items():
        if name == "kind":
            continue
        option = schema["properties"][field.alias or name]
        default = "required" if field.is_required() else word(field.get_default(call_default_factory=True))
        rows.append([name, type_of(option, schema.get("$defs", {})), default, " ".join(_description(option).split())])
    return rows


def _description(option: Mapping[str, Any]) -> str:
    return str(option.get("description", ""))


def type_of(option: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A JSON Schema in words: `number ≥ 0`, `unit, input or matrix`, `list of whole number ≥ 1`, `string or null`."""
    if "$ref" in option:
        return type_of(definitions[option["$ref"].rpartition("/")[2]], definitions)
    if "const" in option:
        return word(option["const"])
    if "enum" in option:
        return _either([word(one) for one in option["enum"]])
    for union in ("anyOf", "oneOf", "allOf"):
        if union in option:
            return _either([type_of(one, definitions) for one in option[union]])
    if option.get("type") == "array":
        items = option.get("items", {})
        return f"list of {type_of(items, definitions)}" if items else "list"
    names = {"number": "number", "integer": "whole number", "boolean": "true or false", "null": "null"}
    name = names.get(option.get("type", ""), str(option.get("type", "anything")))
    return " ".join([name, *_range(option)])


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _range(option: Mapping[str, Any]) -> Iterator[str]:
    for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")):
        if key in option and abs(option[key]) < _LARGEST:
            yield f"{sign} {option[key]:g}"


def acts(kind: type[Kind]) -> Iterator[tuple[str, str]]:
    """The action of a kind: on which weights or outputs, via which way, and the option that a schedule multiplies."""
    if issubclass(kind, Penalty | Constraint):
        ranks = {1: "biases", 2: "matrices"}
        yield "acts on", " and ".join(ranks.get(rank, f"weights of {rank} dimensions") for rank in sorted(kind.ranks))
    if issubclass(kind, ActivityPenalty):
        yield "acts on", "outputs that run over time" if kind.sequence else "outputs, states and cells"
    if vias := vias_of(kind):
        yield "via", ", ".join([f"{vias[0]} (the default)", *vias[1:]])
    if issubclass(kind, Penalty):
        yield "gradient", "in closed form" if kind.gradient is not Penalty.gradient else "by autograd"
        yield "prox", "known" if kind.prox is not Penalty.prox else "none"
    if issubclass(kind, Constraint):
        bounds = " and ".join(kind.bounds)
        yield "a schedule", f"multiplies {bounds}" if bounds else "cannot be given: there is no bound to multiply"
    elif not vias:
        yield "multiplies", "the strength of a penalty, or the bound of a constraint"
    else:
        yield "a schedule", "multiplies strength"


def vias_of(kind: type[Kind]) -> list[Via]:
    """The values of `via` in a rule with such a kind, the default first."""
    if issubclass(kind, ActivityPenalty):
        return ["loss", "inject"]
    if not issubclass(kind, Penalty):
        return []
    known: list[Via] = [via for via in get_args(Via) if via != "inject"]
    return known if kind.prox is not Penalty.prox else [via for via in known if via != "proximal"]


def _in_a_document(entry: Entry) -> Iterator[str]:
    try:
        example = entry.kind.examples()[0]
    except Exception as error:  # a stranger's code: its manual goes on without it, and says why
        yield f"no example: {type(error).__name__}: {error}"
        return
    yield document(entry, example)
    if (short := shorthand(example)) is None:
        yield "in short: no string stands for it, since it has lists"
    else:
        bare = ", ".join(entry.kind.shorthand)
        yield f"in short: {json.dumps(short)}" + (f"; without a name, in this order: {bare}" if bare else "")


def document(entry: Entry, example: Kind, width: int = WIDTH - 2) -> str:
    """A document of one rule with the example; on one line, where the width allows."""
    kind = example.model_dump(mode="json", by_alias=True)
    rule = {"penalty": "l2(1e-4)", "schedule": kind} if entry.family == "schedule" else {_key(entry): kind}
    whole = json.dumps({"rules": [rule]}, ensure_ascii=False)
    if len(whole) <= width:
        return whole
    parts = [
        f'"{key}": {_spread(value) if isinstance(value, dict) else json.dumps(value)}' for key, value in rule.items()
    ]
    return '{"rules": [{\n  ' + ",\n  ".join(parts) + "\n}]}"


def _spread(options: Mapping[str, Any]) -> str:
    """A JSON object with a line for each option; `json.dumps` would give a line to each item of a list, too."""
    lines = [f"    {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in options.items()]
    return "{\n" + ",\n".join(lines) + "\n  }"


def _key(entry: Entry) -> str:
    return "constraint" if entry.family == "constraint" else "penalty"


def shorthand(example: Kind) -> str | None:
    """A kind as a string, with its defaults left out; None where an option cannot be written so."""
    positional = example.shorthand
    given = example.model_dump(mode="json", by_alias=True, exclude={"kind"})
    needed = example.model_dump(mode="json", by_alias=True, exclude={"kind"}, exclude_defaults=True)
    last = max((n for n, name in enumerate(positional) if name in needed), default=-1)
    ordered = {name: given[name] for name in positional[: last + 1]} | needed
    words = {name: word(value) for name, value in ordered.items()}
    if not all(_SHORT.fullmatch(one) for one in words.values()):
        return None
    arguments = [one if name in positional else f"{name}={one}" for name, one in words.items()]
    return f"{example.kind}({', '.join(arguments)})" if arguments else example.kind


def _source(entry: Entry) -> dict[str, str]:
    point = f", entry point {entry.origin.point}" if entry.origin.point else ""
    place = "no source file" if entry.file is None else f"{entry.file}:{entry.line}"
    return {
        "distribution": f"{entry.origin}{point}",
        "class": f"{entry.kind.__module__}.{entry.kind.__qualname__}",
        "file": place,
    }
