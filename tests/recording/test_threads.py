"""Outputs that another thread records while a penalty is computed."""

from __future__ import annotations

import threading
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

import regkit
from regkit import Activity

X = torch.linspace(-1, 1, 24).reshape(4, 2, 3).double()
during: list[threading.Thread] = []
"""Threads to run while a penalty is computed."""


class Slow(regkit.ActivityPenalty):
    """h² for each output, computed while other threads run."""

    kind: Literal["slow"] = "slow"
    separable: ClassVar[bool] = True

    def value(self, activity: Activity) -> Tensor:
        while during:
            thread = during.pop()
            thread.start()
            thread.join()
        return activity.reduce(torch.square, self.reduction)


class SlowWithGradients(Slow):
    """h² for each output, with the gradient in closed form."""

    kind: Literal["slow_with_gradients"] = "slow_with_gradients"

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        activity.add_slopes(gradients, lambda h: h, amount, self.reduction, times=2)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("kind", [Slow, SlowWithGradients])
def test_an_output_that_another_thread_records_meanwhile_belongs_to_the_next_penalty(kind, calls):
    registry = regkit.Registry()
    registry.register(kind)
    model = nn.GRU(3, 4).double()
    name = kind.model_fields["kind"].default
    attachment = regkit.attach(model, {"rules": [{"penalty": f"{name}(1)"}]}, registry=registry)
    during[:] = [threading.Thread(target=model, args=(2 * X,))]
    expected = torch.cat([model(X)[0] for _ in range(calls)]).square().mean()
    torch.testing.assert_close(attachment.penalty(), expected)
    torch.testing.assert_close(attachment.penalty(), model.forward(2 * X)[0].square().mean())
    assert attachment.penalty() == 0
