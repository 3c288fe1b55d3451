"""Sharded tensors, of which several processes hold parts: the whole tensor, and each process' share of a whole.

No other room knows DTensor. The class is looked up among the loaded modules and never imported: where nobody imported
`torch.distributed.tensor`, nobody can have made a DTensor.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

from regkit.errors import AttachError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement
    from typing_extensions import TypeIs


group: Final[Any] = getattr(torch.distributed, "group", None)
"""torch's class of the process group of all processes, `group.WORLD`; None in a torch without process groups."""

FLAT_PARAM: Final = "torch.distributed.fsdp._flat_param"
"""The room of torch in which FSDP1 (FullyShardedDataParallel) flattens parameters."""


def distributed() -> bool:
    """Whether several processes work together, as a process group."""
    return group is not None and group.WORLD is not None


def sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether the tensor is a DTensor: a part, or a copy, of a tensor that the processes of a mesh hold together."""
    room = sys.modules.get("torch.distributed.tensor")
    return room is not None and isinstance(tensor, room.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded tensor; any other tensor is returned. Autograd goes through.

    Where tensors are sharded, every process of their mesh has to call this, and in the same order.
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
        held.append(Replicate() if isinstance(placement, Partial) else placement)
    part = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(placements=held)
    if not any(isinstance(one, Partial) for one in like.placements):
        return part
    shape, stride = whole.shape, whole.stride()  # torch 2.8 redistributes nothing to a sum that is yet to be taken
    return DTensor.from_local(part.to_local(), mesh, like.placements, run_check=False, shape=shape, stride=stride)


def held_here(tensor: Tensor) -> tuple[tuple[int, int], ...] | None:
    """The part of a sharded tensor that this process holds: along each axis, the first index and the number of indices.

    None where the part is no such box, as where some of its rows lie between rows of another process.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert sharded(tensor)
    if not all(isinstance(one, Replicate) or type(one) is Shard for one in tensor.placements):
        return None
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if 0 in shape:
        offset = (0,) * len(shape)
    return tuple(zip(offset, shape, strict=True))


def divided(tensor: Tensor) -> set[int]:
    """The axes along which a sharded tensor is divided among processes."""
    from torch.distributed.tensor import Shard

    assert sharded(tensor)
    return {one.dim for one in tensor.placements if isinstance(one, Shard)}


def placement(tensor: Tensor) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    """The mesh of a sharded tensor, and the tensor's placements on the mesh."""
    assert sharded(tensor)
    return tensor.device_mesh, tensor.placements


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor is returned. Autograd goes through."""
    if not sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local() if torch.is_grad_enabled() else tensor._local_tensor
    return part


def pooled(parts: Sequence[Tensor], like: Tensor, axes: Collection[int], by: Literal["sum", "max"]) -> list[Tensor]:
    """The sums, or maxima, of each process' tensors over the processes among which `like` is divided along the axes.

    One all-reduce for all tensors, for each dimension of the mesh that divides these axes; none where none does.
    Every process of the mesh has to call it, with tensors of equal shapes. Autograd goes through sums.
    """
    from torch.distributed.tensor import Shard

    assert sharded(like)
    over = [by if isinstance(one, Shard) and one.dim in axes else None for one in like.placements]
    if not any(over):
        return list(parts)
    total = _reduced(torch.cat([part.reshape(-1) for part in parts]), like, over)
    each = torch.split_with_sizes(total, [part.numel() for part in parts])
    return [one.view(part.shape) for one, part in zip(each, parts, strict=True)]


def everywhere(flags: Tensor, like: Tensor) -> Tensor:
    """Whether each flag is true in all processes of the mesh of `like`; the flags unchanged where `like` is whole."""
    if not sharded(like):
        return flags
    return _reduced(flags.to(torch.uint8), like, ["min"] * like.device_mesh.ndim).bool()


def _reduced(tensor: Tensor, like: DTensor, over: Sequence[str | None]) -> Tensor:
    """A tensor of each process, reduced over the mesh: `over` names the operation of each dimension, None for none."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    held = [Replicate() if by is None else Partial(by) for by in over]
    return DTensor.from_local(tensor, like.device_mesh, held, run_check=False).full_tensor()


def reshard(model: nn.Module) -> None:
    """Have FSDP2 (fully_shard) put the sharded parameters back into their modules.

    After a forward pass without a backward pass, modules may have whole parameters in place of the sharded ones: no
    optimizer owns the whole ones, and changes of them are lost. Nothing is communicated; the next forward pass gathers
    anew.
    """
    room = sys.modules.get("torch.distributed.fsdp")
    if room is not None:
        for module in model.modules():
            if isinstance(module, room.FSDPModule):
                module.reshard()


def flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 has made the parameter a piece of a flat one."""
    return hasattr(parameter, "_fsdp_flattened")


def refuse_flattened(weights: Iterable[tuple[nn.Module, str]]) -> None:
    """Raise AttachError where FSDP1 keeps parameters of a module itself in a flat one.

    weights: modules, each with the name of its weight for the error. With `use_orig_params=False` such a module has no
    parameters left; with True each parameter is a stretch of the flat one, and is marked.
    """
    if FLAT_PARAM not in sys.modules or group.WORLD is None:
        return
    for module, name in weights:
        own = (p for p in module._parameters.values() if p is not None)
        if vars(module).get("_fsdp_use_orig_params") is False or any(map(flattened, own)):
            raise AttachError(
                f"{name} is a piece of a flat parameter of FSDP1 (FullyShardedDataParallel), in which no row is whole; "
                "use torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )
