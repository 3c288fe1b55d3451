"""Traps around steps: within one another, of several optimizers on one module, of models that die."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import regkit

AR = {"rules": [{"name": "ar", "penalty": "activity_l2(1)"}]}
L2 = {"rules": [{"name": "l2", "penalty": "l2(0.1)"}]}


def zero(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_keeps_nothing_of_its_caller_alive(with_closure):
    model = nn.LSTM(3, 3)
    optimizer = SGD(model.parameters(), lr=0.01)
    regkit.attach(model, L2)
    alive: list[weakref.ref[Tensor]] = []

    def step() -> None:
        batch = torch.ones(10)
        alive.append(weakref.ref(batch))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.randn(2, 1, 3))[0].sum()
            loss.backward()
            return loss

        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    gc.disable()
    try:
        for _ in range(5):
            step()
        assert not any(reference() is not None for reference in alive)
    finally:
        gc.enable()


def test_a_model_collected_in_the_middle_of_another_optimizers_step_is_no_error():
    armed: list[bool] = []

    class Collecting(SGD):
        @property
        def param_groups(self) -> list:
            if armed:
                gc.collect()
            return self.__dict__["groups"]

        @param_groups.setter
        def param_groups(self, groups: list) -> None:
            self.__dict__["groups"] = groups

    optimizer = Collecting(nn.Linear(2, 2).parameters(), lr=0.1)
    model = nn.LSTM(3, 4)
    regkit.attach(model, L2)
    model.itself = [model]
    gc.disable()
    try:
        del model
        armed.append(True)
        optimizer.step()
    finally:
        gc.enable()


class After(SGD):
    """An optimizer that goes on after the step of its base class, which fires the hooks too."""

    def step(self, closure: object = None) -> None:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(100)


class Twice(SGD):
    def step(self, closure: object = None) -> None:
        super().step()
        super().step()


def test_a_step_within_a_step_of_the_same_optimizer_does_not_end_it():
    SGD([torch.zeros(1, requires_grad=True)])  # torch hooks a class when one of it is first made
    model = nn.LSTM(3, 4)
    with regkit.attach(model, {"rules": [{"name": "c", "constraint": "max_norm(1)"}]}) as attachment:
        optimizer = After(model.parameters(), lr=0.1)
        model(torch.randn(2, 2, 3))[0].sum().backward()
        optimizer.step()
        assert attachment.violations()["c"] < 1e-6
    attachment = regkit.attach(model, L2)
    zero(model)
    Twice(model.parameters(), lr=0.0).step()
    torch.testing.assert_close(model.weight_ih_l0.grad, 0.2 * model.weight_ih_l0.detach())
    assert attachment.step_count == 1


def two_optimizers(model: nn.LSTM) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    parts = [[p for p in model.parameters() if p.dim() == rank] for rank in (2, 1)]
    return SGD(parts[0], lr=0.1), Adam(parts[1])


def test_two_optimizers_of_one_module_answer_to_one_penalty():
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, AR)
    matrices, biases = two_optimizers(model)
    for _ in range(3):
        (model(torch.randn(2, 2, 3))[0].sum() + attachment.penalty()).backward()
        matrices.step()
        biases.step()
        model.zero_grad()
    assert attachment.step_count == 3
    model(torch.randn(2, 2, 3))[0].sum().backward()
    with pytest.raises(regkit.StepError, match="not consumed"):
        matrices.step()


def test_a_rule_via_the_loss_over_two_optimizers():
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.LSTM(4, 4)})
    attachment = regkit.attach(model, {"rules": [{"penalty": "l2(0.1)", "via": "loss"}]})
    optimizers = [Adam(model["a"].parameters()), Adam(model["b"].parameters())]
    for _ in range(2):
        (model["b"](model["a"](torch.randn(2, 2, 3))[0])[0].sum() + attachment.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    model["b"](model["a"](torch.randn(2, 2, 3))[0])[0].sum().backward()
    with pytest.raises(regkit.StepError, match="not part of the loss"):
        optimizers[0].step()


def test_a_frozen_module_between_two_optimizers():
    model = nn.ModuleList([nn.Linear(3, 3), nn.LSTM(3, 4).requires_grad_(False), nn.Linear(4, 1)])
    attachment = regkit.attach(model, AR)
    optimizers = [Adam(model[0].parameters()), Adam(model[2].parameters())]
    for _ in range(2):
        (model[2](model[1](model[0](torch.randn(2, 2, 3)))[0]).sum() + attachment.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_an_optimizer_step_in_the_backward_pass():
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, AR)
    optimizers = {p: SGD([p], lr=0.1) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        (model(torch.randn(2, 2, 3))[0].sum() + attachment.penalty()).backward()
    assert attachment.step_count == 3


def test_activity_that_no_step_ever_consumes_is_an_error_and_does_not_grow():
    model = nn.ModuleList([nn.LSTM(3, 4), nn.Linear(4, 1)])
    regkit.attach(model, AR)
    optimizer = Adam(model[1].parameters())  # the LSTM is left out
    model[1](model[0](torch.randn(2, 2, 3))[0]).sum().backward()
    optimizer.step()
    model[1](model[0](torch.randn(2, 2, 3))[0]).sum().backward()
    with pytest.raises(regkit.StepError, match="never consumed"):
        optimizer.step()


def test_new_optimizers_for_the_same_weights_go_on_counting():
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, {"rules": [{"name": "c", "constraint": "max_norm(0.01)", "every": 2}]})
    kept = []
    for step in range(6):
        kept.append(SGD(model.parameters(), lr=0.0))
        zero(model)
        kept[-1].step()
        assert attachment.step_count == step + 1
    assert attachment.violations()["c"] < 1e-6


def test_two_biases_of_a_sum_with_different_learning_rates_have_no_prox():
    model = nn.LSTM(3, 4)
    rule = {"target": {"role": "bias", "bias": "effective"}, "penalty": "l1(1)", "via": "proximal"}
    regkit.attach(model, {"rules": [rule]})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = model.bias_ih_l0.detach().clone()
    groups = [{"params": [model.bias_ih_l0], "lr": 1.0}, {"params": [model.bias_hh_l0], "lr": 0.0}]
    with pytest.raises(regkit.StepError, match="different learning rates"):
        SGD(groups).step()
    assert torch.equal(model.bias_ih_l0, before)  # told before the step, not after it


def test_the_second_optimizer_of_a_module_cannot_step_twice_on_one_penalty():
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, AR)
    matrices, biases = two_optimizers(model)
    (model(torch.randn(2, 2, 3))[0].sum() + attachment.penalty()).backward()
    matrices.step()
    biases.step()
    with pytest.raises(regkit.StepError, match="recorded nothing"):
        biases.step()


def test_two_attachments_both_act_behind_one_closure():
    model = nn.LSTM(3, 4)
    for kind in ("l2(0.5)", "l1(0.25)"):
        regkit.attach(model, {"rules": [{"target": {"role": "recurrent"}, "penalty": kind}]})
    weight = model.weight_hh_l0
    optimizer = SGD(model.parameters(), lr=0.0)
    optimizer.step(lambda: zero(model))
    torch.testing.assert_close(weight.grad, weight.detach() + 0.25 * weight.detach().sign())


def branches() -> nn.ModuleDict:
    return nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.LSTM(3, 4)})


@pytest.mark.parametrize("rule", [{"penalty": "activity_l2(1)"}, {"penalty": "l2(0.1)", "via": "loss"}])
def test_steps_of_another_branch_neither_need_a_penalty_nor_use_one_up(rule):
    model = branches()
    elsewhere = {"target": {"module": "b"}, "penalty": "l2(0.1)"}
    attachment = regkit.attach(model, {"rules": [{"target": {"module": "a"}, **rule}, elsewhere]})
    ruled, free = (Adam(model[name].parameters()) for name in "ab")
    x = torch.randn(2, 2, 3)
    for _ in range(2):
        model["b"](x)[0].sum().backward()
        free.step()
    for _ in range(2):
        (model["a"](x)[0].sum() + model["b"](x)[0].sum() + attachment.penalty()).backward()
        free.step()
        free.step()
        ruled.step()
        model.zero_grad()
    model["a"](x)[0].sum().backward()
    with pytest.raises(regkit.StepError, match=r"not consumed|not part of the loss"):
        ruled.step()


class Searching(SGD):
    """An optimizer that evaluates its closure twice."""

    def step(self, closure: object = None) -> None:
        closure()
        super().step(closure)


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_closure_may_put_gradients_into_the_same_tensors_at_each_evaluation(zeroed):
    """What it puts there has no penalty in it, and so that is added each time, though no backward pass has run."""
    model = nn.LSTM(3, 4)
    regkit.attach(model, L2)
    zero(model)
    optimizer = Searching(model.parameters(), lr=0.0)

    def closure() -> None:
        for p in model.parameters():
            p.grad.zero_() if zeroed else p.grad.copy_(torch.ones_like(p))

    optimizer.step(closure)
    torch.testing.assert_close(model.weight_ih_l0.grad, (not zeroed) + 0.2 * model.weight_ih_l0.detach())
