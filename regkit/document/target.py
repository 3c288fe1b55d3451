"""The target of a rule: the modules, roles, layers, directions and gates to bind to."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    StringConstraints,
    ValidationInfo,
)
from pydantic_core import CoreSchema, PydanticCustomError

from regkit import _pickled
from regkit.adapters import GATE_ALIASES
from regkit.document.context import ReadingContext
from regkit.errors import unknown
from regkit.fields import Index, mistake


def _as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:  # pydantic's min_length would tell refused items a second time
        raise mistake("an empty list selects nothing; leave the key out to mean any")
    return tuple(dict.fromkeys(values))


def _one_or_list(values: tuple[Any, ...] | None) -> Any:
    return values[0] if values is not None and len(values) == 1 else values


class _OneOrMany:
    """An annotation by which the JSON Schema of a list also takes one bare item."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        many = handler(schema)
        return {"anyOf": [many["items"], many]}


T = TypeVar("T")

AnyOf = Annotated[
    tuple[T, ...],
    Field(max_length=1000),
    BeforeValidator(_as_list),
    AfterValidator(_distinct),
    PlainSerializer(_one_or_list),
    _OneOrMany(),
]
"""One item or a list of items, kept as a tuple and saved as a bare item where there is one."""


def _known_role(role: str, info: ValidationInfo) -> str:
    reading = ReadingContext.from_validation(info)
    roles = reading.registry.roles
    if role not in roles and reading.unknown == "error":
        message = str(mistake(unknown("role", role, reading.roles)))  # only the whole rule tells which it could have
        raise PydanticCustomError("regkit_role", "{message}", {"message": message})
    return role


def _known_gate(gate: str, info: ValidationInfo) -> str:
    reading = ReadingContext.from_validation(info)
    gates = reading.registry.gates
    name = gate if gate in gates else GATE_ALIASES.get(gate, gate)
    if name not in gates and reading.unknown == "error":
        raise mistake(unknown("gate", gate, reading.gates))
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

    __reduce_ex__ = _pickled.reduce_value


class Target(Frozen):
    """The target of a rule. A key left out means any; a list means any of its items.

    >>> target = regkit.Target(module="encoder.**", role=["kernel", "recurrent"], gate="f")
    >>> target.role, target.gate
    (('kernel', 'recurrent'), ('forget',))
    """

    module: AnyOf[Pattern] | None = None
    """Globs over dotted module names: `*` within a part, `**` across parts."""

    role: AnyOf[_Role] | None = None
    """kernel, recurrent, bias, projection; output, state, cell. Left out: every weight, or the output."""

    layer: AnyOf[Index] | None = None
    """Layers of a stacked module, from 0."""

    direction: AnyOf[_Direction] | None = None
    """forward or backward."""

    gate: AnyOf[_Gate] | None = None
    """Gates: LSTM input, forget, cell, output; GRU reset, update, new; or their letters."""

    bias: Literal["each", "effective"] = "each"
    """torch has two bias vectors of which the sum acts: penalize each (as weight_decay does), or the sum (as Keras)."""

    ignore: AnyOf[Name] | None = None
    """Globs over parameters that the modules have beside the weights of any role, and that the rule leaves alone."""
