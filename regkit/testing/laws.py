"""Laws and the results of trying laws: plain functions and data, without pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from regkit.errors import RegkitError

Subject = TypeVar("Subject", contravariant=True)


class Broken(Exception):  # noqa: N818  # a signal from a law to its table; what users see is a Result
    """A law that does not hold, with a sentence on the failure."""


class Interrupted(Broken):
    """A law that does not hold for something that was raised, with a sentence on where."""


def hold(condition: object, seen: str) -> None:
    """Raise Broken, with the sentence `seen`, where the condition is false."""
    if not condition:
        raise Broken(seen)


def is_accepted(check: Callable[..., object], *arguments: object) -> None:
    """Raise Broken with regkit's own words where one of regkit's checks refuses its arguments."""
    try:
        check(*arguments)
    except RegkitError as error:
        raise Broken(str(error)) from error


@dataclass(frozen=True)
class Result:
    """The result of trying one law on one subject.

    subject: the name of the subject.
    law: the name of the law.
    passed: whether the law holds.
    seen: what was seen where the law failed, else empty.
    why: why the law matters, and what to do.
    untried: the law that does not hold either, and without which this one cannot be tried; empty for none.

    >>> from regkit.testing import Result
    >>> print(Result("slow()", "factor_is_quick", False, "factor(1000000) takes 80.0 ms", "Write it in closed form."))
    FAILED  factor_is_quick: factor(1000000) takes 80.0 ms
            Write it in closed form.
    """

    subject: str
    law: str
    passed: bool
    seen: str
    why: str
    untried: str = ""

    def __str__(self) -> str:
        if self.passed:
            return f"passed  {self.law}"
        if self.untried:
            return f"not tried  {self.law}: {self.untried} does not hold"
        return f"FAILED  {self.law}: {self.seen}\n        {self.why}"


@dataclass(frozen=True)
class Report:
    """The results of every law that applies to one subject.

    subject: the name of the subject.
    results: a result for each law.
    hints: how the subject could be faster, which no law asks.

    >>> from regkit.testing import check_schedule
    >>> from regkit_standard.schedules import Constant
    >>> report = check_schedule(Constant(value=0.5))
    >>> report.passed, report.failures
    (True, ())
    >>> print(report)
    constant(value=0.5): ... laws hold
    """

    subject: str
    results: tuple[Result, ...]
    hints: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Result, ...]:
        """The results of the laws that do not hold."""
        return tuple(result for result in self.results if not result.passed and not result.untried)

    @property
    def passed(self) -> bool:
        """Whether every law holds."""
        return all(result.passed for result in self.results)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __str__(self) -> str:
        held = sum(result.passed for result in self.results)
        head = f"{self.subject}: {held} of {len(self.results)} laws hold"
        told = [*map(str, self.failures), *untried(self.results), *(f"hint: {hint}" for hint in self.hints)]
        return "\n".join([head, *(f"  {one}" for one in told)])


def untried(results: Iterable[Result]) -> list[str]:
    """A sentence for each law that does not hold and without which others cannot be tried."""
    laws: dict[str, list[str]] = {}
    for result in results:
        if result.untried:
            laws.setdefault(result.untried, []).append(result.law)
    return [f"not tried, as {root} does not hold: {', '.join(dict.fromkeys(names))}" for root, names in laws.items()]


def _always(_: object) -> bool:
    return True


@dataclass(frozen=True)
class Law(Generic[Subject]):
    """A law: a name, a reason, the subjects, and a trial that raises Broken where the law does not hold.

    root: the place among the laws that others take for granted, and without which these may raise anything; 0 for none.
    """

    name: str
    why: str
    trial: Callable[[Subject], None]
    applies: Callable[[Subject], bool]
    root: int = 0

    def tried(self, subject: Subject, title: str, broken_root: str = "") -> Result:
        """The result of the law on a subject.  broken_root: a root that does not hold."""
        try:
            self.trial(subject)
        except Broken as broken:
            untried = broken_root if isinstance(broken, Interrupted) else ""
            return Result(title, self.name, False, str(broken), self.why, untried)
        except Exception as error:  # a stranger's code runs in it: anything can come out
            return Result(title, self.name, False, f"it raised {type(error).__name__}: {error}", self.why, broken_root)
        return Result(title, self.name, True, "", self.why)


class Laws(Generic[Subject]):
    """A table of laws. A law has the name of its function, and the function's docstring as the reason for the law."""

    def __init__(self, *tables: Laws[Subject]) -> None:
        self._laws: list[Law[Subject]] = [law for table in tables for law in table]

    def __iter__(self) -> Iterator[Law[Subject]]:
        return iter(self._laws)

    def add(
        self, applies: Callable[[Subject], bool] = _always, *, root: int = 0
    ) -> Callable[[Callable[[Subject], None]], Law[Subject]]:
        """A decorator that adds a function to the table, for the subjects of which `applies` is true.

        root: as of a law.
        """

        def added(trial: Callable[[Subject], None]) -> Law[Subject]:
            law = Law(trial.__name__, " ".join((trial.__doc__ or "").split()), trial, applies, root)
            self._laws.append(law)
            return law

        return added

    def applying_to(self, subject: Subject) -> list[Law[Subject]]:
        """The laws that apply to a subject."""
        return [law for law in self._laws if law.applies(subject)]

    def report(self, subject: Subject, title: str) -> Report:
        """The results of each law that applies to a subject: of roots first."""
        laws, broken = self.applying_to(subject), ""
        results: list[Result] = []
        for law in sorted(laws, key=lambda law: law.root or len(laws) + 1):
            results.append(law.tried(subject, title, broken))
            if law.root and not results[-1].passed:
                broken = broken or law.name
        return Report(title, tuple(results))
