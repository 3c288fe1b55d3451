"""Penalties that keep the rows or columns of a matrix orthogonal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from regkit import Penalty, hookimpl
from regkit.activity import at_least_float32
from regkit.kinds import Layout


def _off_identity(w: Tensor) -> Tensor:
    """WWᵀ − I for a wide or square W, WᵀW − I for a tall one: the smaller Gram matrix, which alone can reach I."""
    gram = w @ w.T if w.size(0) <= w.size(1) else w.T @ w
    return gram - torch.eye(gram.size(0), dtype=gram.dtype, device=gram.device)


@final
class Orthogonal(Penalty):
    """Soft orthogonality: ‖WWᵀ − I‖_F², or ‖WᵀW − I‖_F² where W is tall  (Bansal et al. 2018).

    w: (rows, columns) -> ().  Gradient: 4(WWᵀ − I)W, or 4W(WᵀW − I); zero where W holds a NaN or an infinity, which
    would spread from there to all of W.
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
        gradient = off @ w if w.size(0) <= w.size(1) else w @ off
        return torch.where(off.isfinite().all(), gradient, 0.0)


@final
class CosineOrthogonal(Penalty):
    """Mean |cosine| over unordered pairs of rows or columns: Σ_{i<j} |cos(w_i, w_j)| / (n(n−1)/2).

    Keras' OrthogonalRegularizer; its `rows` are the columns of a torch weight, which is Keras' kernel transposed.
    w: (rows, columns) -> ().  A zero vector has cosine 0 with all; a single vector has no pair and the value 0. The
    gradient is zero where W holds a NaN or an infinity, which would spread from there to all of W.
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
        vectors = at_least_float32(w) if self.mode == "rows" else at_least_float32(w).T
        n = vectors.size(0)
        if n < 2:
            return vectors.sum() * 0.0  # a zero that autograd can differentiate
        cosines = _unit(vectors) @ _unit(vectors).T
        return torch.triu(cosines.abs(), diagonal=1).sum() / (n * (n - 1) / 2)

    def gradient(self, w: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = at_least_float32(w.detach()).requires_grad_()
            value = self.value(leaf)
            (gradient,) = torch.autograd.grad(value, leaf)
        return torch.where(value.isfinite(), gradient, 0.0)


def _unit(vectors: Tensor) -> Tensor:
    """Rows divided by their norms; a zero row stays zero, with a zero gradient."""
    # First by their largest entries, so that no square overflows or vanishes. A cosine does not depend on scale, and so
    # its gradient is right with the divisor held constant.
    largest = vectors.detach().abs().amax(dim=1, keepdim=True)
    vectors = vectors / torch.where(largest == 0, 1.0, largest)
    squares = vectors.square().sum(dim=1, keepdim=True)
    # sqrt has an infinite slope at 0, which autograd would multiply by 0: it must not see the 0 at all.
    norms = torch.where(squares == 0, 1.0, squares).sqrt()
    return torch.where(squares == 0, 0.0, vectors / norms)


@hookimpl
def regkit_penalties() -> list[type[Penalty]]:
    return [Orthogonal, CosineOrthogonal]
