"""Schedules: factors over the optimizer-step count, which starts at 0."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import ClassVar, Literal, final

from pydantic import Field, model_validator

from regkit import Schedule, hookimpl
from regkit.fields import Count, NonNegative, Positive


@final
class Constant(Schedule):
    """Constant: the same factor at every step.

    >>> Constant(value=0.5).factor(1000)
    0.5
    """

    kind: Literal["constant"] = "constant"

    shorthand: ClassVar[tuple[str, ...]] = ("value",)

    value: NonNegative
    """The factor. Range: > 0."""

    @classmethod
    def examples(cls) -> Sequence[Constant]:
        return [cls(value=0.5)]

    def inert(self) -> str | None:
        return "its value is 0" if self.value == 0 else None

    def factor(self, step: int) -> float:
        return self.value


class _Ramp(Schedule):
    shorthand: ClassVar[tuple[str, ...]] = ("start", "end", "steps")

    start: NonNegative
    """The factor at step 0. Range: ≥ 0."""

    end: NonNegative
    """The factor from step `steps` on. Range: ≥ 0."""

    steps: Count
    """The number of optimizer steps from start to end. Range: ≥ 1."""

    def inert(self) -> str | None:
        return "start and end are both 0" if self.start == self.end == 0 else None

    def _between(self, share: float) -> float:
        # This form gives `end` exactly at share 1, where start + share·(end − start) may miss by a rounding.
        return (1 - share) * self.start + share * self.end


@final
class Linear(_Ramp):
    """Linear ramp: start + (end − start)·t/steps, then end.

    >>> [Linear(start=0.0, end=1.0, steps=4).factor(step) for step in (0, 1, 9)]
    [0.0, 0.25, 1.0]
    """

    kind: Literal["linear"] = "linear"

    @classmethod
    def examples(cls) -> Sequence[Linear]:
        return [cls(start=0.0, end=1.0, steps=1000)]

    def factor(self, step: int) -> float:
        return self._between(min(step / self.steps, 1.0))


@final
class Cosine(_Ramp):
    """Cosine ramp: end + (start − end)·(1 + cos(π·t/steps))/2, then end  (Loshchilov & Hutter 2017, eq. 5).

    >>> [round(Cosine(start=1.0, end=0.0, steps=4).factor(step), 3) for step in (0, 1, 2, 9)]
    [1.0, 0.854, 0.5, 0.0]
    """

    kind: Literal["cosine"] = "cosine"

    @classmethod
    def examples(cls) -> Sequence[Cosine]:
        return [cls(start=1.0, end=0.1, steps=1000)]

    def factor(self, step: int) -> float:
        return self._between((1 - math.cos(math.pi * min(step / self.steps, 1.0))) / 2)


@final
class Exponential(Schedule):
    """Exponential growth or decay: start·decay^(t/steps), smoothly  (Keras ExponentialDecay).

    >>> [Exponential(decay=0.25, steps=10).factor(step) for step in (0, 5, 10)]
    [1.0, 0.5, 0.25]
    """

    kind: Literal["exponential"] = "exponential"

    shorthand: ClassVar[tuple[str, ...]] = ("start", "decay", "steps")

    start: Positive = 1.0
    """The factor at step 0. Range: > 0."""

    decay: Positive
    """What the factor is multiplied by in `steps` steps; above 1 it grows, up to `limit`. Range: > 0."""

    steps: Count
    """The number of optimizer steps for one multiplication. Range: ≥ 1."""

    limit: Positive | None = None
    """The factor never passes this, in the direction it moves. A growing schedule needs one."""

    @classmethod
    def examples(cls) -> Sequence[Exponential]:
        return [cls(decay=0.9, steps=100), cls(start=0.1, decay=2.0, steps=100, limit=1.0)]

    @model_validator(mode="after")
    def _bounded(self) -> Exponential:
        if self.decay > 1 and self.limit is None:
            raise ValueError("a decay above 1 grows without bound; give a limit")
        if self.limit is not None and (self.limit < self.start if self.decay > 1 else self.limit > self.start):
            raise ValueError(f"limit {self.limit} lies on the wrong side of start {self.start}")
        return self

    def factor(self, step: int) -> float:
        periods = step / self.steps
        growth, first = periods * math.log(self.decay), math.log(self.start)
        # Compared as logarithms: a growing power would overflow before it could be cut off.
        if self.limit is not None and abs(growth) >= abs(math.log(self.limit) - first):
            return self.limit
        # So would the power of a tiny start, of which the product is a number still.
        return self.start * math.pow(self.decay, periods) if abs(growth) < 700 else math.exp(first + growth)


@final
class Piecewise(Schedule):
    """Piecewise constant: values[i] from boundaries[i−1] on, until boundaries[i].

    >>> [Piecewise(boundaries=(10,), values=(0.0, 1.0)).factor(step) for step in (9, 10)]
    [0.0, 1.0]
    """

    kind: Literal["piecewise"] = "piecewise"

    boundaries: tuple[Count, ...] = Field(strict=False)  # JSON has lists
    """The steps at which the next value begins, increasing. Range: ≥ 1."""

    values: tuple[NonNegative, ...] = Field(strict=False)
    """The factors: one more than there are boundaries. Range: ≥ 0."""

    @classmethod
    def examples(cls) -> Sequence[Piecewise]:
        return [cls(boundaries=(1000, 5000), values=(0.0, 1.0, 0.1))]

    @model_validator(mode="after")
    def _consistent(self) -> Piecewise:
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"{len(self.boundaries)} boundaries need {len(self.boundaries) + 1} values, got {len(self.values)}"
            )
        if any(a >= b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError(f"boundaries must increase, got {list(self.boundaries)}")
        return self

    def inert(self) -> str | None:
        return "all its values are 0" if not any(self.values) else None

    def factor(self, step: int) -> float:
        return self.values[bisect_right(self.boundaries, step)]


@hookimpl
def regkit_schedules() -> list[type[Schedule]]:
    return [Constant, Linear, Cosine, Exponential, Piecewise]
