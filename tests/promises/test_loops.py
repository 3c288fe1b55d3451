"""Weight penalties in real training loops equal torch's own weight_decay and hand-written losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regkit
from tests.support.loops import (
    DECAY,
    LOOPS,
    OPTIMIZERS,
    RULE,
    SCALED_LOOPS,
    assert_equal_weights,
    loss_of,
    rnn_groups,
    train,
    train_accumulating,
    train_with_closure,
    train_with_scaler,
)


@pytest.mark.parametrize("loop", [*LOOPS, *SCALED_LOOPS])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_l2_of_half_the_strength_equals_weight_decay(name, loop, make_model, batches):
    bare, decayed, regularized = make_model(), make_model(), make_model()
    loop(bare, OPTIMIZERS[name](rnn_groups(bare, 0.0)), batches)
    loop(decayed, OPTIMIZERS[name](rnn_groups(decayed, DECAY)), batches)
    attachment = regkit.attach(regularized, RULE)
    loop(regularized, OPTIMIZERS[name](rnn_groups(regularized, 0.0)), batches)

    assert_equal_weights(decayed, regularized)
    assert attachment.step_count == (2 if loop is train_accumulating else 4)
    assert not torch.allclose(bare.rnn.weight_hh_l0, regularized.rnn.weight_hh_l0, atol=1e-6)


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
def test_l2_equals_weight_decay_on_every_recurrent_layer(layer, options, make_model, batches):
    decayed, regularized = make_model(layer, **options), make_model(layer, **options)
    train(decayed, torch.optim.SGD(rnn_groups(decayed, DECAY), lr=0.1), batches)
    regkit.attach(regularized, RULE)
    train(regularized, torch.optim.SGD(rnn_groups(regularized, 0.0), lr=0.1), batches)
    assert_equal_weights(decayed, regularized)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_that_maximizes_still_makes_the_penalty_small(optimizer, make_model, batches):
    decayed, regularized = make_model(), make_model()
    train(decayed, optimizer(rnn_groups(decayed, DECAY), lr=0.01, maximize=True), batches)
    regkit.attach(regularized, RULE)
    train(regularized, optimizer(rnn_groups(regularized, 0.0), lr=0.01, maximize=True), batches)
    assert_equal_weights(decayed, regularized)


@pytest.mark.parametrize("loop", [train, train_with_closure, train_with_scaler])
@pytest.mark.parametrize("fused", [False, True])
def test_decoupled_l2_equals_adamw(fused, loop, make_model, batches):
    decayed, regularized = make_model(), make_model()
    rule = {"rules": [{"penalty": {"kind": "l2", "strength": DECAY / 2}, "via": "decoupled"}]}
    loop(decayed, torch.optim.AdamW(rnn_groups(decayed, DECAY), lr=0.01, fused=fused), batches)
    regkit.attach(regularized, rule)
    loop(regularized, torch.optim.AdamW(rnn_groups(regularized, 0.0), lr=0.01, fused=fused), batches)
    assert_equal_weights(decayed, regularized)


def test_gradient_path_equals_loss_path_equals_a_hand_written_loss(make_model, batches):
    by_hand, by_gradient, by_loss = make_model(), make_model(), make_model()
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.01)
    for x, y in batches:
        penalty = sum(0.05 * p.abs().sum() + 0.01 * p.square().sum() for p in by_hand.rnn.parameters())
        optimizer.zero_grad()
        (loss_of(by_hand, x, y) + penalty).backward()
        optimizer.step()

    rule = {"penalty": {"kind": "l1_l2", "l1": 0.05, "l2": 0.01}}
    regkit.attach(by_gradient, {"rules": [rule]})
    train(by_gradient, torch.optim.Adam(by_gradient.parameters(), lr=0.01), batches)

    attachment = regkit.attach(by_loss, {"rules": [{**rule, "via": "loss"}]})
    optimizer = torch.optim.Adam(by_loss.parameters(), lr=0.01)
    for x, y in batches:
        optimizer.zero_grad()
        (loss_of(by_loss, x, y) + attachment.penalty()).backward()
        optimizer.step()

    assert_equal_weights(by_hand, by_gradient)
    assert_equal_weights(by_hand, by_loss)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_minimizes_the_loss_plus_the_penalty(line_search, make_model, batches):
    def run(model: nn.Module, objective: Callable[[], Tensor]) -> list[float]:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=8, line_search_fn=line_search)
        returned: list[float] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = objective()
            loss.backward()
            return loss

        returned.extend(optimizer.step(closure).item() for _ in range(3))
        return returned

    x, y = batches[0]
    by_hand, regularized = make_model(), make_model()
    theirs = run(
        by_hand,
        lambda: loss_of(by_hand, x, y) + DECAY / 2 * sum(p.square().sum() for p in by_hand.rnn.parameters()),
    )
    attachment = regkit.attach(regularized, RULE)
    ours = run(regularized, lambda: loss_of(regularized, x, y))

    assert_equal_weights(by_hand, regularized, 1e-7)
    assert ours == pytest.approx(theirs, abs=1e-7)
    assert attachment.step_count == 3


def test_the_closure_of_other_optimizers_returns_the_loss_it_computed(make_model, batches):
    model = make_model()
    x, y = batches[0]
    regkit.attach(model, RULE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    expected = loss_of(model, x, y).item()
    assert optimizer.step(closure).item() == pytest.approx(expected)
    expected = loss_of(model, x, y).item()
    assert optimizer.step(closure=closure).item() == pytest.approx(expected)


@pytest.mark.parametrize("by_name", [False, True])
def test_the_penalty_is_added_behind_a_closure_however_it_is_given(by_name, make_model, batches):
    model = make_model()
    regkit.attach(model, RULE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    bare: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, *batches[0])
        loss.backward()
        bare.append(model.rnn.weight_hh_l0.grad.clone())
        return loss

    optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    wanted = bare[0] + DECAY * model.rnn.weight_hh_l0.detach()
    torch.testing.assert_close(model.rnn.weight_hh_l0.grad, wanted)


class Twice(torch.optim.SGD):
    """An optimizer that evaluates its closure twice, as a line search would."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        return super().step(closure)


@pytest.mark.parametrize("via", ["proximal", "decoupled"])
def test_an_optimizer_that_evaluates_its_closure_twice_is_seen(via, make_model, batches):
    model = make_model()
    regkit.attach(model, {"rules": [{"penalty": {"kind": "l2", "strength": 0.5}, "via": via}]})
    optimizer = Twice(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, *batches[0])
        loss.backward()
        return loss

    with pytest.raises(regkit.StepError, match=f"{via}.*Twice evaluates its closure several times"):
        optimizer.step(closure)


def test_the_prox_of_an_effective_bias_minimizes_over_both_biases(make_model, batches):
    """argmin over (a, b) of ½‖a − a₀‖² + ½‖b − b₀‖² + η·|a + b|: both move alike."""
    model, free = make_model(), make_model()
    rule = {"target": {"role": "bias", "bias": "effective"}, "penalty": "l1(0.5)", "via": "proximal"}
    regkit.attach(model, {"rules": [rule]})
    for one in (model, free):
        train(one, torch.optim.SGD(one.parameters(), lr=0.1), batches[:1])
    a, b = free.rnn.bias_ih_l0.detach(), free.rnn.bias_hh_l0.detach()
    total, step = a + b, 0.1 * 0.5
    wanted = total.sign() * (total.abs() - 2 * step).clamp(min=0)
    torch.testing.assert_close(model.rnn.bias_ih_l0.detach(), a + (wanted - total) / 2)
    torch.testing.assert_close(model.rnn.bias_hh_l0.detach(), b + (wanted - total) / 2)

    def objective(a: Tensor, b: Tensor) -> Tensor:
        moved = (a - free.rnn.bias_ih_l0).square() + (b - free.rnn.bias_hh_l0).square()
        return (moved / 2 + step * (a + b).abs()).sum()

    least = objective(model.rnn.bias_ih_l0, model.rnn.bias_hh_l0)
    for _ in range(100):
        shifts = 0.01 * torch.randn(2, 16, dtype=torch.float64)
        assert objective(model.rnn.bias_ih_l0 + shifts[0], model.rnn.bias_hh_l0 + shifts[1]) >= least


def test_a_decoupled_effective_bias_uses_the_learning_rate_of_each_of_its_two(make_model, batches):
    model, free = make_model(), make_model()
    rule = {"target": {"role": "bias", "bias": "effective"}, "penalty": "l2(0.5)", "via": "decoupled"}
    regkit.attach(model, {"rules": [rule]})
    total = (model.rnn.bias_ih_l0 + model.rnn.bias_hh_l0).detach().clone()
    for one in (model, free):
        groups = [{"params": [one.rnn.bias_ih_l0], "lr": 0.1}, {"params": [one.rnn.bias_hh_l0], "lr": 0.01}]
        train(one, torch.optim.SGD(groups), batches[:1])
    torch.testing.assert_close(model.rnn.bias_ih_l0, free.rnn.bias_ih_l0 - 0.1 * total)
    torch.testing.assert_close(model.rnn.bias_hh_l0, free.rnn.bias_hh_l0 - 0.01 * total)


def test_proximal_l1_is_ista_and_makes_exact_zeros(make_model, batches):
    by_hand, regularized = make_model(), make_model()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for x, y in batches:
        optimizer.zero_grad()
        loss_of(by_hand, x, y).backward()
        optimizer.step()
        with torch.no_grad():
            for p in by_hand.rnn.parameters():
                p.copy_(p.sign() * (p.abs() - 0.1 * 0.5).clamp(min=0))

    attachment = regkit.attach(
        regularized, {"rules": [{"penalty": {"kind": "l1", "strength": 0.5}, "via": "proximal"}]}
    )
    train(regularized, torch.optim.SGD(regularized.parameters(), lr=0.1), batches)

    assert_equal_weights(by_hand, regularized)
    assert (regularized.rnn.weight_hh_l0 == 0).sum() > 5
    expected = 0.5 * sum(p.abs().sum() for p in regularized.rnn.parameters())
    torch.testing.assert_close(attachment.values()["rules/0"], expected.detach())


@pytest.mark.parametrize("via", ["proximal", "decoupled"])
def test_proximal_and_decoupled_rules_refuse_a_line_search(via, make_model, batches):
    model = make_model()
    before = [p.clone() for p in model.parameters()]
    regkit.attach(model, {"rules": [{"penalty": {"kind": "l2", "strength": 0.5}, "via": via}]})
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, *batches[0])
        loss.backward()
        return loss

    with pytest.raises(regkit.StepError, match=f"{via}.*LBFGS.*Use via gradient"):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_decoupled_rule_uses_each_groups_own_learning_rate(make_model, batches):
    def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
        return [
            {"params": [model.rnn.weight_ih_l0], "lr": 0.01, "weight_decay": decay},
            {"params": [model.rnn.weight_hh_l0], "lr": 0.002, "weight_decay": decay},
        ]

    decayed, regularized = make_model(), make_model()
    weights = {"role": ["kernel", "recurrent"]}
    rule = {"target": weights, "penalty": {"kind": "l2", "strength": DECAY / 2}, "via": "decoupled"}
    train(decayed, torch.optim.AdamW(groups(decayed, DECAY)), batches)
    regkit.attach(regularized, {"rules": [rule]})
    train(regularized, torch.optim.AdamW(groups(regularized, 0.0)), batches)
    assert_equal_weights(decayed, regularized)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_get_a_gradient_that_fits_once_it_is_scaled(dtype):
    model = nn.LSTM(64, 512).to(dtype)
    with torch.no_grad():
        model.weight_ih_l0.normal_().abs_()
    regkit.attach(model, {"rules": [{"target": {"role": "kernel"}, "penalty": "orthogonal(1e-7)"}]})
    model.weight_ih_l0.grad = torch.zeros_like(model.weight_ih_l0)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    for gate in range(4):
        w = model.weight_ih_l0.detach().double()[gate * 512 : (gate + 1) * 512]
        wanted = 4e-7 * w @ (w.T @ w - torch.eye(64, dtype=torch.float64))
        ours = model.weight_ih_l0.grad[gate * 512 : (gate + 1) * 512].double()
        torch.testing.assert_close(ours, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.isfinite(model.weight_ih_l0.grad).all()
