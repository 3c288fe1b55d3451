"""Weights that are computed from parameters, by a parametrization or a module, and are written through an inverse."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from regkit.errors import AttachError
from regkit.runtime.sharding import sharded, share, whole
from regkit.runtime.step import moves
from regkit.weights.storage import Storage, View, Whole, grad_of, weakly


class Computed(Whole):
    """A weight that is computed from parameters, once, and remembered until `forget`."""

    remembers = computed = True

    _weight: Tensor | None = None

    def forget(self) -> None:
        self._weight = None

    @abstractmethod
    def _compute(self) -> Tensor:
        """The weight, computed from `parameters`."""

    def read(self) -> Tensor:
        if self._weight is None:
            with torch.enable_grad():
                self._weight = whole(self._compute())
        return self._weight if torch.is_grad_enabled() else self._weight.detach()

    def add(self, view: View, gradient: Tensor, amounts: Sequence[tuple[nn.Parameter, float]]) -> None:
        placed = self._placed(view, gradient)
        # Backward in the weight's dtype, at unit scale: a loss scale of 2¹⁶ would overflow in float16.
        largest = placed.abs().amax()
        unit = torch.where(largest.isfinite() & (largest > 0), largest, 1.0)
        pulled = self._pulled(placed / unit, [parameter for parameter, _ in amounts])
        for (parameter, amount), part in zip(amounts, pulled, strict=True):
            grad_of(parameter).add_(part.to(unit.dtype) * unit, alpha=amount)

    @torch.enable_grad()
    def _pulled(self, slope: Tensor, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor]:
        """The slopes by parameters, from one by the weight; by frozen ones that have a gradient, and so move, too."""
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            weight = whole(self._compute()) if frozen else self.read()
            return torch.autograd.grad(
                weight, parameters, slope.to(weight.dtype), retain_graph=True, materialize_grads=True
            )
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


class Parametrized(Computed):
    """A weight behind torch.nn.utils.parametrize, which is written through `right_inverse`.

    Frozen originals are not written. Writing waits for a GPU twice: does anything move, and is the result right?
    """

    def __init__(self, parametrization: nn.Module, name: str, follows: Iterable[nn.Module] = ()) -> None:
        assert isinstance(parametrization, parametrize.ParametrizationList)
        suffixes = [""] if parametrization.is_tensor else range(parametrization.ntensors)
        self._originals: list[Tensor] = [getattr(parametrization, f"original{suffix}") for suffix in suffixes]
        self.parameters = tuple(one for one in self._originals if isinstance(one, nn.Parameter))
        self._parametrization, self._name = parametrization, name
        self.follows = weakly((*follows, parametrization))

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
        # Where nothing moves, nothing is written: right_inverse(weight) is seldom the original bit for bit, and some
        # parametrizations move buffers of their own in right_inverse.
        if torch.allclose(changed, self.read(), rtol=0, atol=0, equal_nan=True):
            return
        kept = {key: value.clone() for key, value in self._parametrization.state_dict().items()}
        try:
            for original, new in zip(self._originals, self._inverse(changed), strict=True):
                if moves(original):
                    original.copy_(share(new, original))
            self._weight = None
            if not self._fits(changed):
                frozen = "" if all(map(moves, self._originals)) else ", with a part of it frozen,"
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
        """Whether the weight is as wanted now, up to rounding, with finite originals if `wanted` is finite."""
        finite = wanted.isfinite()
        coarsest = max(torch.finfo(one.dtype).eps for one in (wanted, *self._originals))
        largest = float(torch.where(finite, wanted, 0.0).abs().max())
        close = torch.allclose(self.read(), wanted, rtol=0, atol=max(1e-3, 16 * coarsest) * largest, equal_nan=True)
        return close and (not bool(finite.all()) or all(bool(one.isfinite().all()) for one in self._originals))

    def _cannot(self, reason: str) -> str:
        names = ", ".join(type(one).__name__ for one in self._parametrization)
        return f"{self._name} cannot be set to a point: its parametrization {names} {reason}"

    def check_writable(self, view: View, points: Sequence[Tensor]) -> None:
        # On a copy: writing may move buffers and draw random numbers, as torch's `orthogonal` does.
        trial = Parametrized(copy.deepcopy(self._parametrization), self._name)
        if not any(map(moves, trial.parameters)):
            trial._parametrization.requires_grad_(True)  # as when somebody unfreezes the weight
        device = self._originals[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for point in points:
                trial.write(view, point)


class Through(Computed):
    """A weight that acts as f(kept), where f is a module that works element by element, and has an inverse."""

    def __init__(self, under: Storage, function: nn.Module, name: str, path: Iterable[nn.Module]) -> None:
        self.parameters, self.follows, self.steady = under.parameters, (*under.follows, *weakly(path)), under.steady
        self._under, self._function, self._name = under, function, name

    @property
    def identity(self) -> tuple[int, ...]:
        return (*self._under.identity, id(self._function))

    def forget(self) -> None:
        self._weight = None
        self._under.forget()

    def outline(self) -> Tensor:
        return self._under.outline()

    def _compute(self) -> Tensor:
        weight: Tensor = self._function(self._under.read())
        return weight

    def write(self, view: View, point: Tensor) -> None:
        kept = self._kept(view, point)
        self._under.write(lambda whole: whole, kept)
        self._weight = None

    def _kept(self, view: View, point: Tensor) -> Tensor:
        """The kept tensor for which the viewed part is the point; where nothing moves, the present numbers."""
        now, changed = self.read(), self._changed(view, point)
        kept = torch.where(changed == now, self._under.read(), self._inverse(changed))
        close = torch.isclose(self._function(kept), changed, rtol=1e-3, equal_nan=True)
        if not bool(close.all()) or not bool(kept.isfinite().all()):
            raise AttachError(f"{self._name} cannot be set to a point: {self._function} never gives what is wanted")
        return kept

    def _inverse(self, weight: Tensor) -> Tensor:
        if isinstance(self._function, nn.Softplus):
            # y = log(1 + exp(βx)) / β  ⇔  x = y + log(1 − exp(−βy)) / β, which exists for y > 0.
            beta = self._function.beta
            return weight + torch.log(-torch.expm1(-beta * weight)) / beta
        inverse = getattr(self._function, "right_inverse", None)
        if inverse is None:
            raise AttachError(f"{self._name} cannot be set to a point: {self._function} has no right_inverse")
        found: Tensor = inverse(weight)
        return found

    def check_writable(self, view: View, points: Sequence[Tensor]) -> None:
        self._under.check_writable(lambda whole: whole, [self._kept(view, point) for point in points])
