"""Rules on activity: the penalties on recorded outputs, and whether these went into the loss."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

from torch import Tensor

from regkit.activity import Activity
from regkit.adapters import Form, OutputSite
from regkit.errors import StepError
from regkit.kinds import ActivityPenalty
from regkit.plan.binding import Binding
from regkit.recording.recorder import Recorder
from regkit.rules.closed_form import RaiseNamed, Recorded, Source, Values, evaluate, only_backward
from regkit.rules.dense import Entry, gather


class At(NamedTuple):
    """A rule's binding and a site of the rule, for the sentence of an error."""

    binding: Binding
    at: OutputSite


@dataclass(eq=False)
class ActivityRule:
    """A rule on activity, with the recorders of its sites.

    kind: the binding's.
    at: the site being worked on, for the sentence of an error.
    in_last_loss: the rule's terms in the last loss, by the intake: values at unit strength, and their amounts.
    """

    binding: Binding
    kind: ActivityPenalty
    places: list[tuple[OutputSite, Recorder]]
    at: OutputSite | None = None
    in_last_loss: dict[Hashable, list[tuple[Tensor, float]]] = field(default_factory=dict)

    @property
    def last(self) -> Tensor | None:
        """The rule's part of the last loss, None where there was none yet.  -> ()."""
        return _sum([value * amount for terms in self.in_last_loss.values() for value, amount in terms])

    def value(self, index: int) -> Tensor | None:
        """strength · factor · value of the recorded outputs, None where there are none.  -> ()."""
        found = []
        for site, recorder in self.places:
            self.at = site
            if segments := recorder.segments(site):
                found.append(self.kind.value(Activity(segments)) * self.binding.amount(index))
        self.at = None
        return _sum(found)

    def verify_consumed(self, trained: Mapping[Recorder, frozenset[int]]) -> None:
        """Raise StepError where a step trains a module and the activity is not in the loss.

        trained: the ids of the parameters of each recorder's module that the step trains; of all that it trains where
        the module has no trainable parameter.
        """
        for _, recorder in self.places:
            if ids := trained.get(recorder):
                reason = recorder.missing(ids, self.binding.optional)
                if reason is not None:
                    raise StepError(f"{self.binding.label} on {recorder.title} {reason}")


class Intake:
    """Consumes recorded outputs for the loss, under the activity rules of some recorders."""

    def __init__(self, rules: Iterable[ActivityRule], recorders: Iterable[Recorder], raise_named: RaiseNamed) -> None:
        self._rules, self._raise_named = list(rules), raise_named
        among = set(recorders)
        places: dict[tuple[Recorder, Hashable], list[tuple[int, ActivityPenalty, At]]] = {}
        for number, rule in enumerate(self._rules):
            for site, recorder in rule.places:
                if recorder in among:
                    key = recorder, (site.role, site.layers, site.directions)
                    places.setdefault(key, []).append((number, rule.kind, At(rule.binding, site)))
        self._with_form: list[tuple[Entry, Form]] = []
        self._without_form: list[Entry] = []
        for (recorder, _), found in places.items():
            numbers, kinds, where = zip(*found, strict=True)
            in_time = tuple(
                one for kind, one in zip(kinds, where, strict=True) if kind.sequence and not one.binding.optional
            )
            entry = Entry(recorder, where[0].at, kinds, numbers, where, in_time)
            simple = all(kind.separable and kind.offers_gradients for kind in kinds)
            form = recorder.form(entry.site) if simple else None
            if form is None:
                self._without_form.append(entry)
            else:
                self._with_form.append((entry, form))

    def consume(self, index: int) -> list[Tensor]:
        """Tensors of which the sum is the rules' part of the loss at a step. Each rule keeps its terms.  -> () each."""
        amounts = []
        for rule in self._rules:  # without a call for each, as most have no schedule
            strength = rule.kind.strength
            amounts.append(strength if rule.binding.schedule is None else strength * rule.binding.factor(index))
        values: Values = []
        sums: list[Tensor] = []
        closed = only_backward()
        sources: list[Source] = []
        entries = self._without_form
        if closed and self._with_form:
            groups, others = gather(self._with_form)
            for group in groups:
                if not group.paired and group.entry.in_time:
                    _refuse_unpaired(group.entry)
                group.terms = group.entry.terms(amounts, len(group.roots) // group.steps)
            sources += groups
            entries = [*others, *entries] if others else entries
        elif self._with_form:
            entries = [*(entry for entry, _ in self._with_form), *entries]
        for entry in entries:
            self._add(entry, amounts, sources if closed else None, sums, values)
        if sources:
            sums += evaluate(sources, self._raise_named, values)
        of_rules: dict[int, list[tuple[Tensor, float]]] = {}
        for number, value, amount in values:  # for reports: the records are about to be consumed
            of_rules.setdefault(number, []).append((value, amount))
        for number, terms in of_rules.items():
            self._rules[number].in_last_loss[self] = terms
        return sums

    def _add(
        self, entry: Entry, amounts: Sequence[float], sources: list[Source] | None, sums: list[Tensor], values: Values
    ) -> None:
        """Add an entry's records to `sources` where closed forms will do, else their terms to `sums` and `values`."""
        terms = entry.terms(amounts)
        try:
            segments = entry.recorder.segments(entry.site)
        except Exception as error:  # an adapter is a stranger's code: anything can come out
            self._raise_named(terms[0].where, error)
        if not segments:
            return
        if entry.in_time and not any(segment.paired for segment in segments):
            _refuse_unpaired(entry)
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
                self._raise_named(where, error)
            sums.append(value * amount)
            values.append((number, value.detach(), amount))


def _refuse_unpaired(entry: Entry) -> NoReturn:
    """Raise StepError for a rule that compares neighbours in time, where no output has one."""
    raise StepError(
        f"{entry.in_time[0].binding.label} on {entry.recorder.title} found no two neighbours in time: each call was a "
        "single step, and no gradient can reach the state handed in (none, zeros, or detached). Hand on the state that "
        'the call before put out; a rule with "optional": true may find none'
    )


def _sum(values: Sequence[Tensor]) -> Tensor | None:
    """The sum of scalars, on the device of the first; None if there are none.  -> ()."""
    return sum((one.to(values[0].device) for one in values[1:]), values[0]) if values else None
