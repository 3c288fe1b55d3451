"""However many rules there are, a kind is tried once on weights that look alike."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import regkit
from tests.support.scale import Document, cells


class Tried(regkit.Penalty):
    """A stranger's l2 that notes what it is tried on, and that is wrong for weights of one width."""

    kind: Literal["tried"] = "tried"

    wrong_for: int = 0
    notes: list[int] | None = None

    def value(self, w: Tensor) -> Tensor:
        TRIED.append(w)
        return w.square().sum(0) if w.size(1) == self.wrong_for else w.square().sum()


TRIED: list[Tensor] = []


def tried(model: nn.Module, *given_rules: Document) -> int:
    """How often a stranger's kind is tried as these rules are attached, each to one of the cells."""
    TRIED.clear()
    plugin = types.ModuleType("stranger")
    plugin.regkit_penalties = regkit.hookimpl(lambda: [Tried])
    whole = [
        {"target": {"module": f"cells.{number}", "role": "recurrent"}, "penalty": {"kind": "tried", "strength": 1}}
        | rule
        for number, rule in enumerate(given_rules)
    ]
    regkit.attach(model, {"rules": whole}, registry=regkit.Registry([plugin])).detach()
    return len(TRIED)


def test_a_kind_is_tried_once_for_all_rules_on_weights_that_look_alike():
    once = tried(cells(9), {})
    assert once > 0
    assert tried(cells(9), *[{}] * 9) == once
    assert tried(cells(9), *[{}, {"via": "loss"}] * 4) == 2 * once


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"penalty": {"kind": "tried", "strength": 2}}, id="options"),
        pytest.param({"via": "loss"}, id="via"),
        pytest.param({"schedule": {"kind": "constant", "value": 0.5}}, id="schedule"),
    ],
)
def test_a_rule_that_is_another_is_tried_on_its_own(other: Document):
    assert tried(cells(2), {}, other) == 2 * tried(cells(2), {})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda cells: cells[1].double(), id="dtype"),
        pytest.param(lambda cells: cells[1].to("meta"), id="device"),
        pytest.param(lambda cells: cells.__setitem__(1, nn.RNNCell(4, 4)), id="shape"),
        pytest.param(lambda cells: setattr(cells[1], "weight_hh", nn.Parameter(torch.ones(4, 12).T)), id="strides"),
        pytest.param(lambda cells: nn.utils.parametrizations.weight_norm(cells[1], "weight_hh"), id="storage"),
    ],
)
def test_a_rule_on_weights_that_look_otherwise_is_tried_on_its_own(change: Callable[[nn.Module], object]):
    model = cells(2)
    change(model["cells"])
    assert tried(model, {}, {}) == 2 * tried(cells(2), {})


def test_a_kind_with_an_option_that_is_a_list_is_tried_for_each_rule():
    rule = {"penalty": {"kind": "tried", "strength": 1, "notes": [1, 2]}}
    assert tried(cells(3), *[rule] * 3) == 3 * tried(cells(3), rule)


def test_a_kind_that_is_wrong_for_the_weights_of_one_of_many_equal_rules_is_told_with_that_rule():
    model = cells(4)
    model["cells"].insert(2, nn.GRUCell(5, 5))
    with pytest.raises(regkit.PluginError, match=r"^rule 'rules/2': value of .*Tried returns .*\(5,\), not a"):
        tried(model, *[{"penalty": {"kind": "tried", "strength": 1, "wrong_for": 5}}] * 5)
