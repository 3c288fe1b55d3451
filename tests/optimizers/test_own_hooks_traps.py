"""Hooks of an optimizer's own under a loss scale, within one another, that fail; and what is left of regkit's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import regkit
from tests.support.loops import Batches, loss_of

L2 = {"rules": [{"penalty": "l2(0.1)", "target": {"module": "rnn"}}]}
DECAY = 0.2

pytestmark = pytest.mark.works_with("Optimizers: hooks of their own")


def clip(optimizer: Optimizer, *_: Any) -> None:
    """Clip the norm of all gradients to a tenth."""
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)


def by_hand(model: nn.Module, batches: Batches, rate: float) -> None:
    """Gradients are clipped, and then decayed: what is done to the penalty at every other place."""
    decayed = set(model.rnn.parameters())
    for x, y in batches:
        model.zero_grad()
        loss_of(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * (p.grad + (DECAY * p if p in decayed else 0))


def train(model: nn.Module, optimizer: Optimizer, batches: Batches, how: str = "plain") -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=how == "scaled")
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            scaler.scale(loss).backward()
            return loss

        if how == "closure":
            optimizer.step(closure)
            continue
        closure()
        scaler.step(optimizer)
        scaler.update()


def assert_close(one: nn.Module, other: nn.Module) -> None:
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("attachments", [1, 2])
@pytest.mark.parametrize("first", ["hook", "rules"])
@pytest.mark.parametrize("how", ["plain", "scaled"])
def test_clipping_in_such_a_hook_leaves_all_penalties_alone(how, first, attachments, make_model, batches):
    wanted, model = make_model(), make_model()
    by_hand(wanted, batches, 0.1)
    optimizer = SGD(model.parameters(), lr=0.1)
    if first == "hook":
        optimizer.register_step_pre_hook(clip)
    for number in range(attachments):
        rule = {"penalty": f"l2({0.1 / attachments})", "target": {"module": "rnn"}, "name": str(number)}
        if number:
            rule = {"penalty": "l1_l2(0, 0.05)", "target": {"module": "rnn"}}
        regkit.attach(model, {"rules": [rule]})
    if first == "rules":
        optimizer.register_step_pre_hook(clip)
    train(model, optimizer, batches, how)
    assert_close(model, wanted)


def test_a_hook_that_makes_the_gradients_anew_is_before_the_penalty(make_model, batches):
    """Sharpness-aware minimization may be written so: the gradients of the batch are taken again elsewhere."""
    model = make_model()
    regkit.attach(model, L2)
    optimizer = SGD(model.parameters(), lr=0.0)

    def anew(*_: Any) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)

    optimizer.register_step_pre_hook(anew)
    train(model, optimizer, batches[:1])
    for p in model.rnn.parameters():
        torch.testing.assert_close(p.grad, 1 + DECAY * p.detach())


def test_a_closure_that_a_hook_puts_in_is_the_one_that_is_followed(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, L2)
    optimizer = SGD(model.parameters(), lr=0.0)

    def closure() -> Tensor:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        return torch.zeros(())

    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, closure), kwargs))
    optimizer.step()
    for p in model.rnn.parameters():
        torch.testing.assert_close(p.grad, 1 + DECAY * p.detach())
    assert attachment.step_count == 1


def test_an_optimizer_that_another_steps_within_a_hook_is_not_confused_with_it(make_model, batches):
    """The inner one has a hook of its own, too, and steps between the global hooks and the last of the outer's."""
    model, other = make_model(), nn.RNNCell(2, 2).double()
    attachments = regkit.attach(model, L2), regkit.attach(other, {"rules": [{"penalty": "l2(0.1)"}]})
    outer, inner = SGD(model.parameters(), lr=0.0), SGD(other.parameters(), lr=0.0)
    for module in (model, other):
        for p in module.parameters():
            p.grad = torch.ones_like(p)
    inner.register_step_pre_hook(lambda *_: None)
    outer.register_step_pre_hook(lambda *_: inner.step())
    outer.step()
    for p in (*model.rnn.parameters(), *other.parameters()):
        torch.testing.assert_close(p.grad, 1 + DECAY * p.detach())
    assert [one.step_count for one in attachments] == [1, 1]


def hooks_of(optimizer: Optimizer) -> list[Any]:
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]


def test_nothing_is_left_on_the_optimizer_or_in_its_copies(make_model, batches):
    model = make_model()
    seen: list[list[Any]] = []

    def copies(optimizer: Optimizer, *_: Any) -> None:
        seen.append(hooks_of(copy.deepcopy(optimizer)) + hooks_of(pickle.loads(pickle.dumps(optimizer))))

    optimizer = Adam(model.parameters())
    optimizer.register_step_pre_hook(copies)
    attachment = regkit.attach(model, L2)
    for _ in range(3):
        train(model, optimizer, batches[:1])
        assert hooks_of(optimizer) == [copies]
    assert seen == [[]] * 3
    attachment.detach()
    assert hooks_of(optimizer) == [copies]


def test_a_hook_that_fails_leaves_nothing_behind_once_the_rules_are_gone_and_the_retry_is_right(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, L2)
    optimizer = SGD(model.parameters(), lr=0.0)
    failing = [True, True]

    def fail(*_: Any) -> None:
        if failing:
            failing.pop()
            raise ZeroDivisionError

    optimizer.register_step_pre_hook(fail)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
    optimizer.step()
    for p in model.rnn.parameters():
        torch.testing.assert_close(p.grad, 1 + DECAY * p.detach())
    assert attachment.step_count == 1
    failing.append(True)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    attachment.detach()
    assert hooks_of(optimizer) == [fail]


def test_a_constraint_is_behind_the_hooks_after_the_step(make_model, batches):
    """torch runs an optimizer's own hooks first there: whatever they write, the constraint holds after the step."""
    model = make_model()
    attachment = regkit.attach(model, {"rules": [{"name": "it", "constraint": "max_norm(0.3)"}]})
    optimizer = SGD(model.parameters(), lr=0.1)

    @torch.no_grad()
    def grow(*_: Any) -> None:
        for p in model.parameters():
            p.mul_(10)

    optimizer.register_step_post_hook(grow)
    train(model, optimizer, batches)
    assert attachment.violations()["it"] < 1e-9
