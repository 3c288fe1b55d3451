"""The document, as frozen models: what it may say, in its one canonical form.

A `Spec` holds rules; a rule binds one penalty or one constraint to a target. Shorthand and the `layers` section become
rules as they are read, so what is saved is canonical. This room knows no tensor and no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainSerializer,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from regkit import shorthand
from regkit.errors import unknown
from regkit.fields import Count, Index
from regkit.kinds import ActivityPenalty, Constraint, Kind, Penalty
from regkit.registry import Family, Registry, default
from regkit.sites import GATE_ALIASES

VERSION: Final = 1
MOST_RULES: Final = 20_000

Via = Literal["gradient", "loss", "proximal", "decoupled"]
"""How a weight penalty reaches the weight: added to its gradient at the step; added to the loss; by its proximal
operator after the step; or as a decoupled decay, as AdamW's.
"""


def _mistake(message: str) -> PydanticCustomError:
    # The message is a value of the template: braces that a document holds in its strings must not be read as fields.
    return PydanticCustomError("regkit", "{message}", {"message": message})


def registry_of(info: ValidationInfo) -> Registry:
    """The registry that the reader was given, or that of everything installed."""
    registry = (info.context or {}).get("registry")
    return registry if isinstance(registry, Registry) else default()


@dataclass(frozen=True)
class OpenUnion:
    """A field that holds any installed kind of some families.

    The registry is asked at each validation, so that a plugin's kind is as good as one that was there when this module
    was imported; pydantic's own discriminated unions are closed once built.
    """

    families: tuple[Family, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._validate, serialization=core_schema.plain_serializer_function_ser_schema(_dump_kind)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"x-open-union": list(self.families)}  # filled by regkit.schema, which knows the registry

    def _validate(self, value: Any, info: ValidationInfo) -> Kind:
        registry = registry_of(info)
        if isinstance(value, Kind):
            return self._of_family(value, registry)
        try:
            options = shorthand.canonical(value, self.families, registry)
        except shorthand.UnknownKindError as error:
            where = ("kind",) if isinstance(value, dict) and "kind" in value else ()
            raise _at(where, value, f"{error}{_provider(error.name, info)}") from None
        except shorthand.ShorthandError as error:
            raise _mistake(str(error)) from None
        # A ValidationError of the kind's own class is merged by pydantic, under this field's place.
        return registry.kind(options["kind"], *self.families).model_validate(options, context=info.context)

    def _of_family(self, kind: Kind, registry: Registry) -> Kind:
        entry = registry.find(kind.kind, *self.families)
        if entry is None or not isinstance(kind, entry.kind):
            raise _mistake(f"{type(kind).__name__} is not registered as a {' or '.join(self.families)}")
        return kind


def _dump_kind(kind: Kind) -> dict[str, Any]:
    return kind.model_dump(mode="json", exclude_none=True)


def _at(where: tuple[str, ...], value: Any, message: str) -> ValidationError:
    """One mistake at a place below the field being validated."""
    return ValidationError.from_exception_data(
        "kind", [InitErrorDetails(type=_mistake(message), loc=where, input=value)]
    )


def _provider(name: str, info: ValidationInfo) -> str:
    """The sentence that says what to install, where the document was saved with the kind's provenance."""
    provenance = (info.context or {}).get("provenance")
    saved = provenance.get(name) if isinstance(provenance, dict) else None
    if not isinstance(saved, dict) or "distribution" not in saved:
        return ""
    return f". The document was saved with it from {saved['distribution']} {saved.get('version') or ''}".rstrip()


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, int)) else value


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:  # not pydantic's min_length: it also counts items that were refused, and says so a second time
        raise _mistake("an empty list selects nothing; leave the key out to mean any")
    return tuple(dict.fromkeys(values))


def _one_or_list(values: tuple[Any, ...] | None) -> Any:
    return values[0] if values is not None and len(values) == 1 else values


def _any_of(item: Any) -> Any:
    """One item or a list of them, kept as a tuple and saved as one item where there is one."""
    return Annotated[
        tuple[item, ...],
        Field(max_length=1000),
        BeforeValidator(_as_list, json_schema_input_type=item | list[item]),
        AfterValidator(_distinct),
        PlainSerializer(_one_or_list),
    ]


def _known_role(role: str, info: ValidationInfo) -> str:
    roles = registry_of(info).roles
    if role not in roles:
        raise _mistake(unknown("role", role, roles))
    return role


def _known_gate(gate: str, info: ValidationInfo) -> str:
    gates = registry_of(info).gates
    name = gate if gate in gates else GATE_ALIASES.get(gate, gate)
    if name not in gates:
        raise _mistake(unknown("gate", gate, [*gates, *GATE_ALIASES]))
    return name


def _known_direction(direction: Any) -> Any:
    if direction == "reverse":  # torch's own word, in its parameter names
        return "backward"
    if isinstance(direction, str) and direction not in ("forward", "backward"):
        raise _mistake(unknown("direction", direction, ["forward", "backward"]))
    return direction


def _well_formed_glob(pattern: str) -> str:
    if any(not part or ("**" in part and part != "**") for part in pattern.split(".")):
        raise _mistake(f"{pattern!r} is no pattern: dotted names, * within a part, ** for any number of parts")
    return pattern


_Name = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
_Pattern = Annotated[_Name, AfterValidator(_well_formed_glob)]
_Role = Annotated[_Name, AfterValidator(_known_role)]
_Gate = Annotated[_Name, AfterValidator(_known_gate)]
_Direction = Annotated[Literal["forward", "backward"], BeforeValidator(_known_direction)]

AnyPenalty = Annotated[Kind, OpenUnion(("penalty", "activity penalty"))]
WeightPenalty = Annotated[Kind, OpenUnion(("penalty",))]
OutputPenalty = Annotated[Kind, OpenUnion(("activity penalty",))]
AnyConstraint = Annotated[Kind, OpenUnion(("constraint",))]
AnySchedule = Annotated[Kind, OpenUnion(("schedule",))]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class Target(_Model):
    """Where a rule binds. What is left out means any; a list means any of its items."""

    module: _any_of(_Pattern) | None = None  # type: ignore[valid-type]  # pydantic's own idiom for a made-up type
    """Globs over dotted module names: `*` within a part, `**` across parts."""

    role: _any_of(_Role) | None = None  # type: ignore[valid-type]
    """kernel, recurrent, bias, projection; output, state, cell. Left out: every weight, or the output."""

    layer: _any_of(Index) | None = None  # type: ignore[valid-type]
    """Layers of a stacked module, from 0."""

    direction: _any_of(_Direction) | None = None  # type: ignore[valid-type]
    """forward or backward."""

    gate: _any_of(_Gate) | None = None  # type: ignore[valid-type]
    """Gates: LSTM input, forget, cell, output; GRU reset, update, new; or their letters."""

    bias: Literal["each", "effective"] = "each"
    """torch has two bias vectors of which the sum acts: penalize each (as weight_decay does), or the sum (as Keras)."""


class Rule(_Model):
    """One target, one penalty or one constraint, at most one schedule."""

    name: _Name | None = None
    """What values() and violations() call it; rules/3 where it is left out."""

    target: Target = Target()
    """Where it binds; left out: every recurrent module."""

    penalty: AnyPenalty | None = None
    """A penalty on weights or on activity."""

    constraint: AnyConstraint | None = None
    """A constraint on weights."""

    schedule: AnySchedule | None = None
    """A factor on the penalty's strength or the constraint's bound, over optimizer steps."""

    via: Via | None = None
    """How a weight penalty reaches the weight; left out: gradient."""

    every: Count = 1
    """Apply the constraint after every N-th optimizer step."""

    optional: bool = Field(default=False, strict=True)
    """Let the rule bind nothing, or record nothing in a step, without an error."""

    @property
    def kind(self) -> Kind:
        """The penalty or the constraint."""
        kind = self.penalty or self.constraint
        assert kind is not None  # _consistent has seen to it
        return kind

    @model_validator(mode="after")
    def _consistent(self) -> Rule:
        mistakes = list(_mistakes(self))
        if mistakes:
            raise _mistake("; ".join(mistakes))
        return self


def _mistakes(rule: Rule) -> Iterator[str]:
    """What a rule says that cannot be done, or would do nothing."""
    if (rule.penalty is None) == (rule.constraint is None):
        yield "a rule has one penalty or one constraint, " + ("not both" if rule.penalty else "and this has none")
        return
    reason = rule.kind.inert()
    if reason is not None:
        yield f"{rule.kind.kind} has no effect: {reason}"
    if rule.schedule is not None and (reason := rule.schedule.inert()) is not None:
        yield f"the schedule leaves nothing in force: {reason}"
    yield from _penalty_mistakes(rule) if rule.penalty is not None else _constraint_mistakes(rule)


def _penalty_mistakes(rule: Rule) -> Iterator[str]:
    if rule.every != 1:
        yield "`every` goes with a constraint"
    if isinstance(rule.penalty, ActivityPenalty) and rule.via not in (None, "loss"):
        yield f"an activity penalty goes through the loss, not via {rule.via!r}"
    if rule.via == "proximal" and type(rule.penalty).__dict__.get("prox", Penalty.prox) is Penalty.prox:
        yield f"{rule.kind.kind} offers no proximal operator"


def _constraint_mistakes(rule: Rule) -> Iterator[str]:
    if rule.via is not None:
        yield "`via` goes with a penalty"
    if rule.schedule is not None and isinstance(rule.constraint, Constraint) and not rule.constraint.bounds:
        yield f"{rule.kind.kind} has no bound that a schedule could scale"


class Layer(_Model):
    """Keras' seven names for one module, or for all that match."""

    module: _any_of(_Pattern) | None = None  # type: ignore[valid-type]
    """Globs over dotted module names; left out: every recurrent module."""

    kernel_regularizer: WeightPenalty | None = None
    """A penalty on the input weights."""
    recurrent_regularizer: WeightPenalty | None = None
    """A penalty on the recurrent weights."""
    bias_regularizer: WeightPenalty | None = None
    """A penalty on the biases."""
    activity_regularizer: OutputPenalty | None = None
    """A penalty on the output; `l2` means `activity_l2` here."""
    kernel_constraint: AnyConstraint | None = None
    """A constraint on the input weights."""
    recurrent_constraint: AnyConstraint | None = None
    """A constraint on the recurrent weights."""
    bias_constraint: AnyConstraint | None = None
    """A constraint on the biases."""

    def rules(self, place: str) -> Iterator[Rule]:
        """The rules it stands for, each named by its place in the document."""
        for field in type(self).model_fields:
            kind = getattr(self, field)
            if field == "module" or kind is None:
                continue
            role, _, verb = field.partition("_")
            target = Target(module=self.module, role=("output" if role == "activity" else role,))
            part = {"constraint": kind} if verb == "constraint" else {"penalty": kind}
            yield Rule.model_construct(name=f"{place}/{field}", target=target, **part)

    @model_validator(mode="after")
    def _does_something(self) -> Layer:
        kinds = {f: getattr(self, f) for f in type(self).model_fields if f != "module"}
        if all(kind is None for kind in kinds.values()):
            raise _mistake(f"it regularizes nothing; give one of {', '.join(kinds)}")
        for field, kind in kinds.items():
            if kind is not None and (reason := kind.inert()) is not None:
                raise _at((field,), kind, f"{kind.kind} has no effect: {reason}")
        return self


class Provenance(_Model):
    """The distribution that a kind came from when the document was saved."""

    distribution: str
    version: str | None = None


class Spec(_Model):
    """A whole document."""

    schema_: Annotated[str | None, Field(alias="$schema", max_length=1000)] = None
    """The JSON Schema that an editor checks the document with."""

    version: Literal[1] = VERSION
    """The version of the document's language."""

    rules: Annotated[tuple[Rule, ...], Field(max_length=MOST_RULES)] = ()
    """The rules, in the order in which constraints are applied."""

    layers: Annotated[tuple[Layer, ...], Field(max_length=MOST_RULES, exclude=True)] = ()
    """Rules in Keras' seven names; read into `rules`."""

    provenance: Annotated[dict[str, Provenance], Field(exclude=True)] = Field(default_factory=dict)
    """Where the kinds came from; written when the document is saved."""

    @field_validator("version", mode="before")
    @classmethod
    def _known_version(cls, version: Any) -> Any:
        if type(version) is not int or version != VERSION:
            raise _mistake(f"version {version!r} is unknown; this regkit reads version {VERSION}")
        return version

    @model_validator(mode="after")
    def _expand(self) -> Spec:
        expanded = [rule for index, layer in enumerate(self.layers) for rule in layer.rules(f"layers/{index}")]
        # The model is frozen for its users; here it is still being made.
        self.__dict__.update(rules=(*self.rules, *expanded), layers=(), provenance={})
        if not self.rules:
            raise _mistake("it has no rules, so it would regularize nothing")
        named = [rule.name for rule in self.rules if rule.name is not None]
        keys = list(self.keyed_rules())
        if len(keys) < len(self.rules):
            twice = sorted({name for name in named if named.count(name) > 1} or set(named))
            raise _mistake(f"two rules have the name {', '.join(map(repr, twice))}")
        return self

    def keyed_rules(self) -> dict[str, Rule]:
        """The rules by their names, or by rules/3 where they have none."""
        return {rule.name or f"rules/{index}": rule for index, rule in enumerate(self.rules)}

    def to_json(self, registry: Registry | None = None) -> str:
        """The canonical text, with the provenance of its kinds: loading it and saving again gives the same bytes."""
        registry = registry or default()
        body = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        head = {key: body[key] for key in ("$schema",) if key in body}
        whole = {
            **head,
            "version": self.version,
            "provenance": _provenance(self, registry),
            "rules": body["rules"],
        }
        return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"

    def save(self, path: str | Path, registry: Registry | None = None) -> None:
        """Write the canonical text to a file."""
        Path(path).write_text(self.to_json(registry), encoding="utf-8")


def _provenance(spec: Spec, registry: Registry) -> Mapping[str, Mapping[str, str | None]]:
    kinds = [kind for rule in spec.rules for kind in (rule.kind, rule.schedule) if kind is not None]
    found = {name: registry.find(name) for name in sorted({kind.kind for kind in kinds})}
    return {
        name: {"distribution": entry.origin.distribution, "version": entry.origin.version}
        for name, entry in found.items()
        if entry is not None
    }
