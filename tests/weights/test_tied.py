"""Tied weights count once, frozen ones are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import regkit
from tests.support.loops import Batches, assert_equal_weights, loss_of
from tests.support.wrapped import Sinh, with_

pytestmark = pytest.mark.works_with("Tied and frozen weights")


def rule(**rule: object) -> dict[str, object]:
    return {"rules": [{"name": "it", **rule, "target": {"role": "recurrent", **rule.get("target", {})}}]}


CONSTRAINT = {"name": "ball", "target": {"role": "recurrent"}, "constraint": "max_norm(0.2)"}


class Twins(nn.Module):
    """Two cells, called one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.RNNCell(3, 4), nn.RNNCell(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(1), 4, dtype=x.dtype)
        for step in x:
            h = self.two(step, self.one(step, h))
        return h


def tie(model: Twins) -> None:
    model.two.weight_hh = model.one.weight_hh


def twins() -> Twins:
    torch.manual_seed(1)
    return Twins().double()


def train_twins(model: Twins, batches: Batches, penalty=None, after=None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, _ in batches:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        (loss if penalty is None else loss + penalty(model)).backward()
        optimizer.step()
        if after is not None:
            with torch.no_grad():
                after(model)


def once(model: Twins) -> Tensor:
    return 0.1 * model.one.weight_hh.square().sum()


def both(model: Twins) -> Tensor:
    return 0.1 * (model.one.weight_hh.square().sum() + model.two.weight_hh.square().sum())


@pytest.mark.parametrize("when", ["before attach", "after attach"])
@pytest.mark.parametrize("via", ["gradient", "decoupled"])
def test_a_tied_weight_counts_once_whenever_it_was_tied(when, via, batches):
    by_hand, regularized = twins(), twins()
    tie(by_hand)
    if when == "before attach":
        tie(regularized)
    attachment = regkit.attach(regularized, rule(penalty="l2(0.1)", via=via))
    if when == "after attach":
        tie(regularized)
    train_twins(by_hand, batches, once)  # under SGD, decoupled and added L2 are the same
    train_twins(regularized, batches)
    assert_equal_weights(by_hand, regularized)
    torch.testing.assert_close(attachment.values()["it"], once(by_hand).detach())


@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_a_tied_weight_is_moved_once_towards_its_constraint(when, batches):
    halfway = {"kind": "min_max_norm", "max_value": 0.1, "rate": 0.5, "per": "matrix"}
    by_hand, regularized = twins(), twins()
    tie(by_hand)
    if when == "before attach":
        tie(regularized)
    regkit.attach(regularized, rule(constraint=halfway))
    if when == "after attach":
        tie(regularized)

    def after(model: Twins) -> None:
        norm = model.one.weight_hh.norm()
        model.one.weight_hh.mul_((norm + 0.1) / 2 / norm)

    train_twins(by_hand, batches, None, after)
    train_twins(regularized, batches)
    assert_equal_weights(by_hand, regularized)


def test_a_weight_tied_to_the_original_of_a_parametrized_one_is_another_weight_and_counts_too(batches):
    """w and sinh(w) are two matrices, though one parameter is behind both."""
    models = by_hand, regularized = twins(), twins()
    for model in models:
        with_(Sinh)(model.one, "weight_hh")
        model.two.weight_hh = model.one.parametrizations.weight_hh.original
    attachment = regkit.attach(regularized, rule(penalty="l2(0.1)"))
    train_twins(by_hand, batches, both)
    train_twins(regularized, batches)
    assert_equal_weights(by_hand, regularized)
    torch.testing.assert_close(attachment.values()["it"], both(by_hand).detach())


def test_one_parametrization_of_one_tied_original_counts_once(batches):
    models = by_hand, regularized = twins(), twins()
    for model in models:
        tie(model)
        shared = Sinh()
        for cell in (model.one, model.two):
            parametrize.register_parametrization(cell, "weight_hh", shared)
        assert model.one.parametrizations.weight_hh.original is model.two.parametrizations.weight_hh.original
    regkit.attach(regularized, rule(penalty="l2(0.1)"))
    train_twins(by_hand, batches, once)
    train_twins(regularized, batches)
    assert_equal_weights(by_hand, regularized)


@pytest.mark.parametrize("penalty", [False, True])
def test_two_biases_that_are_tied_have_twice_their_value_as_their_sum(penalty, batches):
    target = {"role": "bias", "bias": "effective", "module": "one"}
    models = by_hand, regularized = twins(), twins()
    for model in models:
        model.one.bias_hh = model.one.bias_ih
    extra = {"penalty": "l2(0.1)"} if penalty else {"constraint": "non_negative"}
    attachment = regkit.attach(regularized, rule(**extra, target=target))
    train_twins(
        by_hand,
        batches,
        (lambda model: 0.1 * (2 * model.one.bias_ih).square().sum()) if penalty else None,
        None if penalty else lambda model: model.one.bias_ih.clamp_(min=0),
    )
    train_twins(regularized, batches)
    assert_equal_weights(by_hand, regularized)
    assert penalty or attachment.violations()["it"] == 0


@pytest.mark.parametrize("via", ["gradient", "loss", "proximal", "decoupled"])
def test_frozen_weights_are_left_alone_and_unfreezing_later_works(via, make_model, batches):
    by_hand, regularized = make_model(), make_model()
    for model in (by_hand, regularized):
        model.rnn.weight_hh_l0.requires_grad_(False)
    frozen = regularized.rnn.weight_hh_l0.clone()
    spec = rule(penalty="l2(0.1)", via=via, target={"role": ["recurrent", "kernel"]})
    attachment = regkit.attach(regularized, {"rules": [*spec["rules"], {**CONSTRAINT, "optional": True}]})
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (by_hand, regularized)]
    for part in (batches[:2], batches[2:]):
        for model, optimizer in zip((by_hand, regularized), optimizers, strict=True):
            for x, y in part:
                optimizer.zero_grad()
                mine = [p for p in (model.rnn.weight_ih_l0, model.rnn.weight_hh_l0) if p.requires_grad]
                loss = loss_of(model, x, y)
                if model is by_hand and via in ("gradient", "loss"):
                    loss = loss + 0.1 * sum(p.square().sum() for p in mine)
                (loss + attachment.penalty() if model is regularized else loss).backward()
                with torch.no_grad():
                    if model is by_hand and via == "decoupled":
                        for p in mine:
                            p.mul_(1 - 2 * 0.1 * 0.1)
                    optimizer.step()
                    if model is by_hand and via == "proximal":
                        for p in mine:
                            p.div_(1 + 2 * 0.1 * 0.1)
                    if model is by_hand and model.rnn.weight_hh_l0.requires_grad:
                        w = model.rnn.weight_hh_l0
                        w.mul_((0.2 / w.norm(dim=1, keepdim=True)).clamp(max=1))
        assert_equal_weights(by_hand, regularized)
        if part is batches[:2] or not regularized.rnn.weight_hh_l0.requires_grad:
            assert torch.equal(frozen, regularized.rnn.weight_hh_l0)
        for model in (by_hand, regularized):
            model.rnn.weight_hh_l0.requires_grad_(True)
    assert attachment.violations()["ball"] < 1e-9


def test_two_sums_that_share_one_half_are_two_weights():
    model = Twins()
    model.two.bias_ih = model.one.bias_ih
    plan = regkit.resolve(model, {"rules": [{"penalty": "l2(1)", "target": {"role": "bias", "bias": "effective"}}]})
    assert [site.name for site in plan.bindings[0].weights] == ["one", "two"]


def tied_biases() -> tuple[nn.RNNCell, Tensor]:
    """A cell of which the two biases are one parameter x, so that b = 2x acts; and x as it is."""
    torch.manual_seed(3)
    cell = nn.RNNCell(3, 5).double()
    cell.bias_hh = cell.bias_ih
    with torch.no_grad():
        cell.bias_ih.uniform_(-1, 1)
    return cell, cell.bias_ih.detach().clone()


def stepped_at_zero_gradient(cell: nn.RNNCell, rate: float) -> Tensor:
    for parameter in cell.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(cell.parameters(), lr=rate).step()
    return cell.bias_ih.detach()


def least(x: Tensor, f) -> Tensor:
    """The number among many, for each number of x, at which f(number, x) is least: as slow and sure as can be."""
    tries = torch.linspace(-1.5, 1.5, 300_001, dtype=torch.float64)
    return torch.stack([tries[f(tries, one).argmin()] for one in x])


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_a_proximal_step_on_a_bias_that_is_both_of_two_is_that_of_twice_the_parameter(kind):
    """The next x is the one at which (x' - x)² / 2·lr + strength · Ω(2x') is least."""
    cell, x = tied_biases()
    target = {"role": "bias", "bias": "effective"}
    regkit.attach(cell, {"rules": [{"penalty": f"{kind}(0.7)", "via": "proximal", "target": target}]})
    omega = {"l1": torch.abs, "l2": torch.square}[kind]
    wanted = least(x, lambda new, old: (new - old).square() / (2 * 0.2) + 0.7 * omega(2 * new))
    torch.testing.assert_close(stepped_at_zero_gradient(cell, 0.2), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("via", ["gradient", "decoupled"])
def test_a_gradient_of_a_bias_that_is_both_of_two_is_that_of_twice_the_parameter(via):
    """Ω(2x) = Σ(2x)², of which the slope by x is 8x."""
    cell, x = tied_biases()
    target = {"role": "bias", "bias": "effective"}
    regkit.attach(cell, {"rules": [{"penalty": "l2(0.7)", "via": via, "target": target}]})
    torch.testing.assert_close(stepped_at_zero_gradient(cell, 0.01), x - 0.01 * 0.7 * 8 * x, rtol=1e-12, atol=0)


def test_a_constraint_on_a_bias_that_is_both_of_two_holds_for_twice_the_parameter():
    cell, x = tied_biases()
    ball = {"kind": "max_norm", "max_value": 0.5, "per": "matrix"}
    regkit.attach(cell, {"rules": [{"constraint": ball, "target": {"role": "bias", "bias": "effective"}}]})
    torch.testing.assert_close(stepped_at_zero_gradient(cell, 0.1), 0.25 * x / x.norm(), rtol=1e-6, atol=0)
