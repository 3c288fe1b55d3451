"""Schedules: factors over optimizer steps."""

from __future__ import annotations

from abc import abstractmethod

from regkit.kinds.kind import Kind


class Schedule(Kind):
    """A factor as a function of the number of optimizer steps.

    >>> regkit.load({"rules": [{"penalty": "l2(0.1)", "schedule": "linear(0, 1, 10)"}]}).rules[0].schedule.factor(5)
    0.5
    """

    @abstractmethod
    def factor(self, step: int) -> float:
        """The factor, ≥ 0, at an optimizer step, counted from 0."""
