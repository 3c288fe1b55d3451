"""Constraints on norms and signs: balls, spheres, shells and the non-negative orthant."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, final

import torch
from pydantic import model_validator
from torch import Tensor

from regkit import Constraint, hookimpl
from regkit.fields import Fraction, NonNegative, Positive
from regkit.kinds import Layout

Per = Literal["unit", "input", "cell", "matrix"]


def _norms(w: Tensor, per: Per) -> Tensor:
    """The 2-norms of the groups, in float32 or better, broadcastable to w; torch's renorm sums bfloat16 in bfloat16."""
    matrix = w if w.dim() > 1 else w.unsqueeze(-1)  # a bias is a column: a unit is a scalar
    dims = {"unit": -1, "input": 0, "cell": (0, -1), "matrix": (-2, -1)}[per]
    if per == "cell" and w.dim() < 3:
        matrix = w.unsqueeze(-1)  # a stacked bias, (gates, hidden)
    norms: Tensor = torch.linalg.vector_norm(
        matrix, dim=dims, keepdim=True, dtype=torch.promote_types(w.dtype, torch.float32)
    )
    return norms if matrix.dim() == w.dim() else norms.squeeze(-1)


class _NormConstraint(Constraint):
    per: Per = "unit"
    """Whose norm: `unit`, the incoming weights of each gate unit (a torch row; Keras axis=0); `input`, a column (Keras
    axis=1); `cell`, all gate rows of one hidden unit; `matrix`, the whole. A bias' unit is one scalar."""

    @property
    def layout(self) -> Layout:
        return "cell" if self.per == "cell" else "matrix"

    @abstractmethod
    def _nearest(self, norms: Tensor) -> Tensor:
        """The nearest norms that are allowed."""

    def _wanted(self, norms: Tensor) -> Tensor:
        """The norms that groups of these norms are given."""
        return self._nearest(norms)

    def _factors(self, norms: Tensor) -> Tensor:
        """What groups of these norms are multiplied by. A group already where it is wanted is multiplied by exactly 1;
        one of norm zero, NaN or infinity too: by 0 an infinite one would lose the numbers in it that are finite. So is
        one so near to zero that the factor overflows."""
        factors = self._wanted(norms) / norms
        return torch.where((factors > 0) & (factors < math.inf), factors, 1.0)

    def project(self, w: Tensor) -> Tensor:
        return (w * self._factors(_norms(w, self.per))).to(w.dtype)

    def project_(self, weights: list[Tensor]) -> None:
        norms = [_norms(w, self.per) for w in weights]
        factors = self._factors(torch.cat([one.flatten() for one in norms]))
        parts = torch.split_with_sizes(factors, [one.numel() for one in norms])
        torch._foreach_mul_(weights, [part.view(one.shape) for part, one in zip(parts, norms, strict=True)])

    def violation(self, w: Tensor) -> Tensor:
        norms = _norms(w, self.per)
        return (norms - self._nearest(norms)).abs().amax()


@final
class MaxNorm(_NormConstraint):
    """Each group's 2-norm at most max_value: w · min(1, max_value/‖w‖)  (Srivastava et al. 2014, §5.1).

    w: (rows, columns) -> same.  Groups inside the ball are not touched at all; Keras' formula, with an epsilon in the
    denominator, shrinks them at every call.
    """

    kind: Literal["max_norm"] = "max_norm"

    shorthand: ClassVar[tuple[str, ...]] = ("max_value",)
    bounds: ClassVar[tuple[str, ...]] = ("max_value",)

    max_value: Positive
    """The largest norm allowed. Range: > 0."""

    @classmethod
    def examples(cls) -> Sequence[MaxNorm]:
        return [cls(max_value=3.0), *(cls(max_value=1.5, per=per) for per in ("input", "cell", "matrix"))]

    def _nearest(self, norms: Tensor) -> Tensor:
        return norms.clamp(max=self.max_value)


@final
class UnitNorm(_NormConstraint):
    """Each group's 2-norm exactly 1: w / ‖w‖  (Keras UnitNorm).

    w: (rows, columns) -> same.  A zero group has no nearest point on the sphere; it stays, and counts as violated by 1.
    """

    kind: Literal["unit_norm"] = "unit_norm"

    @classmethod
    def examples(cls) -> Sequence[UnitNorm]:
        return [cls(), *(cls(per=per) for per in ("input", "cell", "matrix"))]

    @property
    def convex(self) -> bool:
        return False

    def _nearest(self, norms: Tensor) -> Tensor:
        return torch.ones_like(norms)


@final
class MinMaxNorm(_NormConstraint):
    """Each group's 2-norm in [min_value, max_value], approached at a rate  (Keras MinMaxNorm).

    w · (rate·clip(‖w‖) + (1 − rate)·‖w‖) / ‖w‖.  At rate 1 this is the nearest point; below, one call goes that
    share of the way. A zero group has no direction to grow in; it stays.
    """

    kind: Literal["min_max_norm"] = "min_max_norm"

    shorthand: ClassVar[tuple[str, ...]] = ("min_value", "max_value")
    bounds: ClassVar[tuple[str, ...]] = ("min_value", "max_value")

    min_value: NonNegative = 0.0
    """The smallest norm allowed. Range: ≥ 0."""

    max_value: Positive = 1.0
    """The largest norm allowed. Range: > 0, ≥ min_value."""

    rate: Fraction = 1.0
    """The share of the way taken at each step. Range: (0, 1]."""

    @model_validator(mode="after")
    def _ordered(self) -> MinMaxNorm:
        if self.min_value > self.max_value:
            raise ValueError(f"min_value {self.min_value} is greater than max_value {self.max_value}")
        return self

    @classmethod
    def examples(cls) -> Sequence[MinMaxNorm]:
        shells = [cls(min_value=0.5, max_value=2.0, per=per) for per in ("unit", "input", "cell", "matrix")]
        return [*shells, cls(max_value=1.5)]

    @property
    def convex(self) -> bool:
        return self.min_value == 0

    def inert(self) -> str | None:
        return "its rate is 0" if self.rate == 0 else None

    def _nearest(self, norms: Tensor) -> Tensor:
        return norms.clamp(self.min_value, self.max_value)

    def _wanted(self, norms: Tensor) -> Tensor:
        return norms.lerp(self._nearest(norms), self.rate)


@final
class NonNegativity(Constraint):
    """No negative weight: max(w, 0)  (Keras NonNeg).  w: any shape -> same."""

    kind: Literal["non_negative"] = "non_negative"

    def project(self, w: Tensor) -> Tensor:
        return w.clamp(min=0)

    def project_(self, weights: list[Tensor]) -> None:
        torch._foreach_clamp_min_(weights, 0)

    def violation(self, w: Tensor) -> Tensor:
        return (-w).clamp(min=0).amax()


@hookimpl
def regkit_constraints() -> list[type[Constraint]]:
    return [MaxNorm, UnitNorm, MinMaxNorm, NonNegativity]
