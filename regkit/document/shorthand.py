"""Shorthand for a kind, made canonical: `"l2(1e-4)"`, `"max_norm(3, per=cell)"`, `{"l2": 1e-4}`, `{"l1": 1, "l2": 2}`.

The canonical form is an object with a `kind`. Nothing here evaluates: arguments are JSON scalars or bare words.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from regkit.errors import listing, nearest, quoted, unknown
from regkit.registry.entries import Entry
from regkit.registry.names import Family
from regkit.registry.registry import Registry
from regkit.vocabulary import from_keras

_CALL: Final = re.compile(r"([A-Za-z_][\w.]*)(?:\s*\((.*)\))?", re.DOTALL)  # linear, whatever it is given
_WORD: Final = re.compile(r"[A-Za-z_]\w*")
_SCALAR: Final = re.compile(r"true|false|null|-?(0|[1-9]\d{0,299})(\.\d{1,300})?([eE][+-]?\d{1,4})?", re.ASCII)


class ShorthandError(ValueError):
    """The error of a value that stands for no kind."""


class KindError(ShorthandError):
    """The error of a kind that is not of the families of a field."""


class UnknownKindError(KindError):
    """The error of a name that no installed plugin offers."""

    def __init__(self, name: str, sentence: str) -> None:
        super().__init__(sentence)
        self.name = name


def canonical(value: Any, families: tuple[Family, ...], registry: Registry) -> dict[str, Any]:
    """The object with a `kind` that the value stands for. Raises ShorthandError."""
    if isinstance(value, str):
        return _of_string(value, families, registry)
    if not isinstance(value, dict):
        raise ShorthandError(
            f"expected an object with a kind, or a string such as {_example('', families, registry)!r}, "
            f"got {type(value).__name__}"
        )
    if "class_name" in value:
        raise ShorthandError(_keras(value, families, registry))
    if "kind" not in value:
        return _of_object(value, families, registry)
    if not isinstance(value["kind"], str):
        raise KindError(f"must be the name of a kind, got {quoted(value['kind'])}")
    return {**value, "kind": _entry(value["kind"], families, registry).name}


def _keras(value: dict[str, Any], families: tuple[Family, ...], registry: Registry) -> str:
    """The sentence on a kind in Keras' form. Raises KindError for one that is of other families."""
    name, config = value["class_name"], value.get("config")
    made = from_keras(name, config if isinstance(config, dict) else {}) if isinstance(name, str) else None
    if made is not None and families == ("activity penalty",):  # of which Keras divides the sum by the batch
        made = {**made, "kind": f"activity_{made['kind']}", "reduction": "batch"}
        made = made if made["kind"] in {entry.name for entry in registry.entries(*families)} else None
    if made is None:
        return f"this is how Keras saves objects, and no kind stands for {quoted(name)} with such a config"
    _entry(made["kind"], families, registry)
    of_bias = '; of a bias, which is a vector, axis=0 is "per": "matrix"' if made.get("per") == "unit" else ""
    return f"this is how Keras saves {name}; write {json.dumps(made)[:300]}{of_bias}"


def _example(given: str, families: tuple[Family, ...], registry: Registry) -> str:
    names = [entry.name for entry in registry.entries(*families)]
    leading = re.match(r"[\w.]+", given.strip())
    near = nearest(leading[0], names) if leading else None
    return f"{near or next(iter(names), 'name')}(…)"


def _entry(name: str, families: tuple[Family, ...], registry: Registry) -> Entry:
    entry = registry.find(name, *families)
    if entry is None and families == ("activity penalty",):
        entry = registry.find(f"activity_{name}", *families)  # under `activity_regularizer`, l2 means activity_l2
    if entry is not None:
        return entry
    elsewhere = registry.find(name)
    if elsewhere is not None:
        raise KindError(f"{name!r} is a kind of {elsewhere.family}, not of {' or '.join(families)}")
    known = [e.name for e in registry.entries(*families)]
    if families == ("activity penalty",):
        known += [one.removeprefix("activity_") for one in known if one.startswith("activity_")]
    raise UnknownKindError(name, unknown(families[0], name, known))


def _of_string(text: str, families: tuple[Family, ...], registry: Registry) -> dict[str, Any]:
    match = _CALL.fullmatch(text.strip())
    if match is None:
        raise ShorthandError(f"{quoted(text)} is not a shorthand; write {_example(text, families, registry)!r}")
    entry = _entry(match[1], families, registry)
    options: dict[str, Any] = {"kind": entry.name}
    arguments = (match[2] or "").strip()
    positional, named = list(entry.kind.shorthand), False
    for argument in arguments.split(",") if arguments else ():
        key, equals, word = argument.rpartition("=")
        if not equals:
            if named:
                raise ShorthandError(f"{quoted(text)}: an option without a name comes before those with one")
            if not positional:
                raise ShorthandError(f"{quoted(text)}: {entry.name} takes {_positional(entry)} without a name")
            key = positional.pop(0)
        named = bool(equals)
        if key.strip() in options:
            raise ShorthandError(f"{quoted(text)} gives {quoted(key.strip())} twice")
        options[key.strip()] = _scalar(text, word.strip())
    return options


def _positional(entry: Entry) -> str:
    names = entry.kind.shorthand
    return f"{len(names)} option{'s' if len(names) != 1 else ''} ({listing(names)})" if names else "no option"


def _scalar(text: str, word: str) -> Any:
    if _SCALAR.fullmatch(word):
        return json.loads(word)
    if _WORD.fullmatch(word) and word not in ("NaN", "Infinity"):
        return word
    raise ShorthandError(f"{quoted(text)}: {quoted(word)} is neither a number nor a word")


def _of_object(value: dict[str, Any], families: tuple[Family, ...], registry: Registry) -> dict[str, Any]:
    if len(value) == 1:
        name, option = next(iter(value.items()))
        return _of_pair(name, option, families, registry)
    for family in families:  # the first family goes before the others: l1 and l2 mean l1_l2, not activity_l1_l2
        fitting = [e.name for e in registry.entries(family) if value and set(value) == set(e.kind.shorthand)]
        if len(fitting) > 1:
            raise ShorthandError(f"no `kind` given, and these options are of several: {listing(fitting)}")
        if fitting:
            return {"kind": fitting[0], **value}
    near = nearest("kind", value)
    hint = f"; did you mean {near!r} to be it?" if near else "."
    known = [entry.name for entry in registry.entries(*families)]
    raise ShorthandError(f"no `kind` given{hint} Available: {listing(known)}")


def _of_pair(name: str, option: Any, families: tuple[Family, ...], registry: Registry) -> dict[str, Any]:
    """`{"l2": 1e-4}`, `{"max_norm": {"max_value": 3, "per": "cell"}}`, `{"unit_norm": {}}`."""
    entry = _entry(name, families, registry)
    if isinstance(option, dict):
        if "kind" in option:
            raise ShorthandError(f"{name!r} names the kind already; leave out the inner `kind`")
        return {"kind": entry.name, **option}
    if len(entry.kind.shorthand) != 1:
        raise ShorthandError(f"{name!r} takes {_positional(entry)}; give an object of options")
    return {"kind": entry.name, entry.kind.shorthand[0]: option}
