"""Activity penalties via inject where a failed step is retried, after a forward pass that no backward pass reaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import regkit

DOCUMENT = {
    "rules": [
        {"penalty": "l2(0.1)", "target": {"module": "encoder"}},
        {"penalty": "activity_l2(1)", "target": {"module": "cell"}, "via": "inject"},
    ]
}


class FailsOnce(torch.optim.SGD):
    """An optimizer whose first step fails after the gradients are complete."""

    failed = False

    def step(self, closure: Any = None) -> Any:
        if not self.failed:
            self.failed = True
            raise OSError("the disk is full")
        return super().step(closure)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.cell = nn.GRU(3, 4), nn.RNNCell(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)[0].sum() + self.cell(x).sum()


X = torch.ones(2, 3)


def retried(model: Model) -> tuple[regkit.Attachment, torch.optim.Optimizer, torch.optim.Optimizer]:
    """A step that failed was retried, with the cell called twice before the retry, and one call in the loss."""
    attachment = regkit.attach(model, DOCUMENT, loss_scale=1.0)
    first = FailsOnce([*model.encoder.parameters(), model.cell.weight_ih], lr=0.1)
    model(X).backward()
    with pytest.raises(OSError, match="the disk is full"):
        first.step()
    reached, _ = model.cell(X), model.cell(X)
    reached.sum().backward()
    first.step()  # whose penalties are in the encoder's gradients since the first attempt
    return attachment, first, torch.optim.SGD([model.cell.weight_hh], lr=0.1)


def test_the_unreached_pass_is_an_error_at_every_step_until_it_is_discarded():
    model = Model()
    attachment, first, second = retried(model)
    model(X).backward()
    for optimizer in (first, second, first):
        with pytest.raises(regkit.StepError, match="no backward pass reached"):
            optimizer.step()
    attachment.discard()
    model(X).backward()
    first.step()
    second.step()
    assert attachment.step_count == 2


def test_an_optimizer_that_joins_the_step_goes_on_once_the_unreached_pass_is_discarded():
    attachment, _, second = retried(Model())
    attachment.discard()
    second.step()
    assert attachment.step_count == 1
