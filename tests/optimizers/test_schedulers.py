"""Learning-rate schedulers, which put a wrapper of their own around optimizer.step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

import regkit
from tests.support.decay import L2_AND_BALL, assert_equals_weight_decay
from tests.support.loops import DECAY, RULE, Batches, assert_equal_weights, loss_of, rnn_groups, train_with_closure

pytestmark = pytest.mark.works_with("Learning-rate schedulers")

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.1),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.1, patience=0, threshold=10.0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)],
        milestones=[3],
    ),
}


def train_scheduled(model: nn.Module, optimizer: Optimizer, scheduler: Any, batches: Batches) -> list[float]:
    """Trains over the batches twice. Returns the learning rates that were in force."""
    rates = []
    for x, y in batches * 2:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step(loss.item()) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
def test_l2_equals_weight_decay_under_a_scheduler(name, make_model, batches):
    def train_with(model: nn.Module, decay: float) -> None:
        optimizer = SGD(rnn_groups(model, decay), lr=0.1, momentum=0.9)
        rates = train_scheduled(model, optimizer, SCHEDULERS[name](optimizer), batches)
        assert len(set(rates)) > 1

    assert assert_equals_weight_decay(make_model, train_with).step_count == 8


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_decoupled_l2_follows_the_scheduled_learning_rate_as_adamw_does(name, tensor_lr, make_model, batches):
    def train_with(model: nn.Module, decay: float) -> None:
        lr = torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05
        optimizer = AdamW(rnn_groups(model, decay), lr=lr, foreach=False)
        train_scheduled(model, optimizer, SCHEDULERS[name](optimizer), batches)

    spec = {"rules": [{**RULE["rules"][0], "via": "decoupled"}]}
    assert_equals_weight_decay(make_model, train_with, spec=spec)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_proximal_steps_follow_the_scheduled_learning_rate(name, make_model, batches):
    by_hand, regularized = make_model(), make_model()
    attachment = regkit.attach(regularized, {"rules": [{"penalty": f"l1({DECAY})", "via": "proximal"}]})
    optimizer = SGD(regularized.parameters(), lr=0.1)
    rates = train_scheduled(regularized, optimizer, SCHEDULERS[name](optimizer), batches)

    optimizer = SGD(by_hand.parameters(), lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)  # OneCycleLR sets momentum as well
    for rate, (x, y) in zip(rates, batches * 2, strict=True):
        optimizer.zero_grad()
        loss = loss_of(by_hand, x, y)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p in by_hand.rnn.parameters():
                p.copy_(p.sign() * (p.abs() - rate * DECAY).clamp(min=0))
        scheduler.step(loss.item()) if name == "ReduceLROnPlateau" else scheduler.step()
    assert_equal_weights(by_hand, regularized)
    assert attachment.step_count == 8


def test_attaching_after_a_scheduler_has_wrapped_the_step_is_no_different(make_model, batches):
    before, after = make_model(), make_model()
    attachments = []
    for model in (before, after):
        if model is before:
            attachments.append(regkit.attach(model, L2_AND_BALL))
        optimizer = SGD(model.parameters(), lr=0.1)
        scheduler = SCHEDULERS["StepLR"](optimizer)
        if model is after:
            attachments.append(regkit.attach(model, L2_AND_BALL))
        for batch in batches:
            train_with_closure(model, optimizer, [batch])
            scheduler.step()
    assert_equal_weights(before, after, 0)
    assert [attachment.step_count for attachment in attachments] == [4, 4]
    assert attachments[1].violations()["ball"] < 1e-9


def test_rule_schedules_count_optimizer_steps_and_not_those_of_a_scheduler(make_model, batches):
    """A scheduler that is stepped once an epoch leaves a rule's schedule to the optimizer."""
    model = make_model()
    rule = {**RULE["rules"][0], "name": "l2", "schedule": {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 8}}
    attachment = regkit.attach(model, {"rules": [rule]})
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    for _ in range(2):
        train_with_closure(model, optimizer, batches)
        scheduler.step()
    squares = sum(p.detach().square().sum() for p in model.rnn.parameters())
    assert attachment.step_count == 8
    torch.testing.assert_close(attachment.values()["l2"], DECAY / 2 * squares)
