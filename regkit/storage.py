"""Where a weight's numbers are kept: in a parameter, in shards of one, behind a parametrization, or under a mask.

What a module calls `weight_hh_l0` need not be a parameter. A `Storage` reads the weight that acts, and brings
gradients and new values to the parameters behind it, its leaves, which are what an optimizer owns. It is found anew at
each use: parameters are replaced, sharded, parametrized and pruned while an attachment lives.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from regkit.errors import AttachError
from regkit.shards import FSDP1, flattened, sharded, share, whole

View = Callable[[Tensor], Tensor]
"""From a whole weight to a view of the part that a rule is about."""


class Storage(ABC):
    """Where one weight is kept."""

    leaves: tuple[nn.Parameter, ...]
    """The parameters behind the weight."""

    @property
    def identity(self) -> tuple[int, ...]:
        """The ids of all that it is made of: equal for one weight under several names, and only there."""
        return tuple(map(id, self.leaves))

    @abstractmethod
    def read(self) -> Tensor:
        """The weight that acts, whole, as it is in evaluation: no dropout, no power iteration. Autograd may follow."""

    def outline(self) -> Tensor:
        """A tensor of the whole weight's shape and dtype, for which no processes need to communicate."""
        return self.read()

    @abstractmethod
    def add(self, view: View, gradient: Tensor, amounts: Sequence[tuple[nn.Parameter, float]]) -> None:
        """Add amount · ∂(weight)ᵀ gradient to the gradient of each given leaf. gradient: of the viewed part."""

    @abstractmethod
    def write(self, view: View, point: Tensor) -> None:
        """Make the viewed part equal to a point. Raises AttachError, and changes nothing, where that cannot be."""

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
        placed = torch.zeros(self.outline().shape, dtype=part.dtype, device=part.device)
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

    def outline(self) -> Tensor:
        return self._parameter

    def add(self, view: View, gradient: Tensor, amounts: Sequence[tuple[nn.Parameter, float]]) -> None:
        placed = self._placed(view, gradient)
        for parameter, amount in amounts:
            grad = _grad(parameter)
            grad.add_(share(placed, grad).to(grad.dtype), alpha=amount)

    def write(self, view: View, point: Tensor) -> None:
        self._parameter.copy_(share(self._changed(view, point), self._parameter))


class _Computed(_Whole):
    """A weight that is computed from its leaves: once for all that one rule does with it at a step."""

    _weight: Tensor | None = None

    @abstractmethod
    def _compute(self) -> Tensor:
        """The weight, from its leaves."""

    def read(self) -> Tensor:
        if self._weight is None:
            with torch.enable_grad():
                self._weight = whole(self._compute())
        return self._weight if torch.is_grad_enabled() else self._weight.detach()

    def add(self, view: View, gradient: Tensor, amounts: Sequence[tuple[nn.Parameter, float]]) -> None:
        with torch.enable_grad():
            weight = self.read()
        placed = self._placed(view, gradient)
        # It goes backward in the weight's dtype, at unit scale: a loss scale of 2¹⁶ would overflow in float16.
        largest = placed.abs().amax()
        unit = torch.where(largest.isfinite() & (largest > 0), largest, 1.0)
        leaves = [leaf for leaf, _ in amounts]
        pulled = torch.autograd.grad(weight, leaves, (placed / unit).to(weight.dtype), materialize_grads=True)
        for (leaf, amount), part in zip(amounts, pulled, strict=True):
            _grad(leaf).add_(part.to(unit.dtype) * unit, alpha=amount)


class Masked(_Computed):
    """A pruned weight, original · mask  (torch.nn.utils.prune)."""

    def __init__(self, original: nn.Parameter, mask: Tensor, name: str) -> None:
        self.leaves = (original,)
        self._original, self._mask, self._name = original, mask, name

    @property
    def identity(self) -> tuple[int, ...]:
        return (*super().identity, id(self._mask))

    def _compute(self) -> Tensor:
        return whole(self._original) * whole(self._mask).to(self._original.dtype)

    def write(self, view: View, point: Tensor) -> None:
        changed = torch.where(whole(self._mask).bool(), self._changed(view, point), whole(self._original))
        self._original.copy_(share(changed, self._original))
        self._weight = None

    def prove(self, view: View, points: Sequence[Tensor]) -> None:
        pruned = ~view(whole(self._mask).bool())
        if any(bool((pruned & (point != 0)).any()) for point in points):
            raise AttachError(f"{self._name} is pruned, and would not be zero any more where it is")


class Parametrized(_Computed):
    """A weight behind torch.nn.utils.parametrize. It is written through `right_inverse`.

    Frozen originals are not written. To write waits for a GPU twice: does anything move, and did it come out right?
    """

    def __init__(self, parametrization: nn.Module, name: str) -> None:
        assert isinstance(parametrization, parametrize.ParametrizationList)
        suffixes = [""] if parametrization.is_tensor else range(parametrization.ntensors)
        self._originals: list[Tensor] = [getattr(parametrization, f"original{suffix}") for suffix in suffixes]
        self.leaves = tuple(one for one in self._originals if isinstance(one, nn.Parameter))
        self._parametrization, self._name = parametrization, name

    @property
    def identity(self) -> tuple[int, ...]:
        return (*map(id, self._originals), *map(id, self._parametrization))

    def _compute(self) -> Tensor:
        training = [one for one in self._parametrization.modules() if one.training]
        for one in training:
            one.training = False
        own = chain(self._parametrization.named_parameters(), self._parametrization.named_buffers())
        wholes = {name: whole(one) for name, one in own if sharded(one)}
        try:
            weight: Tensor = torch.func.functional_call(self._parametrization, wholes, ())
        finally:
            for one in training:
                one.training = True
        return weight

    def write(self, view: View, point: Tensor) -> None:
        changed = self._changed(view, point)
        # Where nothing moves, nothing is written: right_inverse(weight) is seldom the original again, bit for bit, and
        # some parametrizations move buffers of their own in it.
        if torch.allclose(changed, self.read(), rtol=0, atol=0, equal_nan=True):
            return
        kept = {key: value.clone() for key, value in self._parametrization.state_dict().items()}
        try:
            for original, new in zip(self._originals, self._inverse(changed), strict=True):
                if original.requires_grad:
                    original.copy_(share(new, original))
            self._weight = None
            if not self._fits(changed):
                frozen = "" if all(one.requires_grad for one in self._originals) else ", with a part of it frozen,"
                raise AttachError(self._cannot(f"makes of right_inverse(point){frozen} another"))
        except BaseException:
            self._parametrization.load_state_dict(kept)
            self._weight = None
            raise

    def _inverse(self, weight: Tensor) -> list[Tensor]:
        value: Any = weight
        for step in reversed(list(self._parametrization)):
            if not hasattr(step, "right_inverse"):
                raise AttachError(self._cannot(f"has no right_inverse ({type(step).__name__})"))
            try:
                value = step.right_inverse(value)  # type: ignore[operator]  # torch types it as a Module's attribute
            except Exception as error:  # a stranger's code: anything can come out
                raise AttachError(self._cannot(f"refuses it: {error!r}")) from error
        return [value] if isinstance(value, Tensor) else list(value)

    def _fits(self, wanted: Tensor) -> bool:
        """Whether it is as wanted now, up to rounding, and its originals are finite where it is."""
        finite = wanted.isfinite()
        coarsest = max(torch.finfo(one.dtype).eps for one in (wanted, *self._originals))
        largest = float(torch.where(finite, wanted, 0.0).abs().max())
        close = torch.allclose(self.read(), wanted, rtol=0, atol=max(1e-3, 16 * coarsest) * largest, equal_nan=True)
        return close and (not bool(finite.all()) or all(bool(one.isfinite().all()) for one in self._originals))

    def _cannot(self, reason: str) -> str:
        names = ", ".join(type(one).__name__ for one in self._parametrization)
        return f"{self._name} cannot be set to a point: its parametrization {names} {reason}"

    def prove(self, view: View, points: Sequence[Tensor]) -> None:
        # On a copy, for writing may move buffers and draw random numbers, as torch's `orthogonal` does.
        trial = Parametrized(copy.deepcopy(self._parametrization), self._name)
        if not any(one.requires_grad for one in trial.leaves):
            trial._parametrization.requires_grad_(True)  # as it will be when it is unfrozen
        device = self._originals[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for point in points:
                trial.write(view, point)


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # or it would not be trained
    return parameter.grad


def storage_of(module: nn.Module, parent: nn.Module | None, name: str) -> Storage:
    """Where the weight of this name is kept now. Raises AttachError where it is in no place that can be followed.

    parent: what holds the module; wrappers that drop weights keep the raw one there or in the module itself.
    """
    if flattened(module):
        raise AttachError(f"{name} {FSDP1}")
    parameter = _parameter(module, parent, name)
    if parameter is not None:
        if is_lazy(parameter):
            raise AttachError(f"{name} has no shape yet (lazy); run a batch through the model before regkit.attach()")
        return Sharded(parameter) if sharded(parameter) else Plain(parameter)
    if parametrize.is_parametrized(module, name):
        return Parametrized(module.get_submodule(f"parametrizations.{name}"), name)
    original, mask = module._parameters.get(f"{name}_orig"), module._buffers.get(f"{name}_mask")
    if original is not None and mask is not None:
        return Masked(original, mask, name)
    raise AttachError(f"{name} {_reason(module, name)}")


def _parameter(module: nn.Module, parent: nn.Module | None, name: str) -> nn.Parameter | None:
    """The parameter of this name, or the raw one that a wrapper makes it of (Merity et al.'s WeightDrop, fastai's)."""
    own, raw = module._parameters.get(name), module._parameters.get(f"{name}_raw")
    if raw is None and not isinstance(own, nn.Parameter) and parent is not None:
        raw = parent._parameters.get(f"{name}_raw")
    if raw is None or own is raw or not isinstance(own, nn.Parameter):
        return own if raw is None and isinstance(own, nn.Parameter) else raw
    raise AttachError(
        f"{name} is a new Parameter at each forward pass, and so {name}_raw, which it is made of, gets no gradient and "
        "is never trained; let the wrapper assign the tensor itself"
    )


def _reason(module: nn.Module, name: str) -> str:
    own = module._parameters
    if f"{name}_v" in own or f"{name}_orig" in own:
        return "is of the deprecated torch.nn.utils.weight_norm or spectral_norm; use torch.nn.utils.parametrizations"
    if hasattr(module, name):
        return f"is computed from another, and there is no parameter {name}_raw that it is made of"
    return "is missing"
