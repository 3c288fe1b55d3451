"""Where a weight's numbers are kept: in a parameter, in shards of one, behind a parametrization, or under a mask.

What a module calls `weight_hh_l0` need not be a parameter. A `Storage` reads the weight that acts, and brings
gradients and new values to the parameters behind it, its leaves, which are what an optimizer owns. It is found anew at
each use: parameters are replaced, sharded, parametrized and pruned while an attachment lives.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from regkit.errors import AttachError
from regkit.shards import sharded, share, whole

View = Callable[[Tensor], Tensor]
"""From a whole weight to a view of the part that a rule is about."""


class Storage(ABC):
    """Where one weight is kept."""

    leaves: tuple[nn.Parameter, ...]
    """The parameters behind the weight."""

    @abstractmethod
    def read(self) -> Tensor:
        """The weight that acts, whole, as it is in evaluation: no dropout, no power iteration. Autograd may follow."""

    @abstractmethod
    def add(self, view: View, gradient: Tensor, amounts: Sequence[tuple[nn.Parameter, float]]) -> None:
        """Add amount · ∂(weight)ᵀ gradient to the gradient of each given leaf. gradient: of the viewed part."""

    @abstractmethod
    def write(self, view: View, point: Tensor) -> None:
        """Make the viewed part equal to a point."""

    def prove(self, view: View, points: Sequence[Tensor]) -> None:
        """Raise AttachError where `write` cannot make the viewed part equal to points like these."""
        return


class Plain(Storage):
    """A parameter."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.leaves = (parameter,)
        self._parameter = parameter

    def read(self) -> Tensor:
        return self._parameter

    def add(self, view: View, gradient: Tensor, amounts: Sequence[tuple[nn.Parameter, float]]) -> None:
        for parameter, amount in amounts:
            view(_grad(parameter)).add_(gradient, alpha=amount)

    def write(self, view: View, point: Tensor) -> None:
        view(self._parameter).copy_(point)


class _Whole(Storage):
    """A storage in which a view of the whole weight would be a view of a temporary."""

    def _placed(self, view: View, part: Tensor) -> Tensor:
        """The part where it belongs in a weight of zeros."""
        placed = torch.zeros_like(self.read(), dtype=part.dtype)
        view(placed).copy_(part)
        return placed

    def _changed(self, view: View, point: Tensor) -> Tensor:
        """The weight with its viewed part changed."""
        changed = self.read().clone()
        view(changed).copy_(point)
        return changed


class Sharded(_Whole):
    """A parameter of which each process holds a part (a DTensor). It is read whole: every norm is of whole rows."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.leaves = (parameter,)
        self._parameter = parameter

    def read(self) -> Tensor:
        return whole(self._parameter)

    def add(self, view: View, gradient: Tensor, amounts: Sequence[tuple[nn.Parameter, float]]) -> None:
        placed = self._placed(view, gradient)
        for parameter, amount in amounts:
            grad = _grad(parameter)
            grad.add_(share(placed, grad).to(grad.dtype), alpha=amount)

    def write(self, view: View, point: Tensor) -> None:
        self._parameter.copy_(share(self._changed(view, point), self._parameter))


class _Computed(_Whole):
    """A weight that is computed from its leaves."""

    def add(self, view: View, gradient: Tensor, amounts: Sequence[tuple[nn.Parameter, float]]) -> None:
        with torch.enable_grad():
            weight = self.read()
        placed = self._placed(view, gradient).to(weight.dtype)
        leaves = [leaf for leaf, _ in amounts]
        pulled = torch.autograd.grad(weight, leaves, placed, materialize_grads=True)
        for (leaf, amount), part in zip(amounts, pulled, strict=True):
            _grad(leaf).add_(part, alpha=amount)


class Masked(_Computed):
    """A pruned weight, original · mask  (torch.nn.utils.prune)."""

    def __init__(self, original: nn.Parameter, mask: Tensor) -> None:
        self.leaves = (original,)
        self._original, self._mask = original, mask

    def read(self) -> Tensor:
        return whole(self._original * self._mask.to(self._original.dtype))

    def write(self, view: View, point: Tensor) -> None:
        changed = share(self._changed(view, point), self._original)
        self._original.copy_(torch.where(self._mask.bool(), changed, self._original))


class Parametrized(_Computed):
    """A weight behind torch.nn.utils.parametrize. It is written through `right_inverse`."""

    def __init__(self, parametrization: nn.Module, name: str) -> None:
        assert isinstance(parametrization, parametrize.ParametrizationList)
        many = range(parametrization.ntensors)
        names = ["original"] if parametrization.is_tensor else [f"original{index}" for index in many]
        self._originals = [getattr(parametrization, one) for one in names]
        self.leaves = tuple(one for one in self._originals if isinstance(one, nn.Parameter))
        self._parametrization = parametrization
        self._name = name

    def read(self) -> Tensor:
        with _evaluating(self._parametrization):
            weight: Tensor = self._parametrization()
        return whole(weight)

    def write(self, view: View, point: Tensor) -> None:
        before = self.read()
        inverse: Any = self._changed(view, point)
        moved = torch.ne(inverse, before).any()  # on the device: where nothing moves, the originals keep every bit
        for step in reversed(list(self._parametrization)):
            inverse = step.right_inverse(inverse)  # type: ignore[operator]  # torch types it as a Module's attribute
        wanted = [inverse] if isinstance(inverse, Tensor) else inverse
        for original, new in zip(self._originals, wanted, strict=True):
            original.copy_(torch.where(moved, share(new, original).to(original.dtype), original))

    def prove(self, view: View, points: Sequence[Tensor]) -> None:
        # On a copy: some parametrizations move their own buffers when they are written through.
        trial = Parametrized(copy.deepcopy(self._parametrization), self._name)
        names = ", ".join(type(one).__name__ for one in self._parametrization)
        for point in points:
            try:
                trial.write(view, point)
            except (AttributeError, NotImplementedError, ValueError) as error:
                reason = "has no right_inverse" if isinstance(error, AttributeError) else f"refuses it ({error})"
                raise AttachError(
                    f"{self._name} cannot be set to a point: its parametrization {names} {reason}"
                ) from None
            written = view(trial.read())
            if not torch.allclose(written, point.to(written.dtype), rtol=1e-3, atol=1e-4):
                raise AttachError(
                    f"{self._name} cannot be set to a point: what its parametrization {names} makes of "
                    "right_inverse(point) is another"
                )


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # or it would not be trained
    return parameter.grad


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [one for one in module.modules() if one.training]
    for one in training:
        one.training = False
    try:
        yield
    finally:
        for one in training:
            one.training = True


def storage_of(module: nn.Module, parent: nn.Module | None, name: str) -> Storage:
    """Where the weight of this name is kept now. Raises AttachError where it is in no place that can be followed.

    parent: what holds the module; wrappers that drop weights keep the raw one there or in the module itself.
    """
    raw = f"{name}_raw"  # as in Merity et al.'s WeightDrop and those made after it
    parameter = module._parameters.get(raw)
    if parameter is None and parent is not None:
        parameter = parent._parameters.get(raw)
    if parameter is None:
        parameter = module._parameters.get(name)
    if parameter is not None:
        return Sharded(parameter) if sharded(parameter) else Plain(_usable(parameter, name))
    if parametrize.is_parametrized(module, name):
        return Parametrized(module.get_submodule(f"parametrizations.{name}"), name)
    original, mask = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
    if original is not None and mask is not None:
        return Masked(original, mask)
    raise AttachError(f"{name} {_reason(module, name)}")


def _usable(parameter: nn.Parameter, name: str) -> nn.Parameter:
    if is_lazy(parameter):
        raise AttachError(f"{name} has no shape yet (lazy); run a batch through the model before regkit.attach()")
    return parameter


def _reason(module: nn.Module, name: str) -> str:
    own = module._parameters
    if f"{name}_v" in own or f"{name}_orig" in own:
        return (
            "is computed by torch.nn.utils.weight_norm or spectral_norm, which torch has deprecated; use those of "
            "torch.nn.utils.parametrizations"
        )
    if hasattr(module, name):
        return f"is computed from another, and there is no parameter {name}_raw that it is made of"
    return "is missing"
