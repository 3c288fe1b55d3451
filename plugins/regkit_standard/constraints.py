"""Constraints on norms and signs: balls, spheres, shells and the non-negative orthant."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import ClassVar, Final, Literal, final

import torch
from pydantic import model_validator
from torch import Tensor
from torch.compiler import is_compiling

from regkit import Constraint, hookimpl
from regkit.activity import at_least_float32
from regkit.buckets import buckets, pieces, room
from regkit.fields import Fraction, NonNegative, Positive
from regkit.kinds import Layout, Separable

Per = Literal["unit", "input", "cell", "matrix"]

_POOLED: Final[dict[Per, tuple[int, ...]]] = {"unit": (1,), "input": (0,), "matrix": (0, 1)}
"""The axes over which squares are summed. A cell's rows lie apart, gate by gate: they are no axis of a matrix."""


def _grouped(w: Tensor, per: Per) -> Tensor:
    """w as (rows, columns), as (gates, hidden, columns) for cells, as (1, rows, columns) for inputs and the whole.

    A bias has one column. Groups stand side by side along the first axis, those of cells along the second.
    """
    matrix = w.unsqueeze(-1) if w.dim() < (3 if per == "cell" else 2) else w
    return matrix.unsqueeze(0) if per in ("input", "matrix") else matrix


def _norms(w: Tensor, per: Per) -> Tensor:
    """The 2-norms of the groups of w, which is `_grouped`, in float32 or better, and broadcastable to w. Each is the
    same to the last bit, whatever stands beside a group and however it lies in memory."""
    if w.numel() <= (limit := room(w)):
        norms = _of_rows(w, per)
    else:
        norms = torch.cat([_of_rows(piece, per) for piece in pieces(w, limit, -2)], -2)
    if per == "unit":
        return norms
    return _sum(norms if per == "input" else norms.square(), -3 if per == "cell" else -2).sqrt()


def _of_rows(w: Tensor, per: Per) -> Tensor:
    """The norm of each row; for inputs, the sum of the rows' squares."""
    w = at_least_float32(w)
    if per == "input":
        return _sum(w.square(), -2)
    rows = w if w.stride(-1) == 1 else w.contiguous()  # or torch would add up in another order, and slowly
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return norms


def _sum(w: Tensor, axis: int) -> Tensor:
    """The sum along an axis, in the place of w: half of it onto the other half, again and again.

    As exact as a sum can be; and on a CPU ten times as fast as `vector_norm` along columns, or more.
    """
    while (size := w.size(axis)) > 1:
        half = size // 2
        w.narrow(axis, 0, half).add_(w.narrow(axis, size - half, half))
        w = w.narrow(axis, 0, size - half)
    return w


def _portions(weights: list[Tensor], per: Per) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Pieces of large weights, with whole groups in them; and copies of many small ones side by side, with these."""
    limit, axis = room(weights[0]), 1 if per == "cell" else 0
    together, large = buckets(weights, limit)
    for index in large:
        yield from (([piece], []) for piece in pieces(weights[index], limit, axis))
    for some in together:
        alike: dict[tuple[int, ...], list[Tensor]] = {}
        for w in (weights[index] for index in some):
            alike.setdefault((*w.shape[:axis], *w.shape[axis + 1 :]), []).append(w)
        for ws in alike.values():
            yield (ws, []) if len(ws) == 1 else ([at_least_float32(torch.cat(ws, axis))], ws)


def _side_by_side(rows: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Large matrices; and copies of many small ones of as many columns side by side, with these themselves."""
    together, large = buckets(rows)
    if large:
        yield [rows[index] for index in large], []
    for some in together:
        alike: dict[int, list[Tensor]] = {}
        for index in some:
            alike.setdefault(rows[index].size(1), []).append(rows[index])
        for ws in alike.values():
            yield (ws, []) if len(ws) == 1 else ([torch.cat(ws)], ws)


_FEW: Final = 2  # matrices are looked at one by one


class _NormConstraint(Constraint):
    per: Per = "unit"
    """Whose norm: `unit`, the incoming weights of each gate unit (a torch row; Keras axis=0); `input`, a column (Keras
    axis=1); `cell`, all gate rows of one hidden unit; `matrix`, the whole. A bias' unit is one scalar."""

    @property
    def separable(self) -> Separable:
        return "rows" if self.per == "unit" else None

    @property
    def pooled(self) -> tuple[int, ...] | None:
        return _POOLED.get(self.per)

    def sums(self, w: Tensor) -> Tensor:
        return at_least_float32(w).square().sum(_POOLED[self.per], keepdim=True)

    def project_given(self, w: Tensor, sums: Tensor) -> Tensor:
        norms = sums.sqrt()
        return (w * self._factors(norms, self._wanted(norms))).to(w.dtype)

    def violation_given(self, w: Tensor, sums: Tensor) -> Tensor:
        norms = sums.sqrt()
        return (norms - self._nearest(norms)).abs().amax()

    @property
    def layout(self) -> Layout:
        return "cell" if self.per == "cell" else "matrix"

    @abstractmethod
    def _nearest(self, norms: Tensor) -> Tensor:
        """The nearest norms that are allowed."""

    def _wanted(self, norms: Tensor) -> Tensor:
        """The norms that groups of these norms are given."""
        return self._nearest(norms)

    def _factors(self, norms: Tensor, wanted: Tensor) -> Tensor:
        """What groups of these norms are multiplied by: exactly 1 where a group is as wanted already, and where its
        norm is zero, NaN, infinite (numbers in it may be finite), or so small that the factor would overflow."""
        factors = wanted / norms
        return torch.where((factors > 0) & (factors < math.inf), factors, 1.0)

    def project(self, w: Tensor) -> Tensor:
        groups = _grouped(w, self.per)
        norms = _norms(groups, self.per)
        return (groups * self._factors(norms, self._wanted(norms))).to(w.dtype).view(w.shape)

    def project_(self, weights: list[Tensor]) -> None:
        axis = 1 if self.per == "cell" else 0
        if by_rows := self.per == "unit" and weights[0].dtype in (torch.float32, torch.float64):
            rows = [*weights]
            for index, w in enumerate(weights):  # a comprehension would be a call more
                if w.dim() == 1:
                    rows[index] = w.unsqueeze(-1)
            portions: Iterable[tuple[list[Tensor], list[Tensor]]]
            portions = [(rows, [])] if len(rows) <= _FEW else _side_by_side(rows)
        else:
            portions = _portions([_grouped(w, self.per) for w in weights], self.per)
        for some, copied in portions:
            each = []
            for w in some:
                if by_rows and w.stride(-1) == 1:
                    each.append(torch.linalg.vector_norm(w, dim=-1, keepdim=True))
                else:
                    each.append(_norms(w, self.per))
            # The norms of all are looked at together: they are few numbers.
            norms = each[0] if len(each) == 1 else torch.cat(each)
            wanted = self._wanted(norms)
            if type(norms) is Tensor and norms.is_cpu and not is_compiling() and torch.equal(norms, wanted):
                continue
            factors = self._factors(norms, wanted)
            parts = [factors] if len(each) == 1 else torch.split_with_sizes(factors, list(map(len, each)))
            for w, part in zip(some, parts, strict=True):
                w *= part
            if copied:
                sizes = list(map(Tensor.size, copied, repeat(axis)))
                torch._foreach_copy_(copied, torch.split_with_sizes(some[0], sizes, axis))

    def violation(self, w: Tensor) -> Tensor:
        norms = _norms(_grouped(w, self.per), self.per)
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

    _wanted = _nearest


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
