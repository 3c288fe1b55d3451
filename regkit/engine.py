"""What an attachment does at each of its optimizer steps: check, then gradients; after the update, projections."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from regkit.errors import StepError
from regkit.modules import Parameters
from regkit.rules import Rules
from regkit.steps import Step


def total(terms: list[Tensor], device: torch.device) -> Tensor:
    """The sum of scalars, starting from a float32 zero on `device`.  -> ()."""
    result = torch.zeros((), dtype=torch.float32, device=device)
    for term in terms:
        result = result + term.to(device)
    return result


class Engine:
    """The rules at work. It holds the model weakly, as everything does that torch's global hooks hold."""

    def __init__(self, rules: Rules, model: nn.Module) -> None:
        self._rules = rules
        self._reference = weakref.ref(model)
        self._model = Parameters(model)

    def hold(self) -> nn.Module | None:
        """The model, while it lives."""
        return self._reference()

    def moved(self) -> str | None:
        """The name of a bound module that is not where it was bound any more, if there is one."""
        return next((place.name for place in self._rules.places if not place.intact()), None)

    def parameters(self) -> Iterator[Tensor]:
        """Every parameter that makes a step ours.

        Activity rules make every step ours that trains any part of the model: their gradient may flow anywhere.
        """
        weight_rules = chain(self._rules.penalties, self._rules.constraints)
        yield from chain.from_iterable(rule.parameters() for rule in weight_rules)
        if self._rules.activities:
            yield from self._model

    def at_gradients(self, step: Step) -> None:
        """Add gradients and decay, once it is sure that nothing the document says is left out of this step."""
        self._check(step)
        for rule in self._rules.by_gradient:
            rule.add_gradient(step)
        for rule in self._rules.by_decay:
            rule.decay(step)

    def value(self, step: Step) -> Tensor:
        """The value of what `at_gradients` added to gradients."""
        terms = [rule.trained_value(step) for rule in self._rules.by_gradient]
        device = step.optimizer.param_groups[0]["params"][0].device
        return total([term for term in terms if term is not None], device)

    def after(self, step: Step) -> None:
        """Proximal operators, then constraints in the document's order."""
        for rule in self._rules.by_prox:
            rule.shrink(step)
        for constraint in self._rules.constraints:
            if (step.index + 1) % constraint.binding.every == 0:
                constraint.project(step)
        self._settle(step)

    def _check(self, step: Step) -> None:
        for activity in self._rules.activities:
            activity.check(step)
        for recorder in self._rules.recorders:
            recorder.pass_by(step)
        for rule in self._rules.by_loss:
            trained = rule.trained_by(step)
            reason = rule.ledger.missing(trained) if trained else None
            if reason is not None:
                raise StepError(f"rule {rule.binding.key!r} ({rule.binding.kind.describe()}) {reason}")
        for rule in (*self._rules.by_prox, *self._rules.by_decay):
            rule.check(step)

    def _settle(self, step: Step) -> None:
        """Settle the tickets of what this step trained."""
        for recorder in self._rules.recorders:
            if trained := recorder.trained_by(step):
                recorder.ledger.settle(trained)
        for rule in self._rules.by_loss:
            if trained := rule.trained_by(step):
                rule.ledger.settle(trained)
