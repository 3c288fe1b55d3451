"""One notion of trained: what torch moves is regularized and reported, what nothing moves is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import regkit

BALL = {"name": "ball", "target": {"role": "recurrent"}, "constraint": "max_norm(0.1)"}
DECAY = {"name": "decay", "target": {"role": "recurrent"}, "penalty": "l2(0.5)"}
TWO = {"rules": [BALL, DECAY]}


def two() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.RNN(3, 4), "b": nn.RNN(3, 4)}).double()


def test_plan_values_and_violations_agree_on_what_is_frozen():
    model = two()
    model["a"].requires_grad_(False)
    with torch.no_grad():
        model["a"].weight_hh_l0.mul_(100)
    plan = regkit.resolve(model, TWO)
    rows = {(row[0], row[2]): row[-1] for row in plan.rows()}
    assert rows == {
        ("ball", "a"): "frozen: left alone",
        ("ball", "b"): "projected after each step",
        ("decay", "a"): "frozen: left alone",
        ("decay", "b"): "added to the gradient at each step",
    }
    attachment = regkit.attach(model, TWO)
    b = model["b"].weight_hh_l0.detach()
    torch.testing.assert_close(attachment.values()["decay"], 0.5 * b.square().sum())
    torch.testing.assert_close(attachment.violations()["ball"], b.norm(dim=1).max() - 0.1)
    attachment.apply_constraints()
    assert float(attachment.violations()["ball"]) < 1e-12
    assert float(model["a"].weight_hh_l0.detach().norm(dim=1).max()) > 1


@pytest.mark.parametrize("rule", [BALL, DECAY, {**DECAY, "via": "loss"}, {**DECAY, "via": "proximal"}])
def test_a_rule_that_can_act_on_frozen_weights_alone_is_an_error_unless_it_may_wait(rule):
    model = two().requires_grad_(False)
    with pytest.raises(
        regkit.AttachError, match=r"acts on frozen weights alone, and so on nothing \(a\.weight_hh_l0, b\."
    ):
        regkit.attach(model, {"rules": [rule]})
    assert regkit.attachments(model) == ()
    attachment = regkit.attach(model, {"rules": [{**rule, "optional": True}]})
    assert float({**attachment.values(), **attachment.violations()}[rule["name"]]) == 0.0
    model["b"].requires_grad_(True)
    assert float({**attachment.values(), **attachment.violations()}[rule["name"]]) > 0.0


def test_a_frozen_copy_of_a_model_keeps_its_rules():
    model = two()
    regkit.attach(model, TWO)
    average = copy.deepcopy(model).requires_grad_(False)
    (attachment,) = regkit.attachments(average)
    assert float(attachment.values()["decay"]) == 0.0


@pytest.mark.parametrize("how", ["plain", "weight norm"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=["SGD", "Adam"])
def test_a_frozen_weight_that_momentum_goes_on_moving_keeps_to_its_rules(make, how):
    model = two()
    if how == "weight norm":
        for rnn in model.values():
            parametrizations.weight_norm(rnn, "weight_hh_l0")
    attachment = regkit.attach(model, TWO)
    optimizer = make(model.parameters(), lr=0.1, **({"momentum": 0.9} if make is torch.optim.SGD else {}))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for step in range(6):
        optimizer.zero_grad(set_to_none=False)
        sum(rnn(x)[0].sum() for rnn in model.values()).backward()
        if step == 2:
            model["a"].requires_grad_(False)
        before = model["a"].weight_hh_l0.detach().clone()
        optimizer.step()
        moved = not torch.equal(before, model["a"].weight_hh_l0.detach())
        assert moved, "torch has moved it"
        assert float(model["a"].weight_hh_l0.detach().norm(dim=1).max()) < 0.1 + 1e-9
        assert float(attachment.violations()["ball"]) < 1e-9


def test_l2_on_a_weight_that_was_frozen_with_its_gradient_is_weight_decay_as_before():
    decayed, regularized = two(), two()
    regkit.attach(regularized, {"rules": [{"penalty": "l2(0.05)"}]})
    optimizers = [
        torch.optim.SGD(decayed.parameters(), lr=0.1, weight_decay=0.1),
        torch.optim.SGD(regularized.parameters(), lr=0.1),
    ]
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for step in range(4):
        for model, optimizer in zip((decayed, regularized), optimizers, strict=True):
            if step == 2:
                model["a"].requires_grad_(False)
            optimizer.zero_grad(set_to_none=False)
            sum(rnn(x)[0].sum() for rnn in model.values()).backward()
            optimizer.step()
    for one, other in zip(decayed.parameters(), regularized.parameters(), strict=True):
        torch.testing.assert_close(one, other)
