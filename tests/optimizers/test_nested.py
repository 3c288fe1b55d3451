"""Optimizers within optimizers, as people write them: whose step it is, and at which weights a gradient is taken."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import regkit
from tests.support.decay import BOUND, L2_AND_BALL, assert_equals_weight_decay, largest_row
from tests.support.loops import DECAY, RULE, assert_equal_weights, loss_of, rnn_groups, train, train_with_closure

wrapped = pytest.mark.works_with("Optimizers wrapped in optimizers")
AR = {"rules": [{"name": "ar", "penalty": "activity_l2(2)"}]}

COUPLED: dict[str, Any] = {
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": torch.optim.Adagrad,
    "Adam": Adam,
    "Adam amsgrad": lambda p, **o: Adam(p, amsgrad=True, **o),
    "Adamax": torch.optim.Adamax,
    "ASGD": torch.optim.ASGD,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop centered": lambda p, **o: torch.optim.RMSprop(p, centered=True, momentum=0.9, **o),
    "SGD nesterov": lambda p, **o: SGD(p, momentum=0.9, nesterov=True, **o),
}
DECOUPLED: dict[str, Any] = {
    "AdamW": torch.optim.AdamW,
    "NAdam": lambda p, **o: torch.optim.NAdam(p, decoupled_weight_decay=True, **o),
    "RAdam": lambda p, **o: torch.optim.RAdam(p, decoupled_weight_decay=True, **o),
}


@pytest.mark.works_with("Torch optimizers")
@pytest.mark.parametrize("loop", [train, train_with_closure])
@pytest.mark.parametrize("name", COUPLED)
def test_l2_equals_weight_decay_in_every_optimizer_of_torch(name, loop, make_model, batches):
    assert_equals_weight_decay(
        make_model, lambda model, decay: loop(model, COUPLED[name](rnn_groups(model, decay), lr=0.01), batches)
    )


@pytest.mark.works_with("Torch optimizers")
@pytest.mark.parametrize("name", DECOUPLED)
def test_decoupled_l2_equals_decoupled_weight_decay_in_every_optimizer_of_torch(name, make_model, batches):
    spec = {"rules": [{**RULE["rules"][0], "via": "decoupled"}]}
    assert_equals_weight_decay(
        make_model,
        lambda model, decay: train(model, DECOUPLED[name](rnn_groups(model, decay), lr=0.01), batches),
        spec=spec,
    )


@pytest.mark.works_with("Torch optimizers")
def test_decoupled_l2_under_adafactor_equals_decay_written_before_the_step(make_model, batches):
    """Adafactor's own decay comes after it has measured the weights for the size of its step; this comes before."""
    by_hand, regularized = make_model(), make_model()
    optimizer = torch.optim.Adafactor(rnn_groups(by_hand, 0.0), lr=0.01)
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(by_hand, x, y).backward()
        with torch.no_grad():
            for p in by_hand.rnn.parameters():
                p.mul_(1 - 0.01 * DECAY)
        optimizer.step()
    regkit.attach(regularized, {"rules": [{**RULE["rules"][0], "via": "decoupled"}]})
    train(regularized, torch.optim.Adafactor(rnn_groups(regularized, 0.0), lr=0.01), batches)
    assert_equal_weights(by_hand, regularized)


class Lookahead(Optimizer):
    """k steps forward, one back (Zhang et al. 2019). Like most in use, it leaves out the base class' __init__: torch
    calls no hooks for its step."""

    def __init__(self, base: Optimizer, k: int = 2, alpha: float = 0.5) -> None:
        self.base, self.k, self.alpha, self.taken = base, k, alpha, 0
        self.param_groups, self.state = base.param_groups, defaultdict(dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.base.step(closure)
        self.taken += 1
        if self.taken % self.k == 0:
            with torch.no_grad():
                for p in (p for group in self.param_groups for p in group["params"]):
                    slow = self.state[p].setdefault("slow", p.clone())
                    slow.add_(p - slow, alpha=self.alpha)
                    p.copy_(slow)
        return loss


class HookedLookahead(Lookahead):
    """The same with the base class' __init__: torch calls hooks for its step and for the one within."""

    def __init__(self, base: Optimizer) -> None:
        Optimizer.__init__(self, base.param_groups, {})
        super().__init__(base)


@wrapped
@pytest.mark.parametrize("lookahead", [Lookahead, HookedLookahead])
@pytest.mark.parametrize("loop", [train, train_with_closure])
def test_lookahead_around_adam_regularizes_once(loop, lookahead, make_model, batches):
    def train_with(model: nn.Module, decay: float) -> None:
        loop(model, lookahead(Adam(rnn_groups(model, decay), lr=0.05)), batches * 2)

    assert assert_equals_weight_decay(make_model, train_with).step_count == 8


@wrapped
def test_unit_norm_holds_after_lookahead_has_gone_back(make_model, batches):
    """Between two points of a sphere lies none: only a projection behind the outer step is right."""
    model = make_model()
    attachment = regkit.attach(model, {"rules": [{"name": "sphere", "constraint": "unit_norm"}]})
    optimizer = HookedLookahead(SGD(model.parameters(), lr=0.5))
    for _ in range(2):
        train(model, optimizer, batches)
        assert attachment.violations()["sphere"] < 1e-9


class LARC:
    """A trust ratio on gradients, around an optimizer and none itself: apex' (You et al. 2017)."""

    def __init__(self, optimizer: Optimizer, trust: float = 0.02) -> None:
        self.optim, self.trust = optimizer, trust

    def zero_grad(self) -> None:
        self.optim.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        for p in (p for group in self.optim.param_groups for p in group["params"]):
            p.grad.mul_(self.trust * p.norm() / (p.grad.norm() + 1e-8))
        self.optim.step()


@wrapped
def test_a_wrapper_that_is_no_optimizer_and_scales_gradients_leaves_the_penalty_unscaled(make_model, batches):
    assert_equals_weight_decay(
        make_model, lambda model, decay: train(model, LARC(SGD(rnn_groups(model, decay), lr=0.1)), batches)
    )


class Chain(Optimizer):
    """Optimizers one after another, behind one step."""

    def __init__(self, *links: Optimizer) -> None:
        self.links = links
        super().__init__(dict.fromkeys(p for link in links for g in link.param_groups for p in g["params"]), {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for link in self.links:
            link.step()
        return loss


class Pair:
    """The same, and no optimizer."""

    def __init__(self, *links: Optimizer) -> None:
        self.links = links

    def zero_grad(self) -> None:
        for link in self.links:
            link.zero_grad()

    def step(self) -> None:
        for link in self.links:
            link.step()


@wrapped
@pytest.mark.parametrize(("chain", "loop"), [(Pair, train), (Chain, train), (Chain, train_with_closure)])
def test_chained_optimizers_take_one_step_together(chain, loop, make_model, batches):
    def train_with(model: nn.Module, decay: float) -> None:
        rnn, head = rnn_groups(model, decay)
        loop(model, chain(SGD([rnn], lr=0.1), Adam([head], lr=0.01)), batches)

    assert assert_equals_weight_decay(make_model, train_with).step_count == 4


@wrapped
def test_two_links_over_the_same_weights_see_the_gradient_of_one_regularized_loss(make_model, batches):
    def chain(model: nn.Module) -> Chain:
        return Chain(SGD(model.parameters(), lr=0.1), Adam(model.parameters(), lr=0.01))

    by_hand, regularized = make_model(), make_model()
    optimizer = chain(by_hand)
    for x, y in batches:
        optimizer.zero_grad()
        (loss_of(by_hand, x, y) + DECAY / 2 * sum(p.square().sum() for p in by_hand.rnn.parameters())).backward()
        optimizer.step()
    attachment = regkit.attach(regularized, RULE)
    train(regularized, chain(regularized), batches)
    assert_equal_weights(by_hand, regularized)
    assert attachment.step_count == 4


@pytest.mark.works_with("Averaged models (SWA, EMA)")
@pytest.mark.parametrize("multi_avg_fn", [None, get_ema_multi_avg_fn(0.9)])
def test_an_averaged_model_alongside_changes_nothing_and_is_the_average(multi_avg_fn, make_model, batches):
    alone, watched = make_model(), make_model()
    attachments = [regkit.attach(model, {"rules": [*L2_AND_BALL["rules"], *AR["rules"]]}) for model in (alone, watched)]
    averaged = AveragedModel(watched, multi_avg_fn=multi_avg_fn)
    mean: dict[str, Tensor] = {}
    for model, attachment in zip((alone, watched), attachments, strict=True):
        optimizer = Adam(model.parameters(), lr=0.05)
        for step, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            (loss_of(model, x, y) + attachment.penalty()).backward()
            optimizer.step()
            if model is watched:
                averaged.update_parameters(model)
                share = 1 / (step + 1) if multi_avg_fn is None else 0.1 if step else 1.0
                for name, p in model.named_parameters():
                    mean[name] = mean.get(name, torch.zeros_like(p)).lerp(p.detach(), share)
                averaged(x)  # a look at the average between steps, under autograd too, is not data of the model
                with torch.no_grad():
                    averaged(x)
    assert_equal_weights(alone, watched, 0)
    for name, p in averaged.module.named_parameters():
        torch.testing.assert_close(p.detach(), mean[name])
    assert largest_row(averaged.module) <= BOUND + 1e-9  # a ball is convex
    update_bn([x for x, _ in batches], averaged)
    assert attachments[0].values() == attachments[1].values()
    assert copy.deepcopy(averaged)(batches[0][0]).shape == (5, 6, 2)
