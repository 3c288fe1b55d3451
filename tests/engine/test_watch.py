"""The watchdog barks: an update that no torch optimizer makes is an error within a few iterations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import regkit
from regkit.engine.watchdog import _TIMES
from tests.support.loops import Batches, loss_of, train

pytestmark = pytest.mark.works_with("Updates without a torch optimizer")

L2 = {"rules": [{"name": "l2", "penalty": "l2(0.1)"}]}
AR = {"rules": [{"name": "ar", "penalty": "activity_l2(1)"}]}
RATE = 0.1

Iteration = Callable[[Tensor, Tensor], None]


def in_place(model: nn.Module) -> Iteration:
    def iterate(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        loss_of(model, x, y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad

    return iterate


def through_data(model: nn.Module) -> Iteration:
    def iterate(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        loss_of(model, x, y).backward()
        for p in model.parameters():
            p.data -= RATE * p.grad

    return iterate


def replacing_data(model: nn.Module) -> Iteration:
    def iterate(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        loss_of(model, x, y).backward()
        for p in model.parameters():
            p.data = p.data - RATE * p.grad

    return iterate


def by_autograd_grad(model: nn.Module) -> Iteration:
    def iterate(x: Tensor, y: Tensor) -> None:
        gradients = torch.autograd.grad(loss_of(model, x, y), list(model.parameters()))
        with torch.no_grad():
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.sub_(gradient, alpha=RATE)

    return iterate


def by_foreach(model: nn.Module) -> Iteration:
    parameters = list(model.parameters())

    def iterate(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        loss_of(model, x, y).backward()
        with torch.no_grad():
            torch._foreach_add_(parameters, [p.grad for p in parameters], alpha=-RATE)

    return iterate


def by_vector(model: nn.Module) -> Iteration:
    def iterate(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        loss_of(model, x, y).backward()
        flat = nn.utils.parameters_to_vector(model.parameters()).detach()
        gradient = nn.utils.parameters_to_vector(p.grad for p in model.parameters())
        nn.utils.vector_to_parameters(flat - RATE * gradient, model.parameters())

    return iterate


def masters(model: nn.Module, copy_back: Callable[[Tensor, Tensor], Any]) -> Iteration:
    """As apex and DeepSpeed do: a torch optimizer steps clones, which are copied back."""
    clones = [p.detach().clone().requires_grad_() for p in model.parameters()]
    inner = Adam(clones, lr=RATE)

    def iterate(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        loss_of(model, x, y).backward()
        for master, p in zip(clones, model.parameters(), strict=True):
            master.grad = p.grad.clone()
        inner.step()
        with torch.no_grad():
            for master, p in zip(clones, model.parameters(), strict=True):
                copy_back(p, master)

    return iterate


def masters_by_data(model: nn.Module) -> Iteration:
    return masters(model, lambda p, master: p.data.copy_(master.data))


def masters_by_copy(model: nn.Module) -> Iteration:
    return masters(model, lambda p, master: p.copy_(master))


class Foreign:
    """An optimizer that is no torch Optimizer, as fastai's is: lists of parameters, and functions that step them."""

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        self.parameters, self.lr = parameters, lr

    def step(self) -> None:
        for p in self.parameters:
            if p.grad is not None:
                p.data.add_(p.grad.data, alpha=-self.lr)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


def by_a_foreign_optimizer(model: nn.Module) -> Iteration:
    optimizer = Foreign(list(model.parameters()), RATE)

    def iterate(x: Tensor, y: Tensor) -> None:
        loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return iterate


CURES = ("`with attachment.step(lr=...):`", "attachment.apply_constraints()", "attachment.weights_changed()")
UPDATES = [
    in_place,
    through_data,
    replacing_data,
    by_autograd_grad,
    by_foreach,
    by_vector,
    masters_by_data,
    masters_by_copy,
    by_a_foreign_optimizer,
]


def iterations_until_told(iterate: Iteration, batches: Batches, name: str = "weight_ih_l0") -> int:
    for done in range(3 * _TIMES):
        try:
            iterate(*batches[done % len(batches)])
        except regkit.StepError as error:
            if all(one in str(error) for one in (f"{name} changed from one backward pass to the next", *CURES)):
                return done
            raise
    raise AssertionError("it was never told")


@pytest.mark.parametrize("update", UPDATES)
def test_an_update_that_no_torch_optimizer_makes_is_an_error_before_long(update, make_model, batches):
    model = make_model()
    regkit.attach(model, L2)
    assert iterations_until_told(update(model), batches) == _TIMES


def test_it_is_told_again_and_again(make_model, batches):
    model = make_model()
    regkit.attach(model, L2)
    iterate = in_place(model)
    assert iterations_until_told(iterate, batches) == _TIMES
    assert iterations_until_told(iterate, batches) <= _TIMES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_changes_of_large_half_precision_weights_are_seen(dtype):
    model = nn.LSTM(32, 512).to(dtype)
    with torch.no_grad():
        model.weight_ih_l0.normal_(std=4.0)  # the sum of its squares is beyond float16
    regkit.attach(model, L2)
    x = torch.randn(2, 1, 32, dtype=dtype)

    def iterate(*_: Tensor) -> None:
        model(x)[0].sum().backward()
        model.weight_ih_l0.data[0, 0] += 0.1

    assert iterations_until_told(iterate, [(x, x)]) == _TIMES


@pytest.mark.parametrize("accumulation", [4, 16])
def test_a_change_through_data_is_seen_however_many_batches_are_accumulated(accumulation, make_model, batches):
    model = make_model()
    regkit.attach(model, L2)

    def iterate(x: Tensor, y: Tensor) -> None:
        for _ in range(accumulation):
            loss_of(model, x, y).backward()
        for p in model.parameters():
            p.data -= RATE * p.grad
        model.zero_grad()

    assert iterations_until_told(iterate, batches) <= 2 * _TIMES


def test_it_is_seen_after_torch_optimizers_have_stepped_as_well(make_model, batches):
    model = make_model()
    regkit.attach(model, L2)
    optimizer = SGD(model.parameters(), lr=RATE)
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    assert iterations_until_told(in_place(model), batches) == _TIMES


@pytest.mark.parametrize("assign", [False, True])
def test_it_is_seen_after_a_state_was_loaded(assign, make_model, batches):
    model = make_model()
    regkit.attach(model, L2)
    iterate = in_place(model)
    iterate(*batches[0])
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=assign)
    assert iterations_until_told(iterate, batches) == _TIMES


def test_activity_rules_are_watched_over_too(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, AR)

    def iterate(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        (loss_of(model, x, y) + attachment.penalty()).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad

    assert iterations_until_told(iterate, batches, "a weight of rnn") == _TIMES


def test_step_called_without_with_is_no_step(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, L2)
    iterate = in_place(model)

    def and_step(x: Tensor, y: Tensor) -> None:
        iterate(x, y)
        attachment.step(lr=RATE)

    assert iterations_until_told(and_step, batches) == _TIMES
    assert attachment.step_count == 0


def test_it_is_seen_after_an_optimizer_of_weights_that_were_replaced_has_stepped(make_model, batches):
    model = make_model()
    regkit.attach(model, L2)
    optimizer = SGD(model.parameters(), lr=RATE)
    for name, p in list(model.rnn.named_parameters()):
        setattr(model.rnn, name, nn.Parameter(p.detach().clone()))
    with pytest.raises(regkit.StepError, match="no optimizer owns"):
        train(model, optimizer, batches)
    train(model, SGD(model.parameters(), lr=RATE), batches)
    assert iterations_until_told(in_place(model), batches) == _TIMES


def test_a_state_dict_may_be_assigned_under_two_attachments():
    """Each watches a weight of the same module, and moves on to the new one while torch goes through the hooks."""
    cell = nn.GRUCell(3, 4)
    attachments = [regkit.attach(cell, {"rules": [{"penalty": kind}]}) for kind in ("l2(0.1)", "l1(0.1)")]
    cell.load_state_dict(copy.deepcopy(cell.state_dict()), assign=True)
    for one in attachments:
        one.detach()
    assert not cell._load_state_dict_post_hooks
    assert not cell.weight_ih._backward_hooks
