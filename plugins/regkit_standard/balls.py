"""Constraints on norms and signs: balls, spheres, shells and the non-negative orthant."""

from __future__ import annotations

import math
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


def _scaled(w: Tensor, norms: Tensor, wanted: Tensor) -> Tensor:
    """w with each group's norm made as wanted. A group already there is multiplied by exactly 1; one of norm zero, NaN
    or infinity too: by 0 an infinite one would lose the numbers in it that are finite."""
    return (w * torch.where((norms > 0) & (norms < math.inf), wanted / norms, 1.0)).to(w.dtype)


class _NormConstraint(Constraint):
    per: Per = "unit"
    """Whose norm: `unit`, the incoming weights of each gate unit (a torch row; Keras axis=0); `input`, a column (Keras
    axis=1); `cell`, all gate rows of one hidden unit; `matrix`, the whole. A bias' unit is one scalar."""

    @property
    def layout(self) -> Layout:
        return "cell" if self.per == "cell" else "matrix"


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

    def project(self, w: Tensor) -> Tensor:
        norms = _norms(w, self.per)
        return _scaled(w, norms, norms.clamp(max=self.max_value))

    def violation(self, w: Tensor) -> Tensor:
        return (_norms(w, self.per) - self.max_value).clamp(min=0).amax()


@final
class UnitNorm(_NormConstraint):
    """Each group's 2-norm exactly 1: w / ‖w‖  (Keras UnitNorm).

    w: (rows, columns) -> same.  A zero group has no nearest point on the sphere; it stays, and counts as violated by 1.
    """

    kind: Literal["unit_norm"] = "unit_norm"

    def project(self, w: Tensor) -> Tensor:
        norms = _norms(w, self.per)
        return _scaled(w, norms, torch.ones_like(norms))

    def violation(self, w: Tensor) -> Tensor:
        return (_norms(w, self.per) - 1).abs().amax()


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

    def inert(self) -> str | None:
        return "its rate is 0" if self.rate == 0 else None

    def project(self, w: Tensor) -> Tensor:
        norms = _norms(w, self.per)
        return _scaled(w, norms, norms.lerp(norms.clamp(self.min_value, self.max_value), self.rate))

    def violation(self, w: Tensor) -> Tensor:
        norms = _norms(w, self.per)
        return (norms - norms.clamp(self.min_value, self.max_value)).abs().amax()


@final
class NonNegativity(Constraint):
    """No negative weight: max(w, 0)  (Keras NonNeg).  w: any shape -> same."""

    kind: Literal["non_negative"] = "non_negative"

    def project(self, w: Tensor) -> Tensor:
        return w.clamp(min=0)

    def violation(self, w: Tensor) -> Tensor:
        return (-w).clamp(min=0).amax()


@hookimpl
def regkit_constraints() -> list[type[Constraint]]:
    return [MaxNorm, UnitNorm, MinMaxNorm, NonNegativity]
