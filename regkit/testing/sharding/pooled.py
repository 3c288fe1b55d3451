"""The laws of constraints with sums: `pooled`, `sums`, and a part of a weight projected by the sums of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from regkit import Constraint
from regkit.testing.laws import Laws, hold
from regkit.testing.samples.feasible import starts
from regkit.testing.samples.tensors import DTYPES, difference, random, rounding, shapes, weights
from regkit.testing.sharding.parts import Division, divisions, matrix, pools

POOLED_LAWS: Final[Laws[Constraint]] = Laws()
"""The laws of every constraint with `pooled` sums."""

_AXES: Final = ((0,), (1,), (0, 1))


@POOLED_LAWS.add(pools)
def sums_have_their_shape(constraint: Constraint) -> None:
    """Processes add up their `sums`, some of which are of nothing. Return (rows, columns) with 1 in the place of each
    axis in `pooled` (`keepdim=True`), zeros for a part without a row or a column, and float32 at least
    (`at_least_float32`, before anything is squared). A cell's rows lie apart: for the layout `cell` let `pooled` be
    None."""
    pooled = _axes(constraint)
    for dtype in DTYPES:
        for w in map(matrix, [random(shape, 3, 300.0, dtype) for shape in shapes(constraint)]):
            for part in (w, w[:0], w[:, :0]):
                sums, what = constraint.sums(part), f"sums() of {dtype} {tuple(part.shape)}"
                wanted = tuple(1 if axis in pooled else part.size(axis) for axis in (0, 1))
                hold(tuple(sums.shape) == wanted, f"{what}, pooled over {pooled}, is {tuple(sums.shape)}, not {wanted}")
                wide = torch.promote_types(dtype, torch.float32)
                hold(torch.promote_types(sums.dtype, wide) == sums.dtype, f"{what} is {sums.dtype}, not {wide}")
                hold(sums.isfinite().all(), f"{what}, random times 300, is {sums.flatten()[:3].tolist()}")
                empty = part.numel() == 0
                hold(not (empty and sums.any()), f"{what}, of nothing, is {sums.flatten()[:3].tolist()}, not zeros")


@POOLED_LAWS.add(pools)
def sums_of_parts_add_up(constraint: Constraint) -> None:
    """The sums of a weight are made of the sums of its shards: added up along the axes in `pooled`, side by side along
    the others. Take no root, no mean and no maximum before that; `project_given` and `violation_given` can."""
    pooled = _axes(constraint)
    for scale in (0.1, 3.0):
        for w in map(matrix, weights(constraint, scale)):
            whole = constraint.sums(w)
            for division in divisions(w, (0, 1)):
                parts = [constraint.sums(part) for part in division.split(w)]
                ours = torch.stack(parts).sum(0) if division.axis in pooled else division.join(parts)
                off = difference(ours, whole)
                hold(off < 1e-9, f"sums() of {division.named(w)} are {off:.3g} times their size off from the whole's")


@POOLED_LAWS.add(pools)
def given_sums_parts_are_as_in_the_whole(constraint: Constraint) -> None:
    """A process projects its shard, and reads its violation, by the sums of the whole weight: the same point and the
    same violation are to come of that, however the weight is divided. Compute both from `sums` and the options alone,
    not from the part's own size or norm; multiply by exactly 1 what is allowed, and end with `.to(w.dtype)`."""
    pooled = _axes(constraint)
    for dtype in DTYPES:
        for w in _weights(constraint, dtype):
            ways = divisions(matrix(w), (0, 1), empty=True)
            for division in (Division(0, (w.size(0),)), *ways):
                _as_in_the_whole(constraint, w, division, pooled)


def _weights(constraint: Constraint, dtype: torch.dtype) -> Iterator[Tensor]:
    """Weights that are allowed, and others."""
    for scale in (0.1, 3.0):
        yield from weights(constraint, scale, dtype)
    for shape in shapes(constraint)[:2]:
        yield from starts(constraint, shape, dtype, enough=3)


def _as_in_the_whole(constraint: Constraint, w: Tensor, division: Division, pooled: tuple[int, ...]) -> None:
    whole, given = matrix(w), f"{division.named(matrix(w))}, {w.dtype},"
    before, sums = whole.clone(), constraint.sums(whole)
    parts = division.split(whole)
    own = [sums] * len(parts) if division.axis in pooled else division.split(sums)
    points = [constraint.project_given(part, one) for part, one in zip(parts, own, strict=True)]
    fits = all(one.shape == part.shape and one.dtype == part.dtype for one, part in zip(points, parts, strict=True))
    hold(fits, f"project_given() of {given} is {[tuple(one.shape) for one in points]}, {points[0].dtype}")
    point = division.join(points).reshape(w.shape)
    off = difference(point, constraint.project(w), w)
    hold(off <= rounding(w.dtype), f"project_given() of {given} is off by {off:.3g} times its size from project()'s")
    looked = [(part, one) for part, one in zip(parts, own, strict=True) if part.numel()]
    violations = [constraint.violation_given(part, one) for part, one in looked]
    hold(all(one.shape == () for one in violations), f"violation_given() of {given} is {tuple(violations[0].shape)}")
    worst, wanted = float(torch.stack(violations).amax()), float(constraint.violation(w))
    room = rounding(w.dtype) * (1 + wanted + float(w.double().norm()))
    hold(
        abs(worst - wanted) <= room, f"the worst violation_given() of {given} is {worst:.9g}, violation() {wanted:.9g}"
    )
    moved = worst == 0 and not torch.equal(point, w)
    hold(not moved, f"project_given() moves {given} by {difference(point, w):.3g}, where violation_given() is 0")
    hold(torch.equal(whole, before), f"a function of parts wrote into {given}")


def _axes(constraint: Constraint) -> tuple[int, ...]:
    """The axes that a constraint pools over. Raises Broken where there can be no such sums."""
    pooled = constraint.pooled
    hold(pooled in _AXES, f"pooled is {pooled!r}, which is neither (0,), (1,), (0, 1) nor None")
    cell = constraint.layout == "cell"
    hold(not cell, f"pooled is {pooled!r} and layout 'cell', where a group has rows of every gate")
    assert pooled is not None
    return pooled
