"""The laws of activity penalties as functions of tensors: gradients, padding, dtypes, devices, NaN, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, cast, get_args

import torch
from torch import Tensor

from regkit import Activity, ActivityPenalty
from regkit.activity import Reduction, Sequenced, Stepped
from regkit.testing import functions as laws
from regkit.testing.laws import Laws, hold
from regkit.testing.samples.compiling import can_compile, compiles
from regkit.testing.samples.layouts import BOTH, LENGTHS, batch, mask, packed, padded, steps
from regkit.testing.samples.tensors import HALVES, random

TENSOR_LAWS: Final[Laws[ActivityPenalty]] = Laws()
"""The laws of every activity penalty as a function of tensors."""

SCALES: Final = (1e-2, 1.0, 30.0)


def reduced(penalty: ActivityPenalty) -> Iterator[tuple[Reduction, ActivityPenalty]]:
    """A penalty with each reduction that its class takes, by reduction."""
    for name in get_args(type(penalty).model_fields["reduction"].annotation):
        yield cast("Reduction", name), penalty.model_copy(update={"reduction": name})


def near(ours: float, wanted: float) -> bool:
    """Whether two values are equal, up to rounding."""
    return abs(ours - wanted) <= 1e-9 * max(abs(wanted), 1e-12)


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    hold(value.requires_grad, "its value carries no gradient, though the outputs do")
    (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
    hold(gradient is not None, "no gradient of its value reaches the outputs")
    return gradient


@TENSOR_LAWS.add()
def padding_has_no_part(penalty: ActivityPenalty) -> None:
    """Behind the end of a sequence may lie anything, a NaN too. Mask before the formula, for the gradient, and after
    it, for the value, as `activity.reduce` does: 0 · NaN is NaN."""
    valid = mask().unsqueeze(-1)
    for name, filling in (("0", 0.0), ("1e6", 1e6), ("NaN", torch.nan)):
        leaf = torch.where(valid, batch(), filling).requires_grad_()
        value, wanted = penalty.value(padded(leaf, LENGTHS)), float(penalty.value(padded(batch(), LENGTHS)))
        now = float(value.detach())
        hold(near(now, wanted), f"the value is {now:.9g} where padding is {name}, else {wanted:.9g}")
        behind = _gradient(value, leaf)[~valid.expand_as(leaf)]
        hold(not behind.any(), f"where padding is {name}, its gradient is {behind[behind != 0].tolist()[:3]}, not 0")


@TENSOR_LAWS.add()
def gradient_is_the_slope(penalty: ActivityPenalty) -> None:
    """The gradient trains the model. Do not detach outputs, read their numbers, or leave autograd: the gradient is
    compared with finite differences, in float64."""
    for scale in SCALES:
        for reduction, one in reduced(penalty):
            leaf = batch(3, scale).requires_grad_()
            gradient = _gradient(one.value(padded(leaf, LENGTHS)), leaf)
            along = random(leaf.shape, 9)
            h = 1e-5 * scale
            with torch.no_grad():
                ahead, behind = (one.value(padded(leaf + side * h * along, LENGTHS)) for side in (1, -1))
            slope, ours = float(ahead - behind) / (2 * h), float((gradient * along).sum())
            room = 1e-5 * float((gradient * along).abs().sum()) + 1e-9 * abs(float(ahead)) / scale
            hold(
                abs(slope - ours) <= room,
                f"along a direction the gradient of the {reduction} is {ours:.9g}, the slope of the value {slope:.9g}",
            )


@TENSOR_LAWS.add()
def gradient_is_finite(penalty: ActivityPenalty) -> None:
    """States begin at zero, and a sequence may have one step: a gradient of NaN there is the end of training. The root
    of a sum of squares has none at 0; `torch.linalg.vector_norm` does."""
    zeros, beginning = torch.zeros_like(batch()), batch().index_fill(0, torch.tensor([0, 1], device="cpu"), 0.0)
    cases = {"zeros": zeros, "zeros at two steps": beginning, "equal steps": batch()[:1].repeat(5, 1, 1)}
    for reduction, one in reduced(penalty):
        laws.is_finite([(f"the gradient by {reduction}", _slopes(one, lambda h: padded(h, LENGTHS)))], cases.items())
    layouts = {"padded": padded, "packed": lambda h: packed(h, (1, 1, 1, 1))}
    functions = [(f"the gradient, {name},", _slopes(penalty, layout)) for name, layout in layouts.items()]
    laws.is_finite(functions, [("sequences of one step", batch()[:1])])


def _slopes(penalty: ActivityPenalty, layout: Callable[[Tensor], Activity]) -> laws.Function:
    """The gradient of the value as a function of outputs, by autograd."""

    def slopes(h: Tensor) -> Tensor:
        leaf = h.clone().requires_grad_()
        return _gradient(penalty.value(layout(leaf)), leaf)

    return slopes


@TENSOR_LAWS.add()
def gradient_reaches_every_step(penalty: ActivityPenalty) -> None:
    """Every output that is data is to be penalized, of each sequence, direction and segment: not the last step alone.
    (Tried at several scales: a step of which every feature has a zero gradient at all of them was left out.)"""
    lengths = (3, 5, 2, 4)
    reached = torch.zeros(5, 4, 2, dtype=torch.bool, device="cpu")
    for seed, scale in enumerate((1e-2, 1.0, 30.0, 1e3)):
        leaf = batch(seed, scale, features=8).requires_grad_()
        gradient = _gradient(penalty.value(padded(leaf, lengths, directions=BOTH)), leaf)
        reached |= (gradient != 0).view(5, 4, 2, 4).any(-1)
    missed = (~reached & mask(lengths).unsqueeze(-1)).nonzero().tolist()
    where = [f"step {time} of sequence {one}, {BOTH[half]}" for time, one, half in missed]
    hold(not where, f"no gradient reaches {'; '.join(where[:3])}, nor {max(len(where) - 3, 0)} more")


@TENSOR_LAWS.add()
def nan_is_never_hidden(penalty: ActivityPenalty) -> None:
    """A NaN output is a run that has failed, and must be seen. Do not use nan_to_num or nansum, nor a `torch.where` or
    a comparison that takes the other branch for a NaN."""
    layouts = {"padded": lambda h: padded(h, LENGTHS), "packed": packed, "of a cell": steps}
    functions = [(f"value(), {name},", _values(penalty, layout)) for name, layout in layouts.items()]
    laws.shows_nan(functions, [(batch(), place) for place in (0, 23, 70)], laws.OUTPUTS, errors=())


@TENSOR_LAWS.add()
def outputs_are_left_alone(penalty: ActivityPenalty) -> None:
    """The rest of the model reads the same outputs, and has a backward pass that needs these. Change nothing in place:
    no method that ends with `_`, no `out=`."""
    layouts = (padded, lambda h: padded(h, LENGTHS), lambda h: padded(h.transpose(0, 1), LENGTHS, batch_first=True))
    functions = [("value()", _values(penalty, layout)) for layout in layouts]
    laws.leaves_alone(functions, [batch(), torch.zeros_like(batch())], laws.OUTPUTS)


def _values(penalty: ActivityPenalty, layout: Callable[[Tensor], Activity]) -> laws.Function:
    """The value as a function of outputs in a layout."""
    return lambda h: penalty.value(layout(h))


@TENSOR_LAWS.add()
def halves_accumulate_in_float32(penalty: ActivityPenalty) -> None:
    """Sums of many half-precision numbers overflow (65504 in float16) and stall (at 256 in bfloat16). Let
    `activity.reduce` read the outputs, which gives them in float32, or begin with `at_least_float32`."""
    for dtype in HALVES:
        functions = [(f"value() by {reduction}", _values(one, padded)) for reduction, one in reduced(penalty)]
        laws.accumulates_wide(functions, [random((64, 8, 64), 5, 3.0, dtype)], 1e-3, laws.OUTPUTS)


@TENSOR_LAWS.add()
def never_waits_for_the_device(penalty: ActivityPenalty) -> None:
    """Reading a number of a tensor back stops a GPU at every step. Avoid `float(t)`, `t.item()`, `t.numpy()`,
    `if t > 0` and boolean indexing; write `torch.where` and tensors without dimensions."""
    laws.never_waits(_functions(penalty), [(5, 3, 4)], laws.OUTPUTS)


@TENSOR_LAWS.add()
def stays_on_its_device(penalty: ActivityPenalty) -> None:
    """A constant that is made on the CPU meets outputs on a GPU there, and not here: outputs on `meta` tell. Give
    `device=h.device` to `torch.arange` and the like, and never move h."""
    laws.stays_on_device(_functions(penalty), [(5, 3, 4)], laws.OUTPUTS)


def _functions(penalty: ActivityPenalty) -> list[tuple[str, laws.Function]]:
    """The functions of a penalty by name: `value` without and with autograd, and `add_gradients` if there is one."""

    def add_gradients(h: Tensor) -> Tensor:
        gradients = torch.zeros_like(h)
        amount = torch.ones((), dtype=h.dtype, device=h.device)
        with torch.no_grad():
            penalty.add_gradients(_every_segment(h), _every_segment(gradients), amount)
        return gradients

    value = _values(penalty, _every_segment)
    functions = [("value()", torch.no_grad()(value)), ("value()", lambda h: value(h.requires_grad_()))]
    return [*functions, ("add_gradients()", add_gradients)] if penalty.offers_gradients else functions


def _every_segment(h: Tensor) -> Activity:
    """Segments of outputs that may hold no data: padded, whole, backward, and of a cell."""
    valid = torch.empty(*h.shape[:2], 1, dtype=torch.bool, device=h.device)
    return Activity([Sequenced(h, valid), Sequenced(h), Sequenced(h, valid, backward=True), Stepped(h[1], h[0])])


@TENSOR_LAWS.add(can_compile)
def compiles_whole(penalty: ActivityPenalty) -> None:
    """A training step that is compiled as one graph includes the value. Use torch operations, without print, numpy,
    `float(t)` or an `if` on what a tensor holds."""

    def value(h: Tensor, valid: Tensor) -> Tensor:
        return penalty.value(Activity([Sequenced(h, valid), Sequenced(h, backward=True)]))

    compiles(value, [batch(), mask().unsqueeze(-1)], "value()")
