"""Constraints on norms and signs: balls, spheres, shells and the non-negative orthant."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Final, Literal, final

import torch
from pydantic import model_validator
from torch import Tensor

from regkit import Constraint, hookimpl
from regkit.activity import at_least_float32
from regkit.fields import Fraction, NonNegative, Positive
from regkit.kinds import Layout, Separable
from regkit_standard.foreach import Per, group_norms, ratio, scale_groups_, scaled

_POOLED: Final[dict[Per, tuple[int, ...]]] = {"unit": (1,), "input": (0,), "matrix": (0, 1)}
"""The axes over which squares are summed. A cell's rows lie apart, gate by gate: they are no axis of a matrix."""


class _NormConstraint(Constraint):
    """A constraint that scales each group of weights to an allowed 2-norm: w · wanted(‖w‖) / ‖w‖."""

    per: Per = "unit"
    """Whose norm: `unit`, the incoming weights of each gate unit (a torch row; Keras axis=0); `input`, a column (Keras
    axis=1); `cell`, all gate rows of one hidden unit; `matrix`, the whole. A bias' unit is one scalar."""

    _inwards: ClassVar[bool] = True
    """Whether the allowed norms have an inside, to which half-precision results are rounded; a sphere has none."""

    @property
    def separable(self) -> Separable:
        return "rows" if self.per == "unit" else None

    @property
    def pooled(self) -> tuple[int, ...] | None:
        return _POOLED.get(self.per)

    def sums(self, w: Tensor) -> Tensor:
        return at_least_float32(w).square().sum(_POOLED[self.per], keepdim=True)

    @property
    def layout(self) -> Layout:
        return "cell" if self.per == "cell" else "matrix"

    @abstractmethod
    def _nearest(self, norms: Tensor) -> Tensor:
        """The nearest norms that are allowed."""

    def _wanted(self, norms: Tensor) -> Tensor:
        """The norms that groups of these norms are given."""
        return self._nearest(norms)

    def project(self, w: Tensor) -> Tensor:
        return self._scaled(w, group_norms(w, self.per))

    def project_given(self, w: Tensor, sums: Tensor) -> Tensor:
        return self._scaled(w, sums.sqrt())

    def project_(self, weights: list[Tensor]) -> None:
        scale_groups_(weights, self.per, self._wanted, self._inwards)

    def violation(self, w: Tensor) -> Tensor:
        return self._distance(group_norms(w, self.per))

    def violation_given(self, w: Tensor, sums: Tensor) -> Tensor:
        return self._distance(sums.sqrt())

    def _scaled(self, w: Tensor, norms: Tensor) -> Tensor:
        return scaled(w, ratio(self._wanted(norms), norms), self._inwards)

    def _distance(self, norms: Tensor) -> Tensor:
        return (norms - self._nearest(norms)).abs().amax()


@final
class MaxNorm(_NormConstraint):
    """Max-norm, each group's 2-norm at most max_value: w · min(1, max_value/‖w‖)  (Srivastava et al. 2014, §5.1).

    w: (rows, columns) -> same.  Groups inside the ball are not touched at all; Keras' formula, with an epsilon in the
    denominator, shrinks them at every call.

    >>> MaxNorm(max_value=1.0).project(torch.tensor([[3.0, 4.0], [0.5, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.5000, 0.0000]])
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

    _wanted = _nearest


@final
class UnitNorm(_NormConstraint):
    """Unit norm, each group's 2-norm exactly 1: w / ‖w‖  (Keras UnitNorm).

    w: (rows, columns) -> same.  A zero group has no nearest point on the sphere; it stays, and counts as violated by 1.

    >>> UnitNorm(per="matrix").project(torch.tensor([[3.0, 4.0], [0.0, 12.0]]))
    tensor([[0.2308, 0.3077],
            [0.0000, 0.9231]])
    """

    kind: Literal["unit_norm"] = "unit_norm"

    _inwards: ClassVar[bool] = False

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
    """Min-max norm, each group's 2-norm in [min_value, max_value], approached at a rate  (Keras MinMaxNorm).

    w · (rate·clip(‖w‖) + (1 − rate)·‖w‖) / ‖w‖.  At rate 1 this is the nearest point; below, one call goes that
    share of the way. A zero group has no direction to grow in; it stays.

    >>> MinMaxNorm(max_value=1.0, rate=0.5).project(torch.tensor([[3.0, 4.0]]))
    tensor([[1.8000, 2.4000]])
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
    """Non-negativity: max(w, 0)  (Keras NonNeg).

    w: any shape -> same.

    >>> NonNegativity().project(torch.tensor([1.0, -2.0]))
    tensor([1., 0.])
    """

    kind: Literal["non_negative"] = "non_negative"

    @property
    def separable(self) -> Separable:
        return "elements"

    def project(self, w: Tensor) -> Tensor:
        return w.clamp(min=0)

    def project_(self, weights: list[Tensor]) -> None:
        torch._foreach_clamp_min_(weights, 0)

    def violation(self, w: Tensor) -> Tensor:
        return (-w).clamp(min=0).amax()


@hookimpl
def regkit_constraints() -> list[type[Constraint]]:
    return [MaxNorm, UnitNorm, MinMaxNorm, NonNegativity]
