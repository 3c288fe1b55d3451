"""Sharpness-aware minimization in both its styles: two gradients and one step, at two places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import regkit
from tests.support.decay import BOUND, L2_AND_BALL, assert_equals_weight_decay, largest_row
from tests.support.loops import DECAY, RULE, Batches, assert_equal_weights, loss_of, rnn_groups

pytestmark = pytest.mark.works_with("Optimizers wrapped in optimizers")
AR = {"rules": [{"name": "ar", "penalty": "activity_l2(2)"}]}


class SAM(Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021): the gradient at w + ρ·g/‖g‖, applied to w."""

    def __init__(self, groups: list[dict[str, Any]], base: type[Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(groups, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def everything(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norm = torch.stack([p.grad.norm() for p in self.everything()]).norm()
        for p in self.everything():
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for p in self.everything():
            p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is not None
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


def sam_in_two_steps(model: nn.Module, optimizer: SAM, batches: Batches, objective: Objective = loss_of) -> None:
    for x, y in batches:
        objective(model, x, y).backward()
        optimizer.first_step(zero_grad=True)
        objective(model, x, y).backward()
        optimizer.second_step(zero_grad=True)


def sam_with_closure(
    model: nn.Module, optimizer: SAM, batches: Batches, first: Objective = loss_of, second: Objective | None = None
) -> None:
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = (second or first)(model, x, y)
            loss.backward()
            return loss

        first(model, x, y).backward()
        optimizer.step(closure)
        optimizer.zero_grad()


def test_sam_in_two_steps_equals_weight_decay_of_its_base_optimizer(make_model, batches):
    def train_with(model: nn.Module, decay: float) -> None:
        sam_in_two_steps(model, SAM(rnn_groups(model, decay), SGD, lr=0.1, momentum=0.9), batches)

    assert assert_equals_weight_decay(make_model, train_with).step_count == 4


@pytest.mark.parametrize("loop", [sam_in_two_steps, sam_with_closure])
def test_sam_minimizes_an_activity_penalty_in_both_its_passes(loop, make_model, batches):
    by_hand, regularized = make_model(), make_model()

    def hand(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h, _ = model.rnn(x)
        return nn.functional.mse_loss(model.head(h), y) + 2 * h.square().mean()

    loop(by_hand, SAM([{"params": list(by_hand.parameters())}], SGD, lr=0.1), batches, hand)
    attachment = regkit.attach(regularized, AR)
    loop(
        regularized,
        SAM([{"params": list(regularized.parameters())}], SGD, lr=0.1),
        batches,
        lambda model, x, y: loss_of(model, x, y) + attachment.penalty(),
    )
    assert_equal_weights(by_hand, regularized)
    assert attachment.step_count == 4


def test_sam_with_a_closure_takes_l2_where_its_second_pass_takes_the_loss(make_model, batches):
    """The gradient is added behind the closure, when SAM has moved the weights: no weight_decay, which comes later."""

    def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(model, x, y) + DECAY / 2 * sum(p.square().sum() for p in model.rnn.parameters())

    hand, regularized, bounded = (make_model() for _ in range(3))
    sam_with_closure(hand, SAM(rnn_groups(hand, 0.0), SGD, lr=0.1), batches, loss_of, by_hand)
    attachment = regkit.attach(regularized, RULE)
    sam_with_closure(regularized, SAM(rnn_groups(regularized, 0.0), SGD, lr=0.1), batches)
    assert_equal_weights(hand, regularized)
    assert attachment.step_count == 4

    ball = regkit.attach(bounded, L2_AND_BALL)
    sam_with_closure(bounded, SAM(rnn_groups(bounded, 0.0), SGD, lr=0.1), batches)
    assert ball.violations()["ball"] < 1e-9
    assert BOUND / 2 < largest_row(bounded) <= BOUND + 1e-9
