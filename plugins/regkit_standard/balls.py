"""Constraints on norms and signs: balls, spheres, shells and the non-negative orthant."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, final

import torch
from pydantic import model_validator
from torch import Tensor

from regkit import Constraint, hookimpl
from regkit.activity import at_least_float32
from regkit.buckets import buckets, pieces, room
from regkit.fields import Fraction, NonNegative, Positive
from regkit.kinds import Layout

Per = Literal["unit", "input", "cell", "matrix"]


def _grouped(w: Tensor, per: Per) -> Tensor:
    """w as (rows, columns), as (gates, hidden, columns) for cells, as (1, rows, columns) for inputs and the whole.

    A bias has one column. Groups stand side by side along the first axis, those of cells along the second.
    """
    matrix = w.unsqueeze(-1) if w.dim() < (3 if per == "cell" else 2) else w
    return matrix.unsqueeze(0) if per in ("input", "matrix") else matrix


def _norms(w: Tensor, per: Per) -> Tensor:
    """The 2-norms of the groups, in float32 or better, broadcastable to w, which is `_grouped`.

    The norm of a group is the same to the last bit, whatever stands beside it and however it lies in memory.
    """
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


def _portions(weights: list[Tensor], per: Per) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """What to multiply: pieces of large weights, with whole groups in them; and copies of many small ones side by side,
    with the weights to write them back into."""
    limit, axis = room(weights[0]), 1 if per == "cell" else 0
    together, large = buckets(weights, limit)
    for index in large:
        yield from ((piece, []) for piece in pieces(weights[index], limit, axis))
    for some in together:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for index in some:
            shapes.setdefault(weights[index].shape, []).append(weights[index])
        alike: dict[tuple[int, ...], list[Tensor]] = {}
        for shape, ws in shapes.items():
            alike.setdefault((*shape[:axis], *shape[axis + 1 :]), []).extend(ws)
        for ws in alike.values():
            yield (ws[0], []) if len(ws) == 1 else (at_least_float32(torch.cat(ws, axis)), ws)


def _may_be_read(norms: Tensor) -> bool:
    """Whether to look at numbers costs no time: a GPU would be waited for, and what is traced or fake has none."""
    return type(norms) is Tensor and norms.device.type == "cpu" and not torch.compiler.is_compiling()


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

    def _factors(self, norms: Tensor, wanted: Tensor) -> Tensor:
        """What groups of these norms are multiplied by. A group already where it is wanted is multiplied by exactly 1;
        one of norm zero, NaN or infinity too: by 0 an infinite one would lose the numbers in it that are finite. So is
        one so near to zero that the factor overflows."""
        factors = wanted / norms
        return torch.where((factors > 0) & (factors < math.inf), factors, 1.0)

    def project(self, w: Tensor) -> Tensor:
        groups = _grouped(w, self.per)
        norms = _norms(groups, self.per)
        return (groups * self._factors(norms, self._wanted(norms))).to(w.dtype).view(w.shape)

    def project_(self, weights: list[Tensor]) -> None:
        for w, copied in _portions([_grouped(w, self.per) for w in weights], self.per):
            norms = _norms(w, self.per)
            wanted = self._wanted(norms)
            if _may_be_read(norms) and torch.equal(norms, wanted):
                continue
            w *= self._factors(norms, wanted)
            if copied:
                axis = 1 if self.per == "cell" else 0
                parts = torch.split_with_sizes(w, [one.size(axis) for one in copied], axis)
                torch._foreach_copy_(copied, parts)

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
