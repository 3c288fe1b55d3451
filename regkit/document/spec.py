"""The document as frozen models, in its one canonical form.

A `Spec` holds rules; a rule binds one penalty or one constraint to a target. Shorthand and the `layers` section become
rules as they are read, so what is saved is canonical. This room knows no tensor and no model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from regkit.document.context import MissingKind
from regkit.document.kind_field import AnyConstraint, AnyPenalty, AnySchedule, OutputPenalty, WeightPenalty
from regkit.document.target import AnyOf, Frozen, Name, Pattern, Target
from regkit.errors import PluginError, listing, quoted
from regkit.fields import Count, mistake, mistakes_at
from regkit.kinds import ActivityPenalty, Constraint, Kind, Penalty, Schedule, Via
from regkit.registry.entries import Entry
from regkit.registry.registry import Registry, default

VERSION: Final = 1
MOST_RULES: Final = 20_000

_LATEST: Final = 10**9  # optimizer steps: later than any run's last


class Rule(Frozen):
    """One target, one penalty or one constraint, at most one schedule.

    >>> rule = regkit.Rule(target={"role": "recurrent"}, penalty="l2(1e-4)", schedule="linear(0, 1, steps=100)")
    >>> rule.kind.describe()
    'l2(strength=0.0001)'
    """

    name: Name | None = None
    """The key in values() and violations(); left out: the place in the document, as rules/3."""

    target: Target = Target()
    """The weights or outputs to act on; left out: every recurrent module."""

    penalty: AnyPenalty | None = None
    """A penalty on weights or on activity."""

    constraint: AnyConstraint | None = None
    """A constraint on weights."""

    schedule: AnySchedule | None = None
    """A factor on the penalty's strength or the constraint's bound, over optimizer steps."""

    via: Via | None = None
    """How a penalty reaches the weights; left out: gradient for one on weights, loss for one on activity."""

    every: Count = 1
    """Apply the constraint after every N-th optimizer step."""

    optional: bool = Field(default=False, strict=True)
    """Let the rule bind nothing, or record nothing in a step, without an error."""

    @property
    def kind(self) -> Kind:
        """The penalty or the constraint."""
        kind = self.constraint if self.penalty is None else self.penalty
        assert kind is not None  # _consistent has seen to it
        return kind

    @model_validator(mode="after")
    def _consistent(self) -> Rule:
        if (self.penalty is None) == (self.constraint is None):
            has = "and this has none" if self.penalty is None else "not both"
            raise mistake(f"a rule has one penalty or one constraint, {has}")
        if mistakes := list(_mistakes(self)):
            raise mistakes_at(mistakes)
        return self


Mistake = tuple[str, Any, str]
"""The key of a rule, its value, and the sentence that says why the value is wrong."""


def _mistakes(rule: Rule) -> Iterator[Mistake]:
    """The mistakes of a rule: settings that cannot be met, or would have no effect."""
    yield from _inert_kinds({"penalty": rule.penalty, "constraint": rule.constraint, "schedule": rule.schedule})
    yield from _penalty_mistakes(rule) if rule.penalty is not None else _constraint_mistakes(rule)


def _inert_kinds(kinds: Mapping[str, Kind | None]) -> Iterator[Mistake]:
    for key, kind in kinds.items():
        if kind is None:
            continue
        try:
            reason = kind.inert()
        except Exception as error:  # a kind's author may compute anything with options
            yield key, kind, f"{kind.kind} cannot tell whether it has an effect: {error!r}"
        else:
            if reason is not None:
                yield key, kind, f"{kind.kind} has no effect: {reason}"


def _penalty_mistakes(rule: Rule) -> Iterator[Mistake]:
    if rule.every != 1:
        yield "every", rule.every, "`every` goes with a constraint"
    if isinstance(rule.penalty, ActivityPenalty) and rule.via not in (None, "loss", "inject"):
        yield "via", rule.via, f"an activity penalty goes via 'loss' or 'inject', not via {rule.via!r}"
    if isinstance(rule.penalty, Penalty) and rule.via == "inject":
        yield "via", rule.via, "only an activity penalty goes via 'inject': it joins the gradient of outputs"
    if rule.via == "proximal" and isinstance(rule.penalty, Penalty) and not rule.penalty.offers_prox:
        yield "via", rule.via, f"{rule.kind.kind} offers no proximal operator"


def _constraint_mistakes(rule: Rule) -> Iterator[Mistake]:
    if rule.via is not None:
        yield "via", rule.via, "`via` goes with a penalty"
    if rule.schedule is not None and isinstance(rule.constraint, Constraint) and not rule.constraint.bounds:
        yield "schedule", rule.schedule, f"{rule.kind.kind} has no bound that a schedule could scale"
    elif isinstance(rule.schedule, Schedule) and min(rule.schedule.factor(0), rule.schedule.factor(_LATEST)) <= 0:
        yield "schedule", rule.schedule, f"{rule.schedule.kind} takes the bound to 0, which would make every weight 0"


class Layer(Frozen):
    """A penalty or constraint under each of Keras' seven names, for all modules that match."""

    module: AnyOf[Pattern] | None = None
    """Globs over dotted module names; left out: every recurrent module."""

    kernel_regularizer: WeightPenalty | None = None
    """A penalty on the input weights."""
    recurrent_regularizer: WeightPenalty | None = None
    """A penalty on the recurrent weights."""
    bias_regularizer: WeightPenalty | None = None
    """A penalty on the biases, read as `bias` says."""
    activity_regularizer: OutputPenalty | None = None
    """A penalty on the output; `l2` means `activity_l2` here."""
    kernel_constraint: AnyConstraint | None = None
    """A constraint on the input weights."""
    recurrent_constraint: AnyConstraint | None = None
    """A constraint on the recurrent weights."""
    bias_constraint: AnyConstraint | None = None
    """A constraint on the biases, read as `bias` says."""

    bias: Literal["each", "effective"] = "each"
    """torch's two bias vectors one by one, or their sum, which is Keras' one bias."""

    def rules(self, place: str) -> Iterator[Rule]:
        """The rules that the layer stands for, each named by its place in the document."""
        for field, kind in self._kinds().items():
            if kind is None:
                continue
            role, _, verb = field.partition("_")
            # A validation here would ask for the registry once more.
            reading = self.bias if role == "bias" else "each"
            role = "output" if role == "activity" else role
            target = Target.model_construct(module=self.module, role=(role,), bias=reading)
            penalty, constraint = (None, kind) if verb == "constraint" else (kind, None)
            yield Rule.model_construct(name=f"{place}/{field}", target=target, penalty=penalty, constraint=constraint)

    @model_validator(mode="after")
    def _does_something(self) -> Layer:
        kinds = self._kinds()
        if all(kind is None for kind in kinds.values()):
            raise mistake(f"it regularizes nothing; give one of {', '.join(kinds)}")
        if inert := list(_inert_kinds(kinds)):
            raise mistakes_at(inert)
        return self

    def _kinds(self) -> dict[str, Kind | None]:
        return {name: getattr(self, name) for name in type(self).model_fields if name not in ("module", "bias")}


class Provenance(Frozen):
    """The distribution that a kind came from when the document was saved."""

    distribution: str
    version: str | None = None


class _Places(dict[str, tuple[Rule, int, int]]):
    """Each rule, with its line and column in the text of its document, by its key; equal to all others."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Places)

    __hash__ = None


class Spec(Frozen):
    """A whole document.

    >>> spec = regkit.load({"layers": [{"recurrent_regularizer": "l2(1e-4)"}]})
    >>> [(rule.target.role, rule.kind.describe()) for rule in spec.rules]
    [(('recurrent',), 'l2(strength=0.0001)')]
    """

    schema_: Annotated[str | None, Field(alias="$schema", max_length=1000)] = None
    """The JSON Schema that an editor checks the document with."""

    version: Literal[1] = VERSION
    """The version of the document's language."""

    rules: Annotated[tuple[Rule, ...], Field(max_length=MOST_RULES)] = ()
    """The rules, in the order in which constraints are applied."""

    layers: Annotated[tuple[Layer, ...], Field(max_length=MOST_RULES, exclude=True)] = ()
    """Rules in Keras' seven names, which become `rules`."""

    provenance: Annotated[dict[str, Provenance], Field(exclude=True)] = Field(default_factory=dict)
    """The distributions that the kinds came from, written when the document is saved."""

    _places: _Places = PrivateAttr(default_factory=_Places)

    @field_validator("version", mode="before")
    @classmethod
    def _known_version(cls, version: Any) -> Any:
        if type(version) is not int or version != VERSION:
            raise mistake(f"version {quoted(version)} is unknown; this regkit reads version {VERSION}")
        return version

    @model_validator(mode="after")
    def _expand(self) -> Spec:
        expanded = [rule for index, layer in enumerate(self.layers) for rule in layer.rules(f"layers/{index}")]
        # The model is frozen for its users, but still being made here.
        self.__dict__.update(rules=(*self.rules, *expanded), layers=(), provenance={})
        if not self.rules:
            raise mistake("it has no rules, so it would regularize nothing")
        names = Counter(rule.name or f"rules/{index}" for index, rule in enumerate(self.rules))
        if twice := [name for name, count in names.items() if count > 1]:
            raise mistake(f"two rules have the name {listing(map(repr, twice))}")
        return self

    def __hash__(self) -> int:  # `provenance`, always empty by now, is a dict
        return hash(self.rules)

    def keyed_rules(self) -> dict[str, Rule]:
        """The rules by their names; a rule without a name by its place, as rules/3."""
        return {rule.name or f"rules/{index}": rule for index, rule in enumerate(self.rules)}

    def place(self, key: str, rule: Rule) -> tuple[int, int] | tuple[None, None]:
        """The line and column of a rule of a key in the text that the document was read from, if any."""
        read, line, column = self._places.get(key, (None, 0, 0))
        return (line, column) if read == rule else (None, None)  # a copy with other rules has these places too

    def kinds(self) -> Iterator[Kind]:
        """Every penalty, constraint and schedule of the document."""
        for rule in self.rules:
            yield rule.kind
            if rule.schedule is not None:
                yield rule.schedule

    def to_json(self, registry: Registry | None = None) -> str:
        """The canonical text, with the provenance of kinds. To load and save the text gives the same bytes."""
        registry = registry or default()
        body = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        head = {key: body[key] for key in ("$schema",) if key in body}
        whole = {**head, "version": self.version, "provenance": _provenance(self, registry), "rules": body["rules"]}
        return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"

    def save(self, path: str | Path, registry: Registry | None = None) -> None:
        """Write the canonical text to a file."""
        written = self.to_json(registry).encode()  # before the file is opened, and so emptied
        Path(path).write_bytes(written)


def _provenance(spec: Spec, registry: Registry) -> Mapping[str, Mapping[str, str | None]]:
    found = {kind.kind: saved for kind in spec.kinds() if (saved := _saved(kind, registry)) is not None}
    return dict(sorted(found.items()))


def _saved(kind: Kind, registry: Registry) -> Mapping[str, str | None] | None:
    """The provenance of a kind; of a missing kind, the provenance in its document, if known."""
    if isinstance(kind, MissingKind):
        saved: Mapping[str, str | None] | None = kind.saved
        return saved
    origin = _entry(kind, registry).origin
    return {"distribution": origin.distribution, "version": origin.version}


def _entry(kind: Kind, registry: Registry) -> Entry:
    entry = registry.find(kind.kind)
    if entry is None:
        sentence = f"the kind {kind.kind!r} is not in the registry: what is saved with it could not be loaded again"
        raise PluginError(sentence + registry.absence(kind.kind))
    if not entry.made(kind):
        cls, other = type(kind), entry.kind
        raise PluginError(
            f"{cls.__module__}.{cls.__qualname__} has the name {kind.kind!r} of another kind, "
            f"{other.__module__}.{other.__qualname__} of {entry.origin}, as which it would be loaded again"
        )
    return entry
