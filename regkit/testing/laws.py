"""What a law is, and what comes of trying one: plain functions and results, without pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Subject = TypeVar("Subject", contravariant=True)


class Broken(Exception):  # noqa: N818  # a signal from a law to its table; what users see is a Result
    """That a law does not hold, and what was seen instead."""


def hold(condition: object, seen: str) -> None:
    """Let a law go on where the condition is true. Raises Broken, with what was seen, where it is not."""
    if not condition:
        raise Broken(seen)


@dataclass(frozen=True)
class Result:
    """What came of trying one law on one subject.

    seen: what was seen where it failed, else empty. why: why the law matters, and what to do.
    """

    subject: str
    law: str
    passed: bool
    seen: str
    why: str

    def __str__(self) -> str:
        if self.passed:
            return f"passed  {self.law}"
        return f"FAILED  {self.law}: {self.seen}\n        {self.why}"


@dataclass(frozen=True)
class Report:
    """The results of every law that applies to one subject.

    hints: how it could be faster, which no law asks.
    """

    subject: str
    results: tuple[Result, ...]
    hints: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Result, ...]:
        """Those that failed."""
        return tuple(result for result in self.results if not result.passed)

    @property
    def passed(self) -> bool:
        """Whether every law holds."""
        return not self.failures

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __str__(self) -> str:
        count = len(self.results)
        head = f"{self.subject}: {count - len(self.failures)} of {count} laws hold"
        return "\n".join([head, *(f"  {one}" for one in self.failures), *(f"  hint: {hint}" for hint in self.hints)])


def _always(_: object) -> bool:
    return True


@dataclass(frozen=True)
class Law(Generic[Subject]):
    """A law: its name, why it matters, whom it applies to, and a trial that raises Broken where it does not hold."""

    name: str
    why: str
    trial: Callable[[Subject], None]
    applies: Callable[[Subject], bool]

    def tried(self, subject: Subject, title: str) -> Result:
        """What comes of it on a subject."""
        try:
            self.trial(subject)
        except Broken as broken:
            return Result(title, self.name, False, str(broken), self.why)
        except Exception as error:  # a stranger's code runs in it: anything can come out
            return Result(title, self.name, False, f"it raised {type(error).__name__}: {error}", self.why)
        return Result(title, self.name, True, "", self.why)


class Laws(Generic[Subject]):
    """A table of laws. A law is a function, named by its own name; its docstring says why it matters."""

    def __init__(self, *tables: Laws[Subject]) -> None:
        self._laws: list[Law[Subject]] = [law for table in tables for law in table]

    def __iter__(self) -> Iterator[Law[Subject]]:
        return iter(self._laws)

    def add(self, applies: Callable[[Subject], bool] = _always) -> Callable[[Callable[[Subject], None]], Law[Subject]]:
        """A decorator that adds a function to the table, for the subjects that it applies to."""

        def added(trial: Callable[[Subject], None]) -> Law[Subject]:
            law = Law(trial.__name__, " ".join((trial.__doc__ or "").split()), trial, applies)
            self._laws.append(law)
            return law

        return added

    def of(self, subject: Subject) -> list[Law[Subject]]:
        """The laws that apply to a subject."""
        return [law for law in self._laws if law.applies(subject)]

    def report(self, subject: Subject, title: str) -> Report:
        """Try each law that applies."""
        return Report(title, tuple(law.tried(subject, title) for law in self.of(subject)))
