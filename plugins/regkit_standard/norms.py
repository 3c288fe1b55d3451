"""Norm penalties of weights: L1, L2 and their sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Final, Literal, final

import torch
from torch import Tensor

from regkit import Penalty, hookimpl
from regkit.activity import at_least_float32
from regkit.fields import NonNegative


def _l1(w: Tensor) -> Tensor:
    return at_least_float32(w).abs().sum()


def _l2(w: Tensor) -> Tensor:
    # Not the square of vector_norm, whose derivative at zero is a masked 0/0.
    return at_least_float32(w).square().sum()


_BUCKET: Final = 1 << 22
"""Bytes of weights that a list form works on at a time: what it holds meanwhile is small, and in the cache."""


def _buckets(weights: list[Tensor], gradients: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Lists of at most 4 MB of weights, in float32 or better, and of their gradients; a larger one comes in pieces."""
    ws: list[Tensor] = []
    gs: list[Tensor] = []
    room = _BUCKET
    for w, g in _pieces(weights, gradients):
        if w.nbytes > room and ws:
            yield ws, gs
            ws, gs, room = [], [], _BUCKET
        ws.append(at_least_float32(w))
        gs.append(g)
        room -= w.nbytes
    yield ws, gs


def _pieces(weights: list[Tensor], gradients: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for w, g in zip(weights, gradients, strict=True):
        if w.nbytes <= _BUCKET:
            yield w, g
        else:
            rows = max(1, _BUCKET * w.size(0) // w.nbytes)
            yield from ((w[row : row + rows], g[row : row + rows]) for row in range(0, w.size(0), rows))


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

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        for ws, gs in _buckets(weights, gradients):
            torch._foreach_add_(gs, torch._foreach_sign(ws), alpha=amount)


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

    def values(self, weights: list[Tensor]) -> Tensor:
        if torch.is_grad_enabled():  # a norm has no derivative at zero
            return super().values(weights)
        norms = torch._foreach_norm(weights, dtype=torch.promote_types(weights[0].dtype, torch.float32))
        return torch.stack(norms).square().sum()

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        # In half precision torch would round alpha, too, on a CPU: there, copies in float32 are added.
        exact = weights[0].dtype in (torch.float32, torch.float64)
        for ws, gs in [(weights, gradients)] if exact else _buckets(weights, gradients):
            torch._foreach_add_(gs, ws, alpha=2 * amount)


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

    @classmethod
    def examples(cls) -> Sequence[L1L2]:
        return [cls(l1=1e-5, l2=1e-4), cls(l1=1e-5)]

    def inert(self) -> str | None:
        return "neither l1 nor l2 is positive" if self.l1 == self.l2 == 0 else super().inert()

    def value(self, w: Tensor) -> Tensor:
        return self.l1 * _l1(w) + self.l2 * _l2(w)

    def gradient(self, w: Tensor) -> Tensor:
        return self.l1 * at_least_float32(w).sign() + (2 * self.l2) * at_least_float32(w)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return _soft_threshold(w, step * self.l1) / (1 + 2 * self.l2 * step)

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        for ws, gs in _buckets(weights, gradients):
            slopes = torch._foreach_sign(ws)
            torch._foreach_mul_(slopes, self.l1)
            torch._foreach_add_(slopes, ws, alpha=2 * self.l2)
            torch._foreach_add_(gs, slopes, alpha=amount)


@hookimpl
def regkit_penalties() -> list[type[Penalty]]:
    return [L1, L2, L1L2]
