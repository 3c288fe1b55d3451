"""Every kind × every law: the laws of all kinds, of penalties on weights and of schedules."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regkit import Penalty, PluginError, Registry, Schedule
from regkit.kinds import Kind
from regkit.registry.registry import default
from tests.support.laws import (
    CASES,
    CONS,
    HALVES,
    PENS,
    PROXIMAL,
    SCHEDS,
    Case,
    close,
    each,
    make,
    numbers,
    random,
    shapes,
)


def test_the_table_holds_every_kind_of_this_distribution() -> None:
    registered = {entry.name for entry in Registry().entries() if entry.origin.distribution == "torch-regkit"}
    assert {case.kind.kind for case in CASES} == registered


@each(CASES)
def test_a_kind_survives_json_pickle_and_deepcopy(case: Case) -> None:
    kind: Kind = case.kind
    copies = [type(kind).model_validate_json(kind.model_dump_json()), pickle.loads(pickle.dumps(kind))]
    for other in [*copies, copy.deepcopy(kind)]:
        assert other == kind
        assert type(other) is type(kind)
        assert hash(other) == hash(kind)


@each(CASES)
def test_every_option_is_described_in_the_schema_and_the_kind_itself_in_one_line(case: Case) -> None:
    properties = type(case.kind).model_json_schema()["properties"]
    assert [name for name, option in properties.items() if name != "kind" and not option.get("description")] == []
    meaning = default().find(case.kind.kind).meaning
    assert meaning.endswith(".")


@each(PENS)
def test_a_penalty_equals_its_formula(case: Case) -> None:
    for seed, shape in enumerate(shapes(case.kind)):
        for scale in (0.0, 1e-3, 1.0, 1e3):
            w = random(shape, seed, scale)
            value = case.kind.value(w)
            assert value.shape == ()
            assert value.dtype == torch.float64
            assert value >= 0
            close(value, case.reference(w.numpy()), 1e-11)
            assert case.kind.value(w.float()).dtype == torch.float32
            close(case.kind.value(w.float()), case.reference(w.float().double().numpy()), 1e-4)


@each(PENS)
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_weight_has_the_value_of_the_formula_and_the_gradient_of_autograd(case: Case, data: st.DataObject) -> None:
    array = data.draw(numbers(*case.kind.ranks))
    w = torch.from_numpy(array).requires_grad_()
    value = case.kind.value(w)
    close(value.detach(), case.reference(array), 1e-9)
    (wanted,) = torch.autograd.grad(value, w)
    close(case.kind.gradient(w.detach()), wanted, 1e-9)


@each(PENS)
@HALVES
def test_a_penalty_of_half_precision_weights_accumulates_in_float32(case: Case, dtype: torch.dtype) -> None:
    w = random((4096, 64), dtype=dtype).abs()  # no cancelling: a sum in half precision would overflow or stall
    w = w.T if getattr(case.kind, "mode", "") == "rows" else w
    value = case.kind.value(w)
    assert value.dtype == torch.float32
    np.testing.assert_allclose(float(value), case.reference(w.double().numpy()), rtol=1e-3)


@each(PENS)
def test_the_gradient_equals_autograd_and_finite_differences(case: Case) -> None:
    for seed, shape in enumerate(shapes(case.kind)):
        for scale in (1e-2, 1.0, 30.0) if shape == (3, 5) else (0.5,):
            w = random(shape, seed, scale)
            with torch.no_grad():  # as it is called at a step
                gradient = case.kind.gradient(w)
            leaf = w.clone().requires_grad_()
            (derived,) = torch.autograd.grad(case.kind.value(leaf), leaf)
            close(gradient, derived, 1e-10)
            h = 1e-5 * scale
            shifts = h * torch.eye(w.numel(), dtype=w.dtype).view(-1, *shape)
            slopes = [(case.kind.value(w + d) - case.kind.value(w - d)) / (2 * h) for d in shifts]
            np.testing.assert_allclose(gradient.flatten(), torch.stack(slopes), rtol=1e-5, atol=1e-6 * scale)


@each(PENS)
def test_the_gradient_has_the_weights_shape_in_float32_or_better_and_is_finite_at_zero(case: Case) -> None:
    for shape in shapes(case.kind):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            zero_row = random(shape, dtype=dtype)
            zero_row[0] = 0
            for w in (torch.zeros(shape, dtype=dtype), zero_row, random(shape, dtype=dtype)):
                gradient = case.kind.gradient(w)
                wide = torch.promote_types(w.dtype, torch.float32)
                assert (gradient.shape, gradient.dtype, gradient.device) == (w.shape, wide, w.device)
                assert gradient.isfinite().all()
                assert not gradient.requires_grad


@each(PENS)
def test_a_nan_weight_gives_a_nan_penalty(case: Case) -> None:
    for shape in shapes(case.kind):
        w = random(shape)
        w.view(-1)[-1] = torch.nan
        assert case.kind.value(w).isnan(), shape


@each(PENS)
def test_a_penalty_reads_strided_weights_and_leaves_them_untouched(case: Case) -> None:
    w = random((10, 9)).T[::2, 1::3]
    before = w.clone()
    close(case.kind.value(w), case.reference(before.numpy()), 1e-11)
    close(case.kind.gradient(w), case.kind.gradient(before.contiguous()), 1e-11)
    if type(case.kind).prox is not Penalty.prox:
        close(case.kind.prox(w, 0.1), case.kind.prox(before.contiguous(), 0.1), 1e-11)
    assert torch.equal(w, before)


@each([*PENS, *CONS])
def test_a_kind_on_weights_never_waits_for_the_device(case: Case) -> None:
    """A meta tensor has no data: whatever reads one back raises."""
    for shape in shapes(case.kind):
        w = torch.empty(shape, device="meta")
        scalar, like = ("value", "gradient") if isinstance(case.kind, Penalty) else ("violation", "project")
        assert getattr(case.kind, scalar)(w).shape == ()
        assert getattr(case.kind, like)(w).shape == shape
        if case in PROXIMAL:
            assert case.kind.prox(w, torch.empty((), device="meta")).shape == shape


def proximal_objective(case: Case, x: Tensor, w: Tensor, step: float) -> Tensor:
    return (x - w).square().sum() / 2 + step * case.kind.value(x)


@each(PROXIMAL)
def test_prox_is_the_minimum_of_its_strongly_convex_objective(case: Case) -> None:
    """F(x) = ½‖x − w‖² + step·Ω(x) has F(x* + d) ≥ F(x*) + ½‖d‖² for all d, and for no other x*."""
    for seed, step in enumerate((0.0, 1e-3, 0.3, 5.0)):
        w = random((5, 7), seed)
        point = case.kind.prox(w, step)
        assert torch.equal(case.kind.prox(w, torch.tensor(step, dtype=w.dtype)), point)
        least = proximal_objective(case, point, w, step)
        for trial in range(60):
            d = random(w.shape, 100 + trial, 10.0 ** -(trial % 5))
            assert proximal_objective(case, point + d, w, step) - least >= d.square().sum() / 2 * (1 - 1e-4) - 1e-12


@each(PROXIMAL)
def test_prox_at_step_zero_is_the_identity_and_never_expands(case: Case) -> None:
    for seed in range(5):
        x, y = random((5, 7), seed), random((5, 7), 100 + seed)
        assert torch.equal(case.kind.prox(x, 0.0), x)
        assert (case.kind.prox(x, 0.4) - case.kind.prox(y, 0.4)).norm() <= (x - y).norm() * (1 + 1e-12)
        assert case.kind.prox(x.half(), 0.4).dtype == torch.float16


@each([case for case in PENS if case.kind.kind in ("l1", "l1_l2")])
def test_prox_of_an_l1_makes_exact_zeros_within_its_threshold_and_none_beyond(case: Case) -> None:
    threshold = 0.4 * getattr(case.kind, "l1", 1.0)
    w = random((20, 20))
    zeros = case.kind.prox(w, 0.4) == 0
    assert torch.equal(zeros, w.abs() <= threshold)
    assert 0 < zeros.sum() < w.numel()


@each([case for case in PENS if case not in PROXIMAL])
def test_a_penalty_without_prox_says_so(case: Case) -> None:
    with pytest.raises(PluginError, match=f"{case.kind.kind} offers no prox"):
        case.kind.prox(random((3, 3)), 0.1)


@each(SCHEDS)
def test_a_schedule_equals_its_formula_at_every_step_and_long_after_its_end(case: Case) -> None:
    for step in [*range(60), 10**3, 10**6, 10**9]:
        factor = case.kind.factor(step)
        assert type(factor) in (int, float)
        assert factor == pytest.approx(case.reference(step), rel=1e-12, abs=1e-14)
        assert 0 <= factor < math.inf


@each([case for case in SCHEDS if case.kind.kind in ("linear", "cosine")])
def test_a_ramp_begins_at_start_and_is_exactly_at_its_end_from_there_on(case: Case) -> None:
    kind = case.kind
    assert kind.factor(0) == kind.start
    assert kind.factor(kind.steps) == kind.factor(kind.steps + 1) == kind.factor(10**9) == kind.end


@pytest.mark.parametrize("name", ["linear", "cosine"])
@settings(deadline=None)
@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 10**9), st.lists(st.integers(0, 2 * 10**9), min_size=2))
def test_any_ramp_is_monotone_between_start_and_end(name: str, start: float, end: float, n: int, at: list[int]) -> None:
    kind: Schedule = make(name, start=start, end=end, steps=n)
    factors = np.array([kind.factor(step) for step in sorted(at)])
    slack = 1e-12 * max(start, end)
    assert (np.diff(factors) * (1 if end >= start else -1) >= -slack).all()
    assert factors.min() >= min(start, end) - slack
    assert factors.max() <= max(start, end) + slack
    assert factors.min() >= 0


@settings(deadline=None)
@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(1e-9, 1e9), st.integers(1, 10**6), st.integers(0, 10**9))
def test_any_exponential_is_finite_and_never_passes_its_limit(a: float, b: float, x: float, n: int, at: int) -> None:
    start, limit = (min(a, b), max(a, b)) if x > 1 else (max(a, b), min(a, b))
    factor = make("exponential", start=start, decay=x, steps=n, limit=limit).factor(at)
    assert min(start, limit) * (1 - 1e-9) <= factor <= max(start, limit) * (1 + 1e-9)
