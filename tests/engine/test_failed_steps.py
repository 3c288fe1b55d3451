"""Steps that fail and are taken again, with steps of other optimizers between: no penalty counts twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import regkit

L2 = {"rules": [{"penalty": "l2(1)"}]}
"""Ω = Σw², so ∇Ω = 2w."""


class Failing(SGD):
    """An optimizer whose update fails as often as `fails` says."""

    fails = 0

    def step(self, closure: Any = None) -> None:
        if self.fails:
            self.fails -= 1
            raise ZeroDivisionError
        super().step(closure)


@pytest.fixture
def cells() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.RNNCell(3, 3), nn.RNNCell(3, 3)]).double()


def ones(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)


@pytest.fixture
def optimizers(cells: nn.ModuleList) -> list[Failing]:
    SGD([torch.zeros(1, requires_grad=True)])  # torch hooks a class when one of it is first made
    ones(cells)
    return [Failing(cell.parameters(), lr=0.0) for cell in cells]


def failed(optimizer: Failing) -> None:
    optimizer.fails = 1
    with pytest.raises(ZeroDivisionError):
        optimizer.step()


def assert_added_once(cells: nn.ModuleList) -> None:
    for parameter in cells.parameters():
        torch.testing.assert_close(parameter.grad, 1 + 2 * parameter.detach(), rtol=1e-12, atol=0)


def test_a_step_of_another_optimizer_between_a_failure_and_its_retry_doubles_nothing(cells, optimizers):
    one, other = optimizers
    attachment = regkit.attach(cells, L2)
    failed(one)
    other.step()
    one.step()
    assert_added_once(cells)
    assert attachment.step_count == 1


def test_two_optimizers_fail_and_are_retried_in_either_order(cells, optimizers):
    regkit.attach(cells, L2)
    for optimizer in (*optimizers, *optimizers[::-1]):
        failed(optimizer)
    for optimizer in optimizers[::-1]:
        optimizer.step()
    assert_added_once(cells)


def test_a_retry_after_new_gradients_adds_the_penalty_to_these(cells, optimizers):
    one, other = optimizers
    regkit.attach(cells, L2)
    failed(one)
    other.step()
    ones(cells[0])
    one.step()
    assert_added_once(cells)


def test_a_step_that_runs_within_one_that_fails_afterwards_takes_no_memory_of_it(cells, optimizers):
    class Around(SGD):
        broken = True

        def step(self, closure: Any = None) -> None:
            optimizers[1].step()
            if self.broken:
                raise ZeroDivisionError
            super().step()

    around = Around(cells[0].parameters(), lr=0.0)
    regkit.attach(cells, L2)
    with pytest.raises(ZeroDivisionError):
        around.step()
    around.broken = False
    ones(cells[1])
    around.step()
    assert_added_once(cells)


def test_what_was_changed_between_a_failure_and_its_retry_is_an_error_whoever_stepped_between(cells, optimizers):
    one, other = optimizers
    regkit.attach(cells, L2)
    failed(one)
    other.step()
    for parameter in cells[0].parameters():
        parameter.grad.mul_(0.5)
    with pytest.raises(regkit.StepError, match="the last step failed, and penalties are in its gradients already"):
        one.step()


def test_steps_that_failed_are_forgotten_once_their_gradients_are_gone(cells, optimizers):
    attachment = regkit.attach(cells, L2)
    for _ in range(5):
        ones(cells)
        failed(optimizers[0])
    assert len(attachment._engine.failed_steps.begun) == 1
    ones(cells)
    optimizers[0].step()
    assert not attachment._engine.failed_steps.begun
