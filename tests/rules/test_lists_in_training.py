"""Training by the list forms of kinds ends where training by loops ends, in whatever loop and with whatever weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import regkit
from regkit import Constraint, Penalty
from regkit.weights.batch import own_forms
from tests.support.laws import CONS, PENS
from tests.support.loops import Batches, assert_equal_weights, loss_of, train, train_with_closure, train_with_scaler
from tests.support.models import MakeModel, Tagger


@pytest.fixture
def loops_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes its list forms from every kind."""

    def take() -> None:
        for case in (*PENS, *CONS):
            base = Penalty if isinstance(case.kind, Penalty) else Constraint
            for form in own_forms(case.kind):
                monkeypatch.setattr(type(case.kind), form, getattr(base, form))

    return take


def tied(model: Tagger) -> None:
    model.rnn.weight_hh_l1 = model.rnn.weight_hh_l0


def partly_frozen(model: Tagger) -> None:
    model.rnn.weight_hh_l0.requires_grad_(False)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, w: Tensor) -> Tensor:
        return w / 2


def partly_computed(model: Tagger) -> None:
    parametrize.register_parametrization(model.rnn, "weight_hh_l0", Doubled())
    prune.random_unstructured(model.rnn, "weight_ih_l0", 0.5)


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9, **options)


def by_two_optimizers(model: Tagger, batches: Batches) -> None:
    """Kernels by one, all else by another, which steps every second time."""
    kernels = [p for name, p in model.named_parameters() if "weight_ih" in name]
    others = [p for name, p in model.named_parameters() if "weight_ih" not in name]
    optimizers = [torch.optim.SGD(kernels, lr=0.05), torch.optim.Adam(others, lr=0.01)]
    for index, (x, y) in enumerate(batches):
        model.zero_grad()
        loss_of(model, x, y).backward()
        for optimizer in optimizers[: 1 + index % 2]:
            optimizer.step()


def some_at_a_time(model: Tagger, batches: Batches) -> None:
    """In turn, one layer gets gradients and the other none."""
    optimizer = sgd(model)
    for index, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        for name, parameter in model.rnn.named_parameters():
            if name.endswith(f"l{index % 2}"):
                parameter.grad = None
        optimizer.step()


SITUATIONS: dict[str, tuple[Callable[[Tagger], object], Callable[[Tagger, Batches], None]]] = {
    "plain": (lambda model: None, lambda model, batches: train(model, sgd(model), batches)),
    "closure": (lambda model: None, lambda model, batches: train_with_closure(model, sgd(model), batches)),
    "tied": (tied, lambda model, batches: train(model, sgd(model), batches)),
    "partly frozen": (partly_frozen, lambda model, batches: train(model, sgd(model), batches)),
    "partly computed": (partly_computed, lambda model, batches: train(model, sgd(model), batches)),
    "maximizing": (lambda model: None, lambda model, batches: train(model, sgd(model, maximize=True), batches)),
    "scaled": (lambda model: None, lambda model, batches: train_with_scaler(model, sgd(model), batches)),
    "scaled, fused": (lambda model: None, lambda model, some: train_with_scaler(model, sgd(model, fused=True), some)),
    "two optimizers": (lambda model: None, by_two_optimizers),
    "some at a time": (lambda model: None, some_at_a_time),
}
RULES: dict[str, list[dict[str, Any]]] = {
    "penalties": [
        {"target": {"role": ["kernel", "bias"]}, "penalty": "l2(0.03)"},
        {"target": {"role": "recurrent", "gate": ["forget", "output"]}, "penalty": "l2(0.03)"},
        {"penalty": "l1(0.003)", "schedule": {"kind": "linear", "start": 0, "end": 1, "steps": 3}},
    ],
    "elastic net, and cells": [{"penalty": "l1_l2(0.003, 0.03)"}, {"constraint": "max_norm(0.4, per=cell)"}],
    "sums of biases": [
        {"target": {"role": ["kernel", "recurrent"]}, "penalty": "l2(0.03)"},
        {"target": {"role": "bias", "bias": "effective"}, "penalty": "l2(0.03)"},
    ],
    "constraints": [
        {"target": {"role": "kernel"}, "constraint": "max_norm(0.4)"},
        {"target": {"role": "recurrent"}, "constraint": "unit_norm", "every": 2},
        {"target": {"role": "bias"}, "constraint": "non_negative"},
        {
            "target": {"role": "recurrent", "gate": ["cell"]},
            "constraint": "min_max_norm(0.1, 0.4)",
            "schedule": {"kind": "linear", "start": 1, "end": 2, "steps": 3},
        },
    ],
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_training_by_list_forms_ends_where_training_by_loops_ends(
    situation: str, rules: str, make_model: MakeModel, batches: Batches, loops_only: Callable[[], None]
):
    """To the last bit, but for elastic net, and for what is multiplied by a loss scale after it is added up."""
    prepare, run = SITUATIONS[situation]
    ours, looped, bare = (make_model(num_layers=2) for _ in range(3))
    for model in (ours, looped, bare):
        torch.manual_seed(3)
        prepare(model)
    attachment = regkit.attach(ours, {"rules": RULES[rules]})
    run(ours, batches)
    loops_only()
    other = regkit.attach(looped, {"rules": RULES[rules]})
    run(looped, batches)
    run(bare, batches)

    assert_equal_weights(ours, looped, 1e-15 if "elastic" in rules or situation == "scaled, fused" else 0)
    assert attachment.step_count == other.step_count > 0
    assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), bare.parameters(), strict=True))
    ours_now, wanted = ({**one.values(), **one.violations()} for one in (attachment, other))
    torch.testing.assert_close(ours_now, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rules", RULES)
def test_projecting_all_at_once_is_projecting_each(rules: str, make_model: MakeModel, loops_only: Callable[[], None]):
    ours, looped = (make_model(num_layers=2) for _ in range(2))
    for model in (ours, looped):
        partly_frozen(model)
        regkit.attach(model, {"rules": RULES[rules]}).apply_constraints()
        loops_only()
    assert_equal_weights(ours, looped, 0)


def test_lists_via_the_loss_and_in_a_line_search_are_what_loops_are(
    make_model: MakeModel, batches: Batches, loops_only: Callable[[], None]
):
    def run(via: str) -> nn.Module:
        model = make_model(num_layers=2)
        attachment = regkit.attach(model, {"rules": [{"penalty": "l2(0.03)", "via": via}]})
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, *batches[0]) + attachment.penalty()
            loss.backward()
            return loss

        optimizer.step(closure)
        return model

    by_lists = [run(via) for via in ("gradient", "loss")]
    loops_only()
    for via, ours in zip(("gradient", "loss"), by_lists, strict=True):
        assert_equal_weights(ours, run(via), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rules", RULES)
def test_half_precision_weights_are_moved_as_by_loops(rules: str, dtype: torch.dtype, loops_only: Callable[[], None]):
    def run() -> nn.Module:
        torch.manual_seed(4)
        model = nn.LSTM(3, 4, num_layers=2).to(dtype)
        regkit.attach(model, {"rules": RULES[rules]})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return model

    ours = run()
    loops_only()
    assert_equal_weights(ours, run(), 2e-3 if "elastic" in rules else 0)


class Still(torch.optim.Optimizer):
    """It unscales by itself, as fused optimizers do, and moves nothing."""

    def step(self, closure: Any = None) -> None:
        return None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_penalty_too_small_for_half_precision_is_there_once_it_is_scaled(dtype: torch.dtype):
    """2e-6 · 0.01 is 0 in float16, where its gradient times the scale of 65536 is 0.0013."""
    model = nn.GRUCell(3, 4).to(dtype)
    regkit.attach(model, {"rules": [{"penalty": "l2(1e-6)"}]})
    optimizer = Still(model.parameters(), {})
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.01)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(65536.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    optimizer.step()
    for parameter in model.parameters():
        assert parameter.grad is not None
        wanted = (65536.0 * 2e-6 * parameter.detach().float()).to(dtype)
        torch.testing.assert_close(parameter.grad, wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_list_forms_are_right_where_the_default_dtype_is_a_wider_one(dtype: torch.dtype):
    model = nn.GRUCell(3, 4).to(dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        attachment = regkit.attach(model, {"rules": [{"penalty": "l1(0.1)"}, {"penalty": "l2(0.1)"}]})
        wanted = sum(0.1 * float(p.detach().double().square().sum()) for p in model.parameters())
        assert float(attachment.values()["rules/1"]) == pytest.approx(wanted, rel=1e-4)
    finally:
        torch.set_default_dtype(default)
