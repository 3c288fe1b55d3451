"""Penalties on weights."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from regkit.activity import at_least_float32
from regkit.errors import PluginError
from regkit.kinds.kind import _Strong
from regkit.kinds.on_weights import _OnWeights


class Penalty(_Strong, _OnWeights):
    """A scalar function Ω of a weight; strength × factor × Ω(w) is added to the objective.

    >>> from typing import Literal
    >>> class Cube(regkit.Penalty):
    ...     kind: Literal["cube"] = "cube"
    ...     def value(self, w):
    ...         return w.abs().pow(3).sum()
    >>> Cube(strength=0.1).gradient(torch.tensor([1.0, 2.0]))
    tensor([ 3., 12.])
    """

    @abstractmethod
    def value(self, w: Tensor) -> Tensor:
        """Ω(w) at unit strength, in float32 or better.  w: (rows, columns) or (rows,) -> ()."""

    def gradient(self, w: Tensor) -> Tensor:
        """∇Ω(w) at unit strength, of w's shape, in float32 or better; by autograd unless a kind knows a closed form.

        The strength is multiplied in before the gradient is rounded to half precision, where it might overflow.
        """
        with torch.enable_grad():
            leaf = at_least_float32(w.detach()).requires_grad_()
            (gradient,) = torch.autograd.grad(self.value(leaf), leaf)
        return gradient

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """argmin_x ½‖x − w‖² + step·Ω(x), for `"via": "proximal"`.  step: lr · strength · schedule's factor, ≥ 0."""
        raise PluginError(f"{self.kind} offers no prox")

    @property
    def offers_prox(self) -> bool:
        """Whether the kind knows its proximal operator."""
        return type(self).prox is not Penalty.prox

    def plus(self, other: Penalty) -> Penalty | None:
        """A penalty that is the sum of both, if the kind knows one, as l1_l2 for l1 and l2; else None.

        Its strength · value is the sum of the two penalties' strength · value, for every weight that this penalty is
        for, in the same `layout`. Rules on the same weights then act in one pass.
        """
        return None

    def values(self, weights: list[Tensor]) -> Tensor:
        """List form of `value`: Σ_i Ω(weights[i]) in float32 or better.  -> ().  Autograd may follow."""
        first, *others = weights
        return sum((self.value(w) for w in others), start=self.value(first))

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        """List form of `gradient`: gradients[i] += amount · ∇Ω(weights[i]), in place; weights[i] is unchanged.

        gradients[i] has the shape and dtype of weights[i]; no two overlap. Called without autograd. For half-precision
        gradients the sum is computed in float32 and rounded once, when it is added.
        """
        for w, gradient in zip(weights, gradients, strict=True):
            gradient.add_(self.gradient(w), alpha=amount)
