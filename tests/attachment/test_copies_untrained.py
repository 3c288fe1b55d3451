"""Copies that are not trained, as averages and target networks, stay bare; nothing is left of one that is dropped."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import regkit
from regkit.runtime import optimizer_hooks
from tests.support.copying import WAYS, inert_hooks
from tests.support.counting import calls
from tests.support.loops import DECAY, RULE, assert_equal_weights, loss_of, rnn_groups, train

averages = pytest.mark.works_with("Copies: averages and target networks")
copies = pytest.mark.works_with("Copies: deepcopy, pickle, torch.save")

L2 = {"rules": [{"name": "l2", "penalty": "l2(0.1)"}]}
SCHEDULED = {
    "rules": [
        {"penalty": "l2(0.2)", "schedule": "linear(0, 1, 8)"},
        {"name": "ball", "constraint": "max_norm(0.4)", "every": 3},
    ]
}


@averages
@pytest.mark.parametrize("ema", [False, True])
def test_an_average_of_the_weights_stays_bare(ema, make_model, batches):
    models = make_model(), make_model()
    means = []
    for model in models:
        optimizer = SGD(rnn_groups(model, DECAY if model is models[0] else 0.0), lr=0.1)
        if model is models[1]:
            attachment = regkit.attach(model, {"rules": [*RULE["rules"], {"penalty": "activity_l2(1e-30)"}]})
        means.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if ema else None))
        for x, y in batches:
            optimizer.zero_grad()
            loss = loss_of(model, x, y) + (attachment.penalty() if model is models[1] else 0.0)
            loss.backward()
            optimizer.step()
            means[-1].update_parameters(model)
            means[-1](x)  # evaluated with gradients, even: it has no store
    update_bn([x for x, _ in batches], means[1])
    assert_equal_weights(*models)
    assert_equal_weights(*means)
    assert attachment.step_count == 4
    assert not hooks_of_copies(means[1].module)


def hooks_of_copies(model: nn.Module) -> list[Any]:
    return [hook for one in model.modules() for hook in one._forward_hooks.values() if not hook.inert]


@averages
@pytest.mark.parametrize("frozen", [False, True])
def test_a_target_network_follows_and_is_not_regularized(frozen, make_model, batches):
    online, twin = make_model(), make_model()
    attachment = regkit.attach(online, RULE)
    targets = [copy.deepcopy(online), copy.deepcopy(twin)]
    for model, target, decay in ((online, targets[0], 0.0), (twin, targets[1], DECAY)):
        target.requires_grad_(not frozen)
        optimizer = SGD(rnn_groups(model, decay), lr=0.1)
        for x, _ in batches * 2:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), target(x)).backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(target.parameters(), model.parameters(), strict=True):
                    slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
    assert_equal_weights(online, twin)
    assert_equal_weights(*targets)
    assert attachment.step_count == 8


def listeners() -> int:
    return len(optimizer_hooks._listeners)


@copies
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_that_is_dropped_is_gone_at_once(way, trained, make_model, batches):
    model = make_model()
    regkit.attach(model, SCHEDULED)
    before = listeners()
    gc.collect()
    gc.disable()
    try:
        copied = way(model)
        if trained:
            train(copied, SGD(copied.parameters(), lr=0.1), batches)
        gone = [weakref.ref(copied), weakref.ref(copied.rnn.weight_hh_l0)]
        later = [weakref.ref(one) for one in vars(copied)["_regkit_companions"]]
        later += [weakref.ref(one) for one in regkit.attachments(copied)] if trained else []
        gc.collect()  # an optimizer is in a circle of its own
        assert listeners() == before + 1
        del copied
        assert [one() for one in gone] == [None, None]
        assert listeners() == before
        gc.collect()
        assert [one() for one in later] == [None] * len(later)
    finally:
        gc.enable()


@copies
def test_generations_of_copies_do_not_gather_hooks(make_model, batches):
    model = make_model()
    regkit.attach(model, {"rules": [*L2["rules"], {"penalty": "activity_l2(1)", "optional": True}]})
    first = inert_hooks(model)
    for _ in range(5):
        model = copy.deepcopy(copy.deepcopy(model))
        (attachment,) = regkit.attachments(model)
        for x, y in batches[:1]:
            (loss_of(model, x, y) + attachment.penalty()).backward()
        SGD(model.parameters(), lr=0.1).step()
        assert inert_hooks(model) == first
        assert len(vars(model)["_regkit_companions"]) == 1
    assert attachment.step_count == 5


@copies
def test_hundreds_of_copies_do_not_slow_the_originals_steps():
    model = nn.LSTM(3, 4)
    regkit.attach(model, L2)
    optimizer = SGD(model.parameters(), lr=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    optimizer.step()
    before, alone = listeners(), calls(optimizer.step)
    for number in (1, 150):
        copies = [copy.deepcopy(model) for _ in range(number)]
        optimizer.step()  # it is asked once whom it steps
        assert listeners() == before + 1
        assert alone < calls(optimizer.step) <= alone + 4
        del copies
        assert listeners() == before
        assert calls(optimizer.step) == alone
