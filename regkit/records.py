"""The forward hooks, what they keep until `penalty()` consumes it, and the check that nothing fell through.

A hook stores what a module put out and computes nothing. It belongs to the model, and so travels with copies of it: a
copy of a hook is an inert one, which records nothing and writes into no one's store.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from regkit.activity import Activity, Segment, Validity
from regkit.binding import Binding
from regkit.errors import StepError
from regkit.kinds import ActivityPenalty
from regkit.ledger import Ledger, Ticket
from regkit.modules import Parameters
from regkit.sites import Adapter, OutputSite
from regkit.steps import Step


@dataclass(frozen=True)
class Record:
    """What one call of a module put out, and which of it is data."""

    observed: Mapping[str, Any]
    validity: Validity | None
    training: bool


_UNCONSUMED: Final = (
    "recorded outputs that were not consumed before the optimizer's step; add attachment.penalty() to the loss, and "
    "run forward passes that are not trained on under torch.no_grad()"
)
_UNRECORDED: Final = (
    "recorded nothing in this step, although its weights were trained: was the module run through its forward() "
    "instead of being called, under torch.no_grad(), or compiled before regkit was attached? Or was it not run, "
    'and its gradients are zeros left by zero_grad(set_to_none=False)? A rule with "optional": true may record nothing'
)


class Recorder:
    """The forward hook of one module, and its store."""

    def __init__(self, module: nn.Module | None = None, adapter: Adapter | None = None, name: str = "") -> None:
        self._module = (lambda: None) if module is None else weakref.ref(module)
        self._parameters = () if module is None else Parameters(module)
        self._adapter = adapter
        self._handle: RemovableHandle | None = None
        self.name = name
        self.records: list[Record] = []
        self.ledger = Ledger()
        self.validity: Validity | None = None

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return Recorder, ()  # what deepcopy and pickle make of a hook that travels with its model

    @property
    def module(self) -> nn.Module:
        """The module that it records."""
        module = self._module()
        assert module is not None  # the hook lives on it
        return module

    def install(self) -> None:
        """Begin to record."""
        self._handle = self.module.register_forward_hook(self, with_kwargs=True)

    def remove(self) -> None:
        """Record no more, and drop what is stored. May be called again."""
        if self._handle is not None:
            self._handle.remove()
        self.records.clear()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if self._adapter is None:
            return
        try:
            observed = self._adapter.observe(module, args, kwargs, result)
        except Exception as error:  # a subclass may return what it likes; its user must learn what does not fit
            raise StepError(
                f"{self.name or 'the model'} ({type(module).__name__}) returned what its adapter "
                f"{type(self._adapter).__name__} cannot read ({error!r}); it needs an adapter of its own"
            ) from error
        # What no gradient can reach (evaluation under no_grad) is no training data.
        if any(_requires_grad(one) for one in observed.values()):
            self.records.append(Record(observed, self.validity, module.training))

    def consume(self, ticket: Ticket) -> None:
        """What is in store has gone into the loss of this ticket."""
        if self.records:
            self.ledger.tickets.append(ticket)
            self.records.clear()

    def segments(self, site: OutputSite) -> Iterator[Segment]:
        """The segments of everything in store, for one site."""
        assert self._adapter is not None
        self._refuse_mixture()
        seen: dict[int, int] = {}
        for record in self.records:
            # Calls under the same validity are the steps of one loop: that is how a cell finds its place in time.
            step = seen.get(id(record.validity), 0)
            seen[id(record.validity)] = step + 1
            yield from self._adapter.segments(self.module, site, record.observed, record.validity, step)

    def _refuse_mixture(self) -> None:
        evaluated = sum(not record.training for record in self.records)
        if 0 < evaluated < len(self.records):
            raise StepError(
                f"{evaluated} of {len(self.records)} recorded outputs of {self.name or 'the model'} were made in "
                "eval mode and would be counted with those of training; evaluate under torch.no_grad()"
            )

    def is_trained(self, step: Step) -> bool:
        """Whether this step trains the module; one without a trainable parameter is trained with the rest."""
        mine = [id(p) for p in self._parameters if p.requires_grad]
        return any(i in step.trained for i in mine) if mine else bool(step.trained)


def _requires_grad(observed: Any) -> bool:
    data = observed.data if isinstance(observed, PackedSequence) else observed
    return isinstance(data, Tensor) and data.requires_grad


@dataclass(eq=False)
class ActivityRule:
    """A rule on activity, with the recorders that see its sites."""

    binding: Binding
    places: list[tuple[OutputSite, Recorder]]
    last: Tensor | None = None

    def value(self, index: int) -> Tensor | None:
        """strength · factor · Σ value over the sites with anything in store, None where there is nothing.  -> ()."""
        penalty = self.binding.kind
        assert isinstance(penalty, ActivityPenalty)
        total: Tensor | None = None
        for site, recorder in self.places:
            if recorder.records:
                value = penalty.value(Activity(tuple(recorder.segments(site))))
                total = value if total is None else total + value.to(total.device)
        if total is None:
            return None
        return total * (penalty.strength * self.binding.factor(index))

    def take(self, index: int) -> Tensor | None:
        """The same, kept for `values()`: the records are about to be consumed."""
        value = self.value(index)
        self.last = self.last if value is None else value.detach()
        return value

    def check(self, step: Step) -> None:
        """Raise StepError where this step trains a module whose activity is not in the loss."""
        for _, recorder in self.places:
            reason = self._missing(recorder) if recorder.is_trained(step) else None
            if reason is not None:
                what = f"rule {self.binding.key!r} ({self.binding.kind.describe()})"
                raise StepError(f"{what} on {recorder.name or 'the model'} {reason}")

    def _missing(self, recorder: Recorder) -> str | None:
        if recorder.records:
            return _UNCONSUMED
        if recorder.ledger.tickets:
            return recorder.ledger.missing()
        return None if self.binding.optional else _UNRECORDED
