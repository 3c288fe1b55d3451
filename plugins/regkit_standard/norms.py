"""Norm penalties of weights: L1, L2 and their sum."""

from __future__ import annotations

from typing import ClassVar, Literal, final

from torch import Tensor

from regkit import Penalty, hookimpl
from regkit.activity import at_least_float32
from regkit.fields import NonNegative


def _l1(w: Tensor) -> Tensor:
    return at_least_float32(w).abs().sum()


def _l2(w: Tensor) -> Tensor:
    # Not the square of vector_norm, whose derivative at zero is a masked 0/0.
    return at_least_float32(w).square().sum()


def _soft_threshold(w: Tensor, threshold: float | Tensor) -> Tensor:
    """sign(w) · max(|w| − threshold, 0), exactly zero within the threshold."""
    return w.sign() * (w.abs() - threshold).clamp(min=0)


@final
class L1(Penalty):
    """Lasso: Σ|w|  (Tibshirani 1996; Keras L1).

    w: (rows, columns) or (rows,) -> ().  The gradient is sign(w), with 0 chosen from the subgradient at 0.
    prox: sign(w) · max(|w| − step, 0), which makes exact zeros.
    """

    kind: Literal["l1"] = "l1"

    def value(self, w: Tensor) -> Tensor:
        return _l1(w)

    def gradient(self, w: Tensor) -> Tensor:
        return at_least_float32(w).sign()

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return _soft_threshold(w, step)


@final
class L2(Penalty):
    """Ridge: Σw², without the ½, so that `weight_decay` c is strength c/2  (Hoerl & Kennard 1970; Keras L2).

    w: (rows, columns) or (rows,) -> ().  Gradient: 2w.  prox: w / (1 + 2·step).
    """

    kind: Literal["l2"] = "l2"

    def value(self, w: Tensor) -> Tensor:
        return _l2(w)

    def gradient(self, w: Tensor) -> Tensor:
        return 2 * at_least_float32(w)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return w / (1 + 2 * step)


@final
class L1L2(Penalty):
    """Elastic net: l1·Σ|w| + l2·Σw²  (Zou & Hastie 2005; Keras L1L2).

    w: (rows, columns) or (rows,) -> ().  Gradient: l1·sign(w) + 2·l2·w.
    prox: soft threshold by step·l1, then division by 1 + 2·step·l2.
    """

    kind: Literal["l1_l2"] = "l1_l2"

    shorthand: ClassVar[tuple[str, ...]] = ("l1", "l2")

    l1: NonNegative = 0.0
    """The coefficient of Σ|w|. Range: ≥ 0."""

    l2: NonNegative = 0.0
    """The coefficient of Σw². Range: ≥ 0."""

    strength: NonNegative = 1.0
    """What both coefficients are multiplied by. Range: > 0."""

    def inert(self) -> str | None:
        return "neither l1 nor l2 is positive" if self.l1 == self.l2 == 0 else super().inert()

    def value(self, w: Tensor) -> Tensor:
        return self.l1 * _l1(w) + self.l2 * _l2(w)

    def gradient(self, w: Tensor) -> Tensor:
        return self.l1 * at_least_float32(w).sign() + (2 * self.l2) * at_least_float32(w)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return _soft_threshold(w, step * self.l1) / (1 + 2 * self.l2 * step)


@hookimpl
def regkit_penalties() -> list[type[Penalty]]:
    return [L1, L2, L1L2]
