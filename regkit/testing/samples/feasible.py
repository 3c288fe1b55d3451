"""Points of a constraint's set, found by asking `violation` alone: the projection on trial has no say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, combinations, islice

import torch
from torch import Tensor

from regkit import Constraint
from regkit.testing.samples.tensors import random

_STEPS = (1.0, 0.5, 2.0, 0.125, 8.0, 1e-3, -1.0, -0.5, -1e-3)
_GOLDEN = (5**0.5 - 1) / 2


def allowed(constraint: Constraint, w: Tensor) -> bool:
    """Whether `violation` says that a weight is in the set."""
    return bool(constraint.violation(w) == 0)


def starts(
    constraint: Constraint, shape: Sequence[int], dtype: torch.dtype = torch.float64, *, enough: int = 6
) -> list[Tensor]:
    """Points that `violation` allows: zeros, ones, one-hot rows and columns, the identity, signs and random numbers,
    each times a few factors; of these directions the best multiples; only where none of them is allowed, projections.
    """
    directions = [one.to(dtype) for one in _directions(shape)]
    multiples = (step * one for step in _STEPS for one in directions)
    nearest = (_nearest_multiple(constraint, one) for one in directions)
    found = (point for point in chain(multiples, nearest) if allowed(constraint, point))
    projections = (constraint.project(random(shape, seed, dtype=dtype)) for seed in range(4))
    return list(islice(found, enough)) or [point for point in projections if allowed(constraint, point)]


def outside(constraint: Constraint, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Points that `violation` does not allow: random ones, positive, negative, with one large entry or row."""
    found = []
    for scale in (9.0, 1e4):
        for seed in range(2):
            w = random(shape, seed, scale, dtype)
            entry, row = random(shape, seed + 2, 0.01, dtype), random(shape, seed + 4, 0.01, dtype)
            entry.view(-1)[-1] = -scale
            row[0] = w[0]
            found += [w, w.abs(), -w.abs(), entry, row]
    return [point for point in found if not allowed(constraint, point)]


def toward(constraint: Constraint, inside: Tensor, far: Tensor, tolerance: float = 0.0) -> Tensor:
    """The last allowed point, up to a tolerance, on the straight way from an allowed point to another point."""
    if constraint.violation(far) <= tolerance:
        return far
    low, high = 0.0, 1.0
    for _ in range(54):
        middle = (low + high) / 2
        within = bool(constraint.violation(inside + middle * (far - inside)) <= tolerance)
        low, high = (middle, high) if within else (low, middle)
    return inside + low * (far - inside)


def _directions(shape: Sequence[int]) -> Iterator[Tensor]:
    """Zeros; then points of which rows, columns, cells or the whole are alike, so that one multiple suits all."""
    yield torch.zeros(*shape, dtype=torch.float64, device="cpu")
    axes = range(len(shape))
    for kept in chain.from_iterable(combinations(axes, n) for n in range(len(shape) + 1)):
        one_hot = torch.zeros(*shape, dtype=torch.float64, device="cpu")
        one_hot[tuple(slice(None) if axis in kept else 0 for axis in axes)] = 1.0
        yield one_hot
    if len(shape) > 1:
        yield torch.eye(shape[-2], shape[-1], dtype=torch.float64, device="cpu").expand(*shape).clone()
    yield from (random(shape, seed).sign() for seed in range(2))
    yield from (random(shape, seed) for seed in range(2))


def _nearest_multiple(constraint: Constraint, direction: Tensor) -> Tensor:
    """The multiple of a direction with the least violation: by powers of 2, then by golden sections."""

    def violated(factor: float) -> float:
        value = float(constraint.violation(factor * direction))
        return value if value == value else float("inf")

    best = min((sign * 2.0**power for power in range(-10, 8) for sign in (1, -1)), key=violated)
    low, high = best / 2, best * 2
    ulp = torch.finfo(direction.dtype).eps * abs(best) / 2
    while abs(high - low) > 4 * ulp:
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if violated(left) <= violated(right) else (left, high)
    middle = (low + high) / 2
    return min((middle + n * ulp for n in range(-8, 9)), key=violated) * direction
