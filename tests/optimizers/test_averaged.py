"""Schedule-free optimizers, which deploy an average of weights, and optimizers that estimate their step size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from prodigyopt import Prodigy
from schedulefree import (
    AdamWScheduleFree,
    AdamWScheduleFreeReference,
    RAdamScheduleFree,
    ScheduleFreeWrapper,
    ScheduleFreeWrapperReference,
    SGDScheduleFree,
    SGDScheduleFreeClosure,
    SGDScheduleFreeReference,
)
from torch import Tensor, nn

import regkit
from tests.support.decay import assert_equals_weight_decay
from tests.support.loops import Batches, loss_of, rnn_groups, train

schedule_free = pytest.mark.works_with("Optimizers, schedule-free")
estimated = pytest.mark.works_with("Optimizers that estimate their step size")

BOUND, STRENGTH, BETA = 0.35, 0.05, 0.8
Parameters = Iterable[Tensor]
AVERAGED: dict[str, Callable[[Parameters], Any]] = {
    "SGD": lambda p: SGDScheduleFree(p, lr=0.5, momentum=BETA),
    "SGD warming up": lambda p: SGDScheduleFree(p, lr=0.5, momentum=BETA, warmup_steps=3, foreach=False),
    "SGD by the definition": lambda p: SGDScheduleFreeReference(p, lr=0.5, momentum=BETA),
    "AdamW": lambda p: AdamWScheduleFree(p, lr=0.1, warmup_steps=2, r=0.5),
    "AdamW by the definition": lambda p: AdamWScheduleFreeReference(p, lr=0.1),
    "RAdam": lambda p: RAdamScheduleFree(p, lr=0.1),
    "a wrapper": lambda p: ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.5), momentum=BETA),
    "a wrapper by the definition": lambda p: ScheduleFreeWrapperReference(torch.optim.SGD(p, lr=0.5)),
}


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.rnn.named_parameters() if "weight" in name]


def projected(w: Tensor) -> Tensor:
    norms = w.norm(dim=1, keepdim=True)
    return torch.where(norms > BOUND, w * BOUND / norms, w)


def soft_thresholded(w: Tensor, size: float) -> Tensor:
    return w.sign() * (w.abs() - size).clamp(min=0)


def by_the_textbook(
    model: nn.Module, batches: Batches, act: Callable[[Tensor, float], Tensor], warmup: int
) -> list[Tensor]:
    """Schedule-free SGD as Defazio et al. 2024 write it, with `act` on z's weights. Returns x for each parameter."""
    parameters, ours = list(model.parameters()), {id(p) for p in weights(model)}
    z = [p.detach().clone() for p in parameters]
    x = [p.detach().clone() for p in parameters]
    largest, total = 0.0, 0.0
    for k, batch in enumerate(batches):
        with torch.no_grad():
            for p, one, average in zip(parameters, z, x, strict=True):
                p.copy_((1 - BETA) * one + BETA * average)
        gradients = torch.autograd.grad(loss_of(model, *batch), parameters)
        lr = 0.5 * min(1.0, (k + 1) / warmup)
        largest = max(largest, lr)
        total += largest**2
        c = largest**2 / total
        z = [one - lr * gradient for one, gradient in zip(z, gradients, strict=True)]
        z = [act(one, lr) if id(p) in ours else one for p, one in zip(parameters, z, strict=True)]
        x = [(1 - c) * average + c * one for average, one in zip(x, z, strict=True)]
    return x


@schedule_free
@pytest.mark.parametrize("name", ["SGD", "SGD warming up", "SGD by the definition", "a wrapper"])
@pytest.mark.parametrize(
    ("rule", "act"),
    [
        ({"constraint": f"max_norm({BOUND})"}, lambda z, _: projected(z)),
        ({"penalty": f"l1({STRENGTH})", "via": "proximal"}, lambda z, lr: soft_thresholded(z, lr * STRENGTH)),
    ],
    ids=["max-norm", "proximal l1"],
)
def test_rules_act_on_the_iterate_that_makes_the_steps(name, rule, act, make_model, batches):
    batches = batches * 3
    by_hand, model = make_model(), make_model()
    expected = by_the_textbook(by_hand, batches, act, 3 if "warming" in name else 1)

    optimizer = AVERAGED[name](model.parameters())
    roles = {"target": {"role": ["kernel", "recurrent"]}}
    with regkit.attach(model, {"rules": [{**rule, **roles}]}):
        optimizer.train()
        train(model, optimizer, batches)
        optimizer.eval()

    for p, x in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=0, atol=1e-9)


@schedule_free
@pytest.mark.parametrize("make", AVERAGED.values(), ids=AVERAGED)
def test_the_average_that_is_deployed_keeps_to_a_constraint(make, make_model, batches):
    model = make_model()
    optimizer = make(model.parameters())
    with regkit.attach(model, {"rules": [{"name": "ball", "constraint": f"max_norm({BOUND})"}]}) as attachment:
        for _ in range(3):  # training goes on after each evaluation
            optimizer.train()
            train(model, optimizer, batches)
            assert attachment.violations()["ball"] < 1e-9
            optimizer.eval()
            assert attachment.violations()["ball"] < 1e-9
    assert max(float(w.detach().norm(dim=1).max()) for w in weights(model)) > 0.9 * BOUND  # and it has work to do


@schedule_free
@pytest.mark.parametrize("optimizer_class", [SGDScheduleFree, AdamWScheduleFreeReference])
def test_penalties_are_taken_where_the_gradient_is_as_weight_decay_by_hand_is(optimizer_class, make_model, batches):
    def train_with(model: nn.Module, decay: float) -> None:
        optimizer = optimizer_class(rnn_groups(model, 0.0), lr=0.1)
        optimizer.train()
        for x, y in batches * 3:
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            for p in model.rnn.parameters():
                p.grad += decay * p.detach()
            optimizer.step()
        optimizer.eval()

    assert_equals_weight_decay(make_model, train_with)


@pytest.mark.parametrize(
    ("make", "rule", "reason"),
    [
        (AVERAGED["AdamW"], {"constraint": "unit_norm"}, "the set of unit_norm is not convex"),
        (AVERAGED["a wrapper"], {"constraint": "unit_norm"}, "the set of unit_norm is not convex"),
        (AVERAGED["a wrapper by the definition"], {"constraint": "unit_norm"}, "the set of unit_norm is not convex"),
        (AVERAGED["SGD"], {"constraint": "max_norm(0.5)", "every": 2}, "the rule is not for each alike"),
        (
            AVERAGED["SGD"],
            {"constraint": "max_norm(0.5)", "schedule": "linear(1, 0.5, 10)"},
            "the rule is not for each alike",
        ),
        (AVERAGED["SGD"], {"penalty": "l2(0.1)", "via": "decoupled"}, "Use via gradient"),
        (
            lambda p: SGDScheduleFreeClosure(p, lr=0.1),
            {"constraint": "max_norm(0.5)"},
            "does not show how it is made",
        ),
    ],
)
@schedule_free
def test_what_an_average_would_break_is_refused_by_name(make, rule, reason, make_model, batches):
    model = make_model()
    optimizer = make(model.parameters())
    if hasattr(optimizer, "train"):
        optimizer.train()
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        loss = loss_of(model, *batches[0])
        loss.backward()
        return loss

    rule = {"target": {"role": "recurrent"}, **rule}
    with regkit.attach(model, {"rules": [rule]}), pytest.raises(regkit.StepError, match="rule 'rules/0'") as caught:
        optimizer.step(closure)

    assert reason in str(caught.value)
    if "wrapper" not in str(make) and not isinstance(optimizer, ScheduleFreeWrapper | ScheduleFreeWrapperReference):
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@schedule_free
def test_an_average_with_weights_from_before_the_rule_is_refused(make_model, batches):
    model = make_model()
    optimizer = AVERAGED["AdamW"](model.parameters())
    optimizer.train()
    train(model, optimizer, batches)
    with (
        regkit.attach(model, {"rules": [{"constraint": "max_norm(0.5)"}]}),
        pytest.raises(regkit.StepError, match="weights from before attach"),
    ):
        train(model, optimizer, batches)


@schedule_free
def test_a_weight_that_is_no_linear_function_of_what_is_averaged_is_refused(make_model, batches):
    model = make_model()
    nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    optimizer = AVERAGED["AdamW"](model.parameters())
    optimizer.train()
    with (
        regkit.attach(model, {"rules": [{"target": {"role": "recurrent"}, "constraint": "max_norm(0.5)"}]}),
        pytest.raises(regkit.StepError, match="no linear function"),
    ):
        train(model, optimizer, batches)


@estimated
@pytest.mark.parametrize("via", ["decoupled", "proximal"])
def test_a_rule_that_multiplies_a_learning_rate_is_refused_where_the_step_size_is_an_estimate(via, make_model, batches):
    model = make_model()
    with (
        regkit.attach(model, {"rules": [{"penalty": "l2(0.1)", "via": via}]}),
        pytest.raises(regkit.StepError, match="Prodigy, which estimates its step size"),
    ):
        train(model, Prodigy(model.parameters()), batches)


@estimated
def test_penalties_in_the_gradient_and_constraints_act_where_the_step_size_is_an_estimate(make_model, batches):
    def train_with(model: nn.Module, decay: float) -> None:
        train(model, Prodigy(rnn_groups(model, decay), d0=1e-2, decouple=False), batches)

    assert_equals_weight_decay(make_model, train_with)
