"""Norm penalties of weights: L1, L2 and their sum."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from regkit import Penalty, hookimpl
from regkit.activity import at_least_float32
from regkit.fields import NonNegative
from regkit.kinds import Separable
from regkit_standard.foreach import WIDE, portions, signs, sum_of_powers


def _l1(w: Tensor) -> Tensor:
    return at_least_float32(w).abs().sum()


def _l2(w: Tensor) -> Tensor:
    # Not the square of vector_norm, whose derivative at zero is a masked 0/0.
    return at_least_float32(w).square().sum()


def _soft_threshold(w: Tensor, threshold: float | Tensor) -> Tensor:
    """sign(w) · max(|w| − threshold, 0), exactly zero within the threshold."""
    return w.sign() * (w.abs() - threshold).clamp(min=0)


class _Norm(Penalty):
    """l1·Σ|w| + l2·Σw² for some l1 and l2."""

    @property
    def separable(self) -> Separable:
        return "elements"

    @property
    @abstractmethod
    def _coefficients(self) -> tuple[float, float]:
        """l1 and l2, times the strength."""

    def plus(self, other: Penalty) -> Penalty | None:
        if not isinstance(other, _Norm):
            return None
        l1, l2 = map(sum, zip(self._coefficients, other._coefficients, strict=True))
        return L2(strength=l2) if l1 == 0 else L1(strength=l1) if l2 == 0 else L1L2(l1=l1, l2=l2)


@final
class L1(_Norm):
    """Lasso: Σ|w|  (Tibshirani 1996; Keras L1).

    w: (rows, columns) or (rows,) -> ().  The gradient is sign(w), with 0 chosen from the subgradient at 0.
    prox: sign(w) · max(|w| − step, 0), which makes exact zeros.

    >>> L1(strength=1).prox(torch.tensor([-3.0, 0.5]), 1.0)
    tensor([-2.,  0.])
    """

    kind: Literal["l1"] = "l1"

    @property
    def _coefficients(self) -> tuple[float, float]:
        return self.strength, 0.0

    def value(self, w: Tensor) -> Tensor:
        return _l1(w)

    def gradient(self, w: Tensor) -> Tensor:
        return at_least_float32(w).sign()

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return _soft_threshold(w, step)

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        for ws, gs, work in portions(weights, gradients):
            torch._foreach_add_(gs, signs(ws, work), alpha=amount)

    def values(self, weights: list[Tensor]) -> Tensor:
        return super().values(weights) if torch.is_grad_enabled() else sum_of_powers(weights, 1)


@final
class L2(_Norm):
    """Ridge: Σw², without the ½, so that `weight_decay` c is strength c/2  (Hoerl & Kennard 1970; Keras L2).

    w: (rows, columns) or (rows,) -> ().  Gradient: 2w.  prox: w / (1 + 2·step).

    >>> L2(strength=1).value(torch.tensor([3.0, -4.0]))
    tensor(25.)
    """

    kind: Literal["l2"] = "l2"

    @property
    def _coefficients(self) -> tuple[float, float]:
        return 0.0, self.strength

    def value(self, w: Tensor) -> Tensor:
        return _l2(w)

    def gradient(self, w: Tensor) -> Tensor:
        return 2 * at_least_float32(w)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return w / (1 + 2 * step)

    def values(self, weights: list[Tensor]) -> Tensor:
        return super().values(weights) if torch.is_grad_enabled() else sum_of_powers(weights, 2)

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        # In half precision torch would round alpha, too, on a CPU: there, copies in float32 are added.
        if weights[0].dtype in WIDE:
            torch._foreach_add_(gradients, weights, alpha=2 * amount)
            return
        for ws, gs, _ in portions(weights, gradients):
            torch._foreach_add_(gs, ws, alpha=2 * amount)


@final
class L1L2(_Norm):
    """Elastic net: l1·Σ|w| + l2·Σw²  (Zou & Hastie 2005; Keras L1L2).

    w: (rows, columns) or (rows,) -> ().  Gradient: l1·sign(w) + 2·l2·w.
    prox: soft threshold by step·l1, then division by 1 + 2·step·l2.

    >>> L1L2(l1=1.0, l2=0.5).gradient(torch.tensor([3.0, -4.0]))
    tensor([ 4., -5.])
    """

    kind: Literal["l1_l2"] = "l1_l2"

    shorthand: ClassVar[tuple[str, ...]] = ("l1", "l2")

    l1: NonNegative = 0.0
    """The coefficient of Σ|w|. Range: ≥ 0."""

    l2: NonNegative = 0.0
    """The coefficient of Σw². Range: ≥ 0."""

    strength: NonNegative = 1.0
    """What both coefficients are multiplied by. Range: ≥ 0; a rule with 0 is refused."""

    @classmethod
    def examples(cls) -> Sequence[L1L2]:
        return [cls(l1=1e-5, l2=1e-4), cls(l1=1e-5)]

    def inert(self) -> str | None:
        return "neither l1 nor l2 is positive" if self.l1 == self.l2 == 0 else super().inert()

    @property
    def _coefficients(self) -> tuple[float, float]:
        return self.strength * self.l1, self.strength * self.l2

    def value(self, w: Tensor) -> Tensor:
        return self.l1 * _l1(w) + self.l2 * _l2(w)

    def gradient(self, w: Tensor) -> Tensor:
        return self.l1 * at_least_float32(w).sign() + (2 * self.l2) * at_least_float32(w)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return _soft_threshold(w, step * self.l1) / (1 + 2 * self.l2 * step)

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        unit = self.l1 if self.l1 > 1e-6 * 2 * self.l2 else 1.0  # of which the signs are multiples, without a product
        for ws, gs, work in portions(weights, gradients):
            slopes = signs(ws, work)
            if unit != self.l1:
                torch._foreach_mul_(slopes, self.l1)
            torch._foreach_add_(slopes, ws, alpha=2 * self.l2 / unit)
            torch._foreach_add_(gs, slopes, alpha=amount * unit)

    def values(self, weights: list[Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            return super().values(weights)
        return self.l1 * sum_of_powers(weights, 1) + self.l2 * sum_of_powers(weights, 2)


@hookimpl
def regkit_penalties() -> list[type[Penalty]]:
    return [L1, L2, L1L2]
