"""Schedules between the smallest and the largest numbers, and kinds whose authors' arithmetic fails on options."""

from __future__ import annotations

import math
from typing import Literal

import pytest

import regkit


@pytest.mark.parametrize(
    "options",
    [
        {"start": 1e-300, "decay": 1e10, "limit": 1e300, "steps": 1},
        {"start": 1e300, "decay": 1e-10, "limit": 1e-300, "steps": 1},
        {"start": 1e300, "decay": 1e-10, "steps": 1},
        {"start": 5e-324, "decay": 1.0000001, "limit": 1.7e308, "steps": 3},
        {"start": 1e-320, "decay": 1e300, "limit": 1e308, "steps": 1},
    ],
    ids=str,
)
def test_an_exponential_schedule_of_any_range_goes_from_its_start_to_its_limit(options):
    (rule,) = regkit.load({"rules": [{"penalty": "l2(1)", "schedule": {"kind": "exponential", **options}}]}).rules
    factors = [rule.schedule.factor(step) for step in (0, 1, 10, 55, 100, 10**9, 10**12)]
    assert factors[0] == options["start"]
    assert all(math.isfinite(one) and one >= 0 for one in factors)
    assert factors == sorted(factors, reverse=options["decay"] < 1)
    assert factors[-1] == options.get("limit", 0.0)
    if options["start"] in (1e-300, 1e300):  # half a way of 10 to the power of ∓300 in steps of ±10
        assert rule.schedule.factor(25) == pytest.approx(1e-50 if options["start"] < 1 else 1e50, rel=1e-9)


class _Ratio(regkit.Penalty):
    """Penalty with an option of which the inverse is taken."""

    kind: Literal["test_ratio"] = "test_ratio"
    by: float = 1.0

    def model_post_init(self, _: object) -> None:
        if self.by < 0:
            math.exp(-self.by * 1e6)

    def inert(self) -> str | None:
        return None if 1 / self.by else "1 / by is 0"

    def value(self, w):
        return w.sum() / self.by


@pytest.mark.parametrize(("by", "words"), [(0.0, "ZeroDivisionError"), (-1.0, "OverflowError")])
def test_arithmetic_that_fails_on_options_is_a_problem_of_the_document(by, words):
    class Plugin:
        @regkit.hookimpl
        def regkit_penalties(self):
            return [_Ratio]

    registry = regkit.Registry([Plugin()])
    document = {"rules": [{"penalty": {"kind": "test_ratio", "strength": 1, "by": by}}, {"penalty": "l22(1)"}]}
    with pytest.raises(regkit.SpecError, match=words) as told:
        regkit.load(document, registry=registry)
    assert [problem.where.split("/")[2] for problem in told.value.problems] == ["0", "1"]
