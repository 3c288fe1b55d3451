"""Weights in parts, as several processes hold a weight: divisions, and the functions of constraints for a part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from regkit import Constraint
from regkit.kinds import Separable
from regkit.testing.functions import Function

_AXES: Final = {1: ("entries",), 2: ("rows", "columns"), 3: ("gates", "rows", "columns")}


@dataclass(frozen=True)
class Division:
    """An axis of a weight, and the sizes of the parts along that axis."""

    axis: int
    sizes: tuple[int, ...]

    def split(self, w: Tensor) -> list[Tensor]:
        """The parts, as views."""
        return list(torch.split(w, list(self.sizes), self.axis))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts side by side."""
        return torch.cat(list(parts), self.axis)

    def named(self, w: Tensor) -> str:
        """The division of a weight, for a sentence."""
        what = _AXES[w.dim()][self.axis]
        return f"a weight {tuple(w.shape)} divided into {' + '.join(map(str, self.sizes))} {what}"


def divisions(w: Tensor, axes: Sequence[int], *, empty: bool = False) -> Iterator[Division]:
    """Ways to divide a weight: one row or column and the rest, the rest and one, each alone; with empty parts too."""
    for axis in axes:
        size = w.size(axis)
        cuts = [(1, size - 1), (size - 1, 1), (1,) * size] if size > 1 else []
        cuts += [(0, size), (size, 0)] if empty else []
        yield from (Division(axis, cut) for cut in dict.fromkeys(cuts))


def axes_of(w: Tensor, separable: Separable) -> Sequence[int]:
    """The axes along which a kind that is `separable` so may be given parts: rows alone, or any."""
    return range(w.dim()) if separable == "elements" else (0,)


def matrix(w: Tensor) -> Tensor:
    """A weight as (rows, columns): a bias as a matrix of one column, as kinds with sums are given."""
    return w.unsqueeze(-1) if w.dim() == 1 else w


def pools(constraint: Constraint) -> bool:
    """Whether a constraint can do with sums of the parts."""
    return constraint.pooled is not None


def given_forms(constraint: Constraint) -> Iterator[tuple[str, Function]]:
    """The functions of a constraint that are given matrices and sums, as functions of one weight; none without sums."""

    def project_given(w: Tensor) -> Tensor:
        return constraint.project_given(matrix(w), constraint.sums(matrix(w))).reshape(w.shape)

    if pools(constraint) and constraint.layout != "cell":
        yield "sums()", lambda w: constraint.sums(matrix(w))
        yield "project_given()", project_given
        yield "violation_given()", lambda w: constraint.violation_given(matrix(w), constraint.sums(matrix(w)))
