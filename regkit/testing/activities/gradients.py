"""The law of activity penalties with gradients in closed form: in every layout autograd finds the same gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from regkit import Activity, ActivityPenalty
from regkit.activity import Stepped
from regkit.testing.activities.tensors import reduced
from regkit.testing.laws import Laws, hold
from regkit.testing.samples.layouts import BOTH, LENGTHS, batch, layouts, mask, padded, steps
from regkit.testing.samples.tensors import HALVES, difference, random, rounding, strided

GRADIENT_LAWS: Final[Laws[ActivityPenalty]] = Laws()
"""The laws of every activity penalty with gradients in closed form."""


@GRADIENT_LAWS.add(lambda penalty: penalty.offers_gradients)
def closed_form_agrees(penalty: ActivityPenalty) -> None:
    """In training, `add_gradients` takes the place of autograd: amount · the gradient of `value` is added to the
    gradients of every segment, and nothing where there is padding. Use `activity.add_slopes` with the derivative
    of what `value` gives to `activity.reduce`, `add_pair_slopes` with that of `reduce_pairs`, by one reduction."""
    for name, activity in _forms():
        for reduction, one in reduced(penalty):
            _compare(one, activity, f"of the {reduction}, {name},", 1e-9)
    for dtype in HALVES:
        for name, activity in (
            ("padded", padded(random((9, 4, 6), 5, 3.0, dtype), (9, 5, 1, 4))),
            ("cells", steps(batch(dtype=dtype))),
        ):
            _compare(penalty, activity, f"of {dtype} outputs, {name},", rounding(dtype))


def _forms() -> Iterator[tuple[str, Activity]]:
    """Activities of many layouts; at random, at zeros, where steps are equal, and with NaN in the padding."""
    h = batch(features=6)
    for directions in (BOTH[:1], BOTH):
        yield f"{len(directions)} padded", padded(h, LENGTHS, directions=directions)
        yield f"{len(directions)} whole", padded(h, directions=directions)
        yield from ((f"{len(directions)} {name}", one) for name, one in layouts(h, LENGTHS, directions))
    yield "cells", steps(h)
    yield "final states", Activity([Stepped(h[:2]), Stepped(h[3])])
    yield "unbatched", padded(h[:, 0], directions=BOTH)
    yield "of one step", padded(h[:1])
    yield "nothing but padding", padded(h, (0, 0, 0, 0))
    yield "zeros", padded(torch.zeros_like(h), LENGTHS)
    yield "equal steps", padded(h[:1].repeat(5, 1, 1), LENGTHS)
    yield "NaN in the padding", padded(torch.where(mask().unsqueeze(-1), h, torch.nan), LENGTHS)


def _compare(penalty: ActivityPenalty, activity: Activity, what: str, near: float) -> None:
    found: dict[int, Tensor] = {}
    for segment in activity.segments:
        segment.at(lambda tensor: found.setdefault(id(tensor), tensor))
    leaves = {key: strided(tensor.detach()).requires_grad_() for key, tensor in found.items()}
    over = _with_tensors(activity, leaves)
    value = penalty.value(over)
    slopes: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if value.requires_grad:
        slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    live = {key: strided(torch.ones_like(leaf)) for key, leaf in leaves.items()}
    before = {key: leaf._version for key, leaf in leaves.items()}
    with torch.no_grad():
        penalty.add_gradients(over, _with_tensors(activity, live), torch.tensor(0.3, dtype=value.dtype, device="cpu"))
    for (key, leaf), slope in zip(leaves.items(), slopes, strict=True):
        wanted = 1 + (0.0 if slope is None else 0.3 * slope.double()) * torch.ones_like(leaf).double()
        off = difference(live[key], wanted)
        hold(off < near, f"the gradient {what} is off by {off:.3g} of its size from that of autograd")
        hold(leaf._version == before[key], f"add_gradients() {what} wrote into the outputs")


def _with_tensors(activity: Activity, tensors: dict[int, Tensor]) -> Activity:
    """An activity with other tensors in the place of its own, by the ids of its own."""
    found = (segment.at(lambda tensor: tensors[id(tensor)]) for segment in activity.segments)
    return Activity(tuple(segment for segment in found if segment is not None))
