"""The watchdog's last words: rules end, weights have moved, and no step was ever seen."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD

import regkit
from regkit.engine.watchdog import _TIMES
from tests.support.loops import Batches, loss_of

pytestmark = pytest.mark.works_with("Updates without a torch optimizer")

L2 = {"rules": [{"penalty": "l2(0.1)"}]}


def update(model: nn.Module, batches: Batches, times: int, through_data: bool = False) -> None:
    for x, y in (batches * times)[:times]:
        model.zero_grad()
        loss_of(model, x, y).backward()
        with torch.no_grad():
            for p in model.parameters():
                (p.data if through_data else p).sub_(0.1 * p.grad)


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize(("times", "told"), [(1, "once"), (2, "2 times"), (_TIMES, f"{_TIMES} times")])
def test_updates_too_few_to_be_an_error_are_told_at_detach(times, told, through_data, make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, L2)
    update(model, batches, times, through_data)
    with pytest.warns(regkit.RegkitWarning, match=rf"^rnn.weight_ih_l0 changed {told} after.*was ever heard"):
        attachment.detach()
    attachment.detach()  # says nothing any more


def test_they_are_told_at_the_end_of_the_with_block(make_model, batches):
    model = make_model()
    with pytest.warns(regkit.RegkitWarning, match="changed 3 times"), regkit.attach(model, L2):
        update(model, batches, 3)


def test_they_are_told_at_the_end_of_the_model(make_model, batches):
    model = make_model()
    regkit.attach(model, L2)
    update(model, batches, 3)
    models = [model]
    del model
    with pytest.warns(regkit.RegkitWarning, match="changed 3 times"):
        models.clear()


def test_they_are_told_as_python_ends():
    program = """
import torch, regkit
model = torch.nn.RNN(3, 4)
regkit.attach(model, {"rules": [{"penalty": "l2(0.1)"}]})
for _ in range(2):
    model(torch.ones(2, 1, 3))[0].sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "RegkitWarning: weight_ih_l0 changed 2 times after backward passes" in done.stderr


def test_where_the_warning_is_an_error_all_is_detached_nonetheless(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, L2)
    update(model, batches, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(regkit.RegkitWarning):
            attachment.detach()
    assert not regkit.attachments(model)
    assert not model.rnn.weight_ih_l0._backward_hooks


def nothing(model: nn.Module, batches: Batches) -> None:
    """No backward pass at all."""
    update(model, batches, 0)


def only_looked_at(model: nn.Module, batches: Batches) -> None:
    for x, y in batches:
        loss_of(model, x, y).backward()


def initialized_before(model: nn.Module, batches: Batches) -> None:
    nn.init.ones_(model.rnn.weight_ih_l0)
    only_looked_at(model, batches)


def moved_and_put_back(model: nn.Module, batches: Batches) -> None:
    kept = [p.detach().clone() for p in model.parameters()]
    update(model, batches, 3)
    with torch.no_grad():
        for p, old in zip(model.parameters(), kept, strict=True):
            p.copy_(old)


def loaded(model: nn.Module, batches: Batches) -> None:
    only_looked_at(model, batches)
    model.load_state_dict({name: one + 1 for name, one in model.state_dict().items()})


def announced(model: nn.Module, batches: Batches) -> None:
    only_looked_at(model, batches)
    nn.init.ones_(model.rnn.weight_ih_l0)
    regkit.attachments(model)[0].weights_changed()


def by_hand(model: nn.Module, batches: Batches) -> None:
    only_looked_at(model, batches)
    with regkit.attachments(model)[0].step(), torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1 * p.grad)


def by_an_optimizer(model: nn.Module, batches: Batches) -> None:
    optimizer = SGD(model.parameters(), lr=0.1)
    only_looked_at(model, batches)
    optimizer.step()
    nn.init.ones_(model.rnn.weight_ih_l0)  # pruning, a conversion, the next experiment


def of_another_optimizer(model: nn.Module, batches: Batches) -> None:
    """The attachment was told to act in the steps of one that never comes."""
    attachment = regkit.attachments(model)[0]
    attachment.detach()
    optimizers = [SGD(model.parameters(), lr=0.1) for _ in range(2)]
    regkit.attach(model, L2, optimizer=optimizers[0])
    only_looked_at(model, batches)
    optimizers[1].step()


@pytest.mark.parametrize(
    "train",
    [
        nothing,
        only_looked_at,
        initialized_before,
        moved_and_put_back,
        loaded,
        announced,
        by_hand,
        by_an_optimizer,
        of_another_optimizer,
    ],
)
def test_nothing_is_told_where_nothing_was_trained_or_a_step_was_seen(
    train: Callable[[nn.Module, Batches], None], make_model, batches
):
    model = make_model()
    regkit.attach(model, L2)
    train(model, batches)
    regkit.attachments(model)[0].detach()
