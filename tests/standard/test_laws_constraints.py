"""Every constraint × every law."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regkit import StepError
from tests.support.laws import (
    CONS,
    CONVEX,
    Case,
    close,
    each,
    in_groups,
    make,
    numbers,
    projected,
    random,
    shapes,
    violated,
)


def inside(case: Case, shape: Sequence[int]) -> Tensor:
    """A point of the set, off its boundary where it has an inside: in each group one entry is not zero."""
    point = np.full(shape, float(case.reference is None))
    if case.reference is not None:
        for group in in_groups(point, case.kind.per):
            group.flat[0] = 1.0
    return torch.from_numpy(point)


def feasible(case: Case, outside: Tensor) -> Tensor:
    """The last point that `violation` allows on the way from a point of the set to one outside."""
    start, near, far = inside(case, outside.shape).to(outside.dtype), 0.0, 1.0
    for _ in range(80):
        middle = (near + far) / 2
        allowed = case.kind.violation(start + middle * (outside - start)) == 0
        near, far = (middle, far) if allowed else (near, middle)
    return start + near * (outside - start)


@each(CONS)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_a_projection_lands_in_the_set_and_equals_its_formula(case: Case, scale: float) -> None:
    for dtype, tiny in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        for seed, shape in enumerate(shapes(case.kind)):
            w = random(shape, seed, scale, dtype)
            before = w.clone()
            point = case.kind.project(w)
            assert (point.shape, point.dtype, point.device) == (w.shape, w.dtype, w.device)
            assert torch.equal(w, before)
            wanted = projected(case, before.double().numpy())
            np.testing.assert_allclose(point.double(), wanted, rtol=tiny, atol=tiny)
            if w.any() or not case.kind.violation(w):  # a zero weight has no direction to grow in
                assert case.kind.violation(point) <= 4 * tiny
                again = case.kind.project(point).double()
                np.testing.assert_allclose(again, point.double(), rtol=tiny, atol=tiny)


@each(CONS)
def test_a_zero_group_stays_zero_and_the_others_are_projected(case: Case) -> None:
    for shape in shapes(case.kind):
        w = random(shape, scale=9.0).abs()
        w[0] = 0  # a row or, where a gate's rows are gone, part of each cell
        w[..., 0] = 0
        point = case.kind.project(w)
        assert torch.equal(point == 0, w == 0)
        close(point, projected(case, w.numpy()))


@each(CONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_feasible_point_is_not_moved_by_a_single_bit(case: Case, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(shapes(case.kind)):
        outside = -random(shape, seed, 9.0, dtype).abs()
        outside.view(-1)[0] = -9
        boundary = feasible(case, outside)
        assert case.kind.violation(outside) > 0
        assert violated(case, boundary.double().numpy()) <= 4 * torch.finfo(dtype).eps
        points = [boundary, inside(case, shape).to(dtype), (boundary + inside(case, shape).to(dtype)) / 2]
        for point in points[: 3 if case in CONVEX else 2]:
            assert case.kind.violation(point) == 0
            assert torch.equal(case.kind.project(point), point)


@each(CONS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_weight_has_the_violation_and_the_projection_of_the_formula(case: Case, data: st.DataObject) -> None:
    array = data.draw(numbers(*((2, 3) if case.kind.layout == "cell" else (1, 2))))
    w = torch.from_numpy(array)
    close(case.kind.violation(w), violated(case, array))
    assert case.kind.violation(w).shape == ()
    close(case.kind.project(w), projected(case, array))


@each(CONVEX)
def test_a_projection_onto_a_convex_set_makes_no_acute_angle_with_it(case: Case) -> None:
    for seed, shape in enumerate(shapes(case.kind)):
        w = random(shape, seed, 4.0)
        point = case.kind.project(w)
        for trial in range(8):
            other = feasible(case, random(shape, 100 + trial, 4.0))
            assert ((w - point) * (other - point)).sum() <= 1e-9


@each([case for case in CONS if case not in CONVEX])
def test_no_sampled_point_of_a_sphere_or_a_shell_is_nearer_than_the_projection(case: Case) -> None:
    for seed, shape in enumerate(shapes(case.kind)):
        w = random(shape, seed, 0.1 + 2.0 * seed)
        point = case.kind.project(w)
        for trial in range(40):
            # The formula puts a sample into the set, which the kind under test must agree on.
            near = point + random(shape, 100 + trial, 10.0 ** -(trial % 4))
            other = torch.from_numpy(projected(case, near.numpy()))
            assert case.kind.violation(other) <= 1e-12
            assert (w - point).norm() <= (w - other).norm() + 1e-12


@each(CONS)
def test_a_nan_weight_is_seen_as_a_violation_and_stays_a_nan(case: Case) -> None:
    for shape in shapes(case.kind):
        w = random(shape)
        w.view(-1)[-1] = torch.nan
        assert case.kind.violation(w).isnan()
        assert case.kind.project(w).view(-1)[-1].isnan()


@each([case for case in CONS if case.kind.layout == "matrix"])
def test_a_projection_reads_strided_weights(case: Case) -> None:
    w = random((10, 9), scale=3.0).T[::2, 1::3]
    close(case.kind.project(w), projected(case, w.contiguous().numpy()))
    close(case.kind.violation(w), violated(case, w.contiguous().numpy()))


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_min_max_norm_goes_the_rate_of_the_way(rate: float) -> None:
    kind = make("min_max_norm", min_value=1.0, max_value=2.0, rate=rate)
    w = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.9, 1.2]], dtype=torch.float64)
    close(torch.linalg.vector_norm(kind.project(w), dim=1), [5 - 3 * rate, 0.5 + 0.5 * rate, 1.5])


@each(CONS)
def test_a_schedules_factor_multiplies_every_bound_and_nothing_else(case: Case) -> None:
    scaled, bounds = case.kind.at(0.5), set(case.kind.bounds)
    assert bounds == {"max_norm": {"max_value"}, "min_max_norm": {"min_value", "max_value"}}.get(case.kind.kind, set())
    for name in type(case.kind).model_fields:
        assert getattr(scaled, name) == getattr(case.kind, name) * (0.5 if name in bounds else 1)
    if bounds:
        with pytest.raises(StepError, match="would make every weight 0"):
            case.kind.at(0.0)
