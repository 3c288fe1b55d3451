"""Weights that are kept in other ways than torch's: turned, side by side, wired, made positive, in a submodule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import regkit
from tests.support.kept_weights import (
    FEATURES,
    HOW,
    REGISTRY,
    UNITS,
    Kept,
    Pair,
    ball,
    changed,
    make,
    part,
    rules,
    train,
)
from tests.support.loops import assert_equal_weights

CASES = [(how, "plain", role, gate) for how in HOW for role, gate in (("kernel", None), ("recurrent", "new"))]
CASES += [(how, "parametrized", "recurrent", "new") for how in ("turned", "all of it")]
CASES += [(how, "pruned", "recurrent", "new") for how in ("side by side", "wired")]


@pytest.mark.parametrize(("how", "under", "role", "gate"), CASES)
@pytest.mark.parametrize("via", ["gradient", "loss", "proximal", "decoupled", "constraint"])
def test_a_block_is_regularized_as_by_hand(how, under, role, gate, via, batches):
    batches = batches[:2]
    bare, by_hand, regularized = (make(how, under) for _ in range(3))
    attachment = regkit.attach(regularized, rules(via, role, gate), registry=REGISTRY)
    act = {
        "gradient": {"extra": lambda: 0.05 * part(by_hand.acting(), role, gate).square().sum()},
        "proximal": {"after": lambda: changed(by_hand, role, gate, lambda block: block / (1 + 2 * 0.3 * 0.05))},
        "decoupled": {"before": lambda: changed(by_hand, role, gate, lambda block: block * (1 - 2 * 0.3 * 0.05))},
        "constraint": {"after": lambda: changed(by_hand, role, gate, ball)},
    }
    act["loss"] = act["gradient"]
    train(bare, batches)
    train(by_hand, batches, **act[via])
    train(regularized, batches, extra=attachment.penalty if via == "loss" else None)
    assert_equal_weights(by_hand, regularized)
    leaf, free = next(regularized.maps.parameters()), next(bare.maps.parameters())
    assert not torch.allclose(leaf, free, atol=1e-4)
    if via == "constraint":
        assert attachment.violations()["it"] < 1e-9
    else:
        wanted = 0.05 * part(by_hand.acting(), role, gate).square().sum()
        torch.testing.assert_close(attachment.values()["it"], wanted.detach())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("via", ["gradient", "constraint"])
def test_what_is_not_of_the_block_is_left_alone(how, via):
    model = make(how)
    regkit.attach(model, rules(via, "kernel", "forget"), registry=REGISTRY)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    moved = (model.maps.w != before["maps.w"]).T if model.transposed else model.maps.w != before["maps.w"]
    wiring = torch.ones_like(model.maps.w) if model.wiring is None else model.wiring
    wiring = (wiring.T if model.transposed else wiring).bool()
    inside = torch.zeros_like(moved)
    part(inside, "kernel", "forget").fill_(True)
    assert not bool((moved & ~(inside & wiring)).any())
    assert bool(moved.any())
    if via == "gradient":
        assert bool(moved[inside & wiring].all())
    assert torch.equal(model.gain, before["gain"])


def test_one_column_is_a_vector():
    model = make("side by side")
    attachment = regkit.attach(
        model, {"rules": [{"target": {"role": "gain"}, "constraint": "max_norm(0.5)"}]}, registry=REGISTRY
    )
    (binding,) = attachment.plan.bindings
    assert [site.shape for site in binding.weights] == [(UNITS,)]
    assert attachment.violations()["rules/0"] == 0.5
    attachment.apply_constraints()
    assert torch.equal(model.gain.detach(), torch.full((1, UNITS), 0.5, dtype=torch.float64))


def test_a_plan_shows_how_a_weight_is_read():
    plan = regkit.resolve(make("all of it"), rules("gradient", "recurrent", "new"), registry=REGISTRY)
    (row,) = plan.rows()
    assert row[3:9] == ("squash(maps.w).T[:, 3:7] * wiring", "recurrent", "0", "forward", "new", "4 × 4")
    assert "squash(maps.w).T[:, 3:7] * wiring" in str(plan)
    plan = regkit.resolve(make("turned"), rules("gradient", "kernel", None), registry=REGISTRY)
    assert plan.rows()[0][3:9] == ("maps.w.T[:, 0:3]", "kernel", "0", "forward", "all", "8 × 3")


@pytest.mark.parametrize("how", ["side by side", "turned"])
def test_a_plan_is_of_another_model_where_the_matrix_is_another(how):
    plan = regkit.resolve(make(how), rules("gradient", "recurrent", None), registry=REGISTRY)
    other = make(how)
    for shape in ((5, 8), (8, 5), (8,)):
        other.maps.w = nn.Parameter(torch.zeros(shape))
        with pytest.raises(regkit.AttachError, match=r"the plan is of another model: .*maps\.w is \("):
            regkit.attach(other, plan)


def test_a_matrix_that_changes_its_shape_under_a_rule_is_an_error(batches):
    model = make("turned")
    regkit.attach(model, rules("gradient", "recurrent", None), registry=REGISTRY)
    model.maps.w = nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    model.maps.w.grad = torch.zeros_like(model.maps.w)
    with pytest.raises(
        regkit.AttachError, match=r"maps\.w\.T\[:, 3:7\] was \(8, 4\) at attach\(\) and is \(5, 8\) now"
    ):
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_a_submodule_that_is_put_in_its_place_later_is_under_the_rule(batches):
    by_hand, regularized = make("turned"), make("turned")
    attachment = regkit.attach(regularized, rules("gradient", "kernel", None), registry=REGISTRY)
    train(regularized, batches[:1])
    train(by_hand, batches[:1], extra=lambda: 0.05 * part(by_hand.acting(), "kernel", None).square().sum())
    for model in (by_hand, regularized):
        fresh = nn.Module()
        fresh.w = nn.Parameter(torch.full_like(model.maps.w, 0.2))
        model.maps = fresh
    train(regularized, batches[1:])
    train(by_hand, batches[1:], extra=lambda: 0.05 * part(by_hand.acting(), "kernel", None).square().sum())
    assert_equal_weights(by_hand, regularized)
    assert attachment.step_count == len(batches)


def test_two_column_blocks_of_one_matrix_are_two_weights_and_the_same_block_is_one():
    both = {"rules": [{"target": {"role": ["kernel", "recurrent"]}, "penalty": "l2(1)"}]}
    (binding,) = regkit.resolve(make("turned"), both, registry=REGISTRY).bindings
    assert [site.columns for site in binding.weights] == [(0, 3), (3, 7)]

    torch.manual_seed(1)
    model = Pair()
    (binding,) = regkit.resolve(model, both, registry=REGISTRY).bindings
    assert [(site.name, site.columns) for site in binding.weights] == [("one", (0, 3)), ("one", (3, 7))]
    attachment = regkit.attach(model, both, registry=REGISTRY)
    torch.testing.assert_close(attachment.values()["rules/0"], model.one.maps.w.detach().square().sum())

    # Tied after attach(), it counts once too.
    model = nn.ModuleList([make("turned"), make("turned")])
    attachment = regkit.attach(model, both, registry=REGISTRY)
    model[1].maps.w = model[0].maps.w
    torch.testing.assert_close(attachment.values()["rules/0"], model[0].maps.w.detach().square().sum())


def test_attaching_a_kind_to_the_other_columns_is_fine_and_to_the_same_columns_an_error():
    model = make("turned")
    regkit.attach(model, rules("gradient", "kernel", None), registry=REGISTRY)
    regkit.attach(model, rules("gradient", "recurrent", None), registry=REGISTRY)
    with pytest.raises(regkit.AttachError, match=r"maps\.w\.T\[:, 3:7\]"):
        regkit.attach(model, rules("gradient", "recurrent", None), registry=REGISTRY)


def test_a_rule_per_cell_takes_the_gates_of_a_turned_matrix_together():
    model = make("turned")
    spec = {"rules": [{"name": "it", "target": {"role": "kernel"}, "constraint": "max_norm(0.4, per=cell)"}]}
    attachment = regkit.attach(model, spec, registry=REGISTRY)
    acting = part(model.acting().detach().clone(), "kernel", None)
    wanted = acting.view(2, UNITS, FEATURES).norm(dim=(0, 2)).clamp(max=0.4)
    attachment.apply_constraints()
    held = part(model.acting().detach(), "kernel", None).view(2, UNITS, FEATURES).norm(dim=(0, 2))
    torch.testing.assert_close(held, wanted)


def test_a_mask_that_would_be_trained_is_an_error_whenever_it_comes_to_be_so(batches):
    model = make("wired")
    model.wiring.requires_grad_(True)
    with pytest.raises(regkit.ResolveError, match="the mask wiring would be trained"):
        regkit.attach(model, rules("gradient", "kernel", None), registry=REGISTRY)
    model.wiring.requires_grad_(False)
    regkit.attach(model, rules("gradient", "kernel", None), registry=REGISTRY)
    train(model, batches[:1])
    model.wiring.requires_grad_(True)  # as model.requires_grad_() does to masks that are parameters
    with pytest.raises(regkit.AttachError, match="the mask wiring would be trained"):
        train(model, batches[1:])


def test_what_a_mask_takes_out_is_not_filled():
    """Nor is what is pruned behind a softplus, where 0 acts as log 2."""
    floor = {"rules": [{"name": "it", "target": {"role": "kernel"}, "constraint": "unit_norm"}]}
    model = make("wired")
    with torch.no_grad():
        part(model.wiring, "kernel", None)[0] = 0
    before = part(model.maps.w.detach().clone(), "kernel", None)[0]
    regkit.attach(model, floor, registry=REGISTRY).apply_constraints()
    assert torch.equal(part(model.maps.w.detach(), "kernel", None)[0], before)

    model = make("positive", "pruned")
    with pytest.raises(regkit.AttachError, match=r"rule 'it' .*maps\.w is pruned, and would not be zero any more"):
        regkit.attach(model, rules("constraint", "kernel", None), registry=REGISTRY)


def test_a_positive_weight_cannot_be_made_zero_or_negative(batches):
    """L1's proximal operator makes exact zeros, which no softplus gives."""
    model = make("positive")
    spec = {"rules": [{"name": "it", "target": {"role": "kernel"}, "penalty": "l1(5)", "via": "proximal"}]}
    regkit.attach(model, spec, registry=REGISTRY)
    with pytest.raises(
        regkit.AttachError, match=r"rule 'it' .*maps\.w cannot be set to a point: Softplus.*never gives"
    ):
        train(model, batches)
    assert bool(model.maps.w.isfinite().all())


def test_a_function_without_an_inverse_can_be_penalized_and_not_constrained(batches):
    def squashed() -> Kept:
        model = make("side by side")
        model.squash = nn.Tanh()
        model.acting = lambda: model.maps.w.tanh()
        return model

    by_hand, regularized = squashed(), squashed()
    with pytest.raises(regkit.AttachError, match=r"maps\.w cannot be set to a point: Tanh\(\) has no right_inverse"):
        regkit.attach(regularized, rules("constraint", "kernel", None), registry=REGISTRY)
    regkit.attach(regularized, rules("gradient", "kernel", None), registry=REGISTRY)
    train(regularized, batches)
    train(by_hand, batches, extra=lambda: 0.05 * part(by_hand.maps.w.tanh(), "kernel", None).square().sum())
    assert_equal_weights(by_hand, regularized)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this one process."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("via", ["gradient", "proximal", "constraint"])
def test_a_block_of_a_sharded_matrix_is_regularized_as_that_of_a_whole_one(how, via, mesh, batches):
    from torch.distributed.tensor import Shard, distribute_tensor

    whole, sharded = make(how), make(how)
    sharded.maps.w = nn.Parameter(distribute_tensor(sharded.maps.w.detach(), mesh, [Shard(0)]))
    for model in (whole, sharded):
        attachment = regkit.attach(model, rules(via, "recurrent", "new"), registry=REGISTRY)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for scale in (0.0, 0.1):
            for p in model.parameters():
                p.grad = torch.ones_like(p) * scale
            optimizer.step()
        assert attachment.step_count == 2
    torch.testing.assert_close(sharded.maps.w.full_tensor(), whole.maps.w)
    assert not torch.allclose(whole.maps.w, make(how).maps.w - 0.03, atol=1e-3)
