"""Forward hooks that record outputs until `penalty()` consumes the records, and the check that none is left out.

A recorder stores a module's outputs and computes nothing. It is a hook of the model and so is copied with the model: a
copy is inert, records nothing and shares no store with the original.
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

from regkit.activity import Segment
from regkit.activity.padding import Validity
from regkit.adapters import Adapter, Form, OutputSite
from regkit.errors import RegkitError, StepError
from regkit.recording.calls import Call, Calls
from regkit.recording.tickets import Tickets
from regkit.runtime import modes
from regkit.runtime.inert_hook import ModelHook
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


class Recorder(ModelHook):
    """The forward hook of one module, with the recorded calls.

    alive: gives the recorded module, or None where that is gone.
    parameters: the parameters of the module and all in it.
    name: the module's, without the prefixes of wrappers; title: the same, for the sentence of an error.
    ledger: the tickets of the penalties on the recorded outputs.
    calls: the recorded calls.
    left: how many records there were at a step of other parameters, which has left them to a later one.
    waiting: of an injector, the forward passes that no backward pass has reached.
    told_of_mixing: whether a warning told that states were changed between two calls.
    told_of_hooks: whether a warning told of a hook that changes recorded outputs.
    """

    word = "recorder"

    def __init__(self, module: nn.Module | None = None, adapter: Adapter | None = None, name: str = "") -> None:
        super().__init__(inert=adapter is None)
        self.alive = (lambda: None) if module is None else weakref.ref(module)
        self.parameters = () if module is None else Parameters(module)
        self._adapter = adapter
        self._steps = adapter is not None and adapter.steps  # each call is one in time: one not recorded counts, too
        self.name = name
        self.title = name or "the model"
        self.ledger = Tickets()
        self.calls = Calls()
        self.left = 0
        self.waiting: list[Any] = []
        self.told_of_mixing = self.told_of_hooks = False
        self._ahead: frozenset[int] | None = None
        """The numbers of the hooks that stood before this one when it was last taken off."""
        self._thread: int | None = None  # in which the module ran last

    @property
    def module(self) -> nn.Module:
        """The recorded module. Raises RegkitError where that is gone."""
        module = self.alive()
        if module is None:
            raise RegkitError("the model that this attachment was on is gone")
        return module

    def install(self) -> None:
        """Put the hook on the module, in its old place if any. Where the module is gone, the next step tells."""
        module = self.alive()
        if module is None:
            return
        hooks = module._forward_hooks
        behind = [] if self._ahead is None else [number for number in hooks if number not in self._ahead]
        self.handle = module.register_forward_hook(self, with_kwargs=True)
        for number in behind:
            hooks[number] = hooks.pop(number)  # to the end
        modes.forget_compiled()

    def remove(self) -> None:
        """Take the hook off the module, and drop all records. May be called again."""
        module, handle = self.alive(), self.handle
        if module is not None and handle is not None and handle.id in module._forward_hooks:
            numbers = list(module._forward_hooks)
            self._ahead = frozenset(numbers[: numbers.index(handle.id)])
        super().remove()
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
        carries = carries and torch.is_grad_enabled()  # or it is no output, but a learned state that was handed in
        if ordinary:
            self._thread = get_ident()
            if carries:
                with calls.lock:
                    calls.last = (Call(observed, versions, module.training, False), calls.last)
        else:
            starts = self.starts(observed)
            self._add(module, Call(observed if carries else {}, versions, module.training, starts), compiling)

    def _add(self, module: nn.Module, call: Call, compiling: bool) -> None:
        """Store a call where anything is out of the ordinary."""
        if not compiling:
            modes.verify_recordable(module, self.title, bool(call.observed))
            self._thread = get_ident()
        # Outputs that no gradient can reach (evaluation under no_grad) are no training data.
        if call.observed or (self.calls.timed and self._steps):
            self.calls.add(call, compiling)

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Mapping[str, Any]:
        """The outputs of a call, by role. Raises StepError where the adapter cannot read the result."""
        assert self._adapter is not None
        try:
            return self._adapter.observe(module, args, kwargs, result)
        except Exception as error:  # a subclass may return what it likes; its user must learn what does not fit
            raise self._unreadable(error) from error

    def starts(self, observed: Mapping[str, Any]) -> bool:
        """Whether an observed call begins a new sequence. Raises StepError where the adapter cannot tell."""
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
    def records(self) -> list[Call]:
        """The recorded calls, each in its place in time."""
        return self.calls.placed()

    @contextmanager
    def under(self, validity: Validity) -> Iterator[None]:
        """A context in which calls have this validity and are counted from 0."""
        with self.calls.under(validity):
            yield
            if self._steps and self.calls.longest:
                validity.check_calls(self.calls.longest, self.title)

    def clear(self) -> None:
        """Drop all records."""
        self.calls.clear()
        self.left = 0

    def form(self, site: OutputSite) -> Form | None:
        """Where the tensor of an output is in observed calls; None where only the adapter's `segments` can tell."""
        return None if self._adapter is None else self._adapter.form(self.module, site)

    def segments(self, site: OutputSite) -> list[Segment]:
        """The segments of all recorded calls, for one site. Raises StepError where the calls do not belong together."""
        records, adapter = self.calls.placed(), self._adapter
        if not records or adapter is None:
            return []
        if len(records) > 1:
            self.verify_together(records)
        module = self.alive() or self.module
        found: list[Segment] = []
        for record in records:
            self.verify_unchanged(record)
            found.extend(adapter.segments(module, site, record.observed, record.validity, record.number))
        return found

    def verify_unchanged(self, record: Call) -> None:
        """Raise StepError where a recorded output was changed in place."""
        for role, (data, version) in record.versions.items():
            if data._version != version:
                raise StepError(
                    f"the {role} of {self.title} was changed in place after it was recorded, so its "
                    "penalty would be that of other values; change a copy"
                )

    def verify_together(self, records: Sequence[Call]) -> None:
        """Raise StepError where several records are not to be counted together."""
        evaluated = 0  # without a call for each, of which there may be hundreds
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
        """Whether no parameter of the module is trained; modules before this one in the model may be."""
        return not any(p.requires_grad for p in self.parameters)

    def missing(self, trained: frozenset[int], optional: bool) -> str | None:
        """The reason why the recorded outputs are not in the loss of a step; None where all are.

        trained: the ids of the module's parameters that the step trains. optional: whether nothing need be recorded.
        """
        if self.records:
            return _UNCONSUMED
        if self.ledger.of_step(trained):
            return self.ledger.missing(trained)
        return None if optional or self.frozen else _UNRECORDED

    def skip_step(self, stepped: Mapping[int, Any]) -> None:
        """Leave the records, of which there are some, to a later step, if this one is of other parameters.

        stepped: the parameter groups of the step, by the ids of parameters. Raises StepError where newer records lie
        beside others that an earlier step has left.
        """
        elsewhere = self._thread not in (None, get_ident())  # another model is trained in this thread
        if elsewhere or any(id(p) in stepped for p in self.parameters):
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
    """Whether every recorder has recorded outputs, and all went through a loss that was backpropagated."""
    for recorder, _ in recorders:
        calls, tickets = recorder.calls, recorder.ledger.tickets
        if calls.last is not None or calls.records or recorder.waiting or not tickets:
            return False
        for ticket in tickets:
            if not ticket.backpropagated:
                return False
    return True


def data_of(observed: Any) -> Any:
    """The tensor of an output, which may be packed."""
    return observed.data if isinstance(observed, PackedSequence) else observed
