"""The watched parameter changes: another is in its place, it is frozen, or it is moved in steps by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

import regkit

L2 = {"rules": [{"penalty": "l2(0.1)"}]}
UNHEARD = r"changed from one backward pass to the next, and no torch optimizer"


def backward(cell: nn.RNNCell) -> None:
    cell.zero_grad()
    cell(torch.randn(2, 3)).sum().backward()


def move_unheard(cell: nn.RNNCell, times: int = 12) -> None:
    for _ in range(times):
        backward(cell)
        with torch.no_grad():
            for parameter in cell.parameters():
                parameter.add_(0.01)


def test_a_parameter_in_the_place_of_the_watched_one_is_watched_from_the_next_step_on():
    cell = nn.RNNCell(3, 4)
    regkit.attach(cell, L2)
    for _ in range(2):
        backward(cell)
        SGD(cell.parameters(), lr=0.1).step()
        for name, parameter in list(cell.named_parameters()):
            setattr(cell, name, nn.Parameter(parameter.detach().clone()))
    backward(cell)
    SGD(cell.parameters(), lr=0.1).step()
    with pytest.raises(regkit.StepError, match=UNHEARD):
        move_unheard(cell)


def test_another_parameter_is_watched_once_the_watched_one_is_frozen():
    cell = nn.RNNCell(3, 4)
    regkit.attach(cell, L2)
    optimizer = SGD(cell.parameters(), lr=0.1)
    for frozen in (False, True):
        cell.weight_ih.requires_grad_(not frozen)
        backward(cell)
        optimizer.step()
    with pytest.raises(regkit.StepError, match=UNHEARD):
        move_unheard(cell)


def test_steps_by_hand_are_heard_however_many_there_are():
    cell = nn.RNNCell(3, 4)
    attachment = regkit.attach(cell, L2)
    for _ in range(12):
        backward(cell)
        with attachment.step(), torch.no_grad():
            for parameter in cell.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)
    assert attachment.step_count == 12
