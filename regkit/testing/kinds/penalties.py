"""The laws of penalties on weights, and `check_penalty`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from regkit import Penalty, PluginError
from regkit.testing.hints import hints
from regkit.testing.kinds.common import KIND_LAWS, report
from regkit.testing.kinds.gradients import GRADIENT_LAWS
from regkit.testing.kinds.prox import PROX_LAWS
from regkit.testing.laws import Laws, Report, hold
from regkit.testing.samples.compiling import compiles
from regkit.testing.samples.tensors import (
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

LAWS: Final[Laws[Penalty]] = Laws(KIND_LAWS, GRADIENT_LAWS, PROX_LAWS, PENALTY_PARTS)
"""What every penalty on weights keeps."""


def check_penalty(penalty: Penalty | type[Penalty]) -> Report:
    """Try every law on a penalty; of a class, on each of its examples. Raises TypeError for anything else."""
    return replace(report(LAWS, Penalty, penalty), hints=hints(penalty))


@LAWS.add()
def takes_its_ranks(penalty: Penalty) -> None:
    """A target may bind biases, which have one dimension, and matrices of any shape. Set `ranks` to the numbers of
    dimensions that the formula is for. Where it cannot be for some shape, say so in a PluginError."""
    asked = possible(penalty)
    refused = {shape: error for shape in asked if (error := refusal(penalty, shape)) is not None}
    for shape, error in refused.items():
        hold(isinstance(error, PluginError), f"value() of a weight {shape} raised {type(error).__name__}: {error}")
    cells = penalty.layout == "cell"
    for rank in penalty.ranks:
        taken = [shape for shape in asked if len(shape) - cells == rank and shape not in refused]
        hold(taken, f"ranks is {penalty.ranks}, but every weight of rank {rank} is refused")


@LAWS.add()
def value_is_a_scalar(penalty: Penalty) -> None:
    """The values of a rule's weights are summed: a vector would be broadcast. Sum or average over all of w, into a
    tensor without dimensions, of w's precision but float32 at least (`regkit.activity.at_least_float32`)."""
    for dtype in (*HALVES, torch.float32, torch.float64):
        for w in weights(penalty, dtype=dtype):
            value: object = penalty.value(w)
            hold(isinstance(value, Tensor), f"value() returns a {type(value).__name__}, not a tensor")
            assert isinstance(value, Tensor)
            given, wide = f"of a {dtype} weight {tuple(w.shape)}", torch.promote_types(dtype, torch.float32)
            hold(value.shape == (), f"value() {given} has shape {tuple(value.shape)}, not ()")
            hold(value.dtype == wide, f"value() {given} is {value.dtype}, not {wide}")


@LAWS.add()
def finite_at_every_scale(penalty: Penalty) -> None:
    """One infinite number makes the loss infinite, or the weight NaN. Scale before what overflows (an exponential, a
    high power), and keep what is divided by away from 0."""
    for dtype in (torch.float32, torch.float64):
        for scale in (0.0, 1e-20, 1e-4, 1.0, 1e4):
            for w in weights(penalty, scale, dtype):
                given = f"of a {dtype} weight {tuple(w.shape)} of scale {scale}"
                value, gradient = penalty.value(w), penalty.gradient(w)
                hold(value.isfinite().all(), f"value() {given} is {value.tolist()}")
                hold(gradient.isfinite().all(), f"gradient() {given} is not")


@LAWS.add(lambda penalty: not penalty.signed)
def value_is_not_negative(penalty: Penalty) -> None:
    """A penalty is least where the weight is best, and is read as a cost. Turn the sign around; where a formula is
    meant to be negative, as an entropy is, set `signed = True` on the class."""
    for scale in (0.0, 1e-2, 1.0, 1e2):
        for w in weights(penalty, scale):
            value, rounding = float(penalty.value(w)), 1e-9 * (1 + float(w.square().sum()))
            hold(not value < -rounding, f"{value} for a weight {tuple(w.shape)} of scale {scale}")


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
    """regkit multiplies by the strength and the schedule's factor: in the mathematics it would count twice. Take
    `self.strength` out of value, gradient and prox."""
    twin = penalty.model_copy(update={"strength": 2 * penalty.strength + 1})
    functions = [("value", penalty.value, twin.value), ("gradient", penalty.gradient, twin.gradient)]
    if penalty.offers_prox:
        functions.append(("prox", lambda w: penalty.prox(w, 0.3), lambda w: twin.prox(w, 0.3)))
    for name, ours, others in functions:
        for w in weights(penalty):
            hold(
                identical(ours(w).detach(), others(w).detach()),
                f"{name}() changes by {difference(others(w), ours(w)):.3g} times its size when strength goes from "
                f"{penalty.strength} to {twin.strength}",
            )


@LAWS.add()
def nan_is_never_hidden(penalty: Penalty) -> None:
    """A NaN weight is a run that has failed, and must be seen, as NaN or as an error. Do not use nan_to_num or nansum,
    nor a `torch.where` or a comparison that takes the other branch for a NaN."""
    for w in weights(penalty):
        for where in sorted({0, w.numel() // 2, w.numel() - 1}):
            spoilt = w.clone()
            spoilt.view(-1)[where] = torch.nan
            given = f"with a NaN at entry {where} of {tuple(w.shape)}"
            value = _or_nan(penalty.value, spoilt)
            hold(value.isnan().all(), f"value() is {value.tolist()} {given}")
            if penalty.offers_prox:
                entry = _or_nan(lambda w: penalty.prox(w, 0.3), spoilt).reshape(-1)[where]
                hold(entry.isnan(), f"prox() makes {float(entry)} of it, {given}")


def _or_nan(function: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    try:
        return function(w)
    except Exception:  # as a singular value decomposition does: that hides nothing
        return w * torch.nan


@LAWS.add()
def weight_is_left_alone(penalty: Penalty) -> None:
    """What is given are the model's own parameters. Change nothing in place: no method that ends with `_`, no `out=`,
    no `requires_grad_` on w itself (`w.detach()` shares its numbers, but not that)."""
    for name, function in _functions(penalty):
        for w in weights(penalty):
            before, version = w.clone(), w._version
            with torch.no_grad():
                function(w)
            hold(identical(w, before), f"{name}() changed a weight {tuple(w.shape)}")
            hold(w._version == version, f"{name}() wrote into a weight {tuple(w.shape)}, if the same numbers")
            hold(not w.requires_grad, f"{name}() left requires_grad on the weight")


@LAWS.add()
def strides_do_not_matter(penalty: Penalty) -> None:
    """A gate's block is a view of a larger weight, and may be transposed. Use `reshape` or `flatten` where you use
    `view`, and dimensions rather than strides."""
    for name, function in _functions(penalty):
        for w in weights(penalty):
            off = difference(function(strided(w)), function(w))
            hold(off < 1e-9, f"{name}() of a view {tuple(w.shape)} is off by {off:.3g} times its size")


@LAWS.add()
def halves_accumulate_in_float32(penalty: Penalty) -> None:
    """Sums of many half-precision numbers overflow (65504 in float16) and stall (at 256 in bfloat16). Begin with
    `regkit.activity.at_least_float32(w)`, before anything is squared or summed."""
    for dtype in HALVES:
        for w in large(penalty, dtype):
            given = f"of a {dtype} weight {tuple(w.shape)}"
            for name, function in [("value", penalty.value), ("gradient", penalty.gradient)]:
                ours, exact = function(w), function(w.double())
                off = difference(ours, exact)
                hold(off < 1e-3, f"{name}() {given} is off by {off:.3g} times its size: {_size(ours, exact)}")


@LAWS.add()
def never_waits_for_the_device(penalty: Penalty) -> None:
    """Reading a number of a tensor back stops a GPU at every step of the optimizer. Avoid `float(t)`, `t.item()`,
    `t.numpy()`, `if t > 0` and boolean indexing; write `torch.where` and tensors without dimensions."""
    taken = shapes(penalty)
    with FakeTensorMode():
        for name, function in [*_functions(penalty), *_list_forms(penalty)]:
            for shape in taken:
                try:
                    function(torch.empty(shape, dtype=torch.float64, device="cpu"))
                except Exception as error:
                    hold(False, f"{name}() of a fake weight {shape} raised {type(error).__name__}: {error}")


@LAWS.add()
def stays_on_its_device(penalty: Penalty) -> None:
    """A constant that is made on the CPU meets a weight on a GPU there, and not here: a weight on `meta` tells. Give
    `device=w.device` to `torch.eye`, `torch.arange` and the like, and never move w."""
    for name, function in [*_functions(penalty), *_list_forms(penalty)]:
        for shape in shapes(penalty):
            try:
                result = function(torch.empty(shape, dtype=torch.float64, device="meta"))
            except Exception as error:
                hold(False, f"{name}() of a weight {shape} on meta raised {type(error).__name__}: {error}")
            hold(result.device.type == "meta", f"{name}() of a weight {shape} on meta is on {result.device}")


@LAWS.add()
def list_forms_agree(penalty: Penalty) -> None:
    """`values` and `add_gradients` are the same mathematics of many weights at once. Sum over all weights, with or
    without autograd, and add into the gradients that are given (`torch._foreach_add_`): they hold the loss' own."""
    for dtype in (*HALVES, torch.float32, torch.float64):
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


def _compiles(_: Penalty) -> bool:
    from torch._dynamo.eval_frame import is_dynamo_supported  # here: it takes a second to import

    return is_dynamo_supported()


@LAWS.add(_compiles)
def compiles_whole(penalty: Penalty) -> None:
    """A training step that is compiled as one graph has the value in it. Use torch operations, without print, numpy,
    `float(t)` or an `if` on what a tensor holds."""
    for shape in shapes(penalty)[:1]:
        compiles(penalty.value, [random(shape)], f"value() of a weight {shape}")


def _functions(penalty: Penalty) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Its functions of one weight, by name."""
    yield "value", penalty.value
    yield "gradient", penalty.gradient
    if penalty.offers_prox:
        yield "prox", lambda w: penalty.prox(w, w.new_full((), 0.3))


def _list_forms(penalty: Penalty) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Its own list forms, as functions of one weight."""

    def add_gradients(w: Tensor) -> Tensor:
        gradient = torch.zeros_like(w)
        penalty.add_gradients([w, w], [gradient, torch.zeros_like(w)], 0.5)
        return gradient

    if type(penalty).values is not Penalty.values:
        yield "values", lambda w: penalty.values([w, w])
    if type(penalty).add_gradients is not Penalty.add_gradients:
        yield "add_gradients", add_gradients


def _size(ours: Tensor, exact: Tensor) -> str:
    return f"{ours.double().abs().max().item():.6g}, where float64 has {exact.double().abs().max().item():.6g}"
