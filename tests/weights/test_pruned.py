"""Pruned weights are penalized and constrained as they act, and stay pruned."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import regkit
from tests.support.loops import assert_equal_weights, loss_of, train
from tests.support.wrapped import assert_bitwise_equal, snapshot

pytestmark = pytest.mark.works_with("Pruned weights")


def rule(**rule: object) -> dict[str, object]:
    return {"rules": [{"name": "it", **rule, "target": {"role": "recurrent", **rule.get("target", {})}}]}


class AtLeast(regkit.Constraint):
    """w ≥ 1."""

    kind: Literal["at_least"] = "at_least"

    def project(self, w: Tensor) -> Tensor:
        return w.clamp(min=1)

    def violation(self, w: Tensor) -> Tensor:
        return (1 - w).clamp(min=0).amax()


PRUNE = {
    "unstructured": lambda module: prune.l1_unstructured(module, "weight_hh_l0", 0.5),
    "structured": lambda module: prune.ln_structured(module, "weight_hh_l0", 0.25, n=2, dim=1),
    "twice": lambda module: prune.random_unstructured(
        prune.l1_unstructured(module, "weight_hh_l0", 0.3), "weight_hh_l0", 0.3
    ),
}


def pruned_pair(make_model, how: str) -> tuple[nn.Module, nn.Module]:
    models = make_model(), make_model()
    for model in models:
        torch.manual_seed(3)
        PRUNE[how](model.rnn)
    return models


def masked(model: nn.Module) -> Tensor:
    return model.rnn.weight_hh_l0_orig * model.rnn.weight_hh_l0_mask


@pytest.mark.parametrize("how", PRUNE)
@pytest.mark.parametrize("via", ["gradient", "loss"])
def test_a_pruned_weight_is_penalized_as_it_acts(how, via, make_model, batches):
    by_hand, regularized = pruned_pair(make_model, how)
    attachment = regkit.attach(regularized, rule(penalty="l2(0.1)", via=via, target={"gate": ["input", "output"]}))
    for model in (by_hand, regularized):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for x, y in batches:
            optimizer.zero_grad()
            rows = torch.cat([masked(model)[:4], masked(model)[12:]])
            extra = 0.1 * rows.square().sum() if model is by_hand else attachment.penalty()
            (loss_of(model, x, y) + extra).backward()
            optimizer.step()
    assert_equal_weights(by_hand, regularized)


@pytest.mark.parametrize("how", PRUNE)
@pytest.mark.parametrize("after", [False, True])
def test_a_pruned_weight_is_constrained_as_it_acts_and_its_mask_and_what_is_under_it_stay(
    how, after, make_model, batches
):
    by_hand, regularized = pruned_pair(make_model, how)
    if after:
        regularized = make_model()
    attachment = regkit.attach(regularized, rule(constraint="max_norm(0.2)"))
    if after:
        torch.manual_seed(3)
        PRUNE[how](regularized.rnn)
    mask = regularized.rnn.weight_hh_l0_mask.clone()
    for model in (by_hand, regularized):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for batch in batches:
            train(model, optimizer, [batch])
            if model is by_hand:
                with torch.no_grad():
                    held = masked(model).renorm(2, 0, 0.2)
                    original = model.rnn.weight_hh_l0_orig
                    original.copy_(torch.where(mask.bool(), held, original))
    assert_equal_weights(by_hand, regularized, 1e-6)  # renorm leaves a little room
    assert attachment.violations()["it"] < 1e-9
    assert masked(regularized).detach().norm(dim=1).max().item() == pytest.approx(0.2)
    assert torch.equal(regularized.rnn.weight_hh_l0_mask, mask)


@pytest.mark.parametrize("via", ["proximal", "decoupled"])
def test_pruned_weights_shrink_where_they_are_not_pruned(via, make_model, batches):
    by_hand, regularized = pruned_pair(make_model, "unstructured")
    train(by_hand, torch.optim.SGD(by_hand.parameters(), lr=0.0), batches[:1])
    with torch.no_grad():
        by_hand.rnn.weight_hh_l0_orig.grad = None
        factor = 1 / (1 + 2 * 0.1) if via == "proximal" else 1 - 2 * 0.1
        original, mask = by_hand.rnn.weight_hh_l0_orig, by_hand.rnn.weight_hh_l0_mask
        wanted = torch.where(mask.bool(), original * factor, original)
    regkit.attach(regularized, rule(penalty="l2(0.1)", via=via))
    loss_of(regularized, *batches[0]).backward()
    for p in regularized.parameters():
        p.grad.zero_()
    torch.optim.SGD(regularized.parameters(), lr=1.0).step()
    torch.testing.assert_close(regularized.rnn.weight_hh_l0_orig.detach(), wanted)


def test_pruning_made_permanent_after_attach_leaves_a_parameter_under_the_rule(make_model, batches):
    by_hand, regularized = pruned_pair(make_model, "unstructured")
    regkit.attach(regularized, rule(penalty="l2(0.1)"))
    for model in (by_hand, regularized):
        prune.remove(model.rnn, "weight_hh_l0")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            (loss + 0.1 * model.rnn.weight_hh_l0.square().sum() if model is by_hand else loss).backward()
            optimizer.step()
    assert_equal_weights(by_hand, regularized)


def test_a_constraint_that_would_fill_what_is_pruned_is_refused(make_model):
    class Plugin:
        @regkit.hookimpl
        def regkit_constraints(self) -> list[type[regkit.Constraint]]:
            return [AtLeast]

    model, _ = pruned_pair(make_model, "unstructured")
    before = snapshot(model)
    with pytest.raises(regkit.AttachError, match=r"rule 'it' .*rnn: weight_hh_l0 is pruned, and would not be zero any"):
        regkit.attach(model, rule(constraint="at_least"), registry=regkit.Registry([Plugin()]))
    assert_bitwise_equal(before, snapshot(model))


# --- a sum of which one half is pruned -------------------------------------------------------------------------------


def half_pruned(first: float = 1.0, second: float = -3.0) -> tuple[nn.LSTM, Tensor]:
    """An LSTM with biases of these numbers, the first half of bias_ih pruned; and where bias_ih acts."""
    model = nn.LSTM(3, 4)
    with torch.no_grad():
        model.bias_ih_l0.fill_(first)
        model.bias_hh_l0.fill_(second)
    acts = torch.arange(16) >= 8
    prune.custom_from_mask(model, "bias_ih_l0", acts)
    return model, acts


def stepped_alone(model: nn.LSTM, rule: dict[str, object], lr: float = 0.5) -> regkit.Attachment:
    """Take a step without gradients from a loss under a rule on the effective biases."""
    attachment = regkit.attach(model, {"rules": [{"target": {"role": "bias", "bias": "effective"}, **rule}]})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.SGD(model.parameters(), lr=lr).step()
    return attachment


def test_a_sum_of_biases_is_projected_by_the_half_that_is_not_pruned():
    model, acts = half_pruned()
    attachment = stepped_alone(model, {"constraint": "non_negative"})
    assert float(attachment.violations()["rules/0"]) == 0
    torch.testing.assert_close(model.bias_ih_l0_orig.detach(), torch.where(acts, 2.0, 1.0))
    torch.testing.assert_close(model.bias_hh_l0.detach(), torch.where(acts, -2.0, 0.0))


def test_the_proximal_step_of_a_sum_counts_once_where_one_half_is_pruned():
    """a + b = −2, and b = −3 alone: moving both by δ/2 costs ¼δ², and moving one by δ costs ½δ²."""
    model, acts = half_pruned()
    stepped_alone(model, {"penalty": "l1(0.1)", "via": "proximal"})
    threshold = torch.where(acts, 2 * 0.05, 0.05)
    wanted = torch.where(acts, -2.0, -3.0) + threshold
    acting = (model.bias_ih_l0_orig * model.bias_ih_l0_mask + model.bias_hh_l0).detach()
    torch.testing.assert_close(acting, wanted)


def test_a_sum_that_is_pruned_in_both_halves_stays_where_it_is_allowed_and_is_an_error_where_it_is_not():
    model, _ = half_pruned()
    prune.custom_from_mask(model, "bias_hh_l0", torch.arange(16) >= 4)
    attachment = stepped_alone(model, {"constraint": "non_negative"})
    assert float(attachment.violations()["rules/0"]) == 0
    attachment.detach()
    model, _ = half_pruned()
    model.bias_hh_l0.requires_grad_(False)
    regkit.attach(model, {"rules": [{"target": {"role": "bias", "bias": "effective"}, "constraint": "non_negative"}]})
    model.bias_ih_l0_orig.grad = torch.zeros(16)
    with pytest.raises(regkit.AttachError, match="where it would change, all of it is pruned"):
        torch.optim.SGD(model.parameters(), lr=0.5).step()


class Norm(regkit.Penalty):
    """‖w‖, whose proximal operator looks at all of it."""

    kind: Literal["test_norm"] = "test_norm"

    def value(self, w: Tensor) -> Tensor:
        return w.norm()

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        return w * (1 - step / w.norm().clamp(min=1e-9)).clamp(min=0)


def test_a_proximal_step_that_looks_at_all_numbers_is_refused_on_a_sum_of_which_a_part_is_pruned():
    class Plugin:
        @regkit.hookimpl
        def regkit_penalties(self) -> list[type[regkit.Penalty]]:
            return [Norm]

    model, _ = half_pruned()
    registry = regkit.Registry(plugins=[Plugin()])
    rule = {"target": {"role": "bias", "bias": "effective"}, "penalty": "test_norm(0.1)", "via": "proximal"}
    attachment = regkit.attach(model, {"rules": [rule]}, registry=registry)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(regkit.StepError, match="does not act on each number alone"):
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    attachment.detach()
