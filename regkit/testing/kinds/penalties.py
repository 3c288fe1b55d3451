"""The laws of penalties on weights, and `check_penalty`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from regkit import Penalty, PluginError
from regkit.testing import functions as laws
from regkit.testing.functions import Function
from regkit.testing.hints import hints
from regkit.testing.kinds.common import KIND_LAWS, report
from regkit.testing.kinds.fitting import FITTING_LAWS
from regkit.testing.kinds.gradients import GRADIENT_LAWS
from regkit.testing.kinds.prox import PROX_LAWS
from regkit.testing.laws import Laws, Report, hold
from regkit.testing.samples.compiling import can_compile, compiles
from regkit.testing.samples.tensors import (
    DTYPES,
    HALVES,
    difference,
    identical,
    large,
    possible,
    random,
    refusal,
    shapes,
    strided,
    weights,
)
from regkit.testing.sharding.separable import PENALTY_PARTS

LAWS: Final[Laws[Penalty]] = Laws(KIND_LAWS, FITTING_LAWS, GRADIENT_LAWS, PROX_LAWS, PENALTY_PARTS)
"""The laws of every penalty on weights."""


def check_penalty(penalty: Penalty | type[Penalty]) -> Report:
    """Try every law on a penalty; of a class, on each of its examples. Raises TypeError for anything else."""
    return replace(report(LAWS, Penalty, penalty), hints=hints(penalty))


@LAWS.add(root=1)
def takes_its_ranks(penalty: Penalty) -> None:
    """A target may bind biases, which have one dimension, and matrices of any shape. Set `ranks` to the numbers of
    dimensions that the formula is for. Where it cannot be for some shape, let `fits` say so."""
    asked = possible(penalty)
    refused = {shape: error for shape in asked if (error := refusal(penalty, shape)) is not None}
    for shape, error in refused.items():
        hold(isinstance(error, PluginError), f"value() of a weight {shape} raised {type(error).__name__}: {error}")
    cells = penalty.layout == "cell"
    for rank in penalty.ranks:
        taken = [shape for shape in asked if len(shape) - cells == rank and shape not in refused]
        hold(taken, f"ranks is {penalty.ranks}, but every weight of rank {rank} is refused")


@LAWS.add(root=2)
def value_is_a_scalar(penalty: Penalty) -> None:
    """The values of a rule's weights are summed: a vector would be broadcast. Sum or average over all of w, into a
    tensor without dimensions, of w's precision but float32 at least (`regkit.activity.at_least_float32`)."""
    for dtype in DTYPES:
        for w in weights(penalty, dtype=dtype):
            laws.fits(penalty.value(w), (), torch.promote_types(dtype, torch.float32), f"value() of {laws.named(w)}")


@LAWS.add()
def finite_at_every_scale(penalty: Penalty) -> None:
    """One infinite number makes the loss infinite, or the weight NaN. Scale before an operation that overflows (an
    exponential, a high power), and keep what is divided by away from 0."""
    for dtype in (torch.float32, torch.float64):
        for scale in (0.0, 1e-20, 1e-4, 1.0, 1e4):
            functions = [("value()", penalty.value), ("gradient()", penalty.gradient)]
            laws.is_finite(functions, _scaled(penalty, scale, dtype))


def _scaled(penalty: Penalty, scale: float, dtype: torch.dtype = torch.float64) -> list[tuple[str, Tensor]]:
    """Weights of a scale, each with a description."""
    return [(f"{laws.named(w)} of scale {scale}", w) for w in weights(penalty, scale, dtype)]


@LAWS.add(lambda penalty: not penalty.signed)
def value_is_not_negative(penalty: Penalty) -> None:
    """A penalty is least where the weight is best, and is read as a cost. Turn the sign around; where a formula is
    meant to be negative, as an entropy is, set `signed = True` on the class."""
    for scale in (0.0, 1e-2, 1.0, 1e2):
        laws.is_not_negative([("value()", penalty.value)], _scaled(penalty, scale))


@LAWS.add()
def has_an_effect(penalty: Penalty) -> None:
    """A rule that optimizes nothing is refused, if its kind says so. Let `inert` say why where the options leave no
    effect, and call `super().inert()` for the strength; see that `examples` have one."""
    reason = penalty.inert()
    hold(reason is None or isinstance(reason, str), f"inert() gives {reason!r}, which is neither None nor a reason")
    values = [float(penalty.value(w)) for scale in (0.1, 1.0, 10.0) for w in weights(penalty, scale)]
    hold(reason or any(values), "the value is 0 for every weight, and inert() does not say why")
    hold(
        not reason or penalty.strength == 0 or not any(values), f"inert() says {reason!r}, but values are {values[:3]}"
    )


@LAWS.add()
def unit_strength(penalty: Penalty) -> None:
    """regkit multiplies by the strength and the schedule's factor: in the mathematics, the strength would count twice.
    Take `self.strength` out of value, gradient and prox."""
    laws.ignores_strength(penalty, _functions, weights(penalty))


@LAWS.add()
def nan_is_never_hidden(penalty: Penalty) -> None:
    """A NaN weight is a run that has failed, and must be seen, as NaN or as an error. Do not use nan_to_num or nansum,
    nor a `torch.where` or a comparison that takes the other branch for a NaN."""
    functions = [(name, function) for name, function in _functions(penalty) if name != "gradient()"]
    samples = weights(penalty)
    laws.shows_nan(functions, [(w, place) for w in samples for place in sorted({0, w.numel() // 2, w.numel() - 1})])


@LAWS.add()
def weight_is_left_alone(penalty: Penalty) -> None:
    """The weights that a penalty is given are the model's own parameters. Change nothing in place: no method that ends
    with `_`, no `out=`, no `requires_grad_` on w itself (`w.detach()` shares its numbers, but not that)."""
    laws.leaves_alone(_functions(penalty), weights(penalty))


@LAWS.add()
def strides_do_not_matter(penalty: Penalty) -> None:
    """A gate's block is a view of a larger weight, and may be transposed. Use `reshape` or `flatten` where you use
    `view`, and dimensions rather than strides."""
    laws.strides_do_not_matter(_functions(penalty), weights(penalty))


@LAWS.add()
def halves_accumulate_in_float32(penalty: Penalty) -> None:
    """Sums of many half-precision numbers overflow (65504 in float16) and stall (at 256 in bfloat16). Begin with
    `regkit.activity.at_least_float32(w)`, before anything is squared or summed."""
    for dtype in HALVES:
        functions = [("value()", penalty.value), ("gradient()", penalty.gradient)]
        laws.accumulates_wide(functions, large(penalty, dtype), 1e-3)


@LAWS.add()
def never_waits_for_the_device(penalty: Penalty) -> None:
    """Reading a number of a tensor back stops a GPU at every step of the optimizer. Avoid `float(t)`, `t.item()`,
    `t.numpy()`, `if t > 0` and boolean indexing; write `torch.where` and tensors without dimensions."""
    laws.never_waits([*_functions(penalty), *_list_forms(penalty)], shapes(penalty))


@LAWS.add()
def stays_on_its_device(penalty: Penalty) -> None:
    """A constant that is made on the CPU meets a weight on a GPU there, and not here: a weight on `meta` tells. Give
    `device=w.device` to `torch.eye`, `torch.arange` and the like, and never move w."""
    laws.stays_on_device([*_functions(penalty), *_list_forms(penalty)], shapes(penalty))


@LAWS.add()
def list_forms_agree(penalty: Penalty) -> None:
    """`values` and `add_gradients` are the same mathematics of many weights at once. Sum over all weights, with or
    without autograd, and add into the gradients that are given (`torch._foreach_add_`): they hold the loss' own."""
    for dtype in DTYPES:
        ws = weights(penalty, dtype=dtype)
        ws += [strided(w) for w in weights(penalty, dtype=dtype, seed=10)]
        loop = torch.stack([penalty.value(w) for w in ws])
        for leaves in (ws, [w.clone().requires_grad_() for w in ws]):
            with torch.set_grad_enabled(leaves is not ws):  # a form may be for one of them
                values = penalty.values(leaves)
            off = difference(values, loop.sum(), loop)
            hold(off < 1e-5, f"values() of {dtype} weights is {values.tolist()}, the loop's sum {float(loop.sum())}")
        hold(values.requires_grad, "values() of weights that require a gradient does not require one")
        before, sums = [w.clone() for w in ws], [strided(random(w.shape, 30, dtype=dtype)) for w in ws]
        wanted = [g.double() + 0.3 * penalty.gradient(w).double() for w, g in zip(ws, sums, strict=True)]
        with torch.no_grad():
            penalty.add_gradients(ws, sums, 0.3)
        size, rounding = torch.cat([want.flatten() for want in wanted]), 4 * torch.finfo(dtype).eps
        for w, same, ours, want in zip(ws, before, sums, wanted, strict=True):
            hold(identical(w, same), f"add_gradients() changed a weight {tuple(w.shape)}")
            off = difference(ours, want, size)
            hold(off <= rounding, f"add_gradients() leaves a {dtype} gradient {tuple(w.shape)} {off:.3g} of it off")


@LAWS.add(lambda penalty: type(penalty).plus is not Penalty.plus)
def plus_is_the_sum(penalty: Penalty) -> None:
    """Two rules on the same weights act as one if `plus` gives a kind for both. Let its strength times its value be the
    sum of both, each times its own strength, for the same ranks and in the same layout; or return None."""
    twin = penalty.model_copy(update={"strength": 2 * penalty.strength + 1})
    for other in (penalty, twin, *type(penalty).examples()):
        assert isinstance(other, Penalty)
        both = penalty.plus(other)
        if both is None:
            continue
        given = f"of {penalty.describe()} and {other.describe()}"
        hold(isinstance(both, Penalty), f"plus() {given} is {both!r}")
        same = both.layout == penalty.layout and set(both.ranks) >= set(penalty.ranks)
        hold(same, f"plus() {given} is {both.describe()}, for ranks {both.ranks} and layout {both.layout!r}")
        for w in weights(penalty):
            for name in ("value", "gradient"):
                ours, *parts = (one.strength * getattr(one, name)(w) for one in (both, penalty, other))
                off = difference(ours, sum(parts), *parts)
                hold(off < 1e-9, f"plus() {given} is {both.describe()}, whose {name}() is {off:.3g} of its size off")


@LAWS.add(can_compile)
def compiles_whole(penalty: Penalty) -> None:
    """A training step that is compiled as one graph includes the value. Use torch operations, without print, numpy,
    `float(t)` or an `if` on what a tensor holds."""
    for shape in shapes(penalty)[:1]:
        compiles(penalty.value, [random(shape)], f"value() of a weight {shape}")


def _functions(penalty: Penalty) -> Iterator[tuple[str, Function]]:
    """The functions of a penalty, by name."""
    yield "value()", penalty.value
    yield "gradient()", penalty.gradient
    if penalty.offers_prox:
        yield "prox()", lambda w: penalty.prox(w, w.new_full((), 0.3))


def _list_forms(penalty: Penalty) -> Iterator[tuple[str, Function]]:
    """The list forms that a penalty overrides, as functions of one weight, by name."""

    def add_gradients(w: Tensor) -> Tensor:
        gradient = torch.zeros_like(w)
        penalty.add_gradients([w, w], [gradient, torch.zeros_like(w)], 0.5)
        return gradient

    if type(penalty).values is not Penalty.values:
        yield "values()", lambda w: penalty.values([w, w])
    if type(penalty).add_gradients is not Penalty.add_gradients:
        yield "add_gradients()", add_gradients
