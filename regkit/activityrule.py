"""A rule on activity: what it makes of what is in store, and whether that went into the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regkit.activity import Activity, Sequenced, Stepped
from regkit.binding import Binding
from regkit.closed import Seen, Term, Terms, evaluate
from regkit.errors import PluginError, StepError
from regkit.kinds import ActivityPenalty
from regkit.records import Recorder
from regkit.sites import OutputSite
from regkit.step import Step

Run = Callable[..., Any]
"""Calls a function of a rule: run(rule, function, *args), where the rule may be `At`."""

Sight = dict[tuple[Any, ...], Seen]
"""What is in store, by recorder and by what a site is of its module."""


class At(NamedTuple):
    """Where a rule works, for an error's sentence."""

    binding: Binding
    at: OutputSite


@dataclass(eq=False)
class ActivityRule:
    """A rule on activity, with the recorders that see its sites. at: the one it works on, for an error's sentence."""

    binding: Binding
    places: list[tuple[OutputSite, Recorder]]
    at: OutputSite | None = None
    _parts: dict[int, tuple[Tensor, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._at = [At(self.binding, site) for site, _ in self.places]

    @property
    def last(self) -> Tensor | None:
        """What it last had in the loss, None where there was nothing yet.  -> ()."""
        return _sum([value * amount for value, amount in self._parts.values()])

    @torch.enable_grad()
    def prove(self) -> None:
        """Raise PluginError where the gradient that the kind adds is not that of its value, for a few small outputs."""
        kind = self.binding.kind
        assert isinstance(kind, ActivityPenalty)
        if not kind.offers_gradients:
            return
        leaf = torch.linspace(-1, 9, 36, dtype=torch.float64).cos().view(3, 2, 6).detach().requires_grad_()
        valid = torch.tensor([[1, 1], [1, 1], [1, 0]], dtype=torch.bool).unsqueeze(-1)
        segments = Sequenced(leaf, valid), Sequenced(leaf, backward=True), Stepped(leaf[1], leaf[0])
        activity = Activity(segments)
        term = Term(kind, 0.3, lambda function, *args: function(*args))
        (closed,) = torch.autograd.grad(evaluate([(term, Seen(activity, lambda: [leaf]))])[1], leaf)
        (wanted,) = torch.autograd.grad(kind.value(activity) * term.amount, leaf)
        if not torch.allclose(closed, wanted, 1e-6, 1e-6, equal_nan=True):
            raise PluginError(
                f"rule {self.binding.key!r}: add_gradients of {type(kind).__module__}.{type(kind).__qualname__} does "
                "not add the gradient of its value"
            )

    def terms(self, index: int, seen: Sight, run: Run | None = None, only: Recorder | None = None) -> Terms:
        """strength · factor · value, for each site with anything in store.

        seen: activities of what is in store now, which several rules share.
        """
        penalty = self.binding.kind
        assert isinstance(penalty, ActivityPenalty)
        amount = penalty.strength * self.binding.factor(index)
        found = []
        for (site, recorder), at in zip(self.places, self._at, strict=True):
            if only is not None and only is not recorder:
                continue
            key = recorder, site.role, site.layers, site.directions
            if key not in seen:
                self.at = site
                segments = recorder.segments(site)
                if segments is None:
                    continue
                seen[key] = Seen(Activity(segments), recorder.recorded)
            found.append((Term(penalty, amount, partial(run or self._run, at)), seen[key]))
        return found

    def _run(self, where: At, function: Callable[..., Any], *args: Any) -> Any:
        self.at = where.at
        return function(*args)

    def value(self, index: int, only: Recorder | None = None) -> Tensor | None:
        """The sum of its terms, None where there are none.  -> ()."""
        return _sum(evaluate(self.terms(index, {}, only=only))[1])

    def inject(self, recorder: Recorder, index: int) -> Tensor | None:
        """The same of one recorder, kept for `values()` together with what the others last gave."""
        value = self.value(index, recorder)
        if value is not None:
            self._parts[id(recorder)] = value.detach(), 1.0
        return value

    def check(self, step: Step) -> None:
        """Raise StepError where this step trains a module whose activity is not in the loss."""
        for _, recorder in self.places:
            trained = recorder.trained_by(step)
            reason = recorder.missing(trained, self.binding.optional) if trained else None
            if reason is not None:
                what = f"rule {self.binding.key!r} ({self.binding.kind.describe()})"
                raise StepError(f"{what} on {recorder.title} {reason}")


def take(rules: Sequence[ActivityRule], index: int, run: Run) -> list[Tensor]:
    """Tensors of which the sum is that of the rules via loss, whose values are kept: the records are about to be
    consumed.

    run: runs what may fail, to say whose it is: run(rule, function, *args).
    """
    seen: Sight = {}
    taken: list[tuple[ActivityRule, Terms]] = []
    terms: Terms = []
    for rule in rules:
        if rule.binding.via == "loss":
            own = run(rule, rule.terms, index, seen, run)
            terms += own
            taken.append((rule, own))
    values, sums = evaluate(terms)
    found = iter(values)
    for rule, own in taken:
        if own:
            rule._parts = {}
        for number, (term, _) in enumerate(own):
            rule._parts[number] = next(found), term.amount
    return sums


def _sum(values: Sequence[Tensor]) -> Tensor | None:
    return sum((one.to(values[0].device) for one in values[1:]), values[0]) if values else None
