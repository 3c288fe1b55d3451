"""The weights and outputs that adapters declare, checked. Each fault is reported with the adapter and its plugin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from regkit.adapters import Output, Weight, oriented
from regkit.errors import AttachError, PluginError, listing
from regkit.plan.modules import RecurrentModule
from regkit.plan.statements import fault
from regkit.runtime.sharding import sharded
from regkit.runtime.step import moves
from regkit.weights.locate import MissingError, function_of, mask_of, storage_of
from regkit.weights.storage import Storage

T = TypeVar("T", Weight, Output)


def weights_of(recurrent: RecurrentModule) -> list[Weight]:
    """Every weight of the module. Raises PluginError where the adapter fails or breaks the contract (`statements`)."""
    return _declared(recurrent, "weights", Weight)


def outputs_of(recurrent: RecurrentModule) -> list[Output]:
    """Every output of the module. Raises PluginError as `weights_of`."""
    return _declared(recurrent, "outputs", Output)


def _declared(recurrent: RecurrentModule, method: str, contract: type[T]) -> list[T]:
    try:
        given = list(getattr(recurrent.adapter, method)(recurrent.module))
    except Exception as error:  # the adapter's author may raise anything
        raise broken(recurrent, f"fails in {method}(): {error!r}") from error
    if odd := [one for one in given if not isinstance(one, contract)]:
        raise broken(recurrent, f"gives {odd[0]!r} in {method}(), which is no {contract.__name__}")
    for one in given:
        if (wrong := fault(recurrent.adapter, one)) is not None:
            raise broken(recurrent, wrong)
    return given


class Outline(NamedTuple):
    """The outline of a weight: everything known of the weight but its numbers.

    shape: the shape that kinds see.
    identity: the ids of the tensors that the weight is made of, equal for one weight under several names.
    frozen: whether no optimizer moves any of the parameters.
    """

    shape: tuple[int, ...]
    identity: tuple[int, ...]
    frozen: bool


def outline(recurrent: RecurrentModule, weight: Weight) -> Outline:
    """The outline of a weight.

    Raises AttachError where the weight cannot be followed, PluginError where it is absent or not as declared.
    """
    stored = [_stored(recurrent, weight, name) for name in weight.parameters]
    shapes = [shape for _, shape in stored]
    if weight.transposed or weight.columns is not None:
        shapes = _oriented(recurrent, weight, shapes)
    if any(shape != shapes[0] for shape in shapes):
        raise broken(recurrent, f"adds {' + '.join(weight.parameters)}, of shapes {listing(map(str, shapes))}")
    rows = shapes[0][0] if shapes[0] else 0
    if not rows or rows % (len(weight.gates) or 1):
        into = f"which do not divide into {len(weight.gates)} gates: {listing(weight.gates)}"
        raise broken(recurrent, f"is wrong: {weight.parameters[0]} has {rows} rows, {into}")
    frozen = not any(moves(parameter) for storage, _ in stored for parameter in storage.parameters)
    return Outline(shapes[0], tuple(one for storage, _ in stored for one in storage.identity), frozen)


def _stored(recurrent: RecurrentModule, weight: Weight, name: str) -> tuple[Storage, tuple[int, ...]]:
    """The storage of a parameter of the weight, and its shape there."""
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


def _oriented(recurrent: RecurrentModule, weight: Weight, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The shapes that kinds see of stored shapes: units in rows, and the columns of the weight alone."""
    try:
        seen = [oriented(torch.empty(one, device="meta"), weight.transposed, weight.columns) for one in shapes]
        if weight.columns is not None:
            columns = weight.columns
            first, stop = columns if isinstance(columns, tuple) else (columns, columns + 1)
            if not 0 <= first < stop:  # torch would count from the end: one column by two numbers
                raise IndexError(columns)
    except (IndexError, RuntimeError, TypeError, ValueError):
        how = ["transposed"] * weight.transposed + [f"columns {weight.columns}"] * (weight.columns is not None)
        names = " + ".join(weight.parameters)
        raise broken(recurrent, f"reads {names} {listing(how)}, which {shapes[0]} has not") from None
    return [tuple(one.shape) for one in seen]


def _refuse_mask(recurrent: RecurrentModule, name: str, mask: Tensor, shape: Sequence[int]) -> None:
    """Raise PluginError unless the mask has the shape and holds 0 and 1 alone; shards and meta tensors are not read."""
    if tuple(mask.shape) != tuple(shape):
        raise broken(recurrent, f"masks {tuple(shape)} by {name}, which is {tuple(mask.shape)}")
    if not sharded(mask) and not mask.is_meta and not bool(((mask == 0) | (mask == 1)).all()):
        raise broken(recurrent, f"masks a weight by {name}, which holds more than 0 and 1")


def broken(recurrent: RecurrentModule, how: str) -> PluginError:
    """The error that the adapter broke its contract, and how."""
    adapter = type(recurrent.adapter)
    whose = f"{adapter.__module__}.{adapter.__qualname__} of plugin {recurrent.origin}"
    return PluginError(f"the adapter {whose}, for {recurrent}, {how}")
