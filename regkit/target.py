"""The target of a rule: which modules, roles, layers, directions and gates it binds to."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidationInfo,
)

from regkit.errors import unknown
from regkit.fields import Index, mistake
from regkit.openunion import registry_of
from regkit.sites import GATE_ALIASES


def _as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:  # not pydantic's min_length: it also counts items that were refused, and says so a second time
        raise mistake("an empty list selects nothing; leave the key out to mean any")
    return tuple(dict.fromkeys(values))


def _one_or_list(values: tuple[Any, ...] | None) -> Any:
    return values[0] if values is not None and len(values) == 1 else values


def any_of(item: Any) -> Any:
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
        raise mistake(unknown("role", role, roles))
    return role


def _known_gate(gate: str, info: ValidationInfo) -> str:
    gates = registry_of(info).gates
    name = gate if gate in gates else GATE_ALIASES.get(gate, gate)
    if name not in gates:
        raise mistake(unknown("gate", gate, [*gates, *GATE_ALIASES]))
    return name


def _known_direction(direction: Any) -> Any:
    if direction == "reverse":  # torch's own word, in its parameter names
        return "backward"
    if isinstance(direction, str) and direction not in ("forward", "backward"):
        raise mistake(unknown("direction", direction, ["forward", "backward"]))
    return direction


def _well_formed_glob(pattern: str) -> str:
    if any(not part or ("**" in part and part != "**") for part in pattern.split(".")):
        raise mistake(f"{pattern!r} is not a pattern: dotted names, * within a part, ** for any number of parts")
    return pattern


# A name stands in tables and on terminals: no control characters, no line ends of any kind.
_PRINTABLE = "^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$"

Name = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200, pattern=_PRINTABLE)]
Pattern = Annotated[Name, AfterValidator(_well_formed_glob)]
_Role = Annotated[Name, AfterValidator(_known_role), Field(json_schema_extra={"x-names": "roles"})]
_Gate = Annotated[Name, AfterValidator(_known_gate), Field(json_schema_extra={"x-names": "gates"})]
_Direction = Annotated[
    Literal["forward", "backward"],
    BeforeValidator(_known_direction, json_schema_input_type=Literal["forward", "backward", "reverse"]),
]


class Frozen(BaseModel):
    """A part of the document."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class Target(Frozen):
    """Where a rule binds. What is left out means any; a list means any of its items."""

    module: any_of(Pattern) | None = None  # type: ignore[valid-type]  # pydantic's own idiom for a made-up type
    """Globs over dotted module names: `*` within a part, `**` across parts."""

    role: any_of(_Role) | None = None  # type: ignore[valid-type]
    """kernel, recurrent, bias, projection; output, state, cell. Left out: every weight, or the output."""

    layer: any_of(Index) | None = None  # type: ignore[valid-type]
    """Layers of a stacked module, from 0."""

    direction: any_of(_Direction) | None = None  # type: ignore[valid-type]
    """forward or backward."""

    gate: any_of(_Gate) | None = None  # type: ignore[valid-type]
    """Gates: LSTM input, forget, cell, output; GRU reset, update, new; or their letters."""

    bias: Literal["each", "effective"] = "each"
    """torch has two bias vectors of which the sum acts: penalize each (as weight_decay does), or the sum (as Keras)."""
