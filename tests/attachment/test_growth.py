"""Models that change while rules are in force: modules that join, and modules that are taken out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import regkit

X = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
EVERYWHERE = {"rules": [{"name": "small", "penalty": "l2(0.1)"}]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in ("rnn", "more"):
            if hasattr(self, name):
                x = getattr(self, name)(x)[0]
        return self.head(x)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("joins", ["a new optimizer", "a new group"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_module_that_joins_behind_a_rule_about_it_is_an_error_at_its_first_step(joins, copied):
    model = Net()
    attachment = regkit.attach(model, EVERYWHERE)
    if copied:
        attachment.detach()
        model_of = copy.deepcopy(model)
        attachment = regkit.attach(model_of, attachment.plan)
        model = model_of
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer)
    model.more = nn.GRU(3, 3)
    before = model.more.weight_hh_l0.detach().clone()
    if joins == "a new group":
        optimizer.add_param_group({"params": list(model.more.parameters())})
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    for _ in range(2):  # and again, until it is mended
        with pytest.raises(regkit.StepError, match=r"module 'more' was added after attach.*rule 'small' is about it"):
            train(model, optimizer)

    assert torch.equal(model.more.weight_hh_l0, before)
    attachment.detach()
    with regkit.attach(model, EVERYWHERE):
        train(model, optimizer)


@pytest.mark.parametrize("owner", ["the model's optimizer", "an optimizer of its own"])
def test_a_module_that_an_optimizer_had_before_is_an_error_at_the_next_64th_step(owner):
    model, later = Net(), nn.GRU(3, 3)
    parameters = list(model.parameters())
    with regkit.attach(model, EVERYWHERE) as attachment:
        more = later.parameters() if owner == "the model's optimizer" else ()
        optimizer, other = torch.optim.SGD([*parameters, *more]), torch.optim.SGD(later.parameters())
        train(model, optimizer)
        other.step()
        model.more = later
        with pytest.raises(regkit.StepError, match=r"module 'more' was added after attach.*rule 'small' is about it"):
            train(model, optimizer, 64)
        assert attachment.step_count == 64


def test_a_module_that_joins_is_an_error_in_updates_by_hand():
    model = Net()
    with regkit.attach(model, EVERYWHERE) as attachment:
        model.more = nn.GRU(3, 3)
        model(X).square().mean().backward()
        with (
            pytest.raises(regkit.StepError, match=r"module 'more' was added after attach"),
            attachment.step(lr=0.1),
        ):
            raise AssertionError("the update is not begun")


def test_a_parameter_that_joins_a_bound_module_and_that_no_adapter_describes_is_an_error():
    model = Net()
    with regkit.attach(model, EVERYWHERE):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))
        model.rnn.peep = nn.Parameter(torch.ones(3))
        with pytest.raises(regkit.StepError, match=r"(?s)the model has changed since attach\(\).*leave out rnn\.peep"):
            train(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("change", ["other target", "not recurrent", "frozen", "not owned", "parametrized", "renamed"])
def test_a_change_that_no_rule_is_about_is_none_of_its_business(change):
    model = Net()
    rule = {"penalty": "l2(0.1)", "target": {"module": "rnn"}} if change == "other target" else EVERYWHERE["rules"][0]
    with regkit.attach(model, {"rules": [rule]}):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, optimizer)
        if change == "parametrized":
            nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
        elif change == "not recurrent":
            model.more2 = nn.Linear(3, 3)
        elif change == "renamed":
            model.same = model.head
        else:
            model.more = nn.GRU(3, 3).requires_grad_(change != "frozen")
        parameters = [p for name, p in model.named_parameters() if change != "not owned" or not name.startswith("more")]
        train(model, torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1), 2)


def test_a_document_that_does_not_fit_the_changed_model_any_more_says_so():
    class Own(nn.GRU):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.gain = nn.Parameter(torch.ones(3))

    model = Net()
    with regkit.attach(model, EVERYWHERE):
        model.more = Own()
        with pytest.raises(regkit.StepError, match=r"(?s)the model has changed since attach\(\).*gain") as caught:
            train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(caught.value.__cause__, regkit.ResolveError)


@pytest.mark.parametrize("rule", ["l2(0.1)", "activity_l2(0.1)", "max_norm(1)"])
def test_a_module_that_is_taken_out_and_trained_elsewhere_is_an_error_at_once(rule):
    model = Net()
    family = "constraint" if "norm" in rule else "penalty"
    with regkit.attach(model, {"rules": [{family: rule}]}):
        taken, model.rnn = model.rnn, nn.Identity()
        optimizer = torch.optim.SGD(taken.parameters(), lr=0.1)
        taken(X)[0].square().mean().backward()
        with pytest.raises(regkit.AttachError, match="module 'rnn' was replaced or removed after attach"):
            optimizer.step()


@pytest.mark.parametrize("rule", ["l2(0.1)", "activity_l2(0.1)"])
def test_a_module_that_is_taken_out_and_updated_by_hand_is_told_at_its_second_pass(rule):
    model = Net()
    with regkit.attach(model, {"rules": [{"penalty": rule}]}):
        taken, model.rnn = model.rnn, nn.Identity()
        taken(X)[0].square().mean().backward()
        with torch.no_grad():
            for p in taken.parameters():
                p.sub_(0.1 * p.grad)
        with pytest.raises(regkit.AttachError, match="module 'rnn' was replaced or removed after attach"):
            taken(X)[0].square().mean().backward()
