"""One weight that is made of two parameters, each with an optimizer of its own: what each of the two does to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD

import regkit

RATE, STRENGTH = 0.1, 0.5
ROUNDS = 3


def normed() -> tuple[nn.RNNCell, list[nn.Parameter], list[nn.Parameter]]:
    """A cell whose recurrent weight is g · v / ‖v‖, and its parameters in two parts: g, and v with the rest."""
    torch.manual_seed(2)
    cell = parametrizations.weight_norm(nn.RNNCell(3, 4).double(), "weight_hh")
    g = cell.parametrizations.weight_hh.original0
    return cell, [g], [p for p in cell.parameters() if p is not g]


def soft(w: Tensor, by: float) -> Tensor:
    return w.sign() * (w.abs() - by).clamp(min=0)


AFTER_A_STEP = {
    "proximal": ("l1", lambda w, lr: soft(w, lr * STRENGTH)),
    "decoupled": ("l2", lambda w, lr: w - lr * STRENGTH * 2 * w),
}


def at_rest(cell: nn.RNNCell) -> None:
    for parameter in cell.parameters():
        parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("via", AFTER_A_STEP)
def test_a_weight_of_a_length_and_a_direction_shrinks_once_for_the_two_optimizers(via: str, order: int):
    cell, *parts = normed()
    name, shrunk = AFTER_A_STEP[via]
    rule = {"target": {"role": "recurrent"}, "penalty": f"{name}({STRENGTH})", "via": via}
    attachment = regkit.attach(cell, {"rules": [rule]})
    optimizers = [SGD(part, lr=RATE) for part in parts][::order]
    wanted = cell.weight_hh.detach().clone()
    for turn in range(ROUNDS):
        at_rest(cell)
        for optimizer in optimizers:
            optimizer.step()
        wanted = shrunk(wanted, RATE)
        torch.testing.assert_close(cell.weight_hh.detach(), wanted, rtol=1e-9, atol=1e-12)
        assert attachment.step_count == turn + 1


@pytest.mark.parametrize("via", AFTER_A_STEP)
def test_one_of_the_two_optimizers_that_steps_alone_shrinks_the_weight_at_each_step(via: str):
    cell, length, _ = normed()
    name, shrunk = AFTER_A_STEP[via]
    rule = {"target": {"role": "recurrent"}, "penalty": f"{name}({STRENGTH})", "via": via}
    regkit.attach(cell, {"rules": [rule | {"optional": True}]})
    optimizer, wanted = SGD(length, lr=RATE), cell.weight_hh.detach().clone()
    for _ in range(ROUNDS):
        at_rest(cell)
        optimizer.step()
        wanted = shrunk(wanted, RATE)
    torch.testing.assert_close(cell.weight_hh.detach(), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("via", AFTER_A_STEP)
def test_two_optimizers_of_different_learning_rates_cannot_shrink_one_weight(via: str):
    cell, length, direction = normed()
    rule = {"target": {"role": "recurrent"}, "penalty": f"{AFTER_A_STEP[via][0]}({STRENGTH})", "via": via}
    regkit.attach(cell, {"rules": [rule]})
    at_rest(cell)
    optimizers = SGD(length, lr=RATE), SGD(direction, lr=RATE / 2)
    optimizers[0].step()
    before = cell.weight_hh.detach().clone()
    with pytest.raises(regkit.StepError, match="what makes up one weight has different learning rates"):
        optimizers[1].step()
    assert torch.equal(cell.weight_hh, before)


@pytest.mark.parametrize("via", AFTER_A_STEP)
def test_two_biases_of_a_sum_shrink_by_the_rate_of_each_of_their_optimizers(via: str):
    """min over a and b of (a' - a)²/2·lr + (b' - b)²/2·lr + Ω(a' + b'): each optimizer takes a step in its own one.

    The soft threshold of a sum by 2t is that by t, twice; of each bias, decay takes its own rate times the slope.
    """
    torch.manual_seed(4)
    cell = nn.RNNCell(3, 8).double()
    name, _ = AFTER_A_STEP[via]
    target = {"role": "bias", "bias": "effective"}
    regkit.attach(cell, {"rules": [{"target": target, "penalty": f"{name}({STRENGTH})", "via": via}]})
    rest = [p for p in cell.parameters() if p is not cell.bias_ih]
    optimizers = SGD([cell.bias_ih], lr=RATE), SGD(rest, lr=RATE)
    a, b = cell.bias_ih.detach().clone(), cell.bias_hh.detach().clone()
    for _ in range(ROUNDS):
        at_rest(cell)
        for optimizer in optimizers:
            optimizer.step()
        if via == "proximal":
            wanted = soft(a + b, 2 * RATE * STRENGTH)
            a, b = cell.bias_ih.detach().clone(), cell.bias_hh.detach().clone()
            torch.testing.assert_close(a + b, wanted, rtol=1e-9, atol=1e-12)
        else:
            a = a - RATE * STRENGTH * 2 * (a + b)
            b = b - RATE * STRENGTH * 2 * (a + b)
            torch.testing.assert_close(cell.bias_ih.detach(), a, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(cell.bias_hh.detach(), b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("via", AFTER_A_STEP)
def test_a_step_that_is_taken_again_after_its_state_was_restored_shrinks_again(via: str):
    cell, *parts = normed()
    name, shrunk = AFTER_A_STEP[via]
    rule = {"target": {"role": "recurrent"}, "penalty": f"{name}({STRENGTH})", "via": via}
    attachment = regkit.attach(cell, {"rules": [rule]})
    state, optimizers = attachment.state_dict(), [SGD(part, lr=RATE) for part in parts]
    wanted = cell.weight_hh.detach().clone()
    for _ in range(ROUNDS):
        attachment.load_state_dict(state)
        at_rest(cell)
        for optimizer in optimizers:
            optimizer.step()
        wanted = shrunk(wanted, RATE)
        torch.testing.assert_close(cell.weight_hh.detach(), wanted, rtol=1e-9, atol=1e-12)
