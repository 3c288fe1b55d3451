"""Whose step it is: several optimizers, wrapped, skipped and raising ones; frozen, tied and replaced weights."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regkit
from regkit.runtime.step import OwnedParameters, StepCount

L2 = {"rules": [{"penalty": {"kind": "l2", "strength": 0.5}}]}  # its gradient is the weight itself
RECURRENT = {"rules": [{"target": {"role": "recurrent"}, "penalty": {"kind": "l2", "strength": 0.5}}]}


def backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture
def x(batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    return batches[0][0]


def test_the_gradient_is_added_once_at_the_step_and_not_before(make_model, x):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    regkit.attach(model, L2)
    backward(model, x)
    before = gradients(model)
    optimizer.step()
    for name, p in model.rnn.named_parameters():
        torch.testing.assert_close(p.grad, before[f"rnn.{name}"] + p)
    assert torch.equal(model.head.weight.grad, before["head.weight"])


def test_optimizers_of_other_models_are_left_alone(make_model, x):
    model, stranger = make_model(), make_model()
    attachment = regkit.attach(model, L2)
    optimizer = torch.optim.SGD(stranger.parameters(), lr=0.1)
    backward(stranger, x)
    before = gradients(stranger)
    optimizer.step()
    assert all(torch.equal(p.grad, before[name]) for name, p in stranger.named_parameters())
    assert attachment.step_count == 0


def test_parameters_split_over_two_optimizers_are_each_regularized_once(make_model, x):
    model = make_model()
    attachment = regkit.attach(model, L2)
    one = torch.optim.SGD([model.rnn.weight_ih_l0, model.rnn.bias_ih_l0], lr=0.0)
    other = torch.optim.SGD([model.rnn.weight_hh_l0, model.rnn.bias_hh_l0], lr=0.0)
    for _ in range(3):
        backward(model, x)
        before = gradients(model)
        one.step()
        other.step()
        for name, p in model.rnn.named_parameters():
            torch.testing.assert_close(p.grad, before[f"rnn.{name}"] + p)
    assert attachment.step_count == 3


def test_an_optimizer_that_steps_more_often_sets_the_count():
    count = StepCount()
    one, other = {1, 2}, {3}
    seen = []
    for parameters in (one, one, other, one, one, other):
        seen.append(count.index(parameters))
        count.advance(parameters)
    assert seen == [0, 1, 1, 2, 3, 3]
    assert count.count == 4


def test_the_rhythm_of_optimizers_is_forgotten_when_all_parameters_were_replaced():
    count = StepCount()
    for parameters in ({1}, {2}, {1}, {2}):
        count.advance(parameters)
    assert count.history
    count.keep({3: None})
    assert (count.history, count.stepped, count.count) == ([], frozenset(), 2)


def test_ownership_restricted_to_new_parameters_is_of_all_that_the_optimizer_has():
    old, new, group = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1)), {"lr": 0.1}
    owned = OwnedParameters({1: old}, {1: group, 2: group})
    assert owned.restrict_to_parameters(owned.current) is owned
    restricted = owned.restrict_to_parameters({2: new})
    assert (restricted.groups, restricted.all_groups) == ({2: group}, {1: group, 2: group})
    assert restricted.parameters == [new]


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another, as Lookahead is: both fire the global hooks."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__([p for g in inner.param_groups for p in g["params"]], {})

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
def test_the_outermost_of_wrapped_optimizers_owns_the_step(with_closure, make_model, x):
    model = make_model()
    attachment = regkit.attach(model, L2)
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    outer = Wrapper(Wrapper(inner))
    backward(model, x)
    before = gradients(model)
    outer.step(lambda: backward(model, x)) if with_closure else outer.step()
    for name, p in model.rnn.named_parameters():
        torch.testing.assert_close(p.grad, before[f"rnn.{name}"] + p)
    assert attachment.step_count == 1


def test_an_inner_optimizer_still_owns_what_the_outer_one_does_not(make_model, x):
    model = make_model()
    regkit.attach(model, L2)
    inner = torch.optim.SGD(model.parameters(), lr=0.0)
    outer = Wrapper(torch.optim.SGD([model.rnn.weight_ih_l0], lr=0.0))
    outer.inner = inner
    backward(model, x)
    before = gradients(model)
    outer.step()
    for name, p in model.rnn.named_parameters():
        torch.testing.assert_close(p.grad, before[f"rnn.{name}"] + p)


class Failing(torch.optim.SGD):
    """An optimizer whose step raises when it is told to."""

    fails = True

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise RuntimeError("out of memory")
        return super().step(closure)


def test_a_step_that_raised_claims_nothing_from_the_next_one(make_model, x):
    model = make_model()
    attachment = regkit.attach(model, L2)
    failing = Failing(model.parameters(), lr=0.0)
    backward(model, x)
    with pytest.raises(RuntimeError, match="out of memory"):
        failing.step()
    assert attachment.step_count == 0

    working = torch.optim.SGD(model.parameters(), lr=0.0)
    backward(model, x)
    before = gradients(model)
    working.step()
    for name, p in model.rnn.named_parameters():
        torch.testing.assert_close(p.grad, before[f"rnn.{name}"] + p)
    assert attachment.step_count == 1


def test_a_closure_that_raises_leaves_the_next_step_right(make_model, x):
    model = make_model()
    attachment = regkit.attach(model, L2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def closure() -> None:
        raise ValueError("bad batch")

    with pytest.raises(ValueError, match="bad batch"):
        optimizer.step(closure)
    backward(model, x)
    before = gradients(model)
    optimizer.step()
    torch.testing.assert_close(
        model.rnn.weight_hh_l0.grad, before["rnn.weight_hh_l0"] + model.rnn.weight_hh_l0.detach()
    )
    assert attachment.step_count == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_adds_projects_and_counts_nothing(fused, make_model, x):
    model = make_model()
    both = {
        "rules": [
            {"penalty": {"kind": "l2", "strength": 0.5}},
            {"constraint": {"kind": "max_norm", "max_value": 0.1}},
        ]
    }
    attachment = regkit.attach(model, both)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(x).square().mean()).backward()
    model.rnn.weight_ih_l0.grad[0, 0] = torch.inf
    weights = [p.clone() for p in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert attachment.step_count == 0

    optimizer.zero_grad()
    scaler.scale(model(x).square().mean()).backward()
    scaler.step(optimizer)
    assert attachment.step_count == 1
    assert attachment.violations()["rules/1"] < 1e-12


def test_frozen_and_untrained_weights_are_left_alone_and_unfreezing_works(make_model, x):
    model = make_model()
    attachment = regkit.attach(
        model,
        {
            "rules": [
                {"target": {"role": "recurrent"}, "penalty": {"kind": "l2", "strength": 0.5}},
                {"target": {"role": "recurrent"}, "constraint": {"kind": "max_norm", "max_value": 0.01}},
            ]
        },
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    weight = model.rnn.weight_hh_l0
    before = weight.detach().clone()
    weight.requires_grad_(False)
    backward(model, x)
    optimizer.step()
    assert torch.equal(weight, before)
    assert weight.grad is None
    assert attachment.values()["rules/0"] == 0

    weight.requires_grad_(True)
    optimizer.zero_grad()
    nn.functional.mse_loss(model.head.weight, torch.ones_like(model.head.weight)).backward()
    optimizer.step()  # a step that does not train the recurrent module
    assert torch.equal(weight, before)

    backward(model, x)
    optimizer.step()
    assert attachment.violations()["rules/1"] < 1e-12


def test_a_tied_weight_counts_once(x):
    first, second = nn.LSTM(3, 3).double(), nn.LSTM(3, 3).double()
    second.weight_hh_l0 = first.weight_hh_l0
    model = nn.ModuleDict({"first": first, "second": second})
    regkit.attach(model, RECURRENT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    (first(x)[0].sum() + second(x)[0].sum()).backward()
    before = first.weight_hh_l0.grad.clone()
    optimizer.step()
    torch.testing.assert_close(first.weight_hh_l0.grad, before + first.weight_hh_l0.detach())


def test_parameters_replaced_after_attach_are_found(make_model, x):
    model = make_model()
    attachment = regkit.attach(model, L2)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    backward(model, x)
    before = gradients(model)
    optimizer.step()
    torch.testing.assert_close(
        model.rnn.weight_hh_l0.grad, before["rnn.weight_hh_l0"] + model.rnn.weight_hh_l0.detach()
    )
    assert attachment.step_count == 1


def test_a_deep_copied_optimizer_is_still_seen(make_model, x):
    model = make_model()
    attachment = regkit.attach(model, L2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    copied = copy.deepcopy(optimizer)
    copied.param_groups[0]["params"] = list(model.parameters())
    backward(model, x)
    copied.step()
    assert attachment.step_count == 1


def test_optimizer_restricts_the_attachment_to_one(make_model, x):
    model = make_model()
    one, other = (torch.optim.SGD(model.parameters(), lr=0.0) for _ in range(2))
    attachment = regkit.attach(model, L2, optimizer=one)
    backward(model, x)
    before = gradients(model)
    other.step()
    assert torch.equal(model.rnn.weight_hh_l0.grad, before["rnn.weight_hh_l0"])
    one.step()
    assert not torch.equal(model.rnn.weight_hh_l0.grad, before["rnn.weight_hh_l0"])
    assert attachment.step_count == 1


def test_models_trained_in_two_threads_do_not_disturb_one_another(make_model, batches):
    def train(model: nn.Module, steps: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(steps):
            backward(model, batches[step % len(batches)][0])
            optimizer.step()

    alone, *threaded = (make_model() for _ in range(3))
    for model in (alone, *threaded):
        regkit.attach(model, L2)
    train(alone, 20)
    threads = [threading.Thread(target=train, args=(model, 20)) for model in threaded]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model in threaded:
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_effective_bias_gets_the_gradient_of_the_sum(make_model, x):
    model = make_model()
    rule = {"target": {"role": "bias", "bias": "effective"}, "penalty": {"kind": "l2", "strength": 0.5}}
    attachment = regkit.attach(model, {"rules": [rule]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    backward(model, x)
    before = gradients(model)
    optimizer.step()
    total = (model.rnn.bias_ih_l0 + model.rnn.bias_hh_l0).detach()
    for name in ("bias_ih_l0", "bias_hh_l0"):
        torch.testing.assert_close(getattr(model.rnn, name).grad, before[f"rnn.{name}"] + total)
    torch.testing.assert_close(attachment.values()["rules/0"], 0.5 * total.square().sum())


def test_one_gate_of_one_direction_is_all_that_a_narrow_target_touches(make_model, x):
    model = make_model(num_layers=2, bidirectional=True)
    target = {"role": "recurrent", "gate": "f", "layer": 1, "direction": "backward"}
    regkit.attach(model, {"rules": [{"target": target, "penalty": {"kind": "l2", "strength": 0.5}}]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    backward(model, x)
    before = gradients(model)
    optimizer.step()
    weight = model.rnn.weight_hh_l1_reverse
    expected = before["rnn.weight_hh_l1_reverse"].clone()
    expected[4:8] += weight.detach()[4:8]
    torch.testing.assert_close(weight.grad, expected)
    for name, p in model.named_parameters():
        if name != "rnn.weight_hh_l1_reverse":
            assert torch.equal(p.grad, before[name])
