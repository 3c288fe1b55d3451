"""Tensors that several processes hold parts of: the whole of one, and each one's share of a whole.

No other room knows DTensor. It is looked up among the modules that are loaded and never imported: where
`torch.distributed.tensor` was not imported nobody can have made one.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement
    from typing_extensions import TypeIs


FSDP1: Final = (
    "is a piece of a flat parameter of FSDP1 (FullyShardedDataParallel), in which no row is whole; use "
    "torch.distributed.fsdp.fully_shard (FSDP2) instead"
)
"""Why what FSDP1 has flattened is refused."""

_AVAILABLE: Final = torch.distributed.is_available()


def distributed() -> bool:
    """Whether processes work together at all."""
    return _AVAILABLE and torch.distributed.group.WORLD is not None


def sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether the tensor is a DTensor: a part, or a copy, of one that the processes of a mesh hold together."""
    room = sys.modules.get("torch.distributed.tensor")
    return room is not None and isinstance(tensor, room.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, any other tensor itself. Autograd goes through it.

    For a sharded one every process of its mesh has to call it, and in the same order.
    """
    return tensor.full_tensor() if sharded(tensor) else tensor


def share(whole: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that `like` holds; the whole itself where `like` is not sharded.

    Nothing is communicated: every process has the whole, and the same one. Where `like` is a sum over processes that
    is yet to be taken, as a gradient may be, each gets an equal part of the whole.
    """
    if not sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = like.device_mesh
    held: list[Placement] = []
    for dimension, placement in enumerate(like.placements):
        if isinstance(placement, Partial) and placement.reduce_op == "sum":
            whole = whole / mesh.size(dimension)
        held.append(placement if isinstance(placement, Partial) else Replicate())
    replicated = DTensor.from_local(whole, mesh, held, run_check=False)
    return replicated.redistribute(placements=like.placements)


def reshard(model: nn.Module) -> None:
    """Have FSDP2 (fully_shard) put the sharded parameters back into their modules.

    After a forward pass without a backward pass there may be whole ones in their place, which no optimizer owns, and
    what is written to those is lost. Nothing is communicated; the next forward pass gathers what it needs.
    """
    room = sys.modules.get("torch.distributed.fsdp")
    if room is not None:
        for module in model.modules():
            if isinstance(module, room.FSDPModule):
                module.reshard()


def flattening() -> bool:
    """Whether FSDP1 is there to flatten anything."""
    loaded = "torch.distributed.fsdp._flat_param" in sys.modules
    return loaded and _AVAILABLE and torch.distributed.group.WORLD is not None  # `distributed()`, at each step


def flattened(module: nn.Module) -> bool:
    """Whether FSDP1 (FullyShardedDataParallel) keeps parameters of this module itself in a flat one.

    With `use_orig_params=False` the module has none left; with True each is some numbers of it in a row, marked.
    """
    if not flattening():
        return False
    if vars(module).get("_fsdp_use_orig_params") is False:
        return True
    return any(marked(p) for p in module._parameters.values() if p is not None)


def marked(parameter: Tensor) -> bool:
    """Whether FSDP1 has made the parameter a piece of a flat one."""
    return hasattr(parameter, "_fsdp_flattened")
