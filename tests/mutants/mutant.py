"""Wrong on purpose: what a mutant of a kind is, and which law is to catch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from regkit.kinds import Kind
from regkit.testing.laws import Report

K = TypeVar("K", bound=Kind)


@dataclass(frozen=True)
class Mutant:
    """A class with one mistake in it. law: what catches it. words: in what the law says. also: laws that may fail too,
    since one mistake can break several promises.
    """

    kind: type[Kind]
    law: str
    words: tuple[str, ...]
    also: frozenset[str]

    def expect(self, report: Report) -> None:
        """Assert that the law caught it, said so, and that no other law cried out that has no reason to."""
        failures = {failure.law: failure.seen for failure in report.failures}
        assert self.law in failures, report
        assert [word for word in self.words if word not in failures[self.law]] == [], failures[self.law]
        assert failures.keys() <= {self.law, *self.also}, report


class Mutants(list[Mutant]):
    """A table of them."""

    def caught_by(self, law: str, *words: str, also: str = "") -> Callable[[type[K]], type[K]]:
        """A decorator that adds a class to the table. also: names with spaces between."""

        def added(kind: type[K]) -> type[K]:
            self.append(Mutant(kind, law, words, frozenset(also.split())))
            return kind

        return added
