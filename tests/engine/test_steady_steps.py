"""What a step looks up is kept from the step before, and looked up anew as soon as anything is another."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import regkit
from tests.support.counting import prepared
from tests.support.loops import DECAY, RULE, Batches, assert_equal_weights, loss_of, rnn_groups
from tests.support.models import MakeModel, Tagger
from tests.support.scale import cells

Change = Callable[[Tagger, Optimizer], Optimizer]


def none(model: Tagger, optimizer: Optimizer) -> Optimizer:
    return optimizer


def new_parameters(model: Tagger, optimizer: Optimizer) -> Optimizer:
    """Every parameter becomes another object, and so does the optimizer."""
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return SGD(rnn_groups(model, optimizer.param_groups[0]["weight_decay"]), lr=0.1)


def new_parameters_in_old_groups(model: Tagger, optimizer: Optimizer) -> Optimizer:
    """In place, in the very lists that the optimizer has, as wrappers do it that shard."""
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    for group, new in zip(optimizer.param_groups, rnn_groups(model, 0), strict=True):
        group["params"][:] = new["params"]
    return optimizer


def one_new_parameter(model: Tagger, optimizer: Optimizer) -> Optimizer:
    old = model.rnn.weight_hh_l0
    model.rnn.weight_hh_l0 = nn.Parameter(old.detach().clone())
    params = optimizer.param_groups[0]["params"]
    params[next(i for i, p in enumerate(params) if p is old)] = model.rnn.weight_hh_l0
    return optimizer


def renamed_parameter(model: Tagger, optimizer: Optimizer) -> Optimizer:
    """Pruning of nothing gives the very same parameter another name."""
    prune.identity(model.rnn, "bias_hh_l0")
    return optimizer


def a_group_more(model: Tagger, optimizer: Optimizer) -> Optimizer:
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5})
    return optimizer


def other_groups(model: Tagger, optimizer: Optimizer) -> Optimizer:
    """What load_state_dict does: the groups are other dicts, of the same parameters."""
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


def thawed(model: Tagger, optimizer: Optimizer) -> Optimizer:
    model.rnn.weight_ih_l0.requires_grad_(True)
    return optimizer


CHANGES: list[Change] = [
    none,
    new_parameters,
    new_parameters_in_old_groups,
    one_new_parameter,
    renamed_parameter,
    a_group_more,
    other_groups,
    thawed,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_l2_is_weight_decay_before_and_after_a_change(change: Change, make_model: MakeModel, batches: Batches):
    decayed, penalized = make_model(), make_model()
    attachment = regkit.attach(penalized, RULE)
    for model, decay in ((decayed, DECAY), (penalized, 0.0)):
        model.rnn.weight_ih_l0.requires_grad_(change is not thawed)
        optimizer: Optimizer = SGD(rnn_groups(model, decay), lr=0.1)
        for index, (x, y) in enumerate([*batches, *batches]):
            if index == len(batches):
                optimizer = change(model, optimizer)
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
    assert attachment.step_count == 2 * len(batches)
    assert_equal_weights(penalized, decayed)


def test_a_weight_that_is_parametrized_between_steps_is_read_as_it_acts(make_model: MakeModel, batches: Batches):
    """By the penalty's definition: the raw weight w acts as 2w, and the gradient of ½·DECAY·(2w)² is 4·DECAY·w."""

    class Doubled(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    model = make_model()
    regkit.attach(model, {"rules": [{**RULE["rules"][0], "target": {"role": "recurrent"}}]})
    optimizer = SGD(model.parameters(), lr=0.1)
    loss_of(model, *batches[0]).backward()
    optimizer.step()
    parametrize.register_parametrization(model.rnn, "weight_hh_l0", Doubled())
    raw = model.rnn.parametrizations.weight_hh_l0.original
    raw.grad = torch.zeros_like(raw)
    before = raw.detach().clone()
    SGD([raw], lr=1.0).step()
    torch.testing.assert_close(raw.detach(), before - 4 * DECAY * before, rtol=1e-12, atol=0)


def test_a_step_by_hand_after_every_parameter_was_replaced_is_a_step_of_its_own(make_model: MakeModel):
    """It trains none of those that the step before it trained, and yet it is no part of the same round."""
    model = make_model()
    attachment = regkit.attach(model, {"rules": [{"constraint": "max_norm(0.1)"}]})
    prepared(model).step()
    model.load_state_dict({name: torch.ones_like(one) for name, one in model.state_dict().items()}, assign=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with attachment.step():
        pass
    assert attachment.step_count == 2
    assert float(attachment.violations()["rules/0"]) < 1e-6


def test_a_step_that_is_taken_again_has_the_penalties_of_two_attachments_once_on_weights_that_are_computed():
    """To work out a gradient behind a parametrization is a backward pass too, of which the other attachment hears."""

    class Doubled(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    cell = nn.GRUCell(3, 4)
    parametrize.register_parametrization(cell, "weight_ih", Doubled())
    for kind in ("l2(0.1)", "l1(0.2)"):
        regkit.attach(cell, {"rules": [{"target": {"role": "kernel"}, "penalty": kind}]})
    optimizer = prepared(cell)
    raw = cell.parametrizations.weight_ih.original
    before = raw.detach().clone()
    hook = register_optimizer_step_pre_hook(fail)  # behind regkit's
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    hook.remove()
    optimizer.step()
    torch.testing.assert_close(raw.grad, 1 + 0.8 * before + 0.4 * before.sign())


def test_a_weight_that_a_hook_of_the_optimizer_replaces_is_projected_at_the_next_step():
    """Its place is found behind the update anew: of the old one nothing would be left, and the next turn is far."""
    cell = nn.GRUCell(3, 4)
    attachment = regkit.attach(cell, {"rules": [{"constraint": "max_norm(0.1)", "every": 4}]})
    optimizer = prepared(cell)

    def replace(optimizer: Optimizer, *_: Any) -> None:
        if attachment.step_count == 7:  # at which every weight is projected, for the second time
            new = nn.Parameter(torch.ones_like(cell.weight_hh))
            params = optimizer.param_groups[0]["params"]
            params[:] = [new if one is cell.weight_hh else one for one in params]
            cell.weight_hh = new

    optimizer.register_step_post_hook(replace)
    for _ in range(8):
        optimizer.step()
    cell.weight_hh.grad = torch.zeros_like(cell.weight_hh)
    optimizer.step()
    torch.testing.assert_close(cell.weight_hh.norm(dim=1), torch.full((12,), 0.1))


def test_rules_come_back_into_force_where_a_step_that_was_kept_in_mind_raised(make_model: MakeModel):
    """The optimizer fails at a step; the next is a whole one."""
    model = make_model()
    attachment = regkit.attach(model, RULE)
    optimizer = SGD(model.parameters(), lr=0.1)

    def step(closure: Any = None) -> None:
        optimizer.zero_grad()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(closure)

    step()
    with pytest.raises(ZeroDivisionError):
        step(lambda: 1 / 0)
    before = model.rnn.weight_hh_l0.detach().clone()
    step()
    torch.testing.assert_close(model.rnn.weight_hh_l0.detach(), before * (1 - 0.1 * DECAY), rtol=1e-12, atol=0)
    assert attachment.step_count == 2


def test_half_of_a_model_that_is_moved_to_another_dtype_is_no_list_with_the_other_half_any_more():
    """`half()` leaves each parameter the object that it is; list forms are promised one dtype."""
    model = cells(2)["cells"]
    seen: list[set[torch.dtype]] = []
    regkit.attach(model, {"rules": [{"penalty": "l2(0.1)"}]})
    add = torch._foreach_add_

    def watched(gradients: Any, weights: Any, **options: Any) -> None:
        seen.append({one.dtype for one in gradients})
        add(gradients, weights, **options)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "_foreach_add_", watched)
            SGD(model.parameters(), lr=0.1, foreach=False).step()

    step()
    assert seen == [{torch.float32}]
    model[1].double()
    seen.clear()
    step()
    assert seen == [{torch.float32}, {torch.float64}]


def test_parameters_that_are_replaced_before_the_first_step_are_not_held(make_model: MakeModel):
    """Of a model with activity rules any part makes a step ours; before there is one, none of it need be kept."""
    model = make_model()
    regkit.attach(model, {"rules": [{"penalty": "activity_l2(1)"}]})
    old = weakref.ref(model.head.weight)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert old() is None


def grow(model: nn.LSTM, units: int) -> SGD:
    """Put the weights of more units in the place of those that it has."""
    for name, parameter in nn.LSTM(3, units).named_parameters():
        setattr(model, name, parameter)
    model.hidden_size = units
    model(torch.randn(5, 2, 3))[0].sum().backward()
    return SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("rule", [{"penalty": "l2(1)"}, {"constraint": "max_norm(1)"}])
@pytest.mark.parametrize("role", ["kernel", "bias"])
def test_more_units_are_an_error_where_a_rule_is_on_a_gate_whose_rows_are_others_now(rule: Any, role: str):
    model = nn.LSTM(3, 4)
    regkit.attach(model, {"rules": [{**rule, "target": {"role": role, "gate": "forget"}}]})
    with pytest.raises(
        regkit.AttachError, match=r"_ih_l0 \(forget\) was \(16.* at attach\(\) and is \(32.*attach anew"
    ):
        grow(model, 8).step()


@pytest.mark.parametrize("units", [2, 8])
@pytest.mark.parametrize("per", ["unit", "cell"])
def test_more_or_fewer_units_are_all_under_a_rule_on_the_whole_weight(units: int, per: str):
    model = nn.LSTM(3, 4)
    ball = {"kind": "max_norm", "max_value": 0.1, "per": per}
    regkit.attach(model, {"rules": [{"constraint": ball, "target": {"role": "kernel"}}]})
    grow(model, units).step()
    w = model.weight_ih_l0.view(4, units, 3).detach()
    norms = w.norm(dim=-1) if per == "unit" else w.transpose(0, 1).flatten(1).norm(dim=-1)
    assert torch.allclose(norms, torch.full_like(norms, 0.1))


def test_a_weight_that_is_lost_between_steps_is_an_error_that_names_the_rule_on_it():
    """At a step and in a report alike; of two rules, the one that is on the weight."""
    cell = nn.GRUCell(3, 4)
    kernel = {"name": "kernels", "target": {"role": "kernel"}, "penalty": "l2(0.1)"}
    bound = {"name": "bound", "target": {"role": "recurrent"}, "constraint": "max_norm(1)"}
    attachment = regkit.attach(cell, {"rules": [kernel, bound]})
    optimizer = prepared(cell)
    optimizer.step()
    del cell._parameters["weight_hh"]
    for look in (optimizer.step, attachment.values, attachment.violations, attachment.apply_constraints):
        with pytest.raises(regkit.AttachError, match=r"^rule 'bound' \(max_norm\(.*the model: weight_hh is missing"):
            look()


def test_a_weight_that_comes_to_be_shared_with_what_another_optimizer_trains_is_regularized():
    """Before, the optimizer was a stranger's, whose steps are none of the attachment's."""
    student, teacher = nn.ModuleList([nn.RNN(3, 3), nn.RNN(3, 3)]), nn.RNN(3, 3)
    student.requires_grad_(False)
    regkit.attach(student, {"rules": [{"penalty": "l2(1)", "optional": True}]})
    optimizer = prepared(teacher)
    optimizer.step()
    student[1].weight_hh_l0 = teacher.weight_hh_l0
    teacher.weight_hh_l0.grad = torch.zeros(3, 3)
    optimizer.step()
    torch.testing.assert_close(teacher.weight_hh_l0.grad, 2 * teacher.weight_hh_l0.detach() / (1 - 0.02))


def test_gradients_of_a_failed_step_that_another_optimizer_steps_with_its_own_are_an_error():
    """Penalties are in some of them already, and not in the others."""

    class Failing(SGD):
        def step(self, closure: Any = None) -> None:
            raise ZeroDivisionError

    cells = nn.ModuleList([nn.RNNCell(3, 3), nn.RNNCell(3, 3)])
    regkit.attach(cells, {"rules": [{"penalty": "l2(1)"}]})
    both, one = prepared(cells), Failing(cells[0].parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError):
        one.step()
    with pytest.raises(regkit.StepError, match="the last step failed, and penalties are in its gradients already"):
        both.step()


def test_a_computed_weight_that_the_optimizer_reads_in_its_step_is_read_anew_behind_it():
    """As where a loss with a penalty in it is evaluated within a step."""

    class Doubled(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

        def right_inverse(self, w: torch.Tensor) -> torch.Tensor:
            return w / 2

    class Looking(SGD):
        def step(self, closure: Any = None) -> None:
            attachment.penalty()
            super().step()

    cell = nn.RNNCell(3, 4)
    parametrize.register_parametrization(cell, "weight_hh", Doubled())
    by_loss = {"target": {"role": "recurrent"}, "penalty": "l2(0.1)", "via": "loss"}
    attachment = regkit.attach(cell, {"rules": [by_loss, {"target": {"role": "recurrent"}, "constraint": "unit_norm"}]})
    optimizer = Looking(cell.parameters(), lr=1.0)
    (cell(torch.ones(2, 3)).sum() + attachment.penalty()).backward()
    raw = cell.parametrizations.weight_hh.original
    moved = 2 * (raw - raw.grad).detach()
    optimizer.step()
    torch.testing.assert_close(cell.weight_hh.detach(), nn.functional.normalize(moved))
