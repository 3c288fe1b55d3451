"""Modules under rules on outputs, of which every parameter is parametrized after `attach`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import regkit

X = torch.linspace(-1, 1, 24).reshape(4, 2, 3).double()
FACTORS = [1.0, 1.0, 10.0]
SCHEDULE = {"kind": "piecewise", "boundaries": [2], "values": [1.0, 10.0]}


def make() -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(3, 4).double()


def parametrized(via: str) -> tuple[nn.GRU, regkit.Attachment, torch.optim.Optimizer]:
    model = make()
    rule = {"penalty": "activity_l2(1)", "via": via, "schedule": SCHEDULE}
    attachment = regkit.attach(model, {"rules": [rule]}, loss_scale=1.0 if via == "inject" else None)
    for name in [name for name, _ in model.named_parameters()]:
        parametrize.register_parametrization(model, name, nn.Identity())
    return model, attachment, torch.optim.SGD(model.parameters(), lr=0.0)


@pytest.mark.parametrize("via", ["loss", "inject"])
def test_steps_are_counted_and_schedules_go_on(via):
    model, attachment, optimizer = parametrized(via)
    bare = make()
    (expected,) = torch.autograd.grad(bare(X)[0].square().mean(), [bare.bias_hh_l0])
    for factor in FACTORS:
        optimizer.zero_grad()
        (model(X)[0].sum() * 0 + attachment.penalty()).backward()
        torch.testing.assert_close(model.parametrizations["bias_hh_l0"].original.grad, factor * expected)
        optimizer.step()
    assert attachment.step_count == len(FACTORS)


@pytest.mark.parametrize("via", ["loss", "inject"])
def test_a_module_that_is_run_by_its_forward_is_told(via):
    model, attachment, optimizer = parametrized(via)
    (model.forward(X)[0].sum() + attachment.penalty()).backward()
    with pytest.raises(regkit.StepError, match="recorded nothing in this step, although its weights were trained"):
        optimizer.step()
