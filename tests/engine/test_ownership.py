"""Which optimizer owns what: whoever comes to own a weight regularizes it from then on."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD

import regkit
from tests.support.counting import prepared
from tests.support.loops import DECAY, RULE, Batches, assert_equal_weights, loss_of
from tests.support.models import MakeModel
from tests.support.scale import cells


def test_an_optimizer_that_comes_to_own_weights_is_known_from_then_on(make_model: MakeModel, batches: Batches):
    """It was a stranger: of a part without rules."""
    model, bare = make_model(), make_model()
    regkit.attach(model, RULE)
    for one, decay in ((model, 0.0), (bare, DECAY)):
        stranger, mine = SGD(one.head.parameters(), lr=0.1), SGD(one.rnn.parameters(), lr=0.1, weight_decay=decay)
        for index, (x, y) in enumerate([*batches, *batches]):
            if index == 4:
                stranger.add_param_group({**mine.param_groups[0], "params": mine.param_groups[0]["params"]})
                mine = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
            one.zero_grad()
            loss_of(one, x, y).backward()
            stranger.step()
            mine.step()
    assert_equal_weights(model, bare)


def test_weights_that_come_to_be_those_of_a_strangers_optimizer_are_regularized_at_its_steps(
    make_model: MakeModel, batches: Batches
):
    model, other = make_model(), make_model()
    attachment = regkit.attach(model, RULE)
    theirs = SGD(other.parameters(), lr=0.1)
    for x, y in batches:
        loss_of(other, x, y).backward()
        theirs.step()
    assert attachment.step_count == 0
    for name, parameter in other.rnn.named_parameters():
        setattr(model.rnn, name, parameter)
    before = [p.detach().clone() for p in other.rnn.parameters()]
    theirs.zero_grad()
    for parameter in other.rnn.parameters():
        parameter.grad = torch.zeros_like(parameter)
    theirs.step()
    assert attachment.step_count == 1
    for now, then in zip(other.rnn.parameters(), before, strict=True):
        torch.testing.assert_close(now.detach(), then - 0.1 * DECAY * then, rtol=1e-12, atol=0)


def test_a_weight_that_comes_to_be_a_strangers_is_regularized_at_its_steps_whoever_stepped_in_between():
    """The weight is one of many, and the step of the model's own optimizer has seen it before the stranger's does."""
    model, other = cells(2)["cells"], cells(1)["cells"]
    regkit.attach(model, {"rules": [{"penalty": "l2(0.05)"}]})
    mine, theirs = prepared(model), prepared(other)
    for optimizer in (theirs, mine):
        optimizer.step()
    model[1].weight_hh = other[0].weight_hh
    mine.step()
    weight, before = other[0].weight_hh, other[0].weight_hh.detach().clone()
    weight.grad = torch.zeros_like(weight)
    theirs.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.01 * 0.1))
