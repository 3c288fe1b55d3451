"""The laws of constraints on the projection and the violation, and `check_constraint`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from regkit import Constraint
from regkit.testing.functions import named
from regkit.testing.hints import hints
from regkit.testing.kinds.common import KIND_LAWS, report
from regkit.testing.kinds.fitting import FITTING_LAWS
from regkit.testing.kinds.projections import PROJECTION_LAWS
from regkit.testing.laws import Laws, Report, hold
from regkit.testing.samples.feasible import allowed, outside, starts, toward
from regkit.testing.samples.tensors import random, shapes, weights
from regkit.testing.sharding.pooled import POOLED_LAWS
from regkit.testing.sharding.separable import CONSTRAINT_PARTS

LAWS: Final[Laws[Constraint]] = Laws(KIND_LAWS, FITTING_LAWS, PROJECTION_LAWS, CONSTRAINT_PARTS, POOLED_LAWS)
"""The laws of every constraint."""

_SCALES: Final = (0.0, 1e-4, 1.0, 1e4)


def check_constraint(constraint: Constraint | type[Constraint]) -> Report:
    """Try every law on a constraint; of a class, on each of its examples. Raises TypeError for anything else."""
    return replace(report(LAWS, Constraint, constraint), hints=hints(constraint))


def _variants(constraint: Constraint) -> list[Constraint]:
    """A constraint as given and with its bounds scaled: a bound of 1 hides a square, or a bound left out."""
    scalable = all(type(getattr(constraint, bound, None)) in (int, float) for bound in constraint.bounds)
    return [constraint, constraint.at(0.375)] if constraint.bounds and scalable else [constraint]


@LAWS.add()
def lands_in_the_set(constraint: Constraint) -> None:
    """After the step, every weight is to be allowed, however far the step went. Return a point at which your own
    `violation` is 0 up to rounding. Only a weight of zeros, which may have no direction to grow in, may stay."""
    for one in _variants(constraint):
        for scale in _SCALES:
            for w in weights(one, scale):
                point = one.project(w)
                if scale == 0 and torch.equal(point, w):
                    continue
                before, after = float(one.violation(w)), float(one.violation(point))
                hold(
                    after <= 1e-10 * (1 + scale),
                    f"{one.describe()}: {named(w)}, random times {scale:g}, has violation {before:g}, "
                    f"and {after:g} after project",
                )


@LAWS.add()
def projects_once(constraint: Constraint) -> None:
    """A projection is applied after every step: a change to its own result piles up over thousands of steps. Let a
    second `project` change nothing; an epsilon in a denominator, or a rate below 1, moves every weight every time."""
    for scale in _SCALES:
        for w in weights(constraint, scale):
            once = constraint.project(w)
            gap = _distance(constraint.project(once), once)
            hold(gap <= 1e-10 * (1 + _norm(once)), f"{named(w)}, projected again, moves by another {gap:g}")


@LAWS.add()
def leaves_allowed_weights_alone(constraint: Constraint) -> None:
    """A weight that `violation` allows must not move, not by one bit: a set that `project` and `violation` do not agree
    on (another axis, a bound squared, an epsilon) shrinks or turns weights that no one wanted changed. Multiply by
    exactly 1 there, or return `torch.where(self.violation(w) > 0, point, w)`. The weights are found by bisection on
    `violation`, up to the set's edge."""
    found = crossed = 0
    tried = [(one, torch.float64) for one in _variants(constraint)]
    for one, dtype in [*tried, (constraint, torch.float32), (constraint, torch.bfloat16)]:
        for shape in shapes(one)[:: 1 if dtype == torch.float64 else 2]:
            first, far = starts(one, shape, dtype), outside(one, shape, dtype)
            found, crossed = found + len(first), crossed + len(far)
            edges = [toward(one, start, end) for start in first[:2] for end in far[:3]]
            halves = [(first[0] + edge) / 2 for edge in edges]
            for w in (*first, *edges, *(half for half in halves if allowed(one, half))):
                _unmoved(one, w)
    hold(found, "violation is 0 at no weight that was tried: make it exactly 0 where the weight is allowed")
    hold(crossed, "violation is 0 at every weight that was tried, random ones times 1e4 among them")


def _unmoved(constraint: Constraint, w: Tensor) -> None:
    point = constraint.project(w.clone())
    if not torch.equal(point, w):
        where = int((point - w).abs().argmax())
        was, now = w.flatten()[where].item(), point.flatten()[where].item()
        hold(
            False,
            f"{constraint.describe()}: violation is 0 at {named(w)} of norm {_norm(w):.6g}, yet project moved it by "
            f"{_distance(point, w):.3g}, an entry from {was:.17g} to {now:.17g}",
        )


@LAWS.add(lambda constraint: constraint.convex)
def is_the_nearest_point(constraint: Constraint) -> None:
    """A constraint changes a weight by as little as possible; one scale for all rows, where each has its own, destroys
    what was learned. Return the nearest allowed point. If the set is not convex (a sphere is not), let the property
    `convex` say False, and only sampled points are compared."""
    for seed, shape in enumerate(shapes(constraint)):
        _between(constraint, starts(constraint, shape))
        for scale in (0.5, 4.0):
            w = random(shape, seed, scale)
            point = constraint.project(w)
            for other in _samples(constraint, w, point):
                ahead = float(((w - point) * (other - point)).sum())
                share = min(1.0, ahead / max(_distance(other, point) ** 2, 1e-300))
                _not_nearer(w, point, point + max(share, 0.0) * (other - point))


@LAWS.add(lambda constraint: not constraint.convex)
def no_sampled_point_is_nearer(constraint: Constraint) -> None:
    """A constraint changes a weight by as little as possible, also where its set is not convex. Return an allowed point
    with no nearer one: keep signs and directions, and treat each group by itself."""
    for seed, shape in enumerate(shapes(constraint)):
        known = starts(constraint, shape)
        for scale in (0.5, 4.0):
            w = random(shape, seed, scale)
            point = constraint.project(w)
            around = [constraint.project(point + random(shape, 7 + n, 10.0**-n)) for n in range(4)]
            again = [one for one in around if constraint.violation(one) <= 1e-12]
            for other in (*known, *again, *_samples(constraint, w, point)):
                _not_nearer(w, point, other)


def _samples(constraint: Constraint, w: Tensor, point: Tensor) -> Iterator[Tensor]:
    """Allowed points: on the way to random ones, and from the projection to one with a row or column of w put back."""
    for start in starts(constraint, w.shape, enough=2):
        for seed in range(2):
            yield toward(constraint, start, random(w.shape, 20 + seed, 4.0))
    for axis in range(w.dim()):
        for index in range(min(w.size(axis), 3)):
            mixed = point.clone()
            mixed.select(axis, index).copy_(w.select(axis, index))
            yield toward(constraint, point, mixed, 1e-12)


def _between(constraint: Constraint, points: list[Tensor]) -> None:
    both = [*points, *(-point for point in points if allowed(constraint, -point))]
    for a in both:
        for b in both:
            far = float(constraint.violation((a + b) / 2))
            hold(
                far <= 1e-9 * (1 + _norm(a) + _norm(b)),
                f"the set is not convex: violation is 0 at two weights {tuple(a.shape)} and {far:g} half way between; "
                "let the property `convex` say False",
            )


def _not_nearer(w: Tensor, point: Tensor, other: Tensor) -> None:
    moved, distance = _distance(w, point), _distance(w, other)
    hold(
        moved <= distance + 1e-9 * (1 + moved),
        f"{named(w)} was moved by {moved:.9g}; an allowed point is nearer, at a distance of {distance:.9g}",
    )


@LAWS.add(root=2)
def violation_is_a_number_from_0_up(constraint: Constraint) -> None:
    """`violations()` shows the largest violation over the weights. Return a floating-point scalar () that is 0
    where the weight is allowed, never less: take the largest over the groups, after `.clamp(min=0)`."""
    for scale in _SCALES:
        for w in weights(constraint, scale):
            for one in (w, constraint.project(w)):
                violation = constraint.violation(one)
                shape = tuple(violation.shape)
                hold(shape == () and violation.is_floating_point(), f"{named(one)} gives {violation.dtype} {shape}")
                hold(violation >= 0, f"{named(one)}, of norm {_norm(one):g}, has violation {float(violation):g}")


@LAWS.add()
def violation_sees_what_moves(constraint: Constraint) -> None:
    """Who reads 0 believes that the weights are allowed. Be above 0 wherever `project` moves a weight, if only one
    group of it, less at half the way to the projection, and 0 where it rests."""
    moved = 0
    for scale in (0.1, 1.0, 10.0, 1e4):
        for w in weights(constraint, scale):
            point = constraint.project(w)
            half = float(constraint.violation((w + point) / 2))
            gap, violation = _distance(w, point), float(constraint.violation(w))
            if gap <= 1e-9 * (1 + scale):
                hold(
                    violation <= 1e-9 * (1 + scale), f"project leaves {named(w)} alone, but violation is {violation:g}"
                )
                continue
            moved += 1
            hold(violation > 0, f"project moves {named(w)} by {gap:g}, but violation is {violation:g}")
            hold(
                0 < half < violation,
                f"project moves {named(w)} by {gap:g}; violation is {violation:g} there and {half:g} at half the way",
            )
    hold(moved, "project moves no weight that was tried, random ones times 1e4 among them")


@LAWS.add(lambda constraint: bool(constraint.bounds))
def bounds_scale(constraint: Constraint) -> None:
    """A schedule multiplies the options in `bounds` (`at`), and nothing else. Name options that hold a number, all
    those that must move together, and use them in `project` and `violation` at each call."""
    options = type(constraint).model_fields
    for bound in constraint.bounds:
        value = getattr(constraint, bound, None)
        hold(bound in options, f"bounds names {bound!r}; the options are {', '.join(sorted(options))}")
        hold(type(value) in (int, float), f"bounds names {bound!r}, which is {value!r} and no number")
    for factor in (1.0, 0.5, 0.125, 3.0):
        scaled = constraint.at(factor)
        wanted = {
            **constraint.model_dump(),
            **{bound: getattr(constraint, bound) * factor for bound in constraint.bounds},
        }
        given = scaled.model_dump()
        hold(given == wanted, f"at({factor:g}) of {constraint.describe()} has options {given}, not {wanted}")
        try:
            type(constraint).model_validate(given)
        except ValueError as error:
            hold(False, f"at({factor:g}) has options that the class itself refuses: {scaled.describe()} ({error})")
    for w in weights(constraint, 4.0):
        tight = constraint.at(0.125)
        if not torch.equal(tight.project(w), constraint.project(w)):
            return
    hold(False, "at(0.125) projects every weight to where at(1) does: the bounds are without effect")


def _norm(w: Tensor) -> float:
    return float(w.double().norm())


def _distance(a: Tensor, b: Tensor) -> float:
    return _norm(a.double() - b.double())
