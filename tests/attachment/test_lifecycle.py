"""Attachments that are detached, taken off for a while, or asked for penalties that no step is made of."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import regkit
from regkit.runtime import optimizer_hooks

L2 = {"rules": [{"penalty": "l2(0.5)"}]}
LOSS = {"rules": [{"penalty": "l2(0.5)", "via": "loss"}]}
AR = {"rules": [{"penalty": "activity_l2(1)"}]}
X = torch.ones(3, 2, 3)


def stranger_steps() -> None:
    """A step of an optimizer of another model."""
    other = nn.Linear(1, 1)
    other(torch.ones(1)).backward()
    SGD(other.parameters(), lr=0.1).step()


# --- detach and detached ---------------------------------------------------------------------------------------------


def test_a_detached_attachment_cannot_be_taken_off():
    attachment = regkit.attach(nn.RNN(3, 4), L2)
    attachment.detach()
    with pytest.raises(regkit.RegkitError, match="nothing to take off"), attachment.detached():
        raise AssertionError("not reached")


def test_detach_inside_detached_is_for_good():
    model = nn.RNN(3, 4)
    attachment = regkit.attach(model, AR)
    with attachment.detached():
        attachment.detach()
    assert not model._forward_hooks
    assert not optimizer_hooks._listeners


def test_the_inner_of_two_detached_puts_nothing_back():
    model = nn.RNN(3, 4)
    attachment = regkit.attach(model, AR)
    with attachment.detached():
        with attachment.detached():
            pass
        assert not model._forward_hooks
    assert len(model._forward_hooks) == 1


def test_after_detach_the_end_of_the_model_means_nothing_to_its_modules():
    rnn = nn.RNN(3, 4)
    model = nn.ModuleList([rnn])
    attachment = regkit.attach(model, L2)
    attachment.detach()
    del model
    gc.collect()
    rnn(X)[0].sum().backward()
    SGD(rnn.parameters(), lr=0.1).step()


def test_a_detached_attachment_holds_no_gradient_of_a_failed_step():
    class Failing(SGD):
        def step(self, closure=None):
            raise ZeroDivisionError

    model = nn.RNN(3, 4)
    attachment = regkit.attach(model, L2)
    model(X)[0].sum().backward()
    with pytest.raises(ZeroDivisionError):
        Failing(model.parameters(), lr=0.1).step()
    gradients = [weakref.ref(p.grad) for p in model.parameters()]
    attachment.detach()
    model.zero_grad()
    gc.collect()
    assert [one() for one in gradients] == [None] * 4


def test_constraints_are_applied_with_the_bound_of_the_present_step():
    model = nn.RNN(3, 4)
    attachment = regkit.attach(model, {"rules": [{"constraint": "max_norm(1)", "schedule": "linear(1, 0.1, 1)"}]})
    optimizer = SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(X)[0].sum().backward()
        optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(2.0)
    attachment.weights_changed()
    attachment.apply_constraints()
    assert float(model.weight_ih_l0.detach().norm(dim=1).max()) == pytest.approx(0.1)


# --- penalties that no step is made of -------------------------------------------------------------------------------


def step(model: nn.Module, attachment: regkit.Attachment) -> None:
    model.zero_grad()
    (model(X)[0].sum() + attachment.penalty()).backward()
    SGD(model.parameters(), lr=0.0).step()


def test_a_penalty_taken_under_no_grad_need_not_be_in_the_loss():
    model = nn.RNN(3, 4)
    attachment = regkit.attach(model, LOSS)
    with torch.no_grad():
        attachment.penalty()
    step(model, attachment)
    assert attachment.step_count == 1


def test_a_penalty_of_weights_that_were_frozen_need_not_be_in_the_loss():
    model = nn.RNN(3, 4)
    attachment = regkit.attach(model, LOSS)
    model.requires_grad_(False)
    attachment.penalty()
    model.requires_grad_(True)
    step(model, attachment)
    assert attachment.step_count == 1


@pytest.mark.parametrize("rules", [LOSS, AR])
def test_discard_keeps_what_was_backpropagated(rules):
    model = nn.RNN(3, 4)
    attachment = regkit.attach(model, rules)
    (model(X)[0].sum() + attachment.penalty()).backward()
    skipped = model(X)[0].sum() + attachment.penalty()
    attachment.discard()
    SGD(model.parameters(), lr=0.0).step()
    assert attachment.step_count == 1
    assert skipped.requires_grad


# --- outputs that lie over the steps of strangers --------------------------------------------------------------------


def recorded(model: nn.Module, times: int = 1) -> Tensor:
    return torch.stack([model(X)[0].sum() for _ in range(times)]).sum()


def test_outputs_left_over_by_one_step_are_no_leftovers_once_consumed():
    model = nn.RNN(3, 4)
    attachment = regkit.attach(model, AR)
    loss = recorded(model)
    stranger_steps()
    (loss + attachment.penalty()).backward()
    optimizer = SGD(model.parameters(), lr=0.0)
    optimizer.step()
    (recorded(model, 2) + attachment.penalty()).backward()
    optimizer.step()
    assert attachment.step_count == 2


def test_outputs_from_before_a_strangers_step_and_after_it_are_refused_at_the_next():
    model = nn.RNN(3, 4)
    regkit.attach(model, AR)
    recorded(model)
    stranger_steps()
    recorded(model)
    with pytest.raises(regkit.StepError, match="from before an optimizer's step and from after it"):
        stranger_steps()


def test_a_strangers_step_in_another_thread_leaves_nothing_over():
    model = nn.RNN(3, 4)
    attachment = regkit.attach(model, AR)
    loss = recorded(model)
    thread = threading.Thread(target=stranger_steps)
    thread.start()
    thread.join()
    (loss + recorded(model) + attachment.penalty()).backward()
    SGD(model.parameters(), lr=0.0).step()
    assert attachment.step_count == 1
