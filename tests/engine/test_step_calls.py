"""How much work a step is: of one's own model, and of another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import regkit
from tests.support.counting import OURS, calls, prepared
from tests.support.scale import cells, rules

ALL = {"rules": [{"penalty": "l2(0.1)"}, {"constraint": "max_norm(1)"}]}


def test_the_step_of_another_models_optimizer_is_as_much_work_for_400_weights_as_for_4():
    other = nn.Linear(3, 3)
    optimizer = prepared(other)

    def work(count: int) -> int:
        model = cells(count)
        with regkit.attach(model, ALL):
            prepared(model).step()
            optimizer.step()
            return calls(optimizer.step)

    assert work(1) == work(100) < 40


def test_a_step_calls_no_more_than_one_function_for_each_weight():
    def work(count: int) -> int:
        model = cells(count)
        with regkit.attach(model, ALL):
            optimizer = prepared(model)
            optimizer.step()
            return calls(optimizer.step)

    assert (work(200) - work(100)) / 400 <= 1


class Loop(nn.Module):
    """A cell that is called 32 times."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for _ in range(32):
            state = self.cell(x[0], state)
        return state[0]


NETS: dict[str, Callable[[], nn.Module]] = {
    "one LSTM": lambda: nn.LSTM(4, 5),
    "64 GRUs": lambda: nn.ModuleList([nn.GRU(4, 5) for _ in range(64)]),
    "a cell in a loop": Loop,
    "1,000 cells": lambda: cells(1000),
}
WEIGHTS = {"role": ["kernel", "recurrent"]}
L2, L1 = {"penalty": "l2(1e-4)", "target": WEIGHTS}, {"penalty": "l1(1e-4)", "target": WEIGHTS}
BALL = {"constraint": "max_norm(3)", "target": WEIGHTS}
AR, TAR = {"penalty": "activity_l2(1)"}, {"penalty": "temporal(1)"}


def calls_of_a_training_step(net: nn.Module, rules: list[Any]) -> int:
    """Forward pass, `penalty()`, backward pass and step, once they are steady; what dataclasses make is not counted."""
    x = torch.randn(3, 2, 4)
    optimizer = prepared(net)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        if any(rule in (AR, TAR) for rule in rules):
            for one in net if isinstance(net, nn.ModuleList) else [net]:
                one(x)
            attachment.penalty().backward()
        optimizer.step()

    with regkit.attach(net, {"rules": rules}) as attachment:
        for _ in range(3):
            step()
        return calls(step, tuple(file for file in OURS if file != "<string>"))


@pytest.mark.parametrize(
    ("net", "rules", "most"),
    [
        ("one LSTM", [L2], 15),
        ("one LSTM", [BALL], 18),
        ("one LSTM", [AR], 37),
        ("one LSTM", [AR, TAR], 43),
        ("one LSTM", [L2, BALL, AR], 46),
        ("64 GRUs", [L2], 15),
        ("64 GRUs", [AR], 197),
        ("64 GRUs", [AR, TAR], 203),
        ("a cell in a loop", [AR], 120),
        ("a cell in a loop", [AR, TAR], 126),
        ("1,000 cells", [L2], 15),
        ("1,000 cells", [L1], 21),
        ("1,000 cells", [BALL], 25),
    ],
)
def test_a_steady_training_step_calls_few_functions(net: str, rules: list[Any], most: int):
    """Each costs a microsecond or two where the backward pass has emptied the caches: small models would feel that."""
    torch.manual_seed(0)
    assert calls_of_a_training_step(NETS[net](), rules) <= most


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / 2


@pytest.mark.parametrize(
    "computed",
    [
        parametrizations.weight_norm,
        lambda module, name: prune.l1_unstructured(module, name, 0.3),
        lambda module, name: parametrize.register_parametrization(module, name, Doubled()),
    ],
    ids=["weight_norm", "pruned", "parametrized"],
)
def test_a_step_of_computed_weights_looks_nothing_up_anew(computed: Callable[[nn.Module, str], Any]):
    """Two of 400 weights are computed: the others are not to pay for that."""
    model = cells(100)
    for cell in list(model["cells"])[:2]:
        computed(cell, "weight_hh")
    assert calls_of_a_training_step(model, [L2, BALL]) <= 160


@pytest.mark.slow
def test_the_first_step_is_as_much_work_for_each_of_2000_rules_as_for_each_of_200():
    def work(count: int) -> int:
        model = cells(count // 2)
        targets = [
            {"module": f"cells.{n}", "role": role} for n in range(count // 2) for role in ("kernel", "recurrent")
        ]
        with regkit.attach(model, rules(*targets)):
            return calls(prepared(model).step)

    few, many = work(200), work(2000)
    assert many <= 10.2 * few
