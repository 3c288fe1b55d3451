"""The search for the storage of a weight.

Parameters are replaced, sharded, parametrized and pruned while an attachment lives: the search is repeated whenever the
model has changed.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from regkit.errors import AttachError
from regkit.runtime.sharding import refuse_flattened, sharded
from regkit.weights.computed import Parametrized, Through
from regkit.weights.storage import Masked, Plain, Sharded, Storage


class MissingError(AttachError):
    """The error for a name under which a module has neither a weight nor anything to compute a weight from."""


def storage_of(
    module: nn.Module, parent: nn.Module | None, name: str, through: str | None = None, mask: str | None = None
) -> Storage:
    """The present storage of the weight of this name. Raises AttachError where no storage can be followed.

    parent: the module's parent; wrappers that drop weights keep the raw weight there or in the module itself.
    name: dotted where a submodule has the weight.
    through, mask: how the module uses the weight, as `regkit.Weight` says.
    """
    storage = _storage(module, parent, name)
    if through is not None:
        storage = Through(storage, function_of(module, through), name, _path(module, through))
    if mask is None:
        return storage
    tensor, path = mask_of(module, mask), _path(module, mask)
    registered = mask.rpartition(".")[-1] in {**path[-1]._buffers, **path[-1]._parameters}
    return Masked(storage, tensor, name, path if registered else None, f"masked by {mask}")


def function_of(module: nn.Module, name: str) -> nn.Module:
    """The submodule of this name. Raises AttachError where there is none."""
    function = _path(module, name)[-1]._modules.get(name.rpartition(".")[-1])
    if function is None:
        raise MissingError(f"the module {name} is missing")
    return function


def mask_of(module: nn.Module, name: str) -> Tensor:
    """The mask of this name. Raises AttachError where there is none, or where the mask is trained."""
    mask = getattr(_path(module, name)[-1], name.rpartition(".")[-1], None)
    if not isinstance(mask, Tensor):
        raise MissingError(f"the mask {name} is missing" if mask is None else f"the mask {name} is {mask!r}, no tensor")
    if mask.requires_grad:
        raise AttachError(f"the mask {name} would be trained, and not be of 0 and 1 any more; requires_grad_(False)")
    return mask


def _path(module: nn.Module, name: str) -> list[nn.Module]:
    """The modules from `module` down to the submodule that has the attribute of a dotted name."""
    path = [module]
    for part in name.split(".")[:-1]:
        child = module._modules.get(part)
        if child is None:
            raise MissingError(f"{name} is missing: {type(module).__name__} has no module {part!r}")
        module = child
        path.append(module)
    refuse_flattened((one, name) for one in path)
    return path


def _storage(module: nn.Module, parent: nn.Module | None, name: str) -> Storage:
    path, own = _path(module, name), name.rpartition(".")[-1]
    module = path[-1]
    parent = path[-2] if len(path) > 1 else parent
    parameter = _parameter(module, parent, own)
    if parameter is not None:
        if is_lazy(parameter):
            raise AttachError(f"{name} has no shape yet (lazy); run a batch through the model before regkit.attach()")
        follows = path if len(path) > 1 else []
        if module._parameters.get(own) is not parameter and parent is not None:  # the raw weight of a wrapper
            follows = [*path, parent]
        return Sharded(parameter, follows) if sharded(parameter) else Plain(parameter, follows)
    if parametrize.is_parametrized(module, own):
        parametrizations = module.get_submodule("parametrizations")
        return Parametrized(parametrizations.get_submodule(own), name, (*path, parametrizations))
    original, mask = module._parameters.get(f"{own}_orig"), module._buffers.get(f"{own}_mask")
    if original is not None and mask is not None:
        return Masked(Sharded(original) if sharded(original) else Plain(original), mask, name, path)
    raise _lost(module, own, name)


def _parameter(module: nn.Module, parent: nn.Module | None, name: str) -> nn.Parameter | None:
    """The parameter of this name, or a wrapper's raw parameter (Merity et al.'s WeightDrop, fastai's)."""
    own, raw = module._parameters.get(name), module._parameters.get(f"{name}_raw")
    if raw is None and not isinstance(own, nn.Parameter) and parent is not None:
        raw = parent._parameters.get(f"{name}_raw")
    if raw is None or own is raw or not isinstance(own, nn.Parameter):
        return own if raw is None and isinstance(own, nn.Parameter) else raw
    raise AttachError(
        f"{name} is a new Parameter at each forward pass, and so {name}_raw, which it is made of, gets no gradient and "
        "is never trained; let the wrapper assign the tensor itself"
    )


def _lost(module: nn.Module, own: str, name: str) -> AttachError:
    """The error that says why a weight is in no known place."""
    parameters = module._parameters
    if f"{own}_v" in parameters or f"{own}_orig" in parameters:
        return AttachError(
            f"{name} is of the deprecated torch.nn.utils.weight_norm or spectral_norm; use "
            "torch.nn.utils.parametrizations"
        )
    if getattr(module, own, None) is not None:
        return AttachError(f"{name} is computed from another, and there is no parameter {own}_raw that it is made of")
    return MissingError(f"{name} is missing")
