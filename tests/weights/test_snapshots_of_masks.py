"""A mask, or what is under it, that changes between two steps: each is seen at the next step."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import regkit
from tests.support.kept_weights import REGISTRY, UNITS, make, part, rules
from tests.support.resting import begun, step


def test_a_mask_that_is_replaced_acts_from_the_next_step_on():
    cell = nn.RNNCell(3, 4)
    prune.identity(cell, "weight_hh")
    optimizer = begun(cell)
    cell.weight_hh_mask = torch.eye(4)
    step(cell, optimizer)
    torch.testing.assert_close(cell.weight_hh_orig.grad, cell.weight_hh_orig.detach() * torch.eye(4))


def test_a_mask_that_is_an_attribute_like_any_other_is_looked_up_at_each_step():
    """No table of the module's has it, so that nothing could tell when it is another."""
    model = make("wired")
    mask = model.wiring
    del model.wiring
    model.wiring = mask
    assert "wiring" not in model._buffers
    optimizer = begun(model, rules("gradient", "kernel", None), registry=REGISTRY)
    model.wiring = 1 - mask
    step(model, optimizer)
    wanted = 0.1 * model.maps.w.detach() * (1 - mask)
    torch.testing.assert_close(part(model.maps.w.grad, "kernel", None), part(wanted, "kernel", None).double())


def test_a_mask_of_a_module_in_a_module_may_be_replaced():
    model = make("side by side", "pruned")
    optimizer = begun(model, rules("gradient", "kernel", None), registry=REGISTRY)
    model.maps.w_mask = torch.zeros_like(model.maps.w_mask)
    step(model, optimizer)
    assert not model.maps.w_orig.grad.any()


@pytest.mark.parametrize("what", ["the module", "its parameter"])
def test_what_is_under_a_mask_may_be_replaced_in_a_module_in_the_module(what: str):
    model = make("wired")
    optimizer = begun(model, rules("gradient", "kernel", None), registry=REGISTRY)
    new = nn.Parameter(torch.ones(2 * UNITS, model.maps.w.size(1), dtype=torch.float64))
    if what == "the module":
        model.maps = nn.Module()
    model.maps.w = new
    optimizer.param_groups[0]["params"][:] = model.parameters()
    step(model, optimizer)
    torch.testing.assert_close(part(new.grad, "kernel", None), part(0.1 * model.wiring.double(), "kernel", None))


def test_of_two_weights_of_one_parameter_each_has_its_own_mask():
    """They are two weights as long as the masks are two, though one parameter is behind both."""
    model = nn.ModuleList([nn.RNNCell(3, 4), nn.RNNCell(3, 4)])
    model[1].weight_hh = model[0].weight_hh
    for cell, rows in zip(model, (torch.eye(4), torch.ones(4, 4)), strict=True):
        prune.custom_from_mask(cell, "weight_hh", rows)
    begun(model)
    raw = model[0].weight_hh_orig
    assert model[1].weight_hh_orig is raw
    torch.testing.assert_close(raw.grad, raw.detach() * (1 + torch.eye(4)))


def test_what_goes_through_a_function_without_an_inverse_and_a_mask_is_not_constrained():
    model = make("wired")
    model.squash = nn.Tanh()
    with pytest.raises(regkit.AttachError, match=r"Tanh\(\) has no right_inverse"):
        regkit.attach(model, rules("constraint", "kernel", None), registry=REGISTRY)


class Shifted(regkit.Penalty):
    """Σ(w − 1)², which has a gradient at 0."""

    kind: Literal["shifted"] = "shifted"

    def value(self, w: Tensor) -> Tensor:
        return (w - 1).square().sum()

    def gradient(self, w: Tensor) -> Tensor:
        return 2 * (w - 1)


def test_what_is_pruned_gets_no_gradient_of_a_penalty_that_has_one_at_zero():
    registry = regkit.Registry()
    registry.register(Shifted)
    cell = nn.RNNCell(3, 4)
    prune.custom_from_mask(cell, "weight_hh", torch.eye(4))
    target = {"role": "recurrent"}
    begun(cell, {"rules": [{"target": target, "penalty": {"kind": "shifted", "strength": 1.0}}]}, registry=registry)
    raw = cell.weight_hh_orig
    torch.testing.assert_close(raw.grad, 2 * (raw.detach() - 1) * torch.eye(4))
