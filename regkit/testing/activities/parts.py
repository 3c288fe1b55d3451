"""The law of `separable` activity penalties: many outputs at once have the value of the outputs one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from regkit import Activity, ActivityPenalty
from regkit.activity import Sequenced, Stepped
from regkit.testing.activities.tensors import SCALES, reduced
from regkit.testing.laws import Laws, hold
from regkit.testing.samples.layouts import batch
from regkit.testing.samples.tensors import difference

ACTIVITY_PARTS: Final[Laws[ActivityPenalty]] = Laws()
"""The laws of every activity penalty that is declared separable."""

_COUNT: Final = 3


@ACTIVITY_PARTS.add(lambda penalty: penalty.separable)
def outputs_side_by_side_add_up(penalty: ActivityPenalty) -> None:
    """Outputs of one shape, of many modules, are reduced at once where a penalty is `separable`: side by side in the
    batch, times how many they are, unless they are summed; and the steps of a loop as one sequence. Let the value be
    what `activity.reduce` or `reduce_pairs` gives, as it is: a root, a power or a maximum of that is no sum over
    outputs."""
    adds_up(penalty)


def adds_up(penalty: ActivityPenalty) -> None:
    """Raise Broken unless outputs side by side, and steps in one sequence, have the value of each alone, added up."""
    for scale in SCALES:
        h = torch.cat([batch(seed, scale) for seed in range(_COUNT)], 1)
        for reduction, one in reduced(penalty):
            times = 1 if reduction == "sum" else _COUNT
            together = dict(_values_and_gradients(one, _together, h))
            for name, wanted in _values_and_gradients(one, _alone, h):
                off = difference(times * together[name], wanted, together[name])
                told = f"the {name} of the {reduction} over {_COUNT} outputs side by side, times {times},"
                hold(off < 1e-9, f"{told} is off by {off:.3g} of its size from the sum over them one by one")
            for name, wanted in _values_and_gradients(one, _stepped, h):
                off = difference(together[name], wanted, together[name])
                told = f"the {name} of the {reduction} over the steps of a loop in one sequence"
                hold(off < 1e-9, f"{told} is off by {off:.3g} of its size from that over the steps one by one")


_Arranged = Callable[[Tensor], Sequence[Activity]]


def _together(h: Tensor) -> list[Activity]:
    """One activity with all outputs side by side.  h: (time, count · batch, features)."""
    return [Activity((Sequenced(h),))]


def _alone(h: Tensor) -> list[Activity]:
    """An activity for each output."""
    return [Activity((Sequenced(one),)) for one in h.chunk(_COUNT, 1)]


def _stepped(h: Tensor) -> list[Activity]:
    """An activity of the steps of a loop, each with the step before."""
    calls = h.unbind()
    return [Activity([Stepped(now, calls[t - 1] if t else None) for t, now in enumerate(calls)])]


def _values_and_gradients(penalty: ActivityPenalty, arranged: _Arranged, h: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The value and the gradients, by name, of all activities that `arranged` makes of the outputs, added up."""
    with torch.enable_grad():
        leaf = h.clone().requires_grad_()
        value = torch.stack([penalty.value(activity) for activity in arranged(leaf)]).sum()
        slopes = torch.autograd.grad(value, leaf)[0] if value.requires_grad else torch.zeros_like(h)
    yield "value", value.detach()
    yield "gradient", slopes
    if penalty.offers_gradients:
        live = torch.zeros_like(h)
        with torch.no_grad():
            for activity, gradients in zip(arranged(h), arranged(live), strict=True):
                penalty.add_gradients(activity, gradients, torch.ones((), dtype=h.dtype, device=h.device))
        yield "closed form of the gradient", live
