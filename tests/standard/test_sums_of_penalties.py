"""Two penalties on one weight as one: `plus`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from regkit import Penalty
from tests.support.laws import PENS, Case, close, each, make, random

NORMS: list[tuple[Any, float, float]] = [
    (make("l1", strength=0.3), 0.3, 0.0),
    (make("l1", strength=2.0), 2.0, 0.0),
    (make("l2", strength=0.7), 0.0, 0.7),
    (make("l2", strength=1e-4), 0.0, 1e-4),
    (make("l1_l2", l1=0.2, l2=0.5), 0.2, 0.5),
    (make("l1_l2", l1=0.2, l2=0.5, strength=3.0), 0.6, 1.5),
    (make("l1_l2", l1=0.4), 0.4, 0.0),
    (make("l1_l2", l2=0.4, strength=0.5), 0.0, 0.2),
]
"""Kinds, with the coefficients of Σ|w| and Σw² that they come to."""
one_of = pytest.mark.parametrize("one", NORMS, ids=lambda case: case[0].describe())
other_of = pytest.mark.parametrize("other", NORMS, ids=lambda case: case[0].describe())


@one_of
@other_of
def test_the_sum_of_two_norms_is_a_norm_with_both_strengths_in_it(one: Any, other: Any) -> None:
    both = one[0].plus(other[0])
    l1, l2 = one[1] + other[1], one[2] + other[2]
    assert both.kind == ("l1_l2" if l1 and l2 else "l1" if l1 else "l2")  # no more is computed than there is
    w = random((5, 7), scale=3.0)
    w[0] = 0
    array = w.numpy()
    close(both.strength * both.value(w), l1 * np.abs(array).sum() + l2 * (array**2).sum())
    close(both.strength * both.gradient(w), l1 * np.sign(array) + 2 * l2 * array)
    threshold = 0.1 * l1
    close(both.prox(w, 0.1 * both.strength), np.sign(array) * np.maximum(np.abs(array) - threshold, 0) / (1 + 0.2 * l2))


@one_of
def test_sums_are_sums_in_whatever_order(one: Any) -> None:
    w, total = random((3, 4)), one[0]
    for other, *_ in NORMS:
        total = total.plus(other)
    again = one[0]
    for other, *_ in reversed(NORMS):
        again = other.plus(again)
    wanted = sum(kind.strength * kind.value(w) for kind, *_ in [one, *NORMS])
    close(total.strength * total.value(w), wanted)
    close(again.strength * again.value(w), wanted)


@each([case for case in PENS if case.kind.kind not in ("l1", "l2", "l1_l2")])
def test_what_has_no_common_kind_has_no_sum(case: Case) -> None:
    norm = make("l2", strength=1.0)
    assert norm.plus(case.kind) is None
    assert case.kind.plus(norm) is None
    assert case.kind.plus(case.kind) is None


def test_the_sum_of_a_norm_without_effect_is_the_other() -> None:
    nothing: Penalty = make("l1", strength=0.0)
    both = nothing.plus(make("l2", strength=0.25))
    assert both == make("l2", strength=0.25)
    assert torch.equal(both.value(torch.ones(3)), torch.tensor(3.0))
