"""The laws as tests: one for each law that applies to each subject."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from regkit.adapters import Adapter, Example
from regkit.errors import unknown
from regkit.kinds import ActivityPenalty, Constraint, Kind, Penalty, Schedule
from regkit.testing.activities import laws as activities
from regkit.testing.adapters import laws as adapters
from regkit.testing.kinds import constraints, penalties, schedules
from regkit.testing.kinds.common import title
from regkit.testing.laws import Law

if TYPE_CHECKING:
    import pytest

Subject = Kind | type[Kind] | Adapter | tuple[Adapter, Example]
"""A subject of laws: a kind, or a class for all its examples; an adapter with an example, or with all its own."""

_TABLES: Final[Mapping[type[Kind], Any]] = {
    Penalty: penalties.LAWS,
    ActivityPenalty: activities.LAWS,
    Constraint: constraints.LAWS,
    Schedule: schedules.LAWS,
}


class ConformanceError(AssertionError):
    """A law that does not hold.

    >>> from typing import Literal
    >>> from regkit.testing import checks
    >>> class Falling(regkit.Schedule):
    ...     kind: Literal["falling"] = "falling"
    ...     def factor(self, step):
    ...         return 1 - step / 10
    >>> [check] = [one for one in checks(Falling()) if one.law.name == "factor_is_finite_and_not_negative"]
    >>> check()
    Traceback (most recent call last):
        ...
    regkit.testing.parametrize.ConformanceError: falling(): FAILED  factor_is_finite_and_not_negative: factor(11) is ...
    """


@dataclass(frozen=True)
class Check:
    """One law to try on one subject. A call raises ConformanceError where the law does not hold.

    >>> from regkit.testing import checks
    >>> from regkit_standard.schedules import Constant
    >>> check, *_ = checks(Constant(value=0.5))
    >>> check
    constant(value=0.5)-named
    >>> check()
    """

    title: str
    law: Law[Any]
    subject: Any

    def __call__(self) -> None:
        """Try the law."""
        result = self.law.tried(self.subject, self.title)
        if not result.passed:
            raise ConformanceError(f"{self.title}: {result}")

    def __repr__(self) -> str:  # pytest shows the arguments of a test that failed
        return f"{self.title}-{self.law.name}"


def checks(subject: Subject) -> Iterator[Check]:
    """Every law that applies to a subject, to be tried one by one.

    Raises TypeError for what no laws are about, ValueError where there is no example to try them on.
    """
    if isinstance(subject, type) and issubclass(subject, Kind):
        examples = subject.examples()
        if not examples:
            raise ValueError(f"{subject.__qualname__}.examples() is empty")
        for kind in examples:
            yield from checks(kind)
    elif isinstance(subject, Kind):
        for contract, laws in _TABLES.items():
            if isinstance(subject, contract):
                yield from (Check(title(subject), law, subject) for law in laws.applying_to(subject))
    elif isinstance(subject, Adapter):
        if not subject.examples():
            raise ValueError(f"{type(subject).__name__}.examples() is empty; give (adapter, regkit.Example(...))")
        for example in subject.examples():
            yield from checks((subject, example))
    elif isinstance(subject, tuple) and len(subject) == 2 and isinstance(subject[1], Example):
        case = adapters.Case(*subject)
        yield from (Check(case.title, law, case) for law in adapters.LAWS.applying_to(case))
    else:
        raise TypeError(f"laws are about kinds and adapters with their examples, not about {subject!r}")


def parametrize_conformance(
    subjects: Iterable[Subject],
    expected_failures: Mapping[str, str] | Callable[[Subject], Mapping[str, str]] | None = None,
) -> pytest.MarkDecorator:
    """A decorator that gives a pytest function one test for each law and subject. The function takes and calls `check`.

    expected_failures: the reason why a law does not hold, by the law's name: for all subjects, or a function of the
    subject. A test that is expected to fail must fail, or it is an error. Raises ValueError for a law that applies to
    none of them.

    >>> @parametrize_conformance([L1(strength=1.0), MaxNorm])  # doctest: +SKIP
    ... def test_conformance(check):
    ...     check()
    """
    import pytest  # who runs no tests need not have it

    parameters, tried, excused = [], set(), set()
    for subject in subjects:
        excuses = expected_failures(subject) if callable(expected_failures) else expected_failures or {}
        excused |= set(excuses)
        for check in checks(subject):
            tried.add(check.law.name)
            reason = excuses.get(check.law.name)
            fails = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True, raises=ConformanceError)]
            parameters.append(pytest.param(check, id=repr(check), marks=fails))
    if stray := excused - tried:
        raise ValueError(unknown("law", min(stray), sorted(tried)))
    return pytest.mark.parametrize("check", parameters)
