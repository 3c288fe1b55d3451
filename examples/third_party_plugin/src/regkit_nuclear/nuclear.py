"""The nuclear norm: a penalty under which weights come to have a low rank."""

from __future__ import annotations

from typing import ClassVar, Literal, final

import torch
from regkit import Penalty, hookimpl
from regkit.activity import at_least_float32
from regkit.kinds import Layout
from torch import Tensor


def _finite(w: Tensor) -> tuple[Tensor, Tensor]:
    """w in float32 or better, with zeros for all of it where anything is not finite; and whether all is.  -> (), bool.

    torch.linalg.svd raises on NaN and infinity. To look first would wait for a GPU, so both answers are computed.
    """
    wide = at_least_float32(w)
    finite = wide.isfinite().all()
    return torch.where(finite, wide, 0.0), finite


def _counted(s: Tensor) -> Tensor:
    """Which singular values are more than what rounding leaves of a zero: σ_i > 32 ε σ_1.

    That is some 10 ε σ_1 at most, in products of up to 1024 × 256. `matrix_rank` has max(rows, columns) ε σ_1: in
    float32, that would take singular values for zeros whose directions are right to five digits.
    """
    return s > 32 * torch.finfo(s.dtype).eps * s[:1]


@final
class NuclearNorm(Penalty):
    """Nuclear norm: Σ σ_i, the sum of singular values, the convex envelope of the rank  (Fazel 2002).

    w: (rows, columns) -> ().  With W = U diag(σ) Vᵀ over the σ_i > 0, the gradient is UVᵀ: of the subgradients, the
    one with the smallest norm, and so 0 at 0.
    prox: U diag(max(σ − step, 0)) Vᵀ, which makes the rank smaller  (Cai, Candès & Shen 2010, theorem 2.1).

    Where W holds a NaN or an infinity, which would spread from there to all of it, the value is NaN, the gradient is 0
    and the prox leaves W alone. Half precision is read in float32. On a GPU, torch's own SVD waits for its result.
    """

    kind: Literal["nuclear"] = "nuclear"

    ranks: ClassVar[tuple[int, ...]] = (2,)

    per: Literal["gate", "matrix"] = "matrix"
    """The stacked matrix, or each gate's block on its own."""

    @property
    def layout(self) -> Layout:
        return self.per

    def value(self, w: Tensor) -> Tensor:
        w, finite = _finite(w)
        s = torch.linalg.svdvals(w)
        # What is no more than rounding has no gradient either: autograd then gives what `gradient` does.
        total = torch.where(_counted(s), s, 0.0).sum()
        return torch.where(finite, total, torch.nan)

    def gradient(self, w: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(_finite(w)[0], full_matrices=False)
        gradient: Tensor = (u * _counted(s)) @ vh
        return gradient

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        wide, finite = _finite(w)
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
        nearest = (u * (s - step).clamp(min=0)) @ vh
        # At step 0, as in a warmup, nothing moves, not even by the rounding of U diag(σ) Vᵀ.
        moves = finite & (torch.as_tensor(step, device=w.device) > 0)
        return torch.where(moves, nearest.to(w.dtype), w)


@hookimpl
def regkit_penalties() -> list[type[Penalty]]:
    """The kinds that this module offers."""
    return [NuclearNorm]
