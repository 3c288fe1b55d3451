"""An optimizer that changes between two steps, in one way at a time, or what it trains: all is seen at the next."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import SGD, Optimizer

import regkit
from tests.support.resting import L2, Times, begun, step

# --- optimizers that owned nothing of the model ----------------------------------------------------------------------


def stranger(*parameters: nn.Parameter) -> Optimizer:
    """An optimizer that has stepped before any of its parameters is the model's."""
    optimizer = SGD(parameters, lr=0.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def test_an_optimizer_is_the_attachments_once_what_it_owns_is_put_into_the_model():
    cell, new = nn.RNNCell(3, 4), nn.Parameter(torch.ones(4, 4))
    begun(cell)
    optimizer = stranger(new)
    cell.weight_hh = new
    optimizer.step()
    torch.testing.assert_close(new.grad, torch.ones(4, 4))


def test_an_optimizer_is_the_attachments_once_what_it_owns_is_added_behind_all_others():
    """With a rule on activity, whatever the model has makes a step the attachment's."""
    cell, new = nn.RNNCell(3, 4), nn.Parameter(torch.ones(4))
    attachment = regkit.attach(cell, {"rules": [{"penalty": "activity_l2(1)"}]})
    everything = SGD(cell.parameters(), lr=0.0)
    (cell(torch.ones(2, 3)).sum() + attachment.penalty()).backward()
    everything.step()
    optimizer = stranger(new)
    cell.extra = new
    cell(torch.ones(2, 3))
    with pytest.raises(regkit.StepError, match="were not consumed before the optimizer's step"):
        optimizer.step()


def test_the_optimizer_of_a_new_weight_is_told_that_another_module_of_the_model_is_gone():
    model = nn.ModuleList([nn.RNNCell(3, 4), nn.RNNCell(3, 4)])
    begun(model)
    new = nn.Parameter(torch.ones(4, 4))
    optimizer = stranger(new)
    model[1].weight_hh = new
    model[0] = nn.Identity()
    gc.collect()
    with pytest.raises(regkit.AttachError, match="was replaced or removed"):
        optimizer.step()


# --- optimizers ------------------------------------------------------------------------------------------------------


def test_a_parameter_that_is_taken_out_of_an_optimizer_in_place_is_trained_by_it_no_more():
    cell = nn.RNNCell(3, 4)
    optimizer = begun(cell)
    params = optimizer.param_groups[0]["params"]
    params[:] = [one for one in params if one is not cell.weight_hh]
    step(cell, optimizer)
    assert not cell.weight_hh.grad.any()


def test_a_parameter_that_moves_from_one_group_to_the_next_decays_at_the_rate_of_that():
    """All of them are the same, in the same order."""
    cell = nn.RNNCell(3, 4, bias=False)
    regkit.attach(cell, {"rules": [{"target": {"role": "recurrent"}, "penalty": "l2(0.5)", "via": "decoupled"}]})
    optimizer = SGD([{"params": [cell.weight_ih, cell.weight_hh], "lr": 0.0}, {"params": [], "lr": 0.5}])
    step(cell, optimizer)
    before = cell.weight_hh.detach().clone()
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    step(cell, optimizer)
    torch.testing.assert_close(cell.weight_hh.detach(), before / 2)


def test_parameters_that_two_groups_exchange_decay_at_each_others_rate():
    """There are as many as before in each, and the model is what it was."""
    cell = nn.RNNCell(3, 4, bias=False)
    regkit.attach(cell, {"rules": [{"target": {"role": "recurrent"}, "penalty": "l2(0.5)", "via": "decoupled"}]})
    optimizer = SGD([{"params": [cell.weight_ih], "lr": 0.5}, {"params": [cell.weight_hh], "lr": 0.0}])
    step(cell, optimizer)
    before = cell.weight_hh.detach().clone()
    for group, parameter in zip(optimizer.param_groups, (cell.weight_hh, cell.weight_ih), strict=True):
        group["params"][0] = parameter
    step(cell, optimizer)
    torch.testing.assert_close(cell.weight_hh.detach(), before / 2)


def test_what_an_optimizer_owned_is_gone_with_it():
    """A loop may make a new one at each step, while the model stays."""
    cell = nn.RNNCell(3, 4)
    begun(cell)
    new = nn.Parameter(torch.ones(4))
    alive = weakref.ref(new)
    stranger(new)
    del new
    gc.collect()
    assert alive() is None


def test_the_groups_that_are_loaded_have_the_rate_that_counts():
    cell = nn.RNNCell(3, 4)
    regkit.attach(cell, {"rules": [{"target": {"role": "recurrent"}, "penalty": "l2(0.5)", "via": "decoupled"}]})
    optimizer = SGD(cell.parameters(), lr=0.0)
    step(cell, optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(saved)
    before = cell.weight_hh.detach().clone()
    step(cell, optimizer)
    torch.testing.assert_close(cell.weight_hh.detach(), before / 2)


def test_a_group_that_is_taken_away_is_not_there_any_more():
    cell = nn.RNNCell(3, 4)
    regkit.attach(cell, L2)
    optimizer = SGD([{"params": [cell.weight_ih]}, {"params": [cell.weight_hh]}], lr=0.0)
    step(cell, optimizer)
    del optimizer.param_groups[1]
    step(cell, optimizer)
    assert not cell.weight_hh.grad.any()


@pytest.mark.parametrize("scale", [None, 4.0])
def test_an_optimizer_may_begin_and_cease_to_maximize_between_steps(scale: float | None):
    """Also one that divides by the loss scale itself, as a fused one does within GradScaler."""
    cell = nn.RNNCell(3, 4)
    optimizer = begun(cell)
    if scale is not None:
        optimizer = SGD(cell.parameters(), lr=0.0, fused=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
    for up in (True, False):
        optimizer.param_groups[0]["maximize"] = up
        step(cell, optimizer)
        torch.testing.assert_close(cell.weight_hh.grad, (-1 if up else 1) * cell.weight_hh.detach())


@pytest.mark.parametrize("computed", [False, True])
def test_of_two_groups_one_may_maximize(computed: bool):
    """The penalty of what it owns is made small all the same, and no other sign is turned."""
    cell = nn.RNNCell(3, 4)
    for name in ("weight_ih", "weight_hh") if computed else ():
        parametrize.register_parametrization(cell, name, Times(2.0))
    leaves = [one for one in cell.parameters() if one.dim() == 2]
    attachment = regkit.attach(cell, {"rules": [{"target": {"role": ["kernel", "recurrent"]}, "penalty": "l2(0.5)"}]})
    optimizer = SGD([{"params": [one]} for one in leaves], lr=0.0)
    for signs in ((1, -1), (-1, 1), (-1, -1), (1, 1)):
        for group, sign in zip(optimizer.param_groups, signs, strict=True):
            group["maximize"] = sign < 0
        step(cell, optimizer)
        for leaf, sign in zip(leaves, signs, strict=True):
            torch.testing.assert_close(leaf.grad, sign * (4 if computed else 1) * leaf.detach())
    assert attachment.step_count == 4


# --- what is trained -------------------------------------------------------------------------------------------------


def test_a_weight_without_a_gradient_is_left_alone_at_that_step_and_at_no_other():
    cell = nn.RNNCell(3, 4)
    attachment = regkit.attach(cell, {"rules": [{"penalty": "l2(0.5)"}]})
    optimizer = SGD(cell.parameters(), lr=0.0)
    for present in (True, False, True, False):
        for parameter in cell.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if not present:
            cell.weight_ih.grad = None
        optimizer.step()
        torch.testing.assert_close(cell.weight_hh.grad, cell.weight_hh.detach())
        if present:
            torch.testing.assert_close(cell.weight_ih.grad, cell.weight_ih.detach())
        else:
            assert cell.weight_ih.grad is None
    assert attachment.step_count == 4


def test_a_weight_that_is_frozen_between_steps_is_left_alone_as_soon_as_it_has_no_gradient():
    cell = nn.RNNCell(3, 4)
    optimizer = begun(cell, {"rules": [{"penalty": "l2(0.5)"}]})
    cell.weight_hh.requires_grad_(False)
    for parameter in cell.parameters():
        parameter.grad = None if parameter is cell.weight_hh else torch.zeros_like(parameter)
    optimizer.step()
    assert cell.weight_hh.grad is None
    torch.testing.assert_close(cell.weight_ih.grad, cell.weight_ih.detach())


def test_a_frozen_weight_that_has_a_gradient_is_moved_by_torch_and_so_regularized():
    cell = nn.RNNCell(3, 4)
    optimizer = begun(cell, {"rules": [{"penalty": "l2(0.5)"}]})
    cell.weight_hh.requires_grad_(False)
    for parameter in cell.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(cell.weight_hh.grad, cell.weight_hh.detach())
    cell.weight_hh.requires_grad_(True)
    step(cell, optimizer)
    torch.testing.assert_close(cell.weight_hh.grad, cell.weight_hh.detach())


def test_a_step_that_is_taken_again_after_it_was_done_adds_its_penalties_again():
    """It is another step, though no backward pass was between: of one that failed, they would be there already."""
    cell = nn.RNNCell(3, 4)
    optimizer = begun(cell)
    step(cell, optimizer)
    optimizer.step()
    torch.testing.assert_close(cell.weight_hh.grad, 2 * cell.weight_hh.detach())


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_is_skipped_leaves_finite_gradients_as_they_are(with_closure: bool):
    """A fused optimizer skips it by itself where GradScaler has found an overflow in any gradient."""
    cell = nn.RNNCell(3, 4)
    attachment = regkit.attach(cell, L2)
    optimizer = SGD(cell.parameters(), lr=0.0, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    for parameter in cell.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(lambda: 0.0) if with_closure else optimizer.step()
    assert not cell.weight_hh.grad.any()
    assert attachment.step_count == 0


def test_the_gradient_of_each_step_is_scaled_as_the_schedule_says():
    cell = nn.RNNCell(3, 4)
    schedule = {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 2}
    optimizer = begun(cell, {"rules": [{**L2["rules"][0], "schedule": schedule}]})
    assert not cell.weight_hh.grad.any()
    for factor in (0.5, 1.0, 1.0):
        step(cell, optimizer)
        torch.testing.assert_close(cell.weight_hh.grad, factor * cell.weight_hh.detach())
