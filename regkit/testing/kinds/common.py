"""The laws of all kinds: a kind is frozen options with a manual, and functions that remember nothing."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
from collections.abc import Iterator
from typing import Final, TypeVar, cast

import numpy as np
import torch
from pydantic import ValidationError

from regkit import Registry
from regkit.kinds import Kind
from regkit.testing.laws import Law, Laws, Report, hold, is_accepted
from regkit.testing.memory import remembers_nothing
from regkit.testing.samples.tensors import identical, outcomes

K = TypeVar("K", bound=Kind)

KIND_LAWS: Final[Laws[Kind]] = Laws()
"""The laws of every kind, in every family."""


def report(laws: Laws[K], contract: type, subject: K | type[K]) -> Report:
    """Try the laws on a kind; of a class, on each of its examples.

    Raises TypeError where the subject is neither a kind of the contract nor a class of such kinds.
    """
    cls = subject if isinstance(subject, type) else type(subject)
    if not issubclass(cls, contract):
        raise TypeError(f"expected a {contract.__name__}, or a subclass of it, got {subject!r}")
    if not isinstance(subject, type):
        return laws.report(subject, title(subject))
    first = EXAMPLES.tried(cls, cls.__qualname__)
    examples = cast("list[K]", list(cls.examples()) if first.passed else [])
    tried = [laws.report(kind, title(kind)) for kind in examples]
    results = (first, *(result for one in tried for result in one))
    return Report(cls.__qualname__, results)


def title(kind: Kind) -> str:
    """The name of a kind in results: `l2(strength=0.1)`."""
    try:
        return kind.describe()
    except Exception:  # that it raises is what the law `described` tells
        return type(kind).__qualname__


def _has_examples(subject: type[Kind]) -> None:
    """The laws are tried on instances of a class, and `regkit kinds` shows the first. Write a classmethod `examples`
    that returns kinds with options that make sense, and see that nothing of the class is left abstract."""
    examples = list(subject.examples())
    hold(examples, f"{subject.__qualname__}.examples() is empty")
    strange = [one for one in examples if type(one) is not subject]
    hold(not strange, f"{subject.__qualname__}.examples() has {strange!r} in it, which is not of this class")


EXAMPLES: Final[Law[type[Kind]]] = Law(
    "examples", " ".join((_has_examples.__doc__ or "").split()), _has_examples, lambda _: True
)
"""The law of classes: that a class has examples, on which the other laws are tried."""


@KIND_LAWS.add()
def named(kind: Kind) -> None:
    """A document calls a kind by its name, which is also its key in every saved spec. Give the class a field
    `kind: Literal["its_name"] = "its_name"`, in lower case, with underscores, and dots after a distribution's name."""
    name = type(kind).kind_name()
    is_accepted(Registry(entry_points=False).register, type(kind))
    hold(kind.kind == name, f"kind is {kind.kind!r}, where the class says {name!r}")


@KIND_LAWS.add()
def documented(kind: Kind) -> None:
    """`regkit kinds` and the JSON Schema are a kind's manual. Write a docstring under the class line (the formula and
    its source) and one under each option (what it is, its range)."""
    cls = type(kind)
    meaning = vars(cls).get("__doc__")
    hold(meaning and meaning.strip(), f"{cls.__qualname__} has no docstring")
    options = cls.model_json_schema()["properties"]
    bare = [name for name, option in options.items() if name != "kind" and not option.get("description")]
    hold(not bare, f"no docstring under {', '.join(bare)}")


@KIND_LAWS.add()
def described(kind: Kind) -> None:
    """Plans, errors and reports say a kind and its options on one line. Leave `describe` alone, or return one line
    that begins with the kind's name."""
    line = kind.describe()
    hold(isinstance(line, str) and line.startswith(kind.kind) and "\n" not in line, f"describe() gives {line!r}")


@KIND_LAWS.add()
def shorthand_fits(kind: Kind) -> None:
    """`"name(1, 2)"` fills the options named in `shorthand`, in order. Name options that exist, each once."""
    names = type(kind).shorthand
    options = set(type(kind).model_fields) - {"kind"}
    strange = [name for name in names if name not in options]
    hold(not strange, f"shorthand names {', '.join(strange)}; the options are {', '.join(sorted(options))}")
    hold(len(set(names)) == len(names), f"shorthand names an option twice: {names}")


@KIND_LAWS.add()
def survives_json(kind: Kind) -> None:
    """A spec is saved and loaded again, and must then be the same. Every field must be a number, a string, a boolean,
    or a tuple of those (`Field(strict=False)`, since JSON has lists), and no validator may change what it validated."""
    text = kind.model_dump_json()
    for again in (type(kind).model_validate_json(text), type(kind).model_validate(json.loads(text))):
        hold(again == kind, f"{text} is read as {again!r}")
        hold(again.model_dump_json() == text, f"{text} is written again as {again.model_dump_json()}")
        hold(hash(again) == hash(kind), f"{text} is read as an equal kind with another hash")


@KIND_LAWS.add()
def survives_copies(kind: Kind) -> None:
    """A model is pickled and deep-copied with its rules: a copy that is another kind would regularize otherwise. Keep
    the class at module level, and nothing in an instance but its options."""
    for how, again in (("pickled", pickle.loads(pickle.dumps(kind))), ("deep copy", copy.deepcopy(kind))):
        hold(type(again) is type(kind) and again == kind, f"{kind!r} comes back {how} as {again!r}")
        hold(hash(again) == hash(kind), f"it comes back {how} with another hash")


@KIND_LAWS.add()
def frozen(kind: Kind) -> None:
    """One kind serves every weight of a rule, and is compared and hashed. Do not set `frozen=False` in the class'
    model_config; what should differ is a new kind (`model_copy`)."""
    other = kind.model_copy()
    for name in type(kind).model_fields:
        try:
            setattr(other, name, getattr(other, name))
        except (ValidationError, AttributeError):
            continue
        hold(False, f"{name} could be assigned")


@KIND_LAWS.add()
def unknown_options_refused(kind: Kind) -> None:
    """A misspelt option would silently be without effect. Do not set `extra="allow"` or `"ignore"` in model_config."""
    name = "an_option_of_no_kind"
    hold(_refuses(kind, {name: 1.0}), f"the option {name!r} was taken")


@KIND_LAWS.add()
def numbers_strict(kind: Kind) -> None:
    """A document's numbers are finite, plain numbers; a NaN would reach every weight. Take the types of options from
    `regkit.fields` (`Real`, `NonNegative`, `Positive`, `Fraction`, `Count`, ...), and leave `strict` as it is."""
    for name, value in kind.model_dump().items():
        for strange in _spoilt(value):
            hold(_refuses(kind, {name: strange}), f"the option {name} took {strange!r}")


@KIND_LAWS.add()
def stateless(kind: Kind) -> None:
    """A kind is shared by many weights, copied, and asked again when a run is resumed: a memory would mix these up.
    Compute everything from the options and the arguments; keep no counter, buffer or cache on self or on the
    class."""
    remembers_nothing(kind, Kind, lambda: outcomes(kind))


@KIND_LAWS.add()
def deterministic(kind: Kind) -> None:
    """Equal weights have equal penalties, or a run could not be repeated or resumed. Depend on the arguments and the
    options alone: not on calls before, random numbers or the time."""
    first = outcomes(kind)
    outcomes(kind, seed=50)  # other questions in between
    for copied in (kind, copy.deepcopy(kind)):
        for one, again in zip(first, outcomes(copied), strict=True):
            hold(identical(one, again), f"asked twice, {_shown(one)} and then {_shown(again)}")


@KIND_LAWS.add()
def draws_no_random_numbers(kind: Kind) -> None:
    """Whoever seeds torch gets the same run with and without a rule only if no kind draws from the global generators.
    Start iterations from fixed numbers, as `torch.ones`."""
    before = _generators()
    outcomes(kind)
    drawn = [name for name, state in _generators().items() if state != before[name]]
    hold(not drawn, f"it drew from the global generator of {', '.join(drawn)}")


def _refuses(kind: Kind, changes: dict[str, object]) -> bool:
    try:
        type(kind).model_validate({**kind.model_dump(), **changes})
    except ValidationError:
        return True
    return False


def _spoilt(value: object) -> Iterator[object]:
    """Values that must not pass for a number, or for the first number in a tuple."""
    if type(value) in (int, float):
        yield from (math.nan, math.inf, -math.inf, str(value), True)
    elif isinstance(value, tuple | list) and value:
        yield from ([strange, *value[1:]] for strange in _spoilt(value[0]))


def _generators() -> dict[str, object]:
    numpy = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr(numpy)
        if not isinstance(numpy, dict)
        else (numpy["state"]["key"].tobytes(), numpy["state"]["pos"]),
        "random": random.getstate(),
    }


def _shown(one: torch.Tensor) -> str:
    return (
        f"{one.flatten()[0].item():.17g}" if one.numel() == 1 else f"a tensor of norm {one.double().norm().item():.17g}"
    )
