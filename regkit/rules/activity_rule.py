"""A rule on activity: what it makes of what is in store, and whether that went into the loss."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from regkit.activity import Activity
from regkit.adapters import Form, OutputSite
from regkit.errors import StepError
from regkit.kinds import ActivityPenalty
from regkit.plan.binding import Binding
from regkit.recording.recorder import Recorder
from regkit.rules.closed_form import Recorded, Source, Told, evaluate, only_backward
from regkit.rules.dense import Entry, gather


class At(NamedTuple):
    """Where a rule works, for an error's sentence."""

    binding: Binding
    at: OutputSite


@dataclass(eq=False)
class ActivityRule:
    """A rule on activity, with the recorders that see its sites.

    at: the site it works on, for an error's sentence. taken: what the rule last had in the loss, by whoever took it:
    values at unit strength, and their amounts.
    """

    binding: Binding
    places: list[tuple[OutputSite, Recorder]]
    at: OutputSite | None = None
    taken: dict[Hashable, list[tuple[Tensor, float]]] = field(default_factory=dict)

    @cached_property
    def penalty(self) -> ActivityPenalty:
        """Its kind."""
        kind = self.binding.kind
        assert isinstance(kind, ActivityPenalty)
        return kind

    def amount(self, index: int) -> float:
        """strength · factor at a step."""
        strength = self.penalty.strength
        return strength if self.binding.schedule is None else strength * self.binding.factor(index)

    @property
    def last(self) -> Tensor | None:
        """The rule's part of the last loss, None where there was none yet.  -> ()."""
        return _sum([value * amount for taken in self.taken.values() for value, amount in taken])

    def value(self, index: int) -> Tensor | None:
        """strength · factor · value of what is in store, None where nothing is.  -> ()."""
        found = []
        for site, recorder in self.places:
            self.at = site
            if segments := recorder.segments(site):
                found.append(self.penalty.value(Activity(segments)) * self.amount(index))
        self.at = None
        return _sum(found)

    def verify_consumed(self, trained: Mapping[Recorder, frozenset[int]]) -> None:
        """Raise StepError where a step trains a module whose activity is not in the loss.

        trained: the ids of what it trains of each; of one without a trainable parameter, of all.
        """
        for _, recorder in self.places:
            if ids := trained.get(recorder):
                reason = recorder.missing(ids, self.binding.optional)
                if reason is not None:
                    raise StepError(f"{self.binding.label} on {recorder.title} {reason}")


class Intake:
    """Takes what is in store into the loss, for some rules on the outputs of some recorders.

    told: raises an error with its rule named.
    """

    def __init__(self, rules: Iterable[ActivityRule], recorders: Iterable[Recorder], told: Told) -> None:
        self._rules, self._told = list(rules), told
        mine = set(recorders)
        places: dict[Hashable, list[tuple[int, OutputSite, Recorder]]] = {}
        for number, rule in enumerate(self._rules):
            for site, recorder in rule.places:
                if recorder in mine:
                    key = recorder, site.role, site.layers, site.directions
                    places.setdefault(key, []).append((number, site, recorder))
        self._formed: list[tuple[Entry, Form]] = []
        self._rest: list[Entry] = []
        for some in places.values():
            entry = self._entry(some)
            simple = all(kind.separable and kind.offers_gradients for kind in entry.kinds)
            form = entry.recorder.form(entry.site) if simple else None
            if form is None:
                self._rest.append(entry)
            else:
                self._formed.append((entry, form))

    def _entry(self, places: Sequence[tuple[int, OutputSite, Recorder]]) -> Entry:
        numbers = tuple(number for number, _, _ in places)
        kinds = tuple(self._rules[number].penalty for number in numbers)
        where = tuple(At(self._rules[number].binding, site) for number, site, _ in places)
        _, site, recorder = places[0]
        return Entry(recorder, site, kinds, numbers, where)

    def consume(self, index: int) -> list[Tensor]:
        """Tensors of which the sum is that of the rules at a step, whose values are kept.  -> () each."""
        amounts = []
        for rule in self._rules:  # without a call for each, as most have no schedule
            strength = rule.penalty.strength
            amounts.append(strength if rule.binding.schedule is None else strength * rule.binding.factor(index))
        values: list[tuple[int, Tensor, float]] = []
        sums: list[Tensor] = []
        closed = only_backward()
        sources: list[Source] = []
        entries = self._rest
        if closed and self._formed:
            groups, others = gather(self._formed)
            for group in groups:
                group.terms = group.entry.terms(amounts, len(group.roots) // group.steps)
            sources += groups
            entries = [*others, *entries] if others else entries
        elif self._formed:
            entries = [*(entry for entry, _ in self._formed), *entries]
        for entry in entries:
            self._one(entry, amounts, sources if closed else None, sums, values)
        if sources:
            sums += evaluate(sources, self._told, values)
        fresh: set[int] = set()
        for number, value, amount in values:  # for reports: the records are about to be consumed
            taken = self._rules[number].taken
            if number not in fresh:
                fresh.add(number)
                taken[self] = []
            taken[self].append((value, amount))
        return sums

    def _one(
        self,
        entry: Entry,
        amounts: Sequence[float],
        sources: list[Source] | None,
        sums: list[Tensor],
        values: list[tuple[int, Tensor, float]],
    ) -> None:
        """Take what is in store of one entry: as a source where closed forms will do, else by autograd."""
        terms = entry.terms(amounts)
        try:
            segments = entry.recorder.segments(entry.site)
        except Exception as error:  # an adapter is a stranger's code: anything can come out
            self._told(terms[0].where, error)
        if not segments:
            return
        activity = Activity(segments)
        source = Recorded(activity)
        if sources is not None and source.device is not None:
            source.terms = [term for term in terms if term.kind.offers_gradients]
            terms = [term for term in terms if not term.kind.offers_gradients]
            if source.terms:
                sources.append(source)
        for kind, amount, number, where in terms:
            try:
                value = kind.value(activity)
            except Exception as error:  # a kind is a stranger's code: anything can come out
                self._told(where, error)
            sums.append(value * amount)
            values.append((number, value.detach(), amount))


def _sum(values: Sequence[Tensor]) -> Tensor | None:
    return sum((one.to(values[0].device) for one in values[1:]), values[0]) if values else None
