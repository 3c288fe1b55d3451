"""The forward hooks, what they keep until `penalty()` consumes it, and the check that nothing fell through.

A hook stores what a module put out and computes nothing. It belongs to the model, and so travels with copies of it: a
copy of a hook is an inert one, which records nothing and writes into no one's store.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id, _is_tracing
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses import FakeTensor
from torch.fx import _symbolic_trace
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from regkit import _pickled
from regkit.activity import Segment
from regkit.activity.padding import Validity
from regkit.adapters import Adapter, Form, OutputSite
from regkit.errors import RegkitError, StepError
from regkit.recording.calls import Call, Calls, Record
from regkit.recording.tickets import Tickets
from regkit.runtime import modes
from regkit.weights.links import Parameters

_UNCONSUMED: Final = (
    "recorded outputs that were not consumed before the optimizer's step; add attachment.penalty() to the loss, run "
    "forward passes that are not trained on under torch.no_grad(), or call attachment.discard() for a skipped batch"
)
_UNRECORDED: Final = (
    "recorded nothing in this step, although its weights were trained: was the module run through its forward() "
    "instead of being called, under torch.no_grad(), as a program that was traced or exported, or within a checkpoint "
    "that keeps no graph? Or was it not run, and its gradients are zeros left by zero_grad(set_to_none=False)? A rule "
    'with "optional": true may record nothing'
)


class Recorder:
    """The forward hook of one module, and its store."""

    def __init__(self, module: nn.Module | None = None, adapter: Adapter | None = None, name: str = "") -> None:
        self.reference = (lambda: None) if module is None else weakref.ref(module)
        self.parameters = () if module is None else Parameters(module)
        self._adapter = adapter
        self._handle: RemovableHandle | None = None
        self.name = name
        self.title = name or "the model"
        self.ledger = Tickets()
        self.calls = Calls()
        self.left = 0
        self.waiting: list[Any] = []  # what no backward pass has reached, of an injector
        self._thread: int | None = None

    def __reduce__(self) -> _pickled.Call:
        # What deepcopy and pickle make of a hook that travels with its model.
        return _pickled.call("hook", "recorder", -1 if self._handle is None else self._handle.id)

    @property
    def inert(self) -> bool:
        """Whether it is a copy of a recorder, and records nothing."""
        return self._adapter is None

    def alive(self) -> nn.Module | None:
        """The module that it records, None where that is gone."""
        return self.reference()

    @property
    def module(self) -> nn.Module:
        """The module that it records."""
        module = self.reference()
        if module is None:
            raise RegkitError("the model that this attachment was on is gone")
        return module

    def install(self) -> None:
        """Begin to record."""
        self._handle = self.module.register_forward_hook(self, with_kwargs=True)
        modes.forget_compiled()

    def remove(self) -> None:
        """Record no more, and drop what is stored. May be called again."""
        if self._handle is not None:
            self._handle.remove()
        self.clear()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        calls, compiling = self.calls, torch.compiler.is_compiling()
        ordinary = not (
            compiling
            or calls.timed
            or _current_graph_task_id() != -1
            or peek_interpreter_stack() is not None
            or "_is_replica" in module.__dict__
            or _is_tracing()
            or _symbolic_trace._is_fx_tracing_flag
        )
        if self._adapter is None or (not ordinary and modes.is_rehearsal(self.title, compiling)):
            return
        try:
            observed = self._adapter.observe(module, args, kwargs, result)
        except Exception as error:  # a subclass may return what it likes; its user must learn what does not fit
            raise self._unreadable(error) from error
        carries = False
        versions: dict[str, tuple[Tensor, int]] = {}
        for role, one in observed.items():
            data = one.data if isinstance(one, PackedSequence) else one
            if isinstance(data, Tensor) and data.requires_grad and type(data) is not FakeTensor:
                carries = True
                # Compiled code cannot be asked for the versions of tensors: changes in place go unchecked there.
                if not compiling:
                    versions[role] = data, data._version
        if ordinary:
            self._thread = get_ident()
            if carries:
                with calls.lock:
                    calls.last = (Call(observed, versions, module.training, False), calls.last)
        else:
            self._add(module, observed if carries else None, versions, self.starts(observed))

    def _add(
        self,
        module: nn.Module,
        observed: Mapping[str, Any] | None,
        versions: Mapping[str, tuple[Tensor, int]],
        starts: bool,
    ) -> None:
        """Store a call where anything is out of the ordinary; None: no gradient reaches what it put out."""
        compiling = torch.compiler.is_compiling()
        if not compiling:
            modes.verify_recordable(module, self.title, observed is not None)
            self._thread = get_ident()
        # What no gradient can reach (evaluation under no_grad) is no training data.
        if observed is not None or (self.calls.timed and self._steps):
            self.calls.add(Call(observed, versions, module.training, starts), compiling)

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Mapping[str, Any]:
        """What its adapter keeps of a call. Raises StepError where that cannot read what the module returned."""
        assert self._adapter is not None
        try:
            return self._adapter.observe(module, args, kwargs, result)
        except Exception as error:  # a subclass may return what it likes; its user must learn what does not fit
            raise self._unreadable(error) from error

    @property
    def _steps(self) -> bool:
        """Whether each call is one step of time, so that one which is not recorded counts too."""
        return self._adapter is not None and self._adapter.steps

    def starts(self, observed: Mapping[str, Any]) -> bool:
        """Whether an observed call begins a new sequence. Raises StepError where its adapter cannot tell."""
        assert self._adapter is not None
        try:
            return self._adapter.starts(observed)
        except Exception as error:  # a stranger's code: anything can come out
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> StepError:
        return StepError(
            f"{self.title} ({type(self.module).__name__}) returned what its adapter {type(self._adapter).__name__} "
            f"cannot read ({error!r}); it needs an adapter of its own"
        )

    @property
    def records(self) -> list[Record]:
        """What is in store."""
        return self.calls.placed()

    @contextmanager
    def under(self, validity: Validity) -> Iterator[None]:
        """Inside, calls have this validity, counted from 0."""
        with self.calls.under(validity):
            yield
            if self._steps and self.calls.longest:
                validity.check_calls(self.calls.longest, self.title)

    def clear(self) -> None:
        """Drop what is in store."""
        self.calls.clear()
        self.left = 0

    def form(self, site: OutputSite) -> Form | None:
        """Where the tensor of an output is in what is observed, if that is simple."""
        return None if self._adapter is None else self._adapter.form(self.module, site)

    def segments(self, site: OutputSite) -> list[Segment]:
        """The segments of everything in store, for one site."""
        records, adapter = self.calls.placed(), self._adapter
        if not records or adapter is None:
            return []
        if len(records) > 1:
            self.refuse(records)
        module = self.reference() or self.module
        found: list[Segment] = []
        for record in records:
            self.refuse_changes(record)
            found.extend(adapter.segments(module, site, record.observed, record.validity, record.call))
        return found

    def refuse_changes(self, record: Call | Record) -> None:
        """Raise StepError where what was recorded was changed in place."""
        for role, (data, version) in record.versions.items():
            if data._version != version:
                raise StepError(
                    f"the {role} of {self.title} was changed in place after it was recorded, so its "
                    "penalty would be that of other values; change a copy"
                )

    def refuse(self, records: Sequence[Call | Record]) -> None:
        """Raise StepError where several records are not to be counted together."""
        evaluated = 0
        for record in records:
            evaluated += not record.training
        if 0 < evaluated < len(records):
            raise StepError(
                f"{evaluated} of {len(records)} recorded outputs of {self.title} were made in "
                "eval mode and would be counted with those of training; evaluate under torch.no_grad()"
            )
        if self.left:
            self._refuse_leftovers(len(records))

    @property
    def frozen(self) -> bool:
        """Whether no step trains it: what is before it in the model may be trained, without it."""
        return not any(p.requires_grad for p in self.parameters)

    def missing(self, trained: frozenset[int], optional: bool) -> str | None:
        """Why what it recorded is not in the loss of a step that trains these of its parameters; None where it is."""
        if self.records:
            return _UNCONSUMED
        if self.ledger.of_step(trained):
            return self.ledger.missing(trained)
        return None if optional or self.frozen else _UNRECORDED

    def skip_step(self, stepped: Mapping[int, Any]) -> None:
        """A step of other parameters leaves the records to a later one, which must not find newer ones beside them."""
        elsewhere = self._thread not in (None, get_ident())  # another model's training has nothing to do with it
        if self.calls.empty or elsewhere or any(id(p) in stepped for p in self.parameters):
            return
        count = len(self.records)
        self._refuse_leftovers(count)
        self.left = count

    def _refuse_leftovers(self, count: int) -> None:
        if 0 < self.left < count:
            raise StepError(
                f"outputs of {self.title} from before an optimizer's step and from after it were never consumed, and "
                "would be counted together: add attachment.penalty() to the loss, or run forward passes that it is not "
                "trained on under torch.no_grad(), or call attachment.discard()"
            )


def all_in_the_loss(recorders: Iterable[tuple[Recorder, object]]) -> bool:
    """Whether each has recorded something, all of which went through a loss that was backpropagated."""
    for recorder, _ in recorders:
        calls, tickets = recorder.calls, recorder.ledger.tickets
        if calls.last is not None or calls.records or recorder.waiting or not tickets:
            return False
        for ticket in tickets:
            if not ticket.backpropagated:
                return False
    return True


def settle(recorders: Iterable[tuple[Recorder, frozenset[int]]]) -> None:
    """Settle the tickets of each: these parameters of it have been stepped."""
    for recorder, trained in recorders:
        ledger = recorder.ledger
        if ledger.tickets:  # as it mostly is: without a call for each
            ledger.settled, ledger.tickets, ledger.stepped = ledger.tickets, [], trained
        else:
            ledger.settle(trained)


def data_of(observed: Any) -> Any:
    """The tensor of an output, which may be packed."""
    return observed.data if isinstance(observed, PackedSequence) else observed


def drop_copied_hooks(model: nn.Module) -> None:
    """Take the inert hooks off a copied model that its original's recorders left on it."""
    for module in model.modules():
        for number in [n for n, hook in module._forward_hooks.items() if isinstance(hook, Recorder) and hook.inert]:
            del module._forward_hooks[number]
            module._forward_hooks_with_kwargs.pop(number, None)
