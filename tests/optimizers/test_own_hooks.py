"""Hooks of an optimizer's own: what they do to gradients comes before penalties, as clipping in a loop does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import regkit
from tests.support.loops import DECAY, RULE, assert_equal_weights, loss_of, rnn_groups, train

BALL = {"target": {"role": "recurrent"}, "constraint": "max_norm(0.1)"}


def clip(optimizer: Optimizer, *_: Any) -> None:
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.01)


def fail(*_: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("attached_first", [True, False])
@pytest.mark.parametrize("make", [SGD, Adam])
def test_a_clip_in_the_optimizers_own_pre_hook_leaves_the_penalty_alone(make, attached_first, make_model, batches):
    by_decay, regularized = make_model(), make_model()
    if attached_first:
        regkit.attach(regularized, RULE)
    for model, decay in ((by_decay, DECAY), (regularized, 0.0)):
        optimizer = make(rnn_groups(model, decay), lr=0.1)
        optimizer.register_step_pre_hook(clip)
        if model is regularized and not attached_first:
            regkit.attach(regularized, RULE)
        train(model, optimizer, batches)
    assert_equal_weights(by_decay, regularized)


def test_a_hook_that_is_registered_between_steps_sees_gradients_without_penalties(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, {"rules": [*RULE["rules"], BALL]})
    optimizer = SGD(model.parameters(), lr=0.1)
    train(model, optimizer, batches[:1])
    seen: list[Tensor] = []
    handle = optimizer.register_step_pre_hook(lambda *_: seen.append(model.rnn.weight_ih_l0.grad.clone()))
    optimizer.zero_grad()
    loss_of(model, *batches[1]).backward()
    bare = model.rnn.weight_ih_l0.grad.clone()
    optimizer.step()
    assert torch.equal(*seen, bare)
    assert not torch.equal(model.rnn.weight_ih_l0.grad, bare)
    handle.remove()
    train(model, optimizer, batches[2:])
    assert attachment.step_count == len(batches)
    assert float(attachment.violations()["rules/1"]) < 1e-9


def test_penalties_come_behind_a_closure_that_such_a_hook_hands_in(make_model, batches):
    by_decay, regularized = make_model(), make_model()
    regkit.attach(regularized, RULE)
    for model, decay in ((by_decay, DECAY), (regularized, 0.0)):
        optimizer = SGD(rnn_groups(model, decay), lr=0.1)

        def hand_in(optimizer: Optimizer, *_: Any, model: nn.Module = model) -> tuple[Any, Any]:
            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, *batches[0])
                loss.backward()
                return loss

            return (optimizer, closure), {}

        optimizer.register_step_pre_hook(hand_in)
        for _ in range(3):
            optimizer.step()
    assert_equal_weights(by_decay, regularized)


def test_nothing_is_left_among_the_optimizers_hooks(make_model, batches):
    model = make_model()
    regkit.attach(model, RULE)
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = optimizer.register_step_pre_hook(clip)
    train(model, optimizer, batches)
    assert list(optimizer._optimizer_step_pre_hooks.values()) == [clip]
    handle.remove()
    train(model, optimizer, batches)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_step_in_which_such_a_hook_fails_has_not_begun(make_model, batches):
    by_decay, regularized = make_model(), make_model()
    attachment = regkit.attach(regularized, RULE)
    for model, decay in ((by_decay, DECAY), (regularized, 0.0)):
        optimizer = SGD(rnn_groups(model, decay), lr=0.1)
        loss_of(model, *batches[0]).backward()
        before = [p.grad.clone() for p in model.parameters()]
        handle = optimizer.register_step_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        assert all(torch.equal(p.grad, kept) for p, kept in zip(model.parameters(), before, strict=True))
        handle.remove()
        optimizer.step()
        assert not optimizer._optimizer_step_pre_hooks
    assert attachment.step_count == 1
    assert_equal_weights(by_decay, regularized)
