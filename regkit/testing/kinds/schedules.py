"""The laws of schedules, and `check_schedule`."""

from __future__ import annotations

import math
import random
from time import perf_counter
from typing import Final

from regkit import Schedule
from regkit.testing.kinds.common import KIND_LAWS, report
from regkit.testing.laws import Laws, Report, hold

LAWS: Final[Laws[Schedule]] = Laws(KIND_LAWS)
"""The laws of every schedule."""

_SOON: Final = range(1001)
_LATE: Final = 10**6
_LATEST: Final = 10**9
_LIMIT: Final = 0.005
"""The seconds that one factor may take; half a microsecond is usual."""


def check_schedule(schedule: Schedule | type[Schedule]) -> Report:
    """Try every law on a schedule; of a class, on each of its examples. Raises TypeError for anything else."""
    return report(LAWS, Schedule, schedule)


@LAWS.add(root=2)
def factor_is_a_plain_number(schedule: Schedule) -> None:
    """The factor multiplies a strength at every step, and is compared and saved. Return a Python float or int: not a
    tensor, which would have to be read back, not a numpy number, not None."""
    for step in _steps(schedule):
        factor: object = schedule.factor(step)
        hold(type(factor) in (int, float), f"factor({step}) is {factor!r}, a {type(factor).__name__}")


@LAWS.add(root=1)
def factor_is_finite_and_not_negative(schedule: Schedule) -> None:
    """A negative factor turns a penalty into a reward, and a NaN reaches every weight. Mind step 0 (a division by 0),
    the end (an index beyond it, a line that goes on below 0) and powers of large steps; use `min` and `max`."""
    for step in _steps(schedule):
        factor = schedule.factor(step)
        hold(0 <= factor < math.inf, f"factor({step}) is {factor}")


@LAWS.add()
def factor_depends_on_the_step_alone(schedule: Schedule) -> None:
    """A resumed run begins in the middle, a report asks out of order, and several rules share a schedule. Compute the
    factor from `step` and the options: count no calls, and build on no factor before."""
    steps = list(_SOON)
    wanted = [schedule.factor(step) for step in steps]
    order = random.Random(0).sample(steps, len(steps))
    for step in [*order, *order[:5]]:
        factor = schedule.factor(step)
        hold(factor == wanted[step], f"factor({step}) is {wanted[step]} in order, and {factor} out of order")


@LAWS.add()
def factor_is_quick(schedule: Schedule) -> None:
    """The factor is asked for at every optimizer step, for each rule; a loop over the steps so far makes a run slower
    and slower. Write it in closed form."""
    took = _seconds(schedule, _LATE)
    hold(took < _LIMIT, f"factor({_LATE}) takes {took * 1e3:.1f} ms, factor(1) {_seconds(schedule, 1) * 1e3:.4f} ms")


@LAWS.add()
def inert_says_when_all_is_zero(schedule: Schedule) -> None:
    """A rule that never optimizes anything is refused, if its schedule says so. Let `inert` say why where the options
    make every factor 0, and return None else; see that `examples` have an effect."""
    reason = schedule.inert()
    hold(reason is None or isinstance(reason, str), f"inert() gives {reason!r}, which is neither None nor a reason")
    working = next((step for step in _steps(schedule) if schedule.factor(step)), None)
    hold(reason or working is not None, "the factor is 0 at every step, and inert() does not say why")
    hold(not reason or working is None, f"inert() says {reason!r}, but factor({working}) is not 0")


def _steps(schedule: Schedule) -> list[int]:
    """The first thousand steps, then ever fewer, up to a thousand million where a late factor is quick."""
    end = _LATEST if _seconds(schedule, _LATE) < _LIMIT else _LATE
    late = [round(1000 * 1.2**n) for n in range(1, 100)]
    return [*_SOON, *(step for step in late if step < end), _LATE, end]


def _seconds(schedule: Schedule, step: int) -> float:
    """The least of a few times that a factor takes, in seconds."""
    least = math.inf
    for _ in range(5):
        start = perf_counter()
        schedule.factor(step)
        least = min(least, perf_counter() - start)
    return least
