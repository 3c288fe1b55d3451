"""Constraints in rounds of several optimizers: what is projected in each, what waits, and for what."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, Optimizer

import regkit


def push(parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
    """A step that makes every number of these grow."""
    for parameter in parameters:
        parameter.grad = -torch.ones_like(parameter)
    optimizer.step()


def halves(kind: str) -> tuple[nn.Module, dict[str, Any], list[list[nn.Parameter]]]:
    """A cell, a constraint on what two parameters make up, and all parameters in two parts, each with one of these."""
    cell = nn.RNNCell(3, 4).double()
    if kind == "weight_norm":
        parametrizations.weight_norm(cell, "weight_hh")
        rule: dict[str, Any] = {"target": {"role": "recurrent"}, "constraint": "max_norm(0.5)"}
        first = cell.parametrizations.weight_hh.original0
    else:
        target = {"role": "bias", "bias": "effective"}
        rule = {"target": target, "constraint": {"kind": "max_norm", "max_value": 0.5, "per": "matrix"}}
        first = cell.bias_ih
    return cell, {"rules": [{"name": "it", **rule}]}, [[first], [p for p in cell.parameters() if p is not first]]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", ["weight_norm", "effective bias"])
def test_a_constraint_on_what_two_optimizers_make_up_together_holds_after_each_round(kind: str, order: int):
    cell, document, parts = halves(kind)
    attachment = regkit.attach(cell, document)
    optimizers = [(part, SGD(part, lr=0.7)) for part in parts][::order]
    for turn in range(4):
        for part, optimizer in optimizers:
            push(part, optimizer)
        assert attachment.violations()["it"] < 1e-9
        assert attachment.step_count == turn + 1


@pytest.mark.parametrize("kind", ["weight_norm", "effective bias"])
def test_what_two_optimizers_make_up_together_is_projected_at_every_second_round_alone(kind: str):
    cell, document, parts = halves(kind)
    document["rules"][0]["every"] = 2
    attachment = regkit.attach(cell, document)
    optimizers = [(part, SGD(part, lr=0.7)) for part in parts]
    outside = []
    for _ in range(4):
        for part, optimizer in optimizers:
            push(part, optimizer)
        outside.append(bool(attachment.violations()["it"] > 1e-9))
        assert attachment.state_dict()["due"] == {}
    assert outside == [True, False, True, False]


@pytest.mark.parametrize("every", [1, 2])
def test_a_weight_that_is_replaced_and_whose_own_optimizer_steps_first_is_projected_in_that_round(every: int):
    cell = nn.RNNCell(3, 4)
    attachment = regkit.attach(cell, {"rules": [{"name": "it", "constraint": "max_norm(0.5)", "every": every}]})
    optimizer = SGD(cell.parameters(), lr=0.1)
    for _ in range(every):
        push(list(cell.parameters()), optimizer)
    cell.weight_hh = nn.Parameter(torch.ones(4, 4))
    push([cell.weight_hh], SGD([cell.weight_hh], lr=0.1))
    assert attachment.violations()["it"] < 1e-6
    assert attachment.step_count == every
    push([cell.weight_ih, cell.bias_ih, cell.bias_hh], optimizer)
    assert attachment.step_count == every + 1


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("after", [False, True])
def test_tied_weights_do_not_wait_once_all_was_trained(after: bool, every: int):
    model = nn.ModuleList([nn.RNNCell(3, 4), nn.RNNCell(3, 4)])

    def tie() -> None:
        model[1].weight_hh = model[0].weight_hh

    if not after:
        tie()
    attachment = regkit.attach(model, {"rules": [{"name": "it", "constraint": "max_norm(0.5)", "every": every}]})
    if after:
        tie()
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(2 * every):
        push(list(model.parameters()), optimizer)
        assert attachment.state_dict()["due"] == {}


def test_each_of_two_halves_of_a_sum_is_moved_by_the_steps_of_its_own_optimizer_alone():
    cell, document, parts = halves("effective bias")
    regkit.attach(cell, document)
    optimizers = [(part, SGD(part, lr=0.7)) for part in parts]
    for _ in range(2):
        for (part, optimizer), (rest, _) in (optimizers, optimizers[::-1]):
            before = [one.detach().clone() for one in rest]
            push(part, optimizer)
            assert all(torch.equal(one, was) for one, was in zip(rest, before, strict=True))


def test_two_optimizers_leave_nothing_waiting_after_the_nth_round():
    model = nn.ModuleDict({"a": nn.RNNCell(3, 4), "b": nn.RNNCell(3, 4)})
    attachment = regkit.attach(model, {"rules": [{"name": "it", "constraint": "max_norm(0.5)", "every": 2}]})
    optimizers = {name: SGD(part.parameters(), lr=0.1) for name, part in model.items()}
    waiting = []
    for _ in range(4):
        for name, optimizer in optimizers.items():
            push(list(model[name].parameters()), optimizer)
            waiting.append({block.split(".")[0] for block in attachment.state_dict()["due"].get("it", [])})
    assert waiting == [set(), set(), {"b"}, set()] * 2


@pytest.mark.parametrize("computed", [False, True])
def test_what_the_nth_step_does_not_train_waits_and_is_projected_once_it_is_trained(computed: bool):
    model = nn.ModuleDict({"a": nn.RNNCell(3, 4), "b": nn.RNNCell(3, 4)})
    for cell in model.values() if computed else ():
        parametrizations.weight_norm(cell, "weight_hh")
    rule = {"name": "it", "target": {"role": "recurrent"}, "constraint": "max_norm(0.5)", "every": 3}
    attachment = regkit.attach(model, {"rules": [rule]})
    optimizer = SGD(model.parameters(), lr=1.0)

    def norm(name: str) -> Tensor:
        return model[name].weight_hh.detach().norm(dim=1)

    for _ in range(3):
        model.zero_grad()
        push(list(model["a"].parameters()), optimizer)
    assert attachment.state_dict()["due"] == {"it": ["b.weight_hh"]}
    attachment.apply_constraints()
    assert attachment.state_dict()["due"] == {"it": ["b.weight_hh"]}
    push(list(model.parameters()), optimizer)  # is not the third
    assert bool((norm("a") > 0.51).all())
    torch.testing.assert_close(norm("b"), torch.full((4,), 0.5))
    assert attachment.state_dict()["due"] == {}
    push(list(model.parameters()), optimizer)
    assert bool((norm("b") > 0.51).all())


def test_what_waits_is_projected_once_by_a_resumed_run_too():
    """The state is of the third step, which is not to begin anew."""
    cell = nn.RNNCell(3, 4)
    attachment = regkit.attach(cell, {"rules": [{"name": "it", "constraint": "max_norm(0.5)", "every": 3}]})
    names = ["weight_ih", "bias_ih", "bias_hh"]
    rest = SGD([cell.get_parameter(name) for name in names], lr=0.1)
    attachment.load_state_dict({"version": 2, "step_count": 3, "stepped": names, "due": {"it": ["weight_hh"]}})
    recurrent = SGD([cell.weight_hh], lr=1.0)
    push([cell.weight_hh], recurrent)
    assert attachment.step_count == 3
    assert attachment.state_dict()["due"] == {}
    torch.testing.assert_close(cell.weight_hh.detach().norm(dim=1), torch.full((4,), 0.5))
    push([cell.get_parameter(name) for name in names], rest)
    push([cell.weight_hh], recurrent)
    assert attachment.step_count == 4
    assert bool((cell.weight_hh.detach().norm(dim=1) > 0.51).all())


def thirds(kind: str) -> tuple[nn.Module, dict[str, Any], list[list[nn.Parameter]]]:
    """As `halves`, with the second of the two parameters apart from the rest."""
    cell, document, (first, rest) = halves(kind)
    weight = cell.parametrizations.weight_hh.original1 if kind == "weight_norm" else cell.bias_hh
    return cell, document, [first, [weight], [p for p in rest if p is not weight]]


def outside(cell: nn.Module, kind: str) -> float:
    """How far the weight is outside the ball of 0.5: of each row, or of the sum of the two biases."""
    if kind == "weight_norm":
        g, v = cell.parametrizations.weight_hh.original0.detach(), cell.parametrizations.weight_hh.original1.detach()
        return float((g * v / v.norm(dim=1, keepdim=True)).norm(dim=1).max()) - 0.5
    return float((cell.bias_ih + cell.bias_hh).detach().norm()) - 0.5


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
@pytest.mark.parametrize("kind", ["weight_norm", "effective bias"])
def test_a_constraint_on_what_two_of_three_optimizers_make_up_holds_after_each_nth_round(kind, order, every):
    cell, document, parts = thirds(kind)
    document["rules"][0]["every"] = every
    attachment = regkit.attach(cell, document)
    optimizers = [(parts[number], SGD(parts[number], lr=0.7)) for number in order]
    for turn in range(2 * every):
        for part, optimizer in optimizers:
            push(part, optimizer)
        is_nth = (turn + 1) % every == 0
        assert (outside(cell, kind) < 1e-9) == is_nth
        assert attachment.step_count == turn + 1
        assert attachment.state_dict()["due"] == {}


@pytest.mark.parametrize("kind", ["weight_norm", "effective bias"])
def test_a_constraint_holds_whenever_one_of_three_optimizers_has_stepped_alone(kind: str):
    """A rhythm of no pattern: what a step has moved is projected behind it, joined or not."""
    cell, document, parts = thirds(kind)
    regkit.attach(cell, document)
    optimizers = [(part, SGD(part, lr=0.7)) for part in parts]
    for number in (0, 0, 1, 2, 2, 1, 0, 1, 1, 0, 2):
        push(*optimizers[number])
        if number < 2:
            assert outside(cell, kind) < 1e-9
