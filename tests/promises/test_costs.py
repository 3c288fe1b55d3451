"""What regularization costs, as far as it can be counted; `python -m tests.benchmarks` says what it takes in time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import regkit
from tests.support.counting import Counted

L2 = {"penalty": "l2(0.1)"}
L1 = {"penalty": "l1(0.1)"}
ELASTIC = {"penalty": "l1_l2(0.1, 0.1)"}


def counted_step(model: nn.Module) -> Counted:
    """A second step, with gradients in place: at the first it is looked whether the weights are finite."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with Counted() as counted:
        optimizer.step()
    return counted


def added(rule: dict[str, Any], model: nn.Module) -> tuple[int, int]:
    """The operations that a rule adds to a step, and the bytes that they allocate."""
    bare = counted_step(model)
    with regkit.attach(model, {"rules": [rule]}):
        ours = counted_step(model)
    return ours.operations - bare.operations, ours.allocated - bare.allocated


def cells(number: int) -> nn.ModuleList:
    return nn.ModuleList([nn.GRUCell(2, 2) for _ in range(number)])


# --- what can be counted ---------------------------------------------------------------------------------------------


def test_l2_adds_as_many_operations_for_4000_weights_as_for_4_and_allocates_nothing():
    few, many = added(L2, cells(1)), added(L2, cells(1000))
    assert few == many
    assert few[0] <= 4
    assert few[1] == 0


@pytest.mark.parametrize("rule", [L1, ELASTIC])
def test_l1_and_elastic_net_add_at_most_8_operations_where_all_weights_fit_into_a_bucket(rule: dict[str, Any]):
    few, many = added(rule, cells(1))[0], added(rule, cells(100))[0]
    assert few == many <= 8


@pytest.mark.parametrize("rule", [L1, ELASTIC])
def test_l1_and_elastic_net_allocate_less_than_the_weights_where_those_are_many_buckets(rule: dict[str, Any]):
    model = nn.LSTM(1024, 1024)
    size = sum(p.nbytes for p in model.parameters())
    with regkit.attach(model, {"rules": [rule]}):
        assert counted_step(model).largest <= size / 8


# --- counting --------------------------------------------------------------------------------------------------------


def test_operations_are_counted_with_their_memory_views_without_and_backward_passes_too():
    w = torch.ones(4, requires_grad=True)
    with Counted() as counted:
        w.view(2, 2)
    assert (counted.operations, counted.allocated) == (1, 0)
    with Counted() as counted:
        doubled = w.view(4) * 2
        doubled.add_(1)
    assert (counted.operations, counted.allocated, counted.largest) == (3, 16, 16)
    with Counted() as counted:
        torch._foreach_mul([torch.ones(2), torch.ones(3)], 2.0)
    assert counted.allocated == 2 * (8 + 12)
    with Counted() as forward:
        total = w.square().sum()
    with Counted() as backward:
        total.backward()
    assert forward.operations == 2
    assert backward.operations > 1
