"""How steps are counted where several optimizers share the parameters out among them: a round of theirs is one step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class StepCount:
    """Optimizer steps, where several optimizers that share the parameters out among them count once.

    A step joins the one before if it trains none of the same parameters; one that does begins the next.
    """

    def __init__(self) -> None:
        self.count = 0
        self.stepped: set[int] = set()

    def index(self, parameters: Iterable[int]) -> int:
        """The number, from 0, of the step that an optimizer of these parameters is about to take part in."""
        joins = self.stepped and self.stepped.isdisjoint(parameters)
        return self.count - 1 if joins else self.count

    def advance(self, parameters: Iterable[int]) -> None:
        """An optimizer of these parameters has stepped."""
        if not self.stepped or not self.stepped.isdisjoint(parameters):
            self.count += 1
            self.stepped.clear()
        self.stepped.update(parameters)

    def keep(self, parameters: Mapping[int, object]) -> None:
        """These are there now. Where none of those that were stepped is, all were replaced: no step can join theirs."""
        if self.stepped.isdisjoint(parameters):
            self.stepped.clear()

    def restore(self, count: int, stepped: Iterable[int]) -> None:
        """Go on from a saved count, of which these parameters have been stepped."""
        self.count = count
        self.stepped = set(stepped)
