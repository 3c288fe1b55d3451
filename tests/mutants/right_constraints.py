"""Constraints onto sets of many kinds, right in all: the laws must let a stranger's good work pass."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from regkit import Constraint
from regkit.activity import at_least_float32
from regkit.fields import Positive
from regkit.kinds import Separable


class Box(Constraint):
    """Each |w| ≤ size."""

    kind: Literal["box"] = "box"
    bounds: ClassVar[tuple[str, ...]] = ("size",)

    size: Positive = 0.3
    """The largest absolute value."""

    @property
    def separable(self) -> Separable:
        return "elements"

    def project(self, w: Tensor) -> Tensor:
        return w.clamp(-self.size, self.size)

    def violation(self, w: Tensor) -> Tensor:
        return (w - w.clamp(-self.size, self.size)).abs().amax()


class Diamond(Constraint):
    """Each row's Σ|w| ≤ size  (Duchi et al. 2008)."""

    kind: Literal["diamond"] = "diamond"
    ranks: ClassVar[tuple[int, ...]] = (2,)
    bounds: ClassVar[tuple[str, ...]] = ("size",)

    size: Positive = 2.0
    """The largest sum."""

    @property
    def separable(self) -> Separable:
        return "rows"

    def project(self, w: Tensor) -> Tensor:
        wide = at_least_float32(w)
        magnitude = wide.abs()
        ordered = magnitude.sort(dim=-1, descending=True).values
        ranks = torch.arange(1, w.size(-1) + 1, device=w.device, dtype=wide.dtype)
        cuts = (ordered.cumsum(-1) - self.size) / ranks
        cut = torch.where(ordered > cuts, cuts, -torch.inf).amax(-1, keepdim=True)
        point = wide.sign() * (magnitude - cut).clamp(min=0)
        outside = magnitude.sum(-1, keepdim=True) > self.size
        lost = magnitude.sum(-1, keepdim=True).isnan()
        return torch.where(lost, wide + torch.nan, torch.where(outside, point, wide)).to(w.dtype)

    def violation(self, w: Tensor) -> Tensor:
        return (at_least_float32(w).abs().sum(-1) - self.size).clamp(min=0).amax()


class Centered(Constraint):
    """Each row's sum 0: a subspace, without an inside."""

    kind: Literal["centered"] = "centered"
    ranks: ClassVar[tuple[int, ...]] = (2,)

    @property
    def separable(self) -> Separable:
        return "rows"

    def project(self, w: Tensor) -> Tensor:
        wide = at_least_float32(w)
        sums = wide.sum(-1, keepdim=True)
        return (wide - sums / w.size(-1)).to(w.dtype)

    def violation(self, w: Tensor) -> Tensor:
        return at_least_float32(w).sum(-1).abs().amax()


class SpectralBall(Constraint):
    """The largest singular value at most size."""

    kind: Literal["spectral_ball"] = "spectral_ball"
    ranks: ClassVar[tuple[int, ...]] = (2,)
    bounds: ClassVar[tuple[str, ...]] = ("size",)

    size: Positive = 0.7
    """The largest singular value allowed."""

    def project(self, w: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(at_least_float32(w), full_matrices=False)
        point = (u * s.clamp(max=self.size)) @ vh
        return torch.where(self.violation(w) > 0, point.to(w.dtype), w)

    def violation(self, w: Tensor) -> Tensor:
        return (torch.linalg.svdvals(at_least_float32(w)).amax() - self.size).clamp(min=0)


class Sparse(Constraint):
    """At most two numbers of each row are not 0: a union of planes, which is not convex."""

    kind: Literal["sparse"] = "sparse"
    ranks: ClassVar[tuple[int, ...]] = (2,)

    @property
    def separable(self) -> Separable:
        return "rows"

    @property
    def convex(self) -> bool:
        return False

    def project(self, w: Tensor) -> Tensor:
        magnitude, rest = w.abs(), w.size(-1) - 2
        if rest <= 0:
            return w.clone()
        least = magnitude.topk(rest, dim=-1, largest=False).indices
        point = w.scatter(-1, least, 0.0)
        return torch.where(magnitude.sum(-1, keepdim=True).isnan(), w + torch.nan, point)

    def violation(self, w: Tensor) -> Tensor:
        rest = w.size(-1) - 2
        if rest <= 0:
            return (w * 0).sum()
        least = w.abs().topk(rest, dim=-1, largest=False).values.amax()
        return least + (w * 0).sum()


class Orthogonal(Constraint):
    """Rows or columns, whichever are fewer, are orthonormal: the polar factor is nearest  (Fan & Hoffman 1955)."""

    kind: Literal["orthogonal_set"] = "orthogonal_set"
    ranks: ClassVar[tuple[int, ...]] = (2,)

    @property
    def convex(self) -> bool:
        return False

    def project(self, w: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(at_least_float32(w), full_matrices=False)
        return torch.where(self.violation(w) > 0, (u @ vh).to(w.dtype), w)

    def violation(self, w: Tensor) -> Tensor:
        wide = at_least_float32(w)
        gram = wide @ wide.mT if w.size(-2) <= w.size(-1) else wide.mT @ wide
        return (gram - torch.eye(gram.size(-1), device=w.device, dtype=wide.dtype)).abs().amax()


RIGHT = [Box, Diamond, Centered, SpectralBall, Sparse, Orthogonal]
