"""Storages of a weight's numbers: a parameter, shards of one, a weight under a mask. Parametrizations: `computed`.

An attribute such as `weight_hh_l0` need not be a parameter. A `Storage` reads the weight that acts, and brings
gradients and new values to the parameters behind the weight, which an optimizer owns.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from regkit.errors import AttachError
from regkit.runtime.sharding import share, whole

Followed = Sequence["weakref.ref[nn.Module]"]

View = Callable[[Tensor], Tensor]
"""Takes a whole weight to a view of the part that a rule is about."""


class Storage(ABC):
    """The place where one weight is kept."""

    __slots__ = ()

    parameters: tuple[nn.Parameter, ...]
    """The parameters behind the weight."""

    limited: ClassVar[bool] = True
    """Whether there may be points to which the weight cannot be brought."""

    constants: Sequence[Tensor] = ()
    """The tensors that must stay untrained, such as masks."""

    remembers: bool = False
    """Whether the storage may remember the weight that was read."""

    computed: bool = False
    """Whether the weight may depend on more parameters than `parameters`."""

    follows: Followed = ()
    """The modules, beside the weight's own, of which the parameters, buffers and children matter to the storage."""

    steady: bool = True
    """Whether the storage stays the weight's as long as parameters, buffers and children of these modules stay."""

    @property
    def identity(self) -> tuple[int, ...]:
        """The ids of the storage's tensors and functions: equal for one weight under several names, and only there."""
        return tuple(map(id, self.parameters))

    def forget(self) -> None:  # noqa: B027  # most remember nothing
        """Make the next reading a fresh one."""

    @abstractmethod
    def read(self) -> Tensor:
        """The whole weight that acts in evaluation: no dropout, no power iteration. Autograd may follow."""

    def outline(self) -> Tensor:
        """A tensor of the whole weight's shape and dtype, made without communication among processes."""
        return self.read()

    def probe(self) -> Tensor:
        """A tensor with a number that is not finite if the weight has one; sharded where possible."""
        return self.read()

    @abstractmethod
    def add(self, view: View, gradient: Tensor, amounts: Sequence[tuple[nn.Parameter, float]]) -> None:
        """Add amount · ∂(weight)ᵀ gradient to the gradient of each given parameter. gradient: of the viewed part."""

    @abstractmethod
    def write(self, view: View, point: Tensor) -> None:
        """Make the viewed part equal to a point. Raises AttachError, and changes nothing, where that cannot be."""

    def free(self, view: View) -> Tensor | None:
        """The numbers of the viewed part that can be changed, as booleans; None if all can."""
        return None

    def check_writable(self, view: View, points: Sequence[Tensor]) -> None:
        """Raise AttachError where `write` cannot make the viewed part equal to points like these."""
        return


class Plain(Storage):
    """A parameter."""

    __slots__ = ("follows", "parameters")

    limited: ClassVar[bool] = False

    def __init__(self, parameter: nn.Parameter, follows: Iterable[nn.Module] = ()) -> None:
        self.parameters, self.follows = (parameter,), weakly(follows)

    def read(self) -> Tensor:
        return self.parameters[0]

    def add(self, view: View, gradient: Tensor, amounts: Sequence[tuple[nn.Parameter, float]]) -> None:
        for parameter, amount in amounts:
            view(grad_of(parameter)).add_(gradient, alpha=amount)

    def write(self, view: View, point: Tensor) -> None:
        view(self.parameters[0]).copy_(point)


class Whole(Storage):
    """A storage that makes the whole weight at each reading, so that a view of the weight writes nothing."""

    def _placed(self, view: View, part: Tensor) -> Tensor:
        """A weight of zeros, but for the part."""
        placed = torch.zeros(self.outline().shape, dtype=part.dtype, device=part.device)
        view(placed).copy_(part)
        return placed

    def _changed(self, view: View, point: Tensor) -> Tensor:
        """The weight with its viewed part changed."""
        changed = self.read().clone()
        view(changed).copy_(point)
        return changed


class Sharded(Whole):
    """A parameter of which each process holds a part (a DTensor). The whole is read: every norm is of whole rows."""

    remembers = True
    _gathered: Tensor | None = None

    def __init__(self, parameter: nn.Parameter, follows: Iterable[nn.Module] = ()) -> None:
        self.parameters, self.follows = (parameter,), weakly(follows)
        self._parameter = parameter

    def read(self) -> Tensor:
        if torch.is_grad_enabled():
            return whole(self._parameter)
        if self._gathered is None:
            self._gathered = whole(self._parameter)
        return self._gathered

    def forget(self) -> None:
        self._gathered = None

    def outline(self) -> Tensor:
        return self._parameter

    probe = outline

    def add(self, view: View, gradient: Tensor, amounts: Sequence[tuple[nn.Parameter, float]]) -> None:
        placed = self._placed(view, gradient)
        for parameter, amount in amounts:
            grad = grad_of(parameter)
            grad.add_(share(placed, grad).to(grad.dtype), alpha=amount)

    def write(self, view: View, point: Tensor) -> None:
        changed = self._changed(view, point)
        self._parameter.copy_(share(changed, self._parameter))
        self._gathered = changed


class Masked(Storage):
    """A weight that acts as under · mask, a mask of 0 and 1: pruned (torch.nn.utils.prune), or wired by its module.

    Where the mask is 0, the number under the mask is never changed.

    under: the storage of the unmasked weight.
    path: the modules down to the one with which the mask is registered; None where the mask is a plain attribute, which
    cannot be followed.
    """

    def __init__(
        self, under: Storage, mask: Tensor, name: str, path: Iterable[nn.Module] | None, how: str = "pruned"
    ) -> None:
        self.parameters, self.follows = under.parameters, (*under.follows, *weakly(path or ()))
        self.steady, self.constants = under.steady and path is not None, (mask,)
        self.remembers, self.computed = under.remembers, under.computed
        self._under, self._mask, self._name, self._how = under, mask, name, how

    @property
    def identity(self) -> tuple[int, ...]:
        return (*self._under.identity, id(self._mask))

    def read(self) -> Tensor:
        weight = self._under.read()
        return weight * whole(self._mask).to(weight.dtype)

    def forget(self) -> None:
        self._under.forget()

    def outline(self) -> Tensor:
        return self._under.outline()

    def probe(self) -> Tensor:
        return self._under.probe()  # NaN · 0 is NaN, too

    def _acts(self, view: View) -> Tensor:
        return view(whole(self._mask).bool())

    def add(self, view: View, gradient: Tensor, amounts: Sequence[tuple[nn.Parameter, float]]) -> None:
        self._under.add(view, torch.where(self._acts(view), gradient, 0.0), amounts)

    def free(self, view: View) -> Tensor:
        return self._acts(view)

    def _filled(self, view: View, point: Tensor) -> Tensor:
        """The point; where the mask is 0, the number under the mask."""
        return torch.where(self._acts(view), point, view(self._under.read()))

    def write(self, view: View, point: Tensor) -> None:
        self._under.write(view, self._filled(view, point))

    def check_writable(self, view: View, points: Sequence[Tensor]) -> None:
        out = ~self._acts(view)
        if any(bool((out & (point != 0)).any()) for point in points):
            raise AttachError(f"{self._name} is {self._how}, and would not be zero any more where it is")
        self._under.check_writable(view, [self._filled(view, point) for point in points])


def weakly(modules: Iterable[nn.Module]) -> Followed:
    """References that keep no module alive."""
    return tuple(map(weakref.ref, modules))


def grad_of(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter that the step trains."""
    assert parameter.grad is not None  # or it would not be trained
    return parameter.grad
