"""NaN and infinity in weights: never spread by a rule, never hidden, and told by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import regkit
from regkit import Constraint, Penalty
from regkit.registry.registry import default

pytestmark = pytest.mark.works_with("NaN and infinite numbers")
BAD = pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])


def make(name: str, **options: object) -> Penalty | Constraint:
    kind = default().kind(name)(**options)
    assert isinstance(kind, (Penalty, Constraint))
    return kind


def spoilt(w: Tensor, bad: float) -> Tensor:
    w = w.clone()
    w[1, 2] = bad
    return w


BALLS = {
    "max_norm": {"max_value": 0.5},
    "unit_norm": {},
    "min_max_norm": {"min_value": 0.1, "max_value": 0.5, "rate": 0.5},
}
GROUPS: dict[str, Callable[[Tensor], Tensor]] = {  # where the group of the entry (1, 2) is
    "unit": lambda w: torch.arange(len(w)).eq(1).unsqueeze(1).expand_as(w),
    "input": lambda w: torch.arange(w.size(1)).eq(2).expand_as(w),
    "matrix": lambda w: torch.ones_like(w, dtype=torch.bool),
}


@BAD
@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.parametrize("per", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_group_without_a_finite_norm_is_left_bit_for_bit_and_the_others_are_projected(kind, per, bad, dtype):
    constraint, clean = make(kind, per=per, **BALLS[kind]), torch.randn(4, 5).to(dtype)
    w = spoilt(clean, bad)
    point, here = constraint.project(w), GROUPS[per](w)
    assert torch.equal(point[here].nan_to_num(9.0), w[here].nan_to_num(9.0))
    assert torch.equal(point[~here], constraint.project(clean)[~here])
    assert not constraint.violation(w).isfinite()


@BAD
def test_a_cells_rows_are_left_where_one_is_not_finite(bad):
    constraint, clean = make("max_norm", max_value=0.5, per="cell"), torch.randn(4, 3, 5)
    w = clean.clone()
    w[2, 1, 0] = bad
    point, rest = constraint.project(w), [0, 2]
    assert torch.equal(point[:, 1].nan_to_num(9.0), w[:, 1].nan_to_num(9.0))
    assert torch.equal(point[:, rest], constraint.project(clean)[:, rest])


@BAD
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("orthogonal", {}),
        ("cosine_orthogonal", {}),
        ("cosine_orthogonal", {"mode": "columns"}),
    ],
)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_of_an_orthogonality_is_zero_where_its_value_is_not_a_number(kind, options, shape, bad, dtype):
    penalty, w = make(kind, strength=1.0, **options), torch.randn(shape).to(dtype)
    assert penalty.gradient(w).abs().min() > 0
    assert torch.equal(penalty.gradient(spoilt(w, bad)), torch.zeros_like(penalty.gradient(w)))
    assert not penalty.value(spoilt(w, bad)).isfinite()


def test_a_column_or_row_on_its_own_has_a_zero_gradient_still():
    assert torch.equal(make("cosine_orthogonal", strength=1.0).gradient(torch.ones(1, 5)), torch.zeros(1, 5))


SPREADING = {
    "l2": {"penalty": "l2(0.1)"},
    "l1": {"penalty": "l1(0.1)"},
    "orthogonal": {"penalty": "orthogonal(0.1)"},
    "cosine_orthogonal": {"penalty": {"kind": "cosine_orthogonal", "strength": 0.1, "per": "gate"}},
    "decoupled": {"penalty": "orthogonal(0.1)", "via": "decoupled"},
    "proximal": {"penalty": "l1(0.1)", "via": "proximal"},
    "max_norm": {"constraint": "max_norm(0.1)"},
    "per matrix": {"constraint": "unit_norm(per=matrix)"},
    "non_negative": {"constraint": "non_negative"},
}


@pytest.mark.parametrize(
    ("rule", "bad"),
    # of what is not negative, 0 is the nearest point to −∞
    [(r, b) for r in SPREADING for b in (torch.nan, torch.inf, -torch.inf) if (r, b) != ("non_negative", -torch.inf)],
)
def test_no_rule_spreads_or_hides_what_is_not_finite_in_a_step(rule, bad):
    lstm = nn.LSTM(3, 4)
    attachment = regkit.attach(lstm, {"rules": [{"name": "it", "target": {"role": "recurrent"}, **SPREADING[rule]}]})
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.1)
    for _ in range(2):  # past the look at the first step, of which the next is the 64th
        for p in lstm.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        with torch.no_grad():
            lstm.weight_hh_l0[5, 1] = bad
    optimizer.step()
    found = (~lstm.weight_hh_l0.isfinite()).nonzero()
    assert found.tolist() == [[5, 1]]
    assert all(bool(p.isfinite().all()) for name, p in lstm.named_parameters() if name != "weight_hh_l0")
    told = attachment.violations() if "constraint" in SPREADING[rule] else attachment.values()
    assert not told["it"].isfinite() or (rule, bad) == ("non_negative", torch.inf)


@BAD
def test_a_weight_that_is_not_finite_is_told_by_name_at_the_next_look(bad):
    lstm = nn.LSTM(3, 4)
    regkit.attach(lstm, {"rules": [{"penalty": "orthogonal(0.1)"}, {"constraint": "max_norm(1)"}]})
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.0)
    for p in lstm.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    with torch.no_grad():
        lstm.weight_hh_l0[5, 1] = bad
    for _ in range(63):
        optimizer.step()
    with pytest.raises(regkit.StepError, match="NaN or infinite numbers in weight_hh_l0 before step 64"):
        optimizer.step()


def test_a_parametrized_weight_that_holds_a_nan_keeps_it_in_its_row():
    cell = nn.utils.parametrizations.weight_norm(nn.LSTMCell(3, 4), "weight_hh")
    attachment = regkit.attach(cell, {"rules": [{"target": {"role": "recurrent"}, "constraint": "max_norm(0.1)"}]})
    with torch.no_grad():
        cell.parametrizations.weight_hh.original1[5, 1] = torch.nan
    attachment.apply_constraints()
    rows = cell.weight_hh.isnan().all(dim=1)
    assert rows.nonzero().tolist() == [[5]]
    assert cell.weight_hh[~rows].norm(dim=1).max() <= 0.1 + 1e-6
    assert attachment.violations()["rules/0"].isnan()
