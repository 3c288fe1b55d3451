"""Penalties that keep the rows or columns of a matrix orthogonal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from regkit import Penalty, hookimpl
from regkit.activity import at_least_float32
from regkit.kinds import Layout
from regkit_standard.foreach import divided, stacks


def _is_wide(w: Tensor) -> bool:
    return w.size(-2) <= w.size(-1)


def _off_identity(w: Tensor) -> Tensor:
    """WWᵀ − I for a wide or square W, WᵀW − I for a tall one: the smaller Gram matrix, which alone can reach I."""
    gram = w @ w.mT if _is_wide(w) else w.mT @ w
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


@final
class Orthogonal(Penalty):
    """Soft orthogonality: ‖WWᵀ − I‖_F², or ‖WᵀW − I‖_F² where W is tall  (Bansal et al. 2018).

    w: (rows, columns) -> ().  Gradient: 4(WWᵀ − I)W, or 4W(WᵀW − I); zero where W holds a NaN or an infinity, which
    would spread from there to all of W.

    >>> Orthogonal(strength=1).value(2 * torch.eye(3))
    tensor(27.)
    """

    kind: Literal["orthogonal"] = "orthogonal"

    ranks: ClassVar[tuple[int, ...]] = (2,)

    per: Literal["gate", "matrix"] = "gate"
    """Each gate's block on its own, so that a square recurrent block can be orthogonal, or the stacked matrix."""

    @classmethod
    def examples(cls) -> Sequence[Orthogonal]:
        return [cls(strength=1e-3), cls(strength=1e-3, per="matrix")]

    @property
    def layout(self) -> Layout:
        return self.per

    def value(self, w: Tensor) -> Tensor:
        return _off_identity(at_least_float32(w)).square().sum()

    def gradient(self, w: Tensor) -> Tensor:
        w = at_least_float32(w)
        off = 4 * _off_identity(w)
        gradient = off @ w if _is_wide(w) else w @ off
        return torch.where(off.isfinite().all(), gradient, 0.0)

    def values(self, weights: list[Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            return super().values(weights)
        return torch.stack([_off_identity(w).square_().sum() for w, _ in stacks(weights, weights)]).sum()

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        for w, gs in stacks(weights, gradients):
            off, wide = _off_identity(w), _is_wide(w)
            finite = off.isfinite().flatten(1).all(dim=1).view(-1, 1, 1)
            for piece, parts in divided(w, gs, axis=-1 if wide else -2):
                slopes = torch.where(finite, off @ piece if wide else piece @ off, 0.0)
                torch._foreach_add_(parts, slopes.unbind(), alpha=4 * amount)


@final
class CosineOrthogonal(Penalty):
    """Mean |cosine| over unordered pairs of rows or columns: Σ_{i<j} |cos(w_i, w_j)| / (n(n−1)/2).

    Keras' OrthogonalRegularizer; its `rows` are the columns of a torch weight, which is Keras' kernel transposed.
    w: (rows, columns) -> ().  A zero vector has cosine 0 with all; a single vector has no pair and the value 0. The
    gradient is zero where W holds a NaN or an infinity, which would spread from there to all of W.

    >>> CosineOrthogonal(strength=1).value(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 5.0]]))
    tensor(0.3333)
    """

    kind: Literal["cosine_orthogonal"] = "cosine_orthogonal"

    ranks: ClassVar[tuple[int, ...]] = (2,)

    mode: Literal["rows", "columns"] = "rows"
    """The vectors: rows of the torch weight (a gate unit's incoming weights) or columns (an input's outgoing ones)."""

    per: Literal["gate", "matrix"] = "matrix"
    """The stacked matrix, as Keras, or each gate's block on its own."""

    @classmethod
    def examples(cls) -> Sequence[CosineOrthogonal]:
        return [cls(strength=1e-2), cls(strength=1e-2, mode="columns", per="gate")]

    @property
    def layout(self) -> Layout:
        return self.per

    def value(self, w: Tensor) -> Tensor:
        vectors = self._vectors(w)
        if vectors.size(0) < 2:
            return vectors.sum() * 0.0  # a zero that autograd can differentiate
        unit, _ = _unit(vectors)
        return torch.triu((unit @ unit.T).abs(), diagonal=1).sum() / self._pairs(vectors)

    def gradient(self, w: Tensor) -> Tensor:
        vectors = self._vectors(w.detach())
        unit, norms = _unit(vectors)
        cosines = (unit @ unit.T).fill_diagonal_(0)
        along = cosines.abs().sum(dim=1, keepdim=True)  # of which the length has no part, for a cosine has none
        slope = (cosines.sign() @ unit - along * unit) / norms / max(self._pairs(vectors), 1)
        slope = torch.where(slope.isfinite().all(), slope, 0.0)
        return slope if self.mode == "rows" else slope.T

    def _vectors(self, w: Tensor) -> Tensor:
        return at_least_float32(w) if self.mode == "rows" else at_least_float32(w).T

    def _pairs(self, vectors: Tensor) -> float:
        return vectors.size(0) * (vectors.size(0) - 1) / 2


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their norms, and the norms; a zero row stays zero, with a zero gradient, and has 1."""
    # First by their largest entries, so that no square overflows or vanishes. A cosine does not depend on scale, and so
    # its gradient is right with the divisor held constant.
    largest = vectors.detach().abs().amax(dim=1, keepdim=True)
    largest = torch.where(largest == 0, 1.0, largest)
    vectors = vectors / largest
    squares = vectors.square().sum(dim=1, keepdim=True)
    # sqrt has an infinite slope at 0, which autograd would multiply by 0: it must not see the 0 at all.
    norms = torch.where(squares == 0, 1.0, squares).sqrt()
    return torch.where(squares == 0, 0.0, vectors / norms), norms * largest


@hookimpl
def regkit_penalties() -> list[type[Penalty]]:
    return [Orthogonal, CosineOrthogonal]
