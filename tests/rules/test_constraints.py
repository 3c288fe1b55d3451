"""Constraints in real training loops: after which steps they hold, on which groups, under which schedules."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import regkit
from regkit.registry.registry import default


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def constrained(model: nn.Module, constraint: object, **rule: object) -> regkit.Attachment:
    return regkit.attach(model, {"rules": [{"constraint": constraint, **rule}]})


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_max_norm_holds_after_every_step_of_a_large_learning_rate(optimizer, make_model, batches):
    model = make_model()
    attachment = constrained(model, "max_norm(0.5)", target={"role": ["kernel", "recurrent"]})
    steps = optimizer(model.parameters(), lr=1.0)
    for batch in batches:
        train(model, steps, [batch])
        for weight in (model.rnn.weight_ih_l0, model.rnn.weight_hh_l0):
            assert weight.norm(dim=1).max() <= 0.5 + 1e-12
        assert attachment.violations()["rules/0"] <= 1e-12
    assert model.rnn.weight_hh_l0.norm(dim=1).max() > 0.49  # it was reached, or the test would show nothing


def test_a_constraint_equals_a_projection_written_by_hand_after_the_step(make_model, batches):
    by_hand, regularized = make_model(), make_model()
    for model in (by_hand, regularized):
        model.rnn.bias_hh_l0.requires_grad_(False)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1.0)
    for batch in batches:
        train(by_hand, optimizer, [batch])
        with torch.no_grad():
            by_hand.rnn.weight_hh_l0.copy_(by_hand.rnn.weight_hh_l0.renorm(2, 0, 0.4))
            by_hand.rnn.bias_ih_l0.clamp_(min=0)
    regkit.attach(
        regularized,
        {
            "rules": [
                {"target": {"role": "recurrent"}, "constraint": "max_norm(0.4)"},
                {"target": {"role": "bias", "module": "rnn"}, "constraint": "non_negative"},
            ]
        },
    )
    train(regularized, torch.optim.SGD(regularized.parameters(), lr=1.0), batches)
    for ours, theirs in zip(regularized.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_every_third_step_projects_after_steps_three_and_six(make_model, batches):
    model = make_model()
    attachment = constrained(model, "max_norm(0.1)", every=3, target={"role": "recurrent"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = []
    for batch in (*batches, *batches[:3]):
        train(model, optimizer, [batch])
        held.append(bool(attachment.violations()["rules/0"] < 1e-12))
    assert held == [False, False, True, False, False, True, False]


def test_a_schedule_tightens_the_bound(make_model, batches):
    model = make_model()
    schedule = {"kind": "piecewise", "boundaries": [2], "values": [1.0, 0.5]}
    constrained(model, "max_norm(0.4)", schedule=schedule, target={"role": "recurrent"})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    largest = []
    for batch in batches:
        train(model, optimizer, [batch])
        largest.append(model.rnn.weight_hh_l0.detach().norm(dim=1).max().item())
    assert largest == pytest.approx([0.4, 0.4, 0.2, 0.2])


def test_per_cell_bounds_all_gate_rows_of_a_hidden_unit_together(make_model, batches):
    model = make_model()
    constrained(model, "max_norm(0.5, per=cell)", target={"role": ["kernel", "recurrent", "bias"]})
    train(model, torch.optim.SGD(model.parameters(), lr=1.0), batches)
    for name, weight in model.rnn.named_parameters():
        norms = weight.detach().reshape(4, 4, -1).norm(dim=(0, 2))
        assert norms.max() <= 0.5 + 1e-12, name


def test_a_gates_block_is_projected_on_its_own(make_model, batches):
    model, free = make_model(), make_model()
    target = {"role": "recurrent", "gate": "forget"}
    constrained(model, "max_norm(0.2, per=matrix)", target=target)
    for one in (model, free):
        train(one, torch.optim.SGD(one.parameters(), lr=0.1), batches[:1])
    assert model.rnn.weight_hh_l0[4:8].norm().item() == pytest.approx(0.2)
    others = [0, 1, 2, 3, *range(8, 16)]
    assert torch.equal(model.rnn.weight_hh_l0[others], free.rnn.weight_hh_l0[others])


def test_the_effective_bias_is_projected_by_the_least_change_of_both(make_model, batches):
    model = make_model()
    attachment = constrained(model, "non_negative", target={"role": "bias", "bias": "effective"})
    before = {n: getattr(model.rnn, n).detach().clone() for n in ("bias_ih_l0", "bias_hh_l0")}
    attachment.apply_constraints()
    total = before["bias_ih_l0"] + before["bias_hh_l0"]
    change = (total.clamp(min=0) - total) / 2
    for name, was in before.items():
        torch.testing.assert_close(getattr(model.rnn, name).detach(), was + change)
    train(model, torch.optim.SGD(model.parameters(), lr=1.0), batches)
    assert (model.rnn.bias_ih_l0 + model.rnn.bias_hh_l0).min() >= -1e-12


def test_apply_constraints_projects_at_once_and_leaves_frozen_weights(make_model):
    model = make_model()
    attachment = constrained(model, "max_norm(0.1)", target={"role": ["kernel", "recurrent"]}, every=5)
    model.rnn.weight_ih_l0.requires_grad_(False)
    before = model.rnn.weight_ih_l0.clone()
    attachment.apply_constraints()
    assert model.rnn.weight_hh_l0.norm(dim=1).max() <= 0.1 + 1e-12
    assert torch.equal(model.rnn.weight_ih_l0, before)
    assert attachment.step_count == 0


def test_attach_itself_moves_no_weight(make_model):
    model = make_model()
    before = [p.clone() for p in model.parameters()]
    constrained(model, "max_norm(0.001)")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_projection_keeps_storage_so_that_views_and_flat_weights_stay(make_model, batches):
    model = make_model()
    pointers = [p.data_ptr() for p in model.parameters()]
    identities = [id(p) for p in model.parameters()]
    constrained(model, "unit_norm")
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [id(p) for p in model.parameters()] == identities
    assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))


def test_constraints_are_applied_in_the_documents_order(make_model, batches):
    model = make_model()
    regkit.attach(
        model,
        {
            "rules": [
                {"target": {"role": "recurrent"}, "constraint": "non_negative"},
                {"target": {"role": "recurrent"}, "constraint": "unit_norm"},
            ]
        },
    )
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches)
    weight = model.rnn.weight_hh_l0.detach()
    assert weight.min() >= 0
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(16, dtype=torch.float64))


def test_an_optional_constraint_that_binds_nothing_is_never_violated(make_model):
    model = make_model()
    attachment = regkit.attach(
        model,
        {
            "rules": [
                {"target": {"role": "projection"}, "constraint": "unit_norm", "optional": True},
                {"constraint": "unit_norm"},
            ]
        },
    )
    assert attachment.violations()["rules/0"] == 0
    assert attachment.violations()["rules/1"] > 0


class Orthonormal(regkit.Constraint):
    """A constraint whose mathematics are products, which autocast makes in half precision."""

    kind: Literal["orthonormal"] = "orthonormal"

    def project(self, w):
        return 1.5 * w - 0.5 * w @ w.T @ w

    def violation(self, w):
        return (w @ w.T - torch.eye(len(w))).abs().amax().sub(0.7).abs()


def test_constraints_are_told_and_applied_under_autocast_as_without():
    seen = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = nn.RNN(3, 4)
        with default().temporary(Orthonormal):
            attachment = regkit.attach(model, {"rules": [{"constraint": "orthonormal", "target": {"role": "kernel"}}]})
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            told = attachment.violations()
            attachment.apply_constraints()
        seen.append((told, model.weight_ih_l0.detach()))
    torch.testing.assert_close(*seen, rtol=0, atol=0)


def test_a_constraint_that_goes_a_share_of_the_way_is_as_far_violated_as_one_that_goes_all():
    kind = default().find("min_max_norm").kind(max_value=1.0, rate=0.5)
    assert float(kind.violation(torch.tensor([[3.0, 4.0]]))) == pytest.approx(4.0)


def test_only_norms_of_rows_are_of_each_row_alone():
    made = default().find("unit_norm").kind
    assert [made(per=per).separable for per in ("unit", "input", "cell", "matrix")] == ["rows", None, None, None]


def test_a_constraint_at_rate_zero_is_refused(make_model):
    with pytest.raises(regkit.RegkitError, match="its rate is 0"):
        constrained(make_model(), {"kind": "min_max_norm", "rate": 0.0})
