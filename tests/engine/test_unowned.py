"""Weights under rules that no optimizer owns are told of at the first step of the one that owns their neighbours."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import regkit
from tests.support.loops import Batches, loss_of

pytestmark = pytest.mark.works_with("Weights that no optimizer owns")

L2 = {"rules": [{"name": "l2", "penalty": "l2(0.1)"}]}
RATE = 0.1


def stepped(model: nn.Module, parameters: Any, batches: Batches) -> None:
    optimizer = SGD(parameters, lr=RATE)
    loss_of(model, *batches[0]).backward()
    optimizer.step()


def test_weights_left_out_of_the_optimizer_are_told_at_its_first_step(make_model, batches):
    model = make_model()
    regkit.attach(model, L2)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    before = model.rnn.weight_hh_l0.detach().clone()
    with pytest.raises(regkit.StepError, match=r"no optimizer owns rnn.bias_ih_l0, rnn.bias_hh_l0, though.*freeze"):
        stepped(model, matrices, batches)
    assert torch.equal(model.rnn.weight_hh_l0, before)


def test_an_optimizer_made_before_a_layer_was_replaced_is_told(make_model, batches):
    model = make_model()
    optimizer = SGD(model.parameters(), lr=RATE)
    model.rnn = nn.LSTM(3, 4).double()
    regkit.attach(model, L2)
    loss_of(model, *batches[0]).backward()
    with pytest.raises(regkit.StepError, match=r"no optimizer owns rnn.weight_ih_l0, rnn.weight_hh_l0"):
        optimizer.step()


def test_an_optimizer_made_before_its_weights_were_assigned_anew_is_told(make_model, batches):
    model = make_model()
    optimizer = SGD(model.parameters(), lr=RATE)
    regkit.attach(model, L2)
    model.rnn.load_state_dict({key: value.clone() for key, value in model.rnn.state_dict().items()}, assign=True)
    loss_of(model, *batches[0]).backward()
    with pytest.raises(regkit.StepError, match=r"no optimizer owns rnn.weight_ih_l0"):
        optimizer.step()


def test_what_another_living_optimizer_owns_is_owned(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, L2)
    optimizers = [SGD([p for p in model.parameters() if p.dim() == rank], lr=RATE) for rank in (1, 2)]
    loss_of(model, *batches[0]).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert attachment.step_count == 1


def test_frozen_weights_and_optional_rules_need_no_owner(make_model, batches):
    frozen, optional = make_model(), make_model()
    regkit.attach(frozen, L2)
    for name, p in frozen.named_parameters():
        p.requires_grad_("bias" not in name)
    stepped(frozen, [p for p in frozen.parameters() if p.requires_grad], batches)

    regkit.attach(optional, {"rules": [{**L2["rules"][0], "optional": True}]})
    stepped(optional, optional.head.parameters(), batches)


def test_an_optimizer_of_something_else_is_not_asked(make_model):
    model, other = make_model(), nn.Linear(2, 2)
    regkit.attach(model, L2)
    other(torch.randn(1, 2)).sum().backward()
    SGD(other.parameters(), lr=RATE).step()


def test_what_is_updated_by_hand_needs_no_optimizer_and_the_rest_does(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, L2)
    biases = [p for p in model.parameters() if p.dim() == 1]
    for p in biases[:1]:
        p.grad = torch.zeros_like(p)
    with attachment.step():
        pass
    with pytest.raises(regkit.StepError, match=r"no optimizer owns rnn.bias_hh_l0, though"):
        stepped(model, [p for p in model.parameters() if p.dim() == 2], batches)


def test_a_failed_step_that_is_taken_again_by_hand_makes_nothing_unowned_silent(make_model, batches):
    """An optimizer that owns too little and comes afterwards is told all the same."""

    class Failing(SGD):
        def step(self, closure: Any = None) -> None:
            raise ZeroDivisionError

    model = make_model()
    attachment = regkit.attach(model, L2)
    loss_of(model, *batches[0]).backward()
    optimizer = Failing(model.parameters(), lr=RATE)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    with attachment.step():
        pass
    del optimizer
    model.rnn.weight_hh_l0 = nn.Parameter(model.rnn.weight_hh_l0.detach().clone())
    with pytest.raises(regkit.StepError, match=r"no optimizer owns rnn.weight_hh_l0"):
        stepped(model, [p for p in model.parameters() if p is not model.rnn.weight_hh_l0], batches)


def test_optimizers_that_gc_freeze_has_hidden_are_a_warning_and_no_error(make_model, batches):
    """The garbage collector does not show them, and nothing else knows of them before their first step."""
    model = make_model()
    attachment = regkit.attach(model, L2)
    optimizers = [SGD([p for p in model.parameters() if p.dim() == rank], lr=RATE) for rank in (1, 2)]
    loss_of(model, *batches[0]).backward()
    gc.freeze()
    try:
        with pytest.warns(regkit.RegkitWarning, match=r"no optimizer that can be seen owns rnn.*gc.freeze\(\) hid"):
            optimizers[0].step()
    finally:
        gc.unfreeze()
    optimizers[1].step()
    assert attachment.step_count == 1


def test_weights_made_after_gc_freeze_can_be_told_to_have_no_owner(make_model, batches):
    """An optimizer from before it cannot have been made of them. Many programs freeze before they begin."""
    gc.freeze()
    try:
        model = make_model()
        regkit.attach(model, L2)
        with pytest.raises(regkit.StepError, match=r"no optimizer owns rnn.bias_ih_l0"):
            stepped(model, [p for p in model.parameters() if p.dim() == 2], batches)
    finally:
        gc.unfreeze()
