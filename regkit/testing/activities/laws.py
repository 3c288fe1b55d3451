"""The laws of activity penalties: one value in every layout of a batch, and `check_activity_penalty`."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from regkit import Activity, ActivityPenalty
from regkit.activity import Stepped
from regkit.testing.activities.gradients import GRADIENT_LAWS
from regkit.testing.activities.parts import ACTIVITY_PARTS
from regkit.testing.activities.tensors import SCALES, TENSOR_LAWS, near, reduced
from regkit.testing.functions import Function, fits, ignores_strength, is_finite, is_not_negative
from regkit.testing.hints import hints
from regkit.testing.kinds.common import KIND_LAWS, report
from regkit.testing.laws import Laws, Report, hold
from regkit.testing.samples.layouts import BOTH, LENGTHS, alone, batch, layouts, packed, padded, steps
from regkit.testing.samples.tensors import DTYPES

LAWS: Final[Laws[ActivityPenalty]] = Laws(KIND_LAWS, TENSOR_LAWS, GRADIENT_LAWS, ACTIVITY_PARTS)
"""The laws of every activity penalty."""


def check_activity_penalty(penalty: ActivityPenalty | type[ActivityPenalty]) -> Report:
    """Try every law on an activity penalty; of a class, on each of its examples. Raises TypeError for anything else."""
    return replace(report(LAWS, ActivityPenalty, penalty), hints=hints(penalty))


@LAWS.add(root=1)
def value_is_a_scalar(penalty: ActivityPenalty) -> None:
    """The values of a rule's places are summed, and added to the loss: a vector would be broadcast. Reduce over all
    segments (`activity.reduce`), into a tensor without dimensions, of the outputs' precision but float32 at least."""
    for dtype in DTYPES:
        wide = torch.promote_types(dtype, torch.float32)
        for reduction, one in reduced(penalty):
            value = one.value(padded(batch(dtype=dtype), LENGTHS))
            fits(value, (), wide, f"value() by {reduction}, of {dtype} outputs,")


@LAWS.add()
def value_is_finite(penalty: ActivityPenalty) -> None:
    """One infinite value makes the loss infinite, and every weight NaN: also where there are no neighbours in time, no
    valid element at all, or a final state alone. Divide by no count that may be 0."""
    forms = {
        "sequences of length 1": padded(batch()[:1]),
        "packed sequences of length 1": packed(batch()[:1], (1, 1, 1, 1)),
        "sequences of length 0 among others": padded(batch(), (0, 5, 0, 2)),
        "nothing but padding": padded(batch(), (0, 0, 0, 0)),
        "final states": Activity([Stepped(batch()[:2])]),
        **{f"outputs times {scale:g}": padded(batch(scale=scale), LENGTHS) for scale in (0.0, 1e-4, 1e4)},
    }
    is_finite([(f"value() by {reduction}", one.value) for reduction, one in reduced(penalty)], forms.items())


@LAWS.add(lambda penalty: not penalty.signed)
def value_is_not_negative(penalty: ActivityPenalty) -> None:
    """A penalty is least where the outputs are best, and is read as a cost. Turn the sign around; where a formula is
    meant to be negative, as an entropy is, set `signed = True` on the class."""
    functions = [(f"value() by {reduction}", _value(one)) for reduction, one in reduced(penalty)]
    is_not_negative(functions, [(f"outputs times {scale:g}", batch(scale=scale)) for scale in SCALES])


@LAWS.add()
def unit_strength(penalty: ActivityPenalty) -> None:
    """regkit multiplies by the strength and the schedule's factor: in the mathematics, the strength would count twice.
    Take `self.strength` out of `value`."""
    ignores_strength(penalty, lambda one: [("value()", _value(one))], [batch()])


def _value(penalty: ActivityPenalty) -> Function:
    """The value as a function of outputs with padding."""
    return lambda h: penalty.value(padded(h, LENGTHS))


@LAWS.add()
def layout_does_not_matter(penalty: ActivityPenalty) -> None:
    """Padded with lengths or a mask, packed, batch first or not, a batch stays the same batch. Padding is no data; the
    larger it is, the smaller a mean that counts it. Use `activity.reduce` and `reduce_pairs`, which know what is
    valid."""
    for directions in (BOTH[:1], BOTH):
        h = batch()
        for reduction, one in reduced(penalty):
            wanted = float(one.value(padded(h, LENGTHS, directions=directions)))
            for name, activity in layouts(h, LENGTHS, directions):
                value = float(one.value(activity))
                hold(
                    near(value, wanted),
                    f"the {reduction} over sequences of lengths {LENGTHS} is {value:.9g} {name}, {wanted:.9g} padded",
                )


@LAWS.add()
def sequences_do_not_mix(penalty: ActivityPenalty) -> None:
    """The other sequences of a batch have nothing to do with a sequence: (time, batch, features) has its neighbours
    along the first axis. A batch has the value of its sequences, each in a segment of its own."""
    h = batch()
    for directions in (BOTH[:1], BOTH):
        for reduction, one in reduced(penalty):
            wanted = float(one.value(alone(h, LENGTHS, directions))) / (len(LENGTHS) if reduction == "batch" else 1)
            value = float(one.value(padded(h, LENGTHS, directions=directions)))
            hold(
                near(value, wanted),
                f"the {reduction} over a batch is {value:.9g}, over its sequences one by one {wanted:.9g}",
            )


@LAWS.add()
def reduces_as_it_says(penalty: ActivityPenalty) -> None:
    """`mean` and `batch` are to be the same for a batch twice as large, and `sum` twice as much: else the strength
    depends on the batch size. Hand `self.reduction` on to `activity.reduce`, and divide by nothing yourself."""
    h, lengths = batch(), (*LENGTHS, *LENGTHS)
    for reduction, one in reduced(penalty):
        once = float(one.value(padded(h, LENGTHS)))
        twice = float(one.value(padded(torch.cat([h, h], 1), lengths)))
        wanted = 2 * once if reduction == "sum" else once
        hold(
            near(twice, wanted), f"the {reduction} is {once:.9g}, and {twice:.9g} of the batch twice, not {wanted:.9g}"
        )
    totals = {reduction: float(one.value(padded(h, LENGTHS))) for reduction, one in reduced(penalty)}
    if {"sum", "batch"} <= totals.keys():
        share, wanted = totals["batch"], totals["sum"] / len(LENGTHS)
        hold(near(share, wanted), f"of {len(LENGTHS)} sequences, batch is {share:.9g}; a share of sum is {wanted:.9g}")


@LAWS.add()
def time_runs_backward_too(penalty: ActivityPenalty) -> None:
    """The backward half of a bidirectional module runs against time: before h_t, that half computed h_(t+1). A mirrored
    batch whose halves have changed places has the same value, if neighbours come from `activity.reduce_pairs`, or from
    the `pairs()` of its segments."""
    h = batch(features=6)
    mirrored = h.flip(0).roll(3, -1)
    for reduction, one in reduced(penalty):
        value, wanted = (float(one.value(padded(form, directions=BOTH))) for form in (mirrored, h))
        hold(near(value, wanted), f"the {reduction} of two directions is {wanted:.9g}, and {value:.9g} in a mirror")


@LAWS.add()
def cells_in_a_loop_are_a_sequence(penalty: ActivityPenalty) -> None:
    """A cell that is called in a loop is a layer written by hand: each call is a segment, with the state before.
    Take every segment of the activity, and its pairs; do not look for a time axis."""
    for reduction, one in reduced(penalty):
        value, wanted = float(one.value(steps(batch())).detach()), float(one.value(padded(batch(), LENGTHS)))
        hold(near(value, wanted), f"the {reduction} over the calls of a cell is {value:.9g}, of a layer {wanted:.9g}")


@LAWS.add()
def sequence_says_whether_time_matters(penalty: ActivityPenalty) -> None:
    """`sequence = True` on the class keeps a rule off outputs that have no neighbours in time, where the rule would be
    without effect. Set it if the value changes with the order of the steps, and only then."""
    h = batch()
    orders = [
        torch.randperm(h.size(0), generator=torch.Generator("cpu").manual_seed(n), device="cpu") for n in range(4)
    ]
    wanted = float(penalty.value(padded(h)))
    values = [float(penalty.value(padded(h[order]))) for order in orders]
    changed = [value for value in values if not near(value, wanted)]
    if penalty.sequence:
        hold(changed, f"sequence is True, but the value is {wanted:.9g} in any order of the steps")
    else:
        hold(not changed, f"sequence is False, but the value is {wanted:.9g}, or {changed[:1]} with the steps shuffled")
