"""Outputs of several modules under one penalty: those of one form go together, and the gradients are autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regkit
from tests.support.activity_forms import KINDS, by_autograd, document, same
from tests.support.laws import REDUCTIONS

LSTM, GRU_CELL = nn.LSTM, nn.GRUCell


def sequence(steps: int = 5, batch: int = 4) -> Tensor:
    return torch.randn(steps, batch, 3, dtype=torch.float64)


def run(module: nn.Module, x: Tensor) -> Tensor:
    """A layer over a sequence, or a cell in a loop over it."""
    first = next(module.parameters())
    x = x.to(first.dtype)
    if isinstance(module, nn.RNNBase):
        return module(x.transpose(0, 1) if module.batch_first else x)[0].sum()
    h, found = None, []
    for step in x:
        h = module(step, h)
        found.append(h)
    return torch.stack(found).sum()


def both(model: nn.ModuleList, xs: list[Tensor], spec: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradients of the penalty by all weights, and its values."""
    with regkit.attach(model, spec) as attachment:
        for module, x in zip(model, xs, strict=True):
            run(module, x)
        found = torch.autograd.grad(attachment.penalty(), list(model.parameters()), allow_unused=True)
        values = attachment.values()
    return [torch.zeros(()) if one is None else one for one in found], values


def pairs() -> dict[str, tuple[list[nn.Module], list[Tensor]]]:
    """Modules of one kind, which differ in one thing, and what each is run over."""
    torch.manual_seed(1)
    equal = [sequence(), sequence()]
    return {
        "alike": ([LSTM(3, 4), LSTM(3, 4), LSTM(3, 4)], [*equal, sequence()]),
        "batch first": ([LSTM(3, 4, batch_first=True) for _ in range(2)], equal),
        "more sequences": ([LSTM(3, 4), LSTM(3, 4)], [sequence(), sequence(batch=2)]),
        "longer ones": ([LSTM(3, 4), LSTM(3, 4)], [sequence(), sequence(steps=7)]),
        "more units": ([LSTM(3, 4), LSTM(3, 5)], equal),
        "float32": ([LSTM(3, 4), LSTM(3, 4).float()], equal),
        "one of them batch first": ([LSTM(3, 4), LSTM(3, 4, batch_first=True)], [sequence(4, 4), sequence(4, 4)]),
        "one of them in both directions": ([LSTM(3, 4), LSTM(3, 2, bidirectional=True)], equal),
        "both directions": ([LSTM(3, 4, bidirectional=True) for _ in range(2)], equal),
        "cells": ([GRU_CELL(3, 4), GRU_CELL(3, 4), GRU_CELL(3, 4)], [*equal, sequence()]),
        "cells of more steps": ([GRU_CELL(3, 4), GRU_CELL(3, 4)], [sequence(), sequence(steps=6)]),
        "cells of more sequences": ([GRU_CELL(3, 4), GRU_CELL(3, 4)], [sequence(), sequence(batch=2)]),
    }


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("which", pairs())
def test_modules_that_differ_in_one_thing_have_the_gradients_of_autograd(which: str, reduction: str):
    modules, xs = pairs()[which]
    exact = which != "float32"
    model = nn.ModuleList(one.double() if exact or i == 0 else one for i, one in enumerate(modules))
    ours, values = both(model, xs, document(KINDS, reduction))
    wanted, known = by_autograd(lambda: both(model, xs, document(KINDS, reduction)))
    if exact:
        same(ours, wanted)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(values, known)


def test_the_penalty_of_modules_side_by_side_is_the_sum_of_what_is_written_by_hand():
    model = nn.ModuleList([LSTM(3, 4), LSTM(3, 4), LSTM(3, 4)]).double()
    attachment = regkit.attach(model, {"rules": [{"name": "it", "penalty": "activity_l2(2)"}]})
    outputs = [module(sequence())[0] for module in model]
    total = attachment.penalty()
    by_hand = sum(2 * h.square().mean() for h in outputs)
    torch.testing.assert_close(total, by_hand)
    torch.testing.assert_close(attachment.values()["it"], by_hand.detach())
    ours = torch.autograd.grad(total, outputs, retain_graph=True)
    same(list(ours), [4 * h / h.numel() for h in outputs])


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_rule_on_one_direction_of_one_of_two_modules_leaves_the_other_direction_of_that_alone(way: str):
    model = nn.ModuleList([LSTM(3, 4, bidirectional=True), LSTM(3, 4, bidirectional=True)]).double()
    kinds = ["temporal(1)", "activity_l2(1)"]
    rules = [{"target": {"module": "0", "direction": way}, "penalty": kind} for kind in kinds]
    rules += [{"target": {"module": "1"}, "penalty": kind} for kind in kinds]
    attachment = regkit.attach(model, {"rules": rules})
    one, two = (module(sequence())[0] for module in model)
    found = torch.autograd.grad(attachment.penalty(), [one, two])
    assert bool(found[0].any(0).any(0)[:4].all()) is (way == "forward")
    assert bool(found[0].any(0).any(0)[4:].all()) is (way == "backward")
    assert bool(found[1].any(0).any(0).all())


def test_a_rule_on_one_of_two_modules_that_are_alike_is_not_on_the_other():
    model = nn.ModuleList([LSTM(3, 4), LSTM(3, 4), LSTM(3, 4)]).double()
    shared = {"target": {"module": ["0", "1"]}, "penalty": "activity_l2(1)"}
    rules = [shared, {"target": {"module": ["1", "2"]}, "penalty": "activity_l1(1)"}]
    attachment = regkit.attach(model, {"rules": rules})
    outputs = [module(sequence())[0] for module in model]
    found = torch.autograd.grad(attachment.penalty(), outputs)
    l2, l1 = ([way(h) / h.numel() for h in outputs] for way in (lambda h: 2 * h, Tensor.sign))
    same(list(found), [l2[0], l2[1] + l1[1], l1[2]])


@pytest.mark.parametrize("room", [1, 700, 1300])
def test_modules_go_side_by_side_as_far_as_there_is_room(room: int, monkeypatch: pytest.MonkeyPatch):
    """An output has 5 · 4 · 4 · 8 = 640 bytes: each by itself, or two at a time, the gradients are the same."""
    model = nn.ModuleList([LSTM(3, 4) for _ in range(5)]).double()
    xs = [sequence() for _ in model]
    wanted, _ = by_autograd(lambda: both(model, xs, document(KINDS)))
    concatenated: list[int] = []
    cat = torch.cat

    def counting(tensors: Any, *args: Any, **options: Any) -> Tensor:
        concatenated.append(len(tensors))
        return cat(tensors, *args, **options)

    monkeypatch.setattr("regkit.rules.dense.ROOM", {True: room})
    with regkit.attach(model, document(KINDS)) as attachment:
        for module, x in zip(model, xs, strict=True):
            run(module, x)
        monkeypatch.setattr(torch, "cat", counting)
        total = attachment.penalty()
        monkeypatch.undo()
        same(list(torch.autograd.grad(total, list(model.parameters()))), wanted)
    assert concatenated == ([2, 2] if room == 1300 else [])


def test_an_output_that_no_gradient_reaches_is_left_out_where_others_of_its_module_are_trained_on():
    """The first of two calls is made without a gradient, the second with one."""
    model = nn.ModuleList([LSTM(3, 4), LSTM(3, 4)]).double()
    attachment = regkit.attach(model, {"rules": [{"penalty": "activity_l2(1)"}]})
    with torch.no_grad():
        model[0](sequence())
    outputs = [module(sequence())[0] for module in model]
    torch.testing.assert_close(attachment.penalty(), sum(h.square().mean() for h in outputs))


def test_a_module_that_is_called_twice_is_pooled_beside_one_that_is_called_once():
    model = nn.ModuleList([LSTM(3, 4), LSTM(3, 4)]).double()
    attachment = regkit.attach(model, {"rules": [{"penalty": "activity_l2(1)"}]})
    first, second, other = model[0](sequence())[0], model[0](sequence(batch=2))[0], model[1](sequence())[0]
    pooled = torch.cat([first.flatten(), second.flatten()]).square().mean()
    total = attachment.penalty()
    torch.testing.assert_close(total, pooled + other.square().mean())
    found = torch.autograd.grad(total, [first, second, other])
    numbers = first.numel() + second.numel()
    same(list(found), [2 * first / numbers, 2 * second / numbers, 2 * other / other.numel()])


def test_outputs_that_were_looked_at_between_two_calls_are_all_penalized():
    model = nn.ModuleList([LSTM(3, 4), LSTM(3, 4)]).double()
    attachment = regkit.attach(model, {"rules": [{"name": "it", "penalty": "activity_l2(1)"}]})
    first, other = (module(sequence())[0] for module in model)
    attachment.values()
    second = model[0](sequence())[0]
    total = attachment.penalty()
    pooled = torch.cat([first, second]).square().mean()
    torch.testing.assert_close(total, pooled + other.square().mean())


def test_two_directions_and_two_layers_of_one_module_may_each_have_a_rule():
    model = LSTM(3, 4, num_layers=2, bidirectional=True).double()
    ways = [("forward", 1.0), ("backward", 3.0)]
    rules = [{"target": {"direction": way}, "penalty": f"activity_l2({by}, reduction=sum)"} for way, by in ways]
    for layer, by in ((0, 5.0), (1, 7.0)):
        target = {"role": "state", "layer": layer}
        rules.append({"target": target, "penalty": f"activity_l2({by}, reduction=sum)"})
    attachment = regkit.attach(model, {"rules": rules})
    h, (last, _) = model(sequence())
    found = torch.autograd.grad(attachment.penalty(), [h, last])
    halves, layers = h.chunk(2, -1), last.chunk(2)
    same(list(found), [2 * torch.cat([halves[0], 3 * halves[1]], -1), 2 * torch.cat([5 * layers[0], 7 * layers[1]])])


# --- cells -----------------------------------------------------------------------------------------------------------


def test_a_cell_that_goes_on_in_another_mode_is_an_error():
    cell = GRU_CELL(3, 4).double()
    attachment = regkit.attach(cell, {"rules": [{"penalty": "temporal(1)"}]})
    first, second = sequence(steps=2)
    h = cell(first)
    cell.eval()
    cell(second, h)
    with pytest.raises(regkit.StepError, match="were made in eval mode"):
        attachment.penalty()


def test_a_state_that_is_changed_in_place_before_the_cell_goes_on_from_it_is_an_error():
    cell = GRU_CELL(3, 4).double()
    attachment = regkit.attach(cell, {"rules": [{"penalty": "temporal(1)"}]})
    first, second = sequence(steps=2)
    h = cell(first)
    h.mul_(2)
    cell(second, h)
    with pytest.raises(regkit.StepError, match="output of the model was changed in place"):
        attachment.penalty()


def test_a_cell_that_begins_from_a_state_that_was_computed_has_that_for_a_neighbour():
    cell = GRU_CELL(3, 4).double()
    attachment = regkit.attach(cell, {"rules": [{"penalty": "temporal(1, reduction=sum)"}]})
    before = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    start = before.tanh()
    states = [start]
    for x in sequence(steps=3):
        states.append(cell(x, states[-1]))
    by_hand = torch.stack(states).diff(dim=0).square().sum()
    total = attachment.penalty()
    torch.testing.assert_close(total, by_hand)
    same(*(list(torch.autograd.grad(one, [before], retain_graph=True)) for one in (total, by_hand)))
