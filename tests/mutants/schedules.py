"""Schedules that are wrong in the ways that authors get them wrong, each with the law that catches it."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
import torch

from regkit import Schedule
from regkit.fields import NonNegative
from tests.mutants.mutant import Mutants

MUTANTS = Mutants()


class Decay(Schedule):
    """0.999^t, as it should be."""

    kind: Literal["decay"] = "decay"

    def factor(self, step: int) -> float:
        return math.pow(0.999, step)


@MUTANTS.caught_by("factor_is_a_plain_number", "factor(0) is tensor(1.)")
class ReturnsATensor(Decay):
    """A tensor, which every step must read back."""

    def factor(self, step: int) -> float:
        return torch.tensor(0.999) ** step  # type: ignore[return-value]  # the mistake


@MUTANTS.caught_by("factor_is_a_plain_number", "a float64")
class ReturnsNumPy(Decay):
    """numpy's number, which passes for a float."""

    def factor(self, step: int) -> float:
        return np.interp(step, [0, 1000], [1.0, 0.1])


@MUTANTS.caught_by("factor_is_finite_and_not_negative", "factor(501) is -")
class FallsBelowZero(Decay):
    """A line that does not end."""

    def factor(self, step: int) -> float:
        return 1 - step / 500


@MUTANTS.caught_by(
    "factor_is_finite_and_not_negative",
    "factor(0) is nan",
    also="factor_depends_on_the_step_alone",
)
class NaNAtZero(Decay):
    """0/0 at the very first step."""

    def factor(self, step: int) -> float:
        x = torch.tensor(float(step))
        return float(x.sin() / x) ** 2


ASKED = (
    "stateless deterministic draws_no_random_numbers factor_is_a_plain_number factor_depends_on_the_step_alone "
    "factor_is_quick inert_says_when_all_is_zero"
)


@MUTANTS.caught_by("factor_is_finite_and_not_negative", "ZeroDivisionError", also=ASKED)
class DividesByTheStep(Decay):
    """1/√t, where steps are counted from 0."""

    def factor(self, step: int) -> float:
        return 1 / math.sqrt(step)


@MUTANTS.caught_by("factor_is_finite_and_not_negative", "OverflowError", also=ASKED)
class Overflows(Decay):
    """It grows without end."""

    def factor(self, step: int) -> float:
        return math.pow(1.01, step)


@MUTANTS.caught_by("factor_is_finite_and_not_negative", "IndexError", also=ASKED)
class EndsTooSoon(Decay):
    """No factor after the last."""

    def factor(self, step: int) -> float:
        return [1.0, 0.5, 0.1][step // 400]


_calls = itertools.count()


@MUTANTS.caught_by("factor_depends_on_the_step_alone", "out of order", also="deterministic")
class CountsItsCalls(Decay):
    """It takes each call for one step more."""

    def factor(self, step: int) -> float:
        return 1 / (1 + next(_calls))


@MUTANTS.caught_by("factor_is_quick", "factor(1000000) takes", "ms")
class LoopsOverSteps(Decay):
    """The decay multiplied up from the beginning at each step."""

    def factor(self, step: int) -> float:
        factor = 1.0
        for _ in range(step):
            factor *= 0.999
        return factor


@MUTANTS.caught_by("inert_says_when_all_is_zero", "the factor is 0 at every step")
class ZeroUnsaid(Decay):
    """A height that is 0 unless given, of which `inert` does not know."""

    height: NonNegative = 0.0
    """The height. Range: ≥ 0."""

    def factor(self, step: int) -> float:
        return self.height


@MUTANTS.caught_by("inert_says_when_all_is_zero", "inert() says", "factor(0) is not 0")
class SaysItIsZero(Decay):
    """A schedule that ends at 0, and calls itself without effect."""

    def inert(self) -> str | None:
        return "it ends at 0"
