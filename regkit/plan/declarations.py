"""What an adapter says of a module, held to its contract: what breaks it is told with the adapter and its plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from types import GenericAlias
from typing import Any, Final, NamedTuple, TypeVar, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from regkit.adapters import OUTPUT_ROLES, WEIGHT_ROLES, Output, Weight, oriented
from regkit.errors import AttachError, PluginError, listing, unknown
from regkit.plan.modules import RecurrentModule
from regkit.runtime.sharding import sharded
from regkit.weights.locate import MissingError, function_of, mask_of, storage_of
from regkit.weights.storage import Storage

T = TypeVar("T", Weight, Output)


def weights_of(recurrent: RecurrentModule) -> list[Weight]:
    """Every weight that the adapter tells of. Raises PluginError where it fails, or gives what no target can name."""
    weights = _given(recurrent, "weights", Weight)
    for weight in weights:
        names: object = weight.parameters
        if not isinstance(names, tuple) or len(names) not in (1, 2) or not all(isinstance(one, str) for one in names):
            raise broken(recurrent, f"gives a weight the parameters {names!r}, not a tuple of one name or two")
        what = f"the weight {' + '.join(weight.parameters)!r}"
        _refuse_types(recurrent, what, weight)
        _refuse_role(recurrent, what, weight.role)
        gates = recurrent.adapter.gates
        if odd := [gate for gate in weight.gates if gate not in gates]:
            raise broken(recurrent, f"gives {what} {unknown('gate', odd[0], gates)} (in its `gates`)")
        if len(set(weight.gates)) < len(weight.gates):
            raise broken(recurrent, f"gives {what} a gate twice: {listing(weight.gates)}")
        if odd := [gate for gate in weight.separate if gate not in weight.gates]:
            raise broken(recurrent, f"gives {what} separate gates that it does not have: {listing(odd)}")
        if weight.mask is not None and len(weight.parameters) > 1:
            raise broken(recurrent, f"gives {what} the mask {weight.mask}, which goes with one parameter alone")
    return weights


def outputs_of(recurrent: RecurrentModule) -> list[Output]:
    """Everything that the module puts out. Raises PluginError as `weights_of`."""
    outputs = _given(recurrent, "outputs", Output)
    for output in outputs:
        _refuse_types(recurrent, "an output", output)
        _refuse_role(recurrent, "an output", output.role)
    return outputs


def _given(recurrent: RecurrentModule, method: str, contract: type[T]) -> list[T]:
    try:
        given: Iterable[object] = getattr(recurrent.adapter, method)(recurrent.module)
        found = list(given)
    except Exception as error:  # a stranger's code: anything can come out
        raise broken(recurrent, f"fails in {method}(): {error!r}") from error
    if odd := [one for one in found if not isinstance(one, contract)]:
        raise broken(recurrent, f"gives {odd[0]!r} in {method}(), which is no {contract.__name__}")
    return [one for one in found if isinstance(one, contract)]


class _Fields:
    """The fields of a contract, and what each may hold: a number is no word here, and a list no tuple."""

    def __init__(self, contract: type[Weight] | type[Output]) -> None:
        hints = get_type_hints(contract)
        self.names = tuple(hints)
        self.values: Callable[[object], tuple[object, ...]] = attrgetter(*hints)
        together: Any = GenericAlias(tuple, tuple(hints.values()))  # they are looked at in one call
        self.types: TypeAdapter[object] = TypeAdapter(together, config=ConfigDict(strict=True))


_WEIGHT: Final = _Fields(Weight)
_OUTPUT: Final = _Fields(Output)


def _refuse_types(recurrent: RecurrentModule, what: str, given: Weight | Output) -> None:
    fields = _WEIGHT if isinstance(given, Weight) else _OUTPUT
    values = fields.values(given)
    try:
        fields.types.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        index, why = int(first["loc"][0]), first["msg"]
        wrong = f"the {fields.names[index]} {values[index]!r}: {why[0].lower()}{why[1:]}"
        raise broken(recurrent, f"gives {what} {wrong}") from None


def _refuse_role(recurrent: RecurrentModule, what: str, role: str) -> None:
    roles = (*WEIGHT_ROLES, *OUTPUT_ROLES, *recurrent.adapter.roles)
    if role not in roles:
        raise broken(recurrent, f"gives {what} the {unknown('role', role, dict.fromkeys(roles))} (in its `roles`)")


class Outline(NamedTuple):
    """What is known of a weight without its numbers.

    shape: that kinds see; identity: the ids of all that it is made of, equal for one weight under several names.
    """

    shape: tuple[int, ...]
    identity: tuple[int, ...]


def outline(recurrent: RecurrentModule, weight: Weight) -> Outline:
    """The outline of a weight.

    Raises AttachError where the weight cannot be followed, PluginError where it is not there, or not as it is told.
    """
    kept = [_kept(recurrent, weight, name) for name in weight.parameters]
    shapes = [shape for _, shape in kept]
    if weight.transposed or weight.columns is not None:
        shapes = _turned(recurrent, weight, shapes)
    if any(shape != shapes[0] for shape in shapes):
        raise broken(recurrent, f"adds {' + '.join(weight.parameters)}, of shapes {listing(map(str, shapes))}")
    rows = shapes[0][0] if shapes[0] else 0
    if not rows or rows % (len(weight.gates) or 1):
        into = f"which do not divide into {len(weight.gates)} gates: {listing(weight.gates)}"
        raise broken(recurrent, f"is wrong: {weight.parameters[0]} has {rows} rows, {into}")
    return Outline(shapes[0], tuple(one for storage, _ in kept for one in storage.identity))


def _kept(recurrent: RecurrentModule, weight: Weight, name: str) -> tuple[Storage, tuple[int, ...]]:
    """Where a parameter is kept, and its shape there."""
    module, mask = recurrent.module, weight.mask
    try:
        storage = storage_of(module, recurrent.parent, name, weight.through, mask)
        with torch.no_grad():
            kept = storage.outline()
        if weight.through is not None and any(True for _ in function_of(module, weight.through).parameters()):
            raise broken(recurrent, f"has {name} go through {weight.through}, which has parameters of its own")
        if mask is not None:
            _refuse_mask(recurrent, mask, mask_of(module, mask), kept.shape)
    except MissingError as error:
        raise broken(recurrent, f"tells of what is not there: {error}") from None
    if not kept.is_floating_point():
        raise AttachError(f"{name} holds {kept.dtype}, not floating-point numbers")
    return storage, tuple(kept.shape)


def _turned(recurrent: RecurrentModule, weight: Weight, kept: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The shapes of what is kept as kinds see it: units in rows, and the columns of the weight alone."""
    try:
        seen = [oriented(torch.empty(one, device="meta"), weight.transposed, weight.columns) for one in kept]
        if weight.columns is not None:
            columns = weight.columns
            first, stop = columns if isinstance(columns, tuple) else (columns, columns + 1)
            if not 0 <= first < stop:  # torch would count from the end: one column by two numbers
                raise IndexError(columns)
    except (IndexError, RuntimeError, TypeError, ValueError):
        how = ["transposed"] * weight.transposed + [f"columns {weight.columns}"] * (weight.columns is not None)
        names = " + ".join(weight.parameters)
        raise broken(recurrent, f"reads {names} {listing(how)}, which {kept[0]} has not") from None
    return [tuple(one.shape) for one in seen]


def _refuse_mask(recurrent: RecurrentModule, name: str, mask: Tensor, shape: Sequence[int]) -> None:
    """Raise PluginError unless the mask is of 0 and 1. On shards and on no device, nobody looks."""
    if tuple(mask.shape) != tuple(shape):
        raise broken(recurrent, f"masks {tuple(shape)} by {name}, which is {tuple(mask.shape)}")
    if not sharded(mask) and not mask.is_meta and not bool(((mask == 0) | (mask == 1)).all()):
        raise broken(recurrent, f"masks a weight by {name}, which holds more than 0 and 1")


def broken(recurrent: RecurrentModule, how: str) -> PluginError:
    """That the adapter broke its contract, and how."""
    adapter = type(recurrent.adapter)
    whose = f"{adapter.__module__}.{adapter.__qualname__} of plugin {recurrent.origin}"
    return PluginError(f"the adapter {whose}, for {recurrent}, {how}")
