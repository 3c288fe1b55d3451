"""Tickets tell whether penalties went through the loss: handed out by `penalty()`, stamped by backpropagation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from regkit.runtime.step import joins


class Ticket:
    """A hook on a penalty, which learns whether the penalty's gradient was ever asked for.

    index: the number of the step that the penalty is of; None where nothing in it has a schedule.
    behind: how many steps had been taken before, by any optimizer.
    """

    backpropagated = False
    index: int | None = None
    behind = 0

    def __call__(self, gradient: Tensor) -> None:
        self.backpropagated = True


@dataclass
class Tickets:
    """The tickets of a recorder or a rule that must go through the loss.

    Several optimizers may share its parameters out among them: the first to step settles the tickets, and a step that
    joins that one answers to the same tickets.

    tickets: those handed out since the last step.
    settled: the tickets that the last step answered to.
    stepped: the ids of the parameters that the last step trained, with those of the steps that joined it.
    """

    tickets: list[Ticket] = field(default_factory=list)
    settled: list[Ticket] = field(default_factory=list)
    stepped: frozenset[int] = frozenset()

    def joined_by(self, trained: frozenset[int]) -> bool:
        """Whether a step that trains `trained` joins the last one: none does where there are new tickets."""
        return not self.tickets and joins(trained, self.stepped)

    def of_step(self, trained: frozenset[int]) -> list[Ticket]:
        """The tickets that a step that trains `trained` answers to."""
        return self.settled if self.joined_by(trained) else self.tickets

    def missing(self, trained: frozenset[int]) -> str | None:
        """The reason why no loss that was backpropagated had the penalty as a term; None where one had."""
        tickets = self.of_step(trained)
        if not tickets:
            return "was not part of the loss in this step; add attachment.penalty() to the loss"
        return None if all(ticket.backpropagated for ticket in tickets) else _UNSTAMPED

    def of_other_steps(self, index: int, behind: int) -> list[int]:
        """The numbers of steps, other than `index`, that penalties for the step to come were computed for.

        A penalty that was there at the step of another optimizer may be of that one's loss, but for the last.
        """
        now = [one for one in self.tickets if one is self.tickets[-1] or one.behind == behind]
        return [one.index for one in now if one.index is not None and one.index != index]

    def forget(self, index: int) -> None:
        """Forget the tickets for the step of this number, which have led to an error: their gradients are wrong."""
        self.tickets = [ticket for ticket in self.tickets if ticket.index != index]

    def discard(self) -> None:
        """Forget every ticket that was not backpropagated. The gradients of the others have been accumulated."""
        self.tickets = [ticket for ticket in self.tickets if ticket.backpropagated]


class _HasTickets(Protocol):
    """A recorder, or a rule via the loss."""

    ledger: Tickets


def settle(stepped: Iterable[tuple[_HasTickets, frozenset[int]]]) -> None:
    """Settle the tickets of recorders or rules after a step, each given with the ids of its trained parameters."""
    for owner, trained in stepped:
        ledger = owner.ledger
        if not ledger.tickets and ledger.joined_by(trained):  # there mostly are some: then no call for each owner
            ledger.stepped |= trained
        else:
            ledger.settled, ledger.tickets, ledger.stepped = ledger.tickets, [], trained


_UNSTAMPED = (
    "was taken by attachment.penalty(), but what that returned was not part of a loss that was backpropagated; add it "
    "to the loss (attachment.values() is for logging), or call attachment.discard() for a batch that is skipped"
)
