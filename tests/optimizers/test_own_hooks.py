"""Hooks of an optimizer's own: what they do to gradients comes before penalties, as clipping in a loop does."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import regkit

L2 = {"rules": [{"penalty": "l2(0.5)"}]}
BALL = {"target": {"role": "recurrent"}, "constraint": "max_norm(0.1)"}


def twins() -> tuple[nn.RNN, nn.RNN]:
    torch.manual_seed(0)
    one = nn.RNN(3, 4).double()
    return one, copy.deepcopy(one)


def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.01)


def train(model: nn.RNN, optimizer: torch.optim.Optimizer, with_closure: bool = False, steps: int = 3) -> None:
    torch.manual_seed(1)
    for x in torch.randn(steps, 5, 2, 3, dtype=torch.float64):

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x)[0].square().sum()
            loss.backward()
            return loss

        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.parametrize("attached_first", [True, False])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=["SGD", "Adam"])
def test_a_clip_in_the_optimizers_own_pre_hook_leaves_the_penalty_alone(make, attached_first):
    by_decay, regularized = twins()
    if attached_first:
        regkit.attach(regularized, L2)
    decayed, plain = make(by_decay.parameters(), lr=0.1, weight_decay=1.0), make(regularized.parameters(), lr=0.1)
    decayed.register_step_pre_hook(clip)
    plain.register_step_pre_hook(clip)
    if not attached_first:
        regkit.attach(regularized, L2)
    train(by_decay, decayed)
    train(regularized, plain)
    for one, other in zip(by_decay.parameters(), regularized.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_hook_that_is_registered_between_steps_comes_before_penalties_too():
    regularized, _ = twins()
    attachment = regkit.attach(regularized, {"rules": [*L2["rules"], BALL]})
    optimizer = torch.optim.SGD(regularized.parameters(), lr=0.1)
    train(regularized, optimizer, steps=1)
    seen: list[torch.Tensor] = []
    handle = optimizer.register_step_pre_hook(lambda *_: seen.append(regularized.weight_ih_l0.grad.clone()))
    optimizer.zero_grad()
    regularized(torch.ones(5, 2, 3, dtype=torch.float64))[0].sum().backward()
    bare = regularized.weight_ih_l0.grad.clone()
    optimizer.step()
    assert torch.equal(*seen, bare)
    assert attachment.step_count == 2
    assert float(attachment.violations()["rules/1"]) < 1e-9
    handle.remove()
    train(regularized, optimizer, steps=1)
    assert attachment.step_count == 3


def test_a_closure_that_such_a_hook_hands_in_is_wrapped():
    model, _ = twins()
    attachment = regkit.attach(model, L2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: None)
    train(model, optimizer, with_closure=True)
    assert attachment.step_count == 3


def test_nothing_is_left_on_the_optimizer_nor_in_its_copies():
    model, _ = twins()
    regkit.attach(model, L2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = optimizer.register_step_pre_hook(clip)
    train(model, optimizer)
    assert list(optimizer._optimizer_step_pre_hooks.values()) == [clip]
    pickle.loads(pickle.dumps(optimizer))
    handle.remove()
    train(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_step_in_which_such_a_hook_fails_has_not_begun():
    model, _ = twins()
    attachment = regkit.attach(model, L2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(5, 2, 3, dtype=torch.float64))[0].sum().backward()
    before = [p.grad.clone() for p in model.parameters()]

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert all(torch.equal(p.grad, kept) for p, kept in zip(model.parameters(), before, strict=True))
    handle.remove()
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert attachment.step_count == 1
    for p, w, g in zip(model.parameters(), weights, before, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.1 * (g + w))
    assert not optimizer._optimizer_step_pre_hooks
