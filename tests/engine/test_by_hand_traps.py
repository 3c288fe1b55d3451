"""`attachment.step()` where weights are replaced, untrained or moved often, and where work behind the update fails."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import torch
from torch import nn
from torch.optim import SGD

import regkit
from regkit.registry.registry import default

X = torch.ones(3, 2, 3)


def prepared(*rules: dict) -> tuple[nn.Module, regkit.Attachment]:
    """A model with gradients, under rules."""
    model = nn.ModuleDict({"rnn": nn.RNN(3, 4), "head": nn.Linear(4, 1)})
    attachment = regkit.attach(model, {"rules": [*rules]})
    backward(model)
    return model, attachment


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model["head"](model["rnn"](X)[0]).sum().backward()


@pytest.mark.parametrize("via", ["proximal", "decoupled"])
def test_a_learning_rate_of_zero_is_one(via):
    _, attachment = prepared({"penalty": "l2(0.1)", "via": via})
    with attachment.step(lr=0.0):
        pass
    assert attachment.step_count == 1


def test_some_weights_may_have_no_gradient():
    model, attachment = prepared({"penalty": "l2(0.5)"})
    model["rnn"].weight_hh_l0.grad = None
    before = model["rnn"].weight_ih_l0.grad.clone()
    with attachment.step():
        pass
    assert model["rnn"].weight_hh_l0.grad is None
    torch.testing.assert_close(model["rnn"].weight_ih_l0.grad, before + model["rnn"].weight_ih_l0)


def test_a_step_of_weights_that_have_replaced_all_others_joins_no_step():
    model, attachment = prepared({"penalty": "l2(0.5)"})
    for _ in range(2):
        with attachment.step():
            pass
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
        backward(model)
    assert attachment.step_count == 2


def test_an_optimizer_may_train_the_rest_of_the_model():
    model, attachment = prepared({"penalty": "l2(0.5)"})
    with attachment.step():
        pass
    SGD(model["head"].parameters(), lr=0.1).step()
    assert attachment.step_count == 1


def test_weights_may_move_between_backward_passes_within_an_update():
    model, attachment = prepared({"penalty": "l2(0.5)"})
    with attachment.step():
        for _ in range(20):
            with torch.no_grad():
                model["rnn"].weight_ih_l0.add_(0.01)
            backward(model)
    assert attachment.step_count == 1


class Fragile(regkit.Constraint):
    """A constraint."""

    kind: Literal["fragile"] = "fragile"
    broken: ClassVar[list[bool]] = []

    def project(self, w):
        if self.broken:
            raise ZeroDivisionError
        return w

    def violation(self, w):
        return w.new_zeros(())


def test_a_step_is_counted_where_a_constraint_fails_behind_the_update(monkeypatch):
    with default().temporary(Fragile):
        _, attachment = prepared({"constraint": "fragile"})
    monkeypatch.setattr(Fragile, "broken", [True])
    with pytest.raises(regkit.StepError, match="fragile"), attachment.step():
        pass
    assert attachment.step_count == 1
