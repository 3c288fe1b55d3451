"""How much work a step is: of one's own model, and of another's."""

from __future__ import annotations

from typing import Any

import pytest
from counting import calls, prepared
from scale import cells
from torch import nn

import regkit

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


@pytest.mark.parametrize(
    ("rules", "most"),
    [
        pytest.param(ALL["rules"][:1], 40, id="l2"),
        pytest.param([*ALL["rules"][:1], {"penalty": "l1(0.1)"}], 51, id="elastic net"),
        pytest.param(ALL["rules"][1:], 70, id="max-norm"),
        pytest.param(ALL["rules"], 77, id="both"),
    ],
)
def test_a_steady_step_calls_few_functions(rules: list[Any], most: int):
    """Each costs a microsecond or two where the backward pass has emptied the caches: small models would feel that."""
    model = nn.LSTM(3, 4)
    with regkit.attach(model, {"rules": rules}):
        optimizer = prepared(model)
        optimizer.step()
        optimizer.step()
        assert calls(optimizer.step) <= most
