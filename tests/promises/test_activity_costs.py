"""What activity penalties in closed form cost: operations, bytes and calls, which are the same at every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import regkit
from regkit.rules import closed_form
from tests.support.activity_forms import by_autograd, document
from tests.support.counting import Counted, calls


def cost(kinds: list[Any], model: nn.Module, x: Any, wanted: Callable[[Any], list[Tensor]]) -> Counted:
    """Of `penalty()` and its backward pass as far as the outputs."""
    with regkit.attach(model, document(kinds)) as attachment:
        outputs = wanted(model(x))
        with Counted() as seen:
            torch.autograd.grad(attachment.penalty(), outputs)
    return seen


MB = 2**20


@pytest.mark.parametrize(
    ("kinds", "bytes_besides"),
    [
        (["activity_l2"], 1.25 * MB),
        (["activity_l2", "temporal"], 13 * MB),
        (["activity_l1"], 10 * MB),
        (["norm_stabilizer"], 17 * MB),
    ],
)
def test_all_that_is_as_large_as_the_output_is_one_gradient(kinds, bytes_besides):
    """The output of a bidirectional LSTM of 512 units, batch 32, 64 steps: 8 MB. Pieces of it come and go."""
    model = nn.LSTM(8, 512, bidirectional=True)
    seen = cost(kinds, model, torch.randn(64, 32, 8), lambda result: [result[0]])
    assert seen.largest == 8 * MB
    assert seen.allocated <= 8 * MB + bytes_besides


def test_nor_is_anything_as_large_made_of_a_packed_sequence():
    model = nn.LSTM(8, 512, bidirectional=True)
    lengths = [64 - 2 * (number // 2) for number in range(32)]
    x = pack_padded_sequence(torch.randn(64, 32, 8), torch.tensor(lengths))
    seen = cost(["activity_l2", "temporal"], model, x, lambda result: [result[0].data])
    gradient = sum(lengths) * 1024 * 4
    assert seen.largest == gradient
    assert seen.allocated <= 6 * gradient  # of its halves, which autograd puts together


@pytest.mark.parametrize(("kinds", "most"), [(["activity_l2"], 12), (["activity_l2", "temporal"], 40)])
def test_a_longer_sequence_takes_no_more_operations(kinds, most):
    counts = [
        cost(kinds, nn.GRU(3, 4), torch.randn(time, 2, 3), lambda result: [result[0]]).operations for time in (4, 400)
    ]
    assert counts[0] == counts[1] <= most


@pytest.mark.parametrize("kinds", [["activity_l2"], ["activity_l2", "temporal", "norm_stabilizer"]])
def test_nor_does_a_longer_loop_over_a_cell(kinds, monkeypatch):
    """Of `penalty()`, and of its own function in the backward pass; what is computed of small tensors is computed of
    all together."""
    backward = closed_form._Closed.backward
    seen = Counted()

    def counted(*args: Any) -> Any:
        with seen:
            return backward(*args)

    monkeypatch.setattr(closed_form._Closed, "backward", staticmethod(counted))

    def operations(time: int) -> int:
        model = nn.GRUCell(3, 4)
        with regkit.attach(model, document(kinds)) as attachment:
            h = None
            for step in torch.randn(time, 2, 3):
                h = model(step, h)
            seen.operations = 0
            with seen:
                total = attachment.penalty()
            total.backward()
        return seen.operations

    counts = [operations(time) for time in (4, 64, 256)]
    assert counts[0] == counts[1] == counts[2] <= 22 * len(kinds)


def test_what_holds_of_the_costs_does_not_hold_of_autograd():
    """So that what is asserted above can fail."""
    model, x = nn.LSTM(8, 512, bidirectional=True), torch.randn(64, 32, 8)
    seen = by_autograd(lambda: cost(["activity_l2", "temporal"], model, x, lambda result: [result[0]]))
    assert seen.allocated > 100 * MB


@pytest.mark.parametrize(
    ("kinds", "of_penalty", "of_its_backward_pass"),
    [(["activity_l2"], 43, 26), (["activity_l2", "temporal"], 64, 41)],
)
def test_few_functions_are_called(kinds, of_penalty, of_its_backward_pass):
    """Each costs a microsecond or two where the forward pass has emptied the caches: small models would feel that."""
    model = nn.LSTM(3, 4)
    with regkit.attach(model, document(kinds)) as attachment:
        h, _ = model(torch.randn(5, 2, 3))
        found: list[Tensor] = []
        assert calls(lambda: found.append(attachment.penalty())) <= of_penalty
        assert calls(lambda: torch.autograd.grad(found[0], h)) <= of_its_backward_pass


def test_a_longer_loop_over_a_cell_calls_no_more_than_a_few_functions_for_each_step():
    def work(time: int) -> tuple[int, int]:
        model = nn.GRUCell(3, 4)
        with regkit.attach(model, document(["activity_l2"])) as attachment:
            h = None
            outputs = [h := model(step, h) for step in torch.randn(time, 2, 3)]
            found: list[Tensor] = []
            of_penalty = calls(lambda: found.append(attachment.penalty()))
            return of_penalty, calls(lambda: torch.autograd.grad(found[0], outputs))

    (short, short_back), (long, long_back) = work(10), work(110)
    assert (long - short) / 100 <= 13
    assert (long_back - short_back) / 100 <= 10
