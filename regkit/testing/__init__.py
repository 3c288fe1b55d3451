"""The laws that penalties, constraints, schedules and adapters keep, for plugins to prove themselves by.

`check_penalty(kind)` and its like need no test runner: they try every law and return a `Report`, whose results say of
each law whether it holds, what was seen, and why it matters. `parametrize_conformance` makes a test of each law.
"""

from regkit.testing.activities.laws import check_activity_penalty
from regkit.testing.adapters.laws import check_adapter, check_example
from regkit.testing.kinds.constraints import check_constraint
from regkit.testing.kinds.penalties import check_penalty
from regkit.testing.kinds.schedules import check_schedule
from regkit.testing.laws import Report, Result
from regkit.testing.parametrize import Check, ConformanceError, checks, parametrize_conformance

__all__ = [
    "Check",
    "ConformanceError",
    "Report",
    "Result",
    "check_activity_penalty",
    "check_adapter",
    "check_constraint",
    "check_example",
    "check_penalty",
    "check_schedule",
    "checks",
    "parametrize_conformance",
]
