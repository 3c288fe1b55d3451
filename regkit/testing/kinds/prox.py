"""The laws of proximal operators, of penalties that offer one."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from regkit import Penalty
from regkit.testing.functions import fits, is_finite, named
from regkit.testing.laws import Laws, hold
from regkit.testing.samples.tensors import (
    DTYPES,
    HALVES,
    difference,
    large,
    random,
    rounding,
    shapes,
    weights,
    with_zeros,
)

PROX_LAWS: Final[Laws[Penalty]] = Laws()
"""The laws of every proximal operator."""

_STEPS: Final = (1e-3, 0.05, 0.3, 5.0)


def _offers(penalty: Penalty) -> bool:
    return penalty.offers_prox


@PROX_LAWS.add(_offers)
def prox_fits_the_weight(penalty: Penalty) -> None:
    """The result is written over the weight, in half precision too. Return w's shape and dtype, computed in float32
    where it sums or multiplies."""
    for dtype in DTYPES:
        for w in [*weights(penalty, dtype=dtype), *(large(penalty, dtype) if dtype in HALVES else [])]:
            point, call = penalty.prox(w, 0.3), f"prox() of {named(w)}"
            fits(point, w.shape, dtype, call)
            off = difference(point, penalty.prox(w.double(), 0.3))
            hold(off < rounding(dtype), f"{call} is off by {off:.3g} times its size")


@PROX_LAWS.add(_offers)
def prox_at_step_zero_is_the_identity(penalty: Penalty) -> None:
    """A learning rate of 0, as in a warm-up, moves nothing. Multiply by the step whatever is taken from w, and do not
    project w onto a set besides."""
    for dtype in (torch.float16, torch.float32, torch.float64):
        for w in weights(penalty, dtype=dtype):
            for step in (0.0, torch.zeros((), dtype=dtype)):
                off = difference(penalty.prox(w, step), w)
                hold(off <= rounding(dtype), f"at step {step!r} it moves a weight {tuple(w.shape)} by {off:.3g} of it")


@PROX_LAWS.add(_offers)
def prox_is_the_minimum(penalty: Penalty) -> None:
    """prox(w, step) is where F(x) = ½‖x − w‖² + step·Ω(x) is least: no other point, near or far, may be lower. Set the
    derivative of F to 0 again; mind the factors (the square has a ½, Ω has what `value` gives it) and that step is
    already learning rate · strength."""
    for seed, step in enumerate(_STEPS):
        for w in weights(penalty, seed=40 * seed):
            point = penalty.prox(w, step)
            least = _objective(penalty, point, w, step)
            for other in _rivals(penalty, point, w, step):
                value = _objective(penalty, other, w, step)
                hold(
                    least <= value + 1e-12 * (1 + abs(value)),
                    f"at step {step} of a weight {tuple(w.shape)}, F(prox) = {least:.12g}, and a point "
                    f"{float((other - point).norm()):.3g} away from it has {value:.12g}",
                )


def _objective(penalty: Penalty, x: Tensor, w: Tensor, step: float) -> float:
    return float((x - w).square().sum() / 2 + step * penalty.value(x))


def _rivals(penalty: Penalty, point: Tensor, w: Tensor, step: float) -> list[Tensor]:
    """Points of which some are lower if `point` is not the lowest: w, 0, points down the slope, random points around
    `point`, and points with one entry made 0."""
    with torch.enable_grad():
        leaf = point.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad((leaf - w).square().sum() / 2 + step * penalty.value(leaf), leaf)
    down = [point - length * slope for length in (1e-4, 1e-2, 0.1, 0.5)]
    around = [point + random(w.shape, 100 + trial, 10.0 ** -(trial % 5)) for trial in range(20)]
    holes = [point.masked_fill(one.view_as(point), 0) for one in torch.eye(w.numel(), dtype=torch.bool)]
    return [w, torch.zeros_like(w), *down, *around, *holes]


@PROX_LAWS.add(_offers)
def prox_never_expands(penalty: Penalty) -> None:
    """For convex Ω two weights never end farther apart than before: an operator that jumps (a hard threshold in the
    place of a soft one) makes training unstable. Where Ω is meant not to be convex, expect this failure, for that
    reason."""
    for seed in range(4):
        for shape in shapes(penalty):
            for apart in (1.0, 1e-2):
                x = random(shape, seed)
                y = x + random(shape, 60 + seed, apart)
                for step in _STEPS:
                    after = float((penalty.prox(x, step) - penalty.prox(y, step)).norm())
                    before = float((x - y).norm())
                    hold(
                        after <= before * (1 + 1e-9),
                        f"at step {step} two weights {shape} at a distance of {before:.6g} end at {after:.6g}",
                    )


@PROX_LAWS.add(_offers)
def prox_takes_a_tensor_for_its_step(penalty: Penalty) -> None:
    """A learning rate may be a tensor, and is then not read back. Use arithmetic on the step, and `torch.maximum` or
    `clamp` rather than `max`, `math` or `float`."""
    for dtype in DTYPES:
        for w in weights(penalty, dtype=dtype):
            for step in _STEPS:
                point = penalty.prox(w, torch.tensor(step, dtype=torch.promote_types(dtype, torch.float32)))
                off = difference(point, penalty.prox(w, step))
                hold(point.dtype == dtype, f"with a tensor for a step, prox() of a {dtype} weight is {point.dtype}")
                hold(
                    off < rounding(dtype),
                    f"with step {step} as a tensor, prox() of a {dtype} weight differs by {off:.3g} times its size",
                )


@PROX_LAWS.add(_offers)
def prox_is_finite_at_zero(penalty: Penalty) -> None:
    """A proximal operator makes zeros, and meets zeros again at the next step. Where you divide by a norm, divide by
    `torch.where(norm == 0, 1, norm)`."""
    functions = [(f"prox() at step {step}", lambda w, step=step: penalty.prox(w, step)) for step in (0.0, 0.3)]
    for dtype in DTYPES:
        for shape in shapes(penalty):
            is_finite(functions, with_zeros(shape, dtype))
