"""Strangers' kinds on several modules: the order of time, the number of rows, and what is no sum over outputs."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

import regkit
from regkit import Activity
from tests.support.activity_forms import same
from tests.support.laws import REDUCTIONS


def sequence() -> Tensor:
    return torch.randn(5, 4, 3, dtype=torch.float64)


class Rises(regkit.ActivityPenalty):
    """max(h_t − h_{t−1}, 0)²: the one kind here that knows which of two steps is the later."""

    kind: Literal["rises"] = "rises"
    sequence: ClassVar[bool] = True
    separable: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce_pairs(lambda later, before: (later - before).relu().square(), self.reduction)

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        activity.add_pair_slopes(
            gradients, lambda later, before: (later - before).relu(), amount, self.reduction, times=2
        )


class Length(regkit.ActivityPenalty):
    """‖h_t‖², one number for each step of each sequence."""

    kind: Literal["length"] = "length"
    separable: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: h.square().sum(-1, keepdim=True), self.reduction)

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        activity.add_slopes(gradients, lambda h: h, amount, self.reduction, times=2, per_row=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}])
@pytest.mark.parametrize("kind", [Rises, Length])
def test_a_strangers_kind_knows_the_order_of_time_and_how_many_rows_there_are(
    kind: type[regkit.ActivityPenalty], options: dict[str, Any], reduction: str
):
    registry = regkit.Registry()
    registry.register(kind)
    model = nn.ModuleList([nn.LSTM(3, 4, **options), nn.LSTM(3, 4, **options)]).double()
    name = kind.model_fields["kind"].default
    document = {"rules": [{"penalty": {"kind": name, "reduction": reduction, "strength": 1.0}}]}
    attachment = regkit.attach(model, document, registry=registry)
    outputs = [module(sequence())[0] for module in model]
    wanted = torch.zeros((), dtype=torch.float64)
    for h in outputs:
        halves = h.chunk(2, -1) if options else [h]
        straight = [half.flip(0) if number else half for number, half in enumerate(halves)]
        parts = [(one[1:] - one[:-1]).relu().square() for one in straight]
        if kind is Length:
            parts = [one.square().sum(-1) for one in straight]
        number = {"mean": sum(one.numel() for one in parts), "batch": 4, "sum": 1}[reduction]
        wanted = wanted + sum(one.sum() for one in parts) / number
    total = attachment.penalty()
    torch.testing.assert_close(total, wanted)
    ours, theirs = (torch.autograd.grad(one, outputs, retain_graph=True) for one in (total, wanted))
    same(list(ours), list(theirs))


class Offset(regkit.ActivityPenalty):
    """(mean of h)²: of all outputs at once, and not of each by itself."""

    kind: Literal["offset"] = "offset"

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: h).square()

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        mean = activity.reduce(lambda h: h)
        activity.add_slopes(gradients, torch.ones_like, amount * mean, times=2)


def test_a_kind_that_is_no_sum_over_outputs_has_each_module_by_itself():
    registry = regkit.Registry()
    registry.register(Offset)
    model = nn.ModuleList([nn.LSTM(3, 4), nn.LSTM(3, 4)]).double()
    attachment = regkit.attach(model, {"rules": [{"penalty": "offset(1)"}]}, registry=registry)
    outputs = [module(sequence())[0] for module in model]
    total = attachment.penalty()
    torch.testing.assert_close(total, sum(h.mean().square() for h in outputs))
    found = torch.autograd.grad(total, outputs)
    same(list(found), [(2 * h.mean() / h.numel()).expand_as(h) for h in outputs])
