"""Whether what must go through the loss did: tickets that `penalty()` hands out, and that backpropagation stamps."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


class Ticket:
    """Handed out with each `penalty()`: learns whether its gradient was ever asked for."""

    backpropagated = False

    def __call__(self, gradient: Tensor) -> None:
        self.backpropagated = True


@dataclass
class Tickets:
    """The tickets of one thing that must go through the loss.

    Several optimizers may train it, each a part of its parameters: the first of them settles the tickets, and a step
    that trains none of the same parameters answers to the same ones.
    """

    tickets: list[Ticket] = field(default_factory=list)
    settled: list[Ticket] = field(default_factory=list)
    stepped: frozenset[int] = frozenset()

    def _joins(self, trained: frozenset[int]) -> bool:
        return not self.tickets and bool(self.stepped) and self.stepped.isdisjoint(trained)

    def of_step(self, trained: frozenset[int]) -> list[Ticket]:
        """The tickets that a step that trains these parameters answers to."""
        return self.settled if self._joins(trained) else self.tickets

    def missing(self, trained: frozenset[int]) -> str | None:
        """Why it did not go through a loss that was backpropagated; None where it did."""
        tickets = self.of_step(trained)
        if not tickets:
            return "was not part of the loss in this step; add attachment.penalty() to the loss"
        return None if all(ticket.backpropagated for ticket in tickets) else _UNSTAMPED

    def settle(self, trained: frozenset[int]) -> None:
        """These parameters have been stepped."""
        if self._joins(trained):
            self.stepped |= trained
        else:
            self.settled, self.tickets, self.stepped = self.tickets, [], frozenset(trained)

    def discard(self) -> None:
        """Forget what was not backpropagated. What was is in the gradients that others of a step have accumulated."""
        self.tickets = [ticket for ticket in self.tickets if ticket.backpropagated]


_UNSTAMPED = (
    "was taken by attachment.penalty(), but what that returned was not part of a loss that was backpropagated; add it "
    "to the loss (attachment.values() is for logging), or call attachment.discard() for a batch that is skipped"
)
