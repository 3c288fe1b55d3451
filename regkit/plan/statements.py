"""The contract of the weights and outputs that adapters give: the check of `resolve` and of `regkit.testing`."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from types import GenericAlias
from typing import Any, Final, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from regkit.adapters import OUTPUT_ROLES, WEIGHT_ROLES, Adapter, Output, Weight
from regkit.errors import listing, unknown


def fault(adapter: Adapter, said: Weight | Output) -> str | None:
    """The first fault of a weight or an output that an adapter gives, or None where there is none.

    A sentence without its subject, the adapter: "gives the weight 'w' a gate twice: input".
    """
    return next(_faults(adapter, said), None)


def _faults(adapter: Adapter, said: Weight | Output) -> Iterator[str]:
    """The faults in order: each is looked for on the assumption that there is none before."""
    given = "an output"
    if isinstance(said, Weight):
        names: object = said.parameters
        if not isinstance(names, tuple) or len(names) not in (1, 2) or not all(isinstance(one, str) for one in names):
            yield f"gives a weight the parameters {names!r}, not a tuple of one name or two"
        given = f"the weight {' + '.join(said.parameters)!r}"
    yield from (f"gives {given} {wrong}" for wrong in _mistyped(said))
    roles = (*WEIGHT_ROLES, *OUTPUT_ROLES, *adapter.roles)
    if said.role not in roles:
        yield f"gives {given} the {unknown('role', said.role, dict.fromkeys(roles))} (in its `roles`)"
    if isinstance(said, Weight):
        yield from (f"gives {given} {wrong}" for wrong in _weight_faults(adapter, said))


def _weight_faults(adapter: Adapter, weight: Weight) -> Iterator[str]:
    if odd := [gate for gate in weight.gates if gate not in adapter.gates]:
        yield f"{unknown('gate', odd[0], adapter.gates)} (in its `gates`)"
    if len(set(weight.gates)) < len(weight.gates):
        yield f"a gate twice: {listing(weight.gates)}"
    if odd := [gate for gate in weight.separate if gate not in weight.gates]:
        yield f"separate gates that it does not have: {listing(odd)}"
    if weight.mask is not None and len(weight.parameters) > 1:
        yield f"the mask {weight.mask}, which goes with one parameter alone"


def _types(contract: type[Weight] | type[Output]) -> tuple[tuple[str, ...], TypeAdapter[object]]:
    """The names of a contract's fields, and their types together, strictly: a number is no word."""
    hints = get_type_hints(contract)
    together: Any = GenericAlias(tuple, tuple(hints.values()))  # all are validated in one call
    return tuple(hints), TypeAdapter(together, config=ConfigDict(strict=True))


_WEIGHT: Final = _types(Weight)
_OUTPUT: Final = _types(Output)


def _mistyped(said: Weight | Output) -> Iterator[str]:
    """The first field that holds a value of another type, with the value and the reason."""
    names, types = _WEIGHT if isinstance(said, Weight) else _OUTPUT
    values = attrgetter(*names)(said)
    try:
        types.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        index, why = int(first["loc"][0]), first["msg"]
        yield f"the {names[index]} {values[index]!r}: {why[0].lower()}{why[1:]}"
