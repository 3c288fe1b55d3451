"""What a CUDA graph would keep for ever is refused while it is captured, and nothing is read back then.

A replay runs no Python: what depends on the step count would stay as it was at capture. Here torch only says that a
graph is captured; `tests/promises/test_cuda.py` captures one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import regkit

RAMP = {"kind": "linear", "start": 1.0, "end": 2.0, "steps": 4}


@contextmanager
def captured() -> Iterator[None]:
    """Inside, torch says that a CUDA graph is being captured."""
    with (
        patch.object(torch.cuda, "is_initialized", lambda: True),
        patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
    ):
        yield


def trained(rule: dict[str, Any]) -> tuple[nn.LSTM, regkit.Attachment, torch.optim.Optimizer]:
    """A model with gradients, after its first step."""
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, {"rules": [rule]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run(model, attachment)
    optimizer.step()
    run(model, attachment)
    return model, attachment, optimizer


def run(model: nn.LSTM, attachment: regkit.Attachment) -> None:
    (model(torch.randn(5, 2, 3))[0].square().mean() + attachment.penalty()).backward()


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ({"penalty": "l2(0.1)", "schedule": RAMP}, r"linear\(start=1.0"),
        ({"penalty": "l1(0.1)", "via": "proximal", "schedule": RAMP}, r"linear\(start=1.0"),
        ({"penalty": "l2(0.1)", "via": "decoupled", "schedule": RAMP}, r"linear\(start=1.0"),
        ({"constraint": "max_norm(2)", "schedule": RAMP}, r"linear\(start=1.0"),
        ({"constraint": "max_norm(2)", "every": 2}, "every 2 steps"),
    ],
)
def test_a_step_that_depends_on_the_step_count_is_refused_while_it_is_captured(rule: dict[str, Any], what: str):
    model, attachment, optimizer = trained({"name": "it", **rule})
    with (
        captured(),
        pytest.raises(regkit.StepError, match=rf"'it' counts steps \({what}.*is done at step 1,.*optimizer"),
    ):
        optimizer.step()
    assert attachment.step_count == 1
    optimizer.step()  # nothing was changed, and nothing stands in the way of a step that is not captured
    assert regkit.attachments(model)[0].step_count == 2


@pytest.mark.parametrize("rule", [{"penalty": "activity_l2(1)"}, {"penalty": "l2(1)", "via": "loss"}])
def test_a_penalty_that_depends_on_the_step_count_is_refused_in_a_captured_loss(rule: dict[str, Any]):
    model, attachment, _ = trained({**rule, "schedule": RAMP})
    model(torch.randn(5, 2, 3))
    with captured(), pytest.raises(regkit.StepError, match=r"counts steps \(linear"):
        attachment.penalty()
    attachment.penalty()


@pytest.mark.parametrize(
    "rule",
    [
        {"penalty": "l2(0.1)"},
        {"penalty": "l1(0.1)", "via": "proximal"},
        {"penalty": "l2(0.1)", "via": "decoupled"},
        {"penalty": "activity_l2(1)"},
        {"constraint": "max_norm(0.5)"},
    ],
)
def test_what_is_the_same_at_every_step_does_in_a_captured_one_what_it_does_in_any(rule: dict[str, Any]):
    states = []
    for context in (captured, torch.no_grad):  # what torch's own step runs in anyway
        torch.manual_seed(3)
        model, _, optimizer = trained(rule)
        with context():
            optimizer.step()
        states.append(model.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_nothing_is_read_back_in_a_captured_step_even_where_it_is_time_to_look():
    """The first step of a run, and a step that is a multiple of 64: what is looked at then is left to the next time."""
    model = nn.LSTM(3, 4)
    attachment = regkit.attach(model, {"rules": [{"penalty": "l2(0.1)"}, {"constraint": "non_negative"}]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with captured(), patch.object(torch.Tensor, "__bool__", refuse), patch.object(torch, "equal", refuse):
        for _ in range(3):
            run(model, attachment)  # of which the watchdog would compare the second and third
        optimizer.step()
    with torch.no_grad():
        model.weight_hh_l0[0, 0] = math.nan
    attachment.load_state_dict({**attachment.state_dict(), "step_count": 64})
    with pytest.raises(regkit.StepError, match="NaN or infinite numbers in weight_hh_l0 before step 64"):
        optimizer.step()


def refuse(*_: object) -> bool:
    raise AssertionError("a number was read back")
