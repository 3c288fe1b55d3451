"""A model that changes between two steps, in one way at a time: each is seen at the next step, whatever stays."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim import SGD, Optimizer

import regkit
from tests.support.kept_weights import REGISTRY, make, part, rules
from tests.support.resting import L2, Times, begun, step
from tests.support.wrapped import WeightDropout

# --- weights that are computed ---------------------------------------------------------------------------------------


def two_of_one() -> tuple[nn.ModuleList, nn.Parameter, Optimizer]:
    """Two cells whose recurrent weights are one and the same since attach(): twice the parameter behind both."""
    model, times = nn.ModuleList([nn.RNNCell(3, 4), nn.RNNCell(3, 4)]), Times(2.0)
    for cell in model:
        parametrize.register_parametrization(cell, "weight_hh", times)
    regkit.attach(model, L2)
    raw = model[1].parametrizations.weight_hh.original = model[0].parametrizations.weight_hh.original
    optimizer = SGD(model.parameters(), lr=0.0)
    step(model, optimizer)
    torch.testing.assert_close(raw.grad, 4 * raw.detach())
    return model, raw, optimizer


def test_a_parametrization_on_top_of_one_of_two_tied_weights_makes_two_weights_of_them():
    model, raw, optimizer = two_of_one()
    model[1].parametrizations.weight_hh.append(Times(3.0))
    step(model, optimizer)
    torch.testing.assert_close(raw.grad, 4 * raw.detach() + 36 * raw.detach())


def test_another_parametrization_of_one_of_two_tied_weights_makes_two_weights_of_them():
    model, raw, optimizer = two_of_one()
    model[1].parametrizations.weight_hh[0] = Times(3.0)
    step(model, optimizer)
    torch.testing.assert_close(raw.grad, 4 * raw.detach() + 9 * raw.detach())


def test_a_list_of_parametrizations_that_is_replaced_is_not_read_any_more():
    cell = nn.RNNCell(3, 4)
    parametrize.register_parametrization(cell, "weight_hh", Times(2.0))
    raw = cell.parametrizations.weight_hh.original
    optimizer = begun(cell)
    other = nn.RNNCell(3, 4)
    parametrize.register_parametrization(other, "weight_hh", Times(3.0))
    other.parametrizations.weight_hh.original = raw
    cell.parametrizations.weight_hh = other.parametrizations.weight_hh
    step(cell, optimizer)
    torch.testing.assert_close(raw.grad, 9 * raw.detach())


def test_an_original_that_is_replaced_is_not_written_to_any_more():
    cell = nn.RNNCell(3, 4)
    parametrize.register_parametrization(cell, "weight_hh", Times(2.0))
    optimizer = begun(cell)
    new = cell.parametrizations.weight_hh.original = nn.Parameter(torch.ones(4, 4))
    optimizer.param_groups[0]["params"][:] = cell.parameters()
    step(cell, optimizer)
    torch.testing.assert_close(new.grad, torch.full((4, 4), 4.0))


def test_a_function_that_a_weight_goes_through_may_be_replaced():
    """The module `squash` has no parameter: nothing but the child of its parent is another."""
    model = make("positive")
    optimizer = begun(model, rules("gradient", "kernel", None), registry=REGISTRY)
    model.squash = nn.Softplus(beta=5)
    step(model, optimizer)
    w = model.maps.w.detach().clone().requires_grad_()
    part(nn.functional.softplus(w, beta=5), "kernel", None).square().sum().mul(0.05).backward()
    torch.testing.assert_close(model.maps.w.grad, w.grad)


@pytest.mark.parametrize("document", [{"penalty": "l2(0.5)"}, {"constraint": "max_norm(1)"}])
def test_a_weight_that_is_computed_is_read_anew_at_each_step(document: Any):
    cell = nn.RNNCell(3, 4)
    parametrize.register_parametrization(cell, "weight_hh", Times(2.0))
    raw = cell.parametrizations.weight_hh.original
    optimizer = begun(cell, {"rules": [{"target": {"role": "recurrent"}, **document}]})
    with torch.no_grad():
        raw.fill_(3)
    step(cell, optimizer)
    if "penalty" in document:
        torch.testing.assert_close(raw.grad, torch.full((4, 4), 12.0))
    else:
        torch.testing.assert_close(cell.weight_hh.norm(dim=1), torch.ones(4))


def test_the_values_of_a_weight_that_is_computed_are_of_what_it_is_now():
    cell = nn.RNNCell(3, 4)
    parametrize.register_parametrization(cell, "weight_hh", Times(2.0))
    attachment = regkit.attach(cell, {"rules": [{**L2["rules"][0], "name": "it"}]})
    for number in (1.0, 3.0):
        with torch.no_grad():
            cell.parametrizations.weight_hh.original.fill_(number)
        torch.testing.assert_close(attachment.values()["it"], torch.tensor(0.5 * 16 * 4 * number**2))


def test_a_weight_that_moves_between_its_penalty_and_the_step_is_read_as_it_is_each_time():
    """As in sharpness-aware minimization. One rule goes through the loss, the other acts at the step."""
    cell = nn.RNNCell(3, 4)
    parametrize.register_parametrization(cell, "weight_hh", Times(2.0))
    raw = cell.parametrizations.weight_hh.original
    through = {"target": {"role": "recurrent"}, "penalty": "l1(0.5)", "via": "loss"}
    attachment = regkit.attach(cell, {"rules": [*L2["rules"], through]})
    optimizer = SGD(cell.parameters(), lr=0.0)
    for _ in range(2):
        for number in (1.0, 3.0):
            nn.init.constant_(raw, number)
            attachment.discard()
            penalty = attachment.penalty()
            torch.testing.assert_close(penalty.detach(), torch.tensor(16 * number))
        for parameter in cell.parameters():
            parameter.grad = torch.zeros_like(parameter)
        penalty.backward()
        nn.init.constant_(raw, 5)
        optimizer.step()
        torch.testing.assert_close(raw.grad, torch.full((4, 4), 1.0 + 20.0))


def test_a_parametrized_weight_of_a_module_in_a_module_that_is_replaced_is_read_where_it_is_now():
    model, other = make("turned", "parametrized"), make("turned", "parametrized")
    optimizer = begun(model, rules("gradient", "kernel", None), registry=REGISTRY)
    model.maps = other.maps
    raw = model.maps.parametrizations.w.original
    nn.init.constant_(raw, 0.5)
    optimizer.param_groups[0]["params"][:] = model.parameters()
    step(model, optimizer)
    assert bool(raw.grad.any())


@pytest.mark.parametrize("rule", [{"penalty": "l2(0.5)"}, {"constraint": "max_norm(1)"}])
def test_a_weight_that_was_computed_for_a_step_is_not_held_until_the_next(rule: Any):
    """Nor for a report: of a large model the weights would be held twice."""
    made: list[weakref.ref[Tensor]] = []

    class Made(Times):
        def forward(self, w: Tensor) -> Tensor:
            result = super().forward(w)
            made.append(weakref.ref(result))
            return result

    cell = nn.RNNCell(3, 4)
    parametrize.register_parametrization(cell, "weight_hh", Made(2.0))
    attachment = regkit.attach(cell, {"rules": [{"target": {"role": "recurrent"}, **rule}]})
    optimizer = SGD(cell.parameters(), lr=0.0)
    for act in (lambda: step(cell, optimizer), attachment.values, attachment.violations, attachment.apply_constraints):
        act()
        gc.collect()
        assert all(one() is None for one in made)
    assert made


# --- names and places ------------------------------------------------------------------------------------------------


def test_a_parameter_that_goes_by_another_name_is_pruned_from_the_next_step_on():
    """The last of a module: pruned, it is the same parameter at the same place in the same table."""
    cell = nn.RNNCell(3, 4)
    optimizer = begun(cell, {"rules": [{"target": {"role": "bias"}, "penalty": "l2(0.5)"}]})
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    prune.custom_from_mask(cell, "bias_hh", mask)
    assert next(reversed(cell._parameters)) == "bias_hh_orig"
    step(cell, optimizer)
    torch.testing.assert_close(cell.bias_hh_orig.grad, cell.bias_hh_orig.detach() * mask)


def test_a_raw_weight_that_a_wrapper_keeps_may_be_replaced_in_the_wrapper():
    """The module that the rule is on has no parameter that is another."""
    wrapper = WeightDropout(nn.LSTM(3, 4), 0.5)
    optimizer = begun(wrapper)
    wrapper.weight_hh_l0_raw = nn.Parameter(torch.ones(16, 4))
    optimizer.param_groups[0]["params"][:] = wrapper.parameters()
    step(wrapper, optimizer)
    torch.testing.assert_close(wrapper.weight_hh_l0_raw.grad, torch.ones(16, 4))


class Nested(nn.Module):
    """A cell in an encoder, beside a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"cell": nn.RNNCell(3, 4)})
        self.head = nn.Linear(4, 2)


def put_another(model: Nested) -> None:
    model.encoder.cell = nn.RNNCell(3, 4)


def put_the_encoder_away(model: Nested) -> None:
    model.encoder = None


def put_another_encoder(model: Nested) -> None:
    model.encoder = nn.ModuleDict({"cell": model.encoder.cell})


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("change", [put_another, put_the_encoder_away])
def test_a_module_that_is_not_in_the_model_any_more_is_an_error_at_the_next_step(change: Any, kept: bool):
    """Whether somebody keeps it or not."""
    model = Nested()
    optimizer = begun(model)
    alive = model.encoder.cell if kept else None
    change(model)
    gc.collect()
    with pytest.raises(regkit.AttachError, match="was replaced or removed"):
        step(model, optimizer)
    assert (alive is not None) is kept


def test_an_encoder_that_is_replaced_around_its_cell_is_an_error_at_the_next_step():
    model = Nested()
    optimizer = begun(model)
    put_another_encoder(model)
    with pytest.raises(regkit.AttachError, match="'encoder' was replaced or removed"):
        step(model, optimizer)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this one process."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_model_that_fsdp1_flattens_after_its_first_step_is_an_error_at_the_next(mesh: Any):
    """With `use_orig_params` every parameter is the object that it was, where it was."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    cell = nn.RNNCell(3, 4)
    optimizer = begun(cell)
    with pytest.warns(UserWarning, match="NO_SHARD"):
        FullyShardedDataParallel(cell, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(regkit.AttachError, match="a piece of a flat parameter of FSDP1"):
        optimizer.step()
