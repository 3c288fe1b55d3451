"""The laws of the gradient of a penalty: the slope of the value, in closed form and by autograd."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from regkit import Penalty
from regkit.testing.functions import fits, is_finite, named
from regkit.testing.laws import Laws, hold
from regkit.testing.samples.tensors import DTYPES, difference, shapes, weights, with_zeros

GRADIENT_LAWS: Final[Laws[Penalty]] = Laws()
"""The laws of the gradient of every penalty on weights."""


def _derived(penalty: Penalty, w: Tensor) -> Tensor:
    """The gradient that autograd finds through the value."""
    with torch.enable_grad():
        leaf = w.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(penalty.value(leaf), leaf)
    return gradient


@GRADIENT_LAWS.add(root=3)
def value_keeps_the_graph(penalty: Penalty) -> None:
    """With `"via": "loss"` the value is differentiated with the loss. Do not detach w, read its numbers, leave to
    numpy, or compute under no_grad."""
    for w in weights(penalty):
        with torch.enable_grad():
            value = penalty.value(w.requires_grad_())
        hold(value.requires_grad, f"value() of a weight {tuple(w.shape)} that requires a gradient does not require one")
        (gradient,) = torch.autograd.grad(value, w, allow_unused=True)
        hold(gradient is not None, f"no gradient reaches a weight {tuple(w.shape)} from value()")


@GRADIENT_LAWS.add(root=4)
def gradient_fits_the_weight(penalty: Penalty) -> None:
    """The penalty's gradient is added to the weight's own, under no_grad: another shape would be broadcast. Return
    w's shape and precision, float32 at least (`regkit.activity.at_least_float32`), with no graph behind it."""
    for dtype in DTYPES:
        for w in weights(penalty, dtype=dtype):
            with torch.no_grad():
                gradient = penalty.gradient(w.requires_grad_())
            call = f"gradient() of {named(w)}"
            fits(gradient, w.shape, torch.promote_types(dtype, torch.float32), call)
            hold(gradient.grad_fn is None, f"{call} has a graph behind it")
            hold(w.grad is None, f"{call} left something in w.grad")


@GRADIENT_LAWS.add()
def gradient_is_that_of_autograd(penalty: Penalty) -> None:
    """A rule acts the same via the gradient and via the loss. Derive the closed form again (its sign, its factors, the
    axis that a sum runs over), or leave `gradient` out: autograd finds it."""
    for scale in (1e-2, 1.0, 30.0):
        for w in weights(penalty, scale):
            with torch.no_grad():
                gradient = penalty.gradient(w)
            derived = _derived(penalty, w)
            hold(
                gradient.shape == w.shape and difference(gradient, derived) < 1e-8,
                f"of a weight {tuple(w.shape)} of scale {scale}, {_worst(gradient, derived, 'autograd')}",
            )


@GRADIENT_LAWS.add()
def gradient_is_the_slope_of_the_value(penalty: Penalty) -> None:
    """The gradient tells how a small change of the weight changes the value, in float64. Where autograd agrees with a
    wrong gradient, a part of w was detached, or a number was rounded to float32 on the way."""
    for scale in (1e-2, 1.0, 30.0):
        for w in weights(penalty, scale, seed=20):
            with torch.no_grad():
                gradient = penalty.gradient(w)
                ahead, behind, noise = _slopes(penalty, w, 1e-5 * scale)
            low, high = torch.minimum(ahead, behind), torch.maximum(ahead, behind)  # apart where there is a kink
            size = max(float(gradient.abs().max()), float(high.abs().max()), float(low.abs().max()))
            allowed = 1e-5 * size + noise
            held = (gradient >= low - allowed) & (gradient <= high + allowed)
            hold(
                gradient.shape == w.shape and held.all(),
                f"of a weight {tuple(w.shape)} of scale {scale}, "
                + _worst(gradient, torch.minimum(torch.maximum(gradient, low), high), "the slope"),
            )


def _slopes(penalty: Penalty, w: Tensor, h: float) -> tuple[Tensor, Tensor, float]:
    """The slopes ahead and behind along each entry, and the part that may be rounding."""
    here = penalty.value(w)
    steps = h * torch.eye(w.numel(), dtype=w.dtype).view(-1, *w.shape)
    ahead = torch.stack([(penalty.value(w + step) - here) / h for step in steps])
    behind = torch.stack([(here - penalty.value(w - step)) / h for step in steps])
    return ahead.view_as(w), behind.view_as(w), 100 * torch.finfo(w.dtype).eps * (1 + abs(float(here))) / h


@GRADIENT_LAWS.add()
def gradient_is_finite_at_zero(penalty: Penalty) -> None:
    """Weights start at zero, are pruned, and reach zero; a 0/0 there makes the weight NaN for good. Where you divide by
    a norm or take a root, put `torch.where(x == 0, 1, x)` inside it: outside, autograd still multiplies the infinite
    slope by 0."""
    functions = [
        ("gradient()", torch.no_grad()(penalty.gradient)),
        ("the gradient by autograd", lambda w: _derived(penalty, w)),
    ]
    for dtype in DTYPES:
        for shape in shapes(penalty):
            is_finite(functions, with_zeros(shape, dtype))


def _worst(ours: Tensor, wanted: Tensor, by: str) -> str:
    """The entry in which two gradients differ most, for a sentence."""
    if ours.shape != wanted.shape:
        return f"gradient() has shape {tuple(ours.shape)}"
    place = int((ours - wanted).abs().nan_to_num(torch.inf).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(place), ours.shape)]
    return (
        f"gradient(){index} is {ours.reshape(-1)[place].item():.9g}, "
        f"where {by} is {wanted.reshape(-1)[place].item():.9g}"
    )
