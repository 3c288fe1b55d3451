"""Parameters shared out over several optimizers: by role, by rank, by rhythm, one each in the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import regkit
from tests.support.decay import BOUND, assert_equals_weight_decay
from tests.support.loops import DECAY, RULE, Batches, assert_equal_weights, loss_of
from tests.support.versions import needs_torch

split = pytest.mark.works_with("Parameters split over several optimizers")


def parts(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The recurrent weights, and everything else."""
    recurrent = [p for name, p in model.rnn.named_parameters() if "hh" in name]
    return recurrent, [p for p in model.parameters() if all(p is not one for one in recurrent)]


def others(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Groups of all but the recurrent weights, with decay on those of the recurrent module."""
    kernel = [p for name, p in model.rnn.named_parameters() if "ih" in name]
    return [{"params": kernel, "weight_decay": decay}, {"params": list(model.head.parameters()), "weight_decay": 0.0}]


def train_together(model: nn.Module, optimizers: list[Optimizer], batches: Batches) -> None:
    for x, y in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, x, y).backward()
        for optimizer in optimizers:
            optimizer.step()


@split
def test_kernel_and_recurrent_weights_with_an_optimizer_and_a_learning_rate_each(make_model, batches):
    def train_with(model: nn.Module, decay: float) -> None:
        recurrent = SGD(parts(model)[0], lr=0.3, momentum=0.9, weight_decay=decay)
        train_together(model, [recurrent, Adam(others(model, decay), lr=0.01)], batches)

    assert assert_equals_weight_decay(make_model, train_with).step_count == 4


@split
@pytest.mark.parametrize("via", ["decoupled", "proximal"])
def test_each_part_shrinks_by_the_learning_rate_of_its_own_optimizer(via, make_model, batches):
    by_hand, regularized = make_model(), make_model()
    rates = (0.3, 0.02)

    def optimizers(model: nn.Module) -> list[Optimizer]:
        return [SGD(part, lr=rate) for part, rate in zip(parts(model), rates, strict=True)]

    rnn = set(by_hand.rnn.parameters())
    shrunk = [(p, rate) for part, rate in zip(parts(by_hand), rates, strict=True) for p in part if p in rnn]
    pair = optimizers(by_hand)
    for x, y in batches:
        by_hand.zero_grad()
        loss_of(by_hand, x, y).backward()
        with torch.no_grad():
            for p, rate in shrunk if via == "decoupled" else ():
                p.mul_(1 - rate * DECAY)
            for optimizer in pair:
                optimizer.step()
            for p, rate in shrunk if via == "proximal" else ():
                p.div_(1 + rate * DECAY)
    regkit.attach(regularized, {"rules": [{**RULE["rules"][0], "via": via}]})
    train_together(regularized, optimizers(regularized), batches)
    assert_equal_weights(by_hand, regularized)


@split
@needs_torch("2.9", "there is no Muon")
def test_muon_for_matrices_and_adamw_for_the_rest_equal_their_own_decay(make_model, batches):
    def train_with(model: nn.Module, decay: float) -> None:
        matrices = [p for p in model.rnn.parameters() if p.dim() == 2]
        biases = [p for p in model.rnn.parameters() if p.dim() == 1]
        groups = [{"params": biases, "weight_decay": decay}, {"params": list(model.head.parameters())}]
        muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=decay)
        train_together(model, [muon, AdamW(groups, lr=0.02, weight_decay=0.0)], batches)

    spec = {"rules": [{**RULE["rules"][0], "via": "decoupled"}]}
    assert assert_equals_weight_decay(make_model, train_with, spec=spec).step_count == 4


def train_in_two_rhythms(model: nn.Module, often: Optimizer, seldom: Optimizer, batches: Batches, first: str) -> None:
    """The one steps at every batch, the other at every second, with the gradients of both."""
    for index, (x, y) in enumerate(batches):
        loss_of(model, x, y).backward()
        due = [often, seldom] if index % 2 else [often]
        for optimizer in due if first == "often" else reversed(due):
            optimizer.step()
            optimizer.zero_grad()


@split
@pytest.mark.parametrize("first", ["often", "seldom"])
def test_an_optimizer_that_steps_at_every_second_batch_decays_at_its_own_steps(first, make_model, batches):
    def train_with(model: nn.Module, decay: float) -> None:
        often = Adam(others(model, decay), lr=0.01)
        seldom = SGD(parts(model)[0], lr=0.2, weight_decay=decay)
        train_in_two_rhythms(model, often, seldom, batches, first)

    assert assert_equals_weight_decay(make_model, train_with).step_count == 4


@split
@pytest.mark.parametrize("first", ["often", "seldom"])
def test_a_constraint_at_every_second_step_reaches_weights_that_are_stepped_at_every_second_step(
    first, make_model, batches
):
    model = make_model()
    rule = {"name": "ball", "constraint": f"max_norm({BOUND})", "every": 2}
    attachment = regkit.attach(model, {"rules": [rule]})
    recurrent, rest = parts(model)
    train_in_two_rhythms(model, SGD(rest, lr=0.1), SGD(recurrent, lr=0.1), batches, first)
    assert attachment.step_count == 4
    assert attachment.violations()["ball"] < 1e-9


def train_in_the_backward_pass(model: nn.Module, decay: float, batches: Batches, loss: Any = loss_of) -> None:
    """One optimizer for each parameter, as torch's tutorial does to save the memory of gradients."""
    rnn = set(model.rnn.parameters())
    optimizers = {p: Adam([p], lr=0.02, weight_decay=decay * (p in rnn), foreach=False) for p in model.parameters()}

    def step(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    for x, y in batches:
        loss(model, x, y).backward()
        assert all(p.grad is None for p in model.parameters())
    for handle in handles:
        handle.remove()


@pytest.mark.works_with("Optimizer step in the backward pass")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_an_optimizer_for_each_parameter_in_the_backward_pass_equals_weight_decay(options, make_model, batches):
    attachment = assert_equals_weight_decay(
        lambda: make_model(**options), lambda model, decay: train_in_the_backward_pass(model, decay, batches)
    )
    assert attachment.step_count == 4


@pytest.mark.works_with("Optimizer step in the backward pass")
def test_an_activity_penalty_goes_through_a_backward_pass_that_steps(make_model, batches):
    by_hand, regularized = make_model(), make_model()

    def hand(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h, _ = model.rnn(x)
        return nn.functional.mse_loss(model.head(h), y) + 2 * h.square().mean()

    train_in_the_backward_pass(by_hand, 0.0, batches, hand)
    attachment = regkit.attach(regularized, {"rules": [{"penalty": "activity_l2(2)"}]})
    train_in_the_backward_pass(
        regularized, 0.0, batches, lambda model, x, y: loss_of(model, x, y) + attachment.penalty()
    )
    assert_equal_weights(by_hand, regularized)
    assert attachment.step_count == 4
    with pytest.raises(regkit.StepError, match="not consumed before"):
        train_in_the_backward_pass(regularized, 0.0, batches[:1])
