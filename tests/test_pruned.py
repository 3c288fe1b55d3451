"""Pruned weights are penalized and constrained as they act, and stay pruned."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from loops import assert_equal_weights, loss_of, train
from torch import Tensor, nn
from torch.nn.utils import prune
from wrapped import assert_bitwise_equal, snapshot

import regkit

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
