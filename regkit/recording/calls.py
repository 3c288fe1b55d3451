"""The recorded calls of one module: the outputs of each, and its place in time, which follows from their order.

A forward hook adds calls, also within compiled code. That code would be compiled anew whenever something changes that
it has read: a count, a length, the lengths of a batch. So the calls are a chain, and to add one is to replace the last
link and to read nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from regkit.activity.padding import Validity
from regkit.errors import StepError
from regkit.runtime.modes import uncompiled


class Call(NamedTuple):
    """One call of a module.

    observed: the module's outputs, by role; empty if no gradient reaches them, and the call counts in time alone.
    versions: by role, an output and the version it had, to notice changes in place.
    training: whether the module was in training mode.
    starts: whether the call begins a new sequence.
    validity: which of the outputs are data and no padding; None: all, or the call has no place in time yet.
    number: how many calls came before under the same validity.
    """

    observed: Mapping[str, Any]
    versions: Mapping[str, tuple[Tensor, int]]
    training: bool
    starts: bool
    validity: Validity | None = None
    number: int = 0


Chain = tuple[Call, "Chain"] | None
"""The last call, and the chain of the calls before."""


@uncompiled
def _this_thread() -> int:
    return threading.get_ident()


class Calls:
    """The calls of one module since `clear`.

    last: the chain of the calls that have no place in time yet.
    records: the calls that have one, and outputs that a gradient reaches.
    validity: the validity in force, under which calls count in time; None where none is in force.
    timed: whether a validity is in force. Compiled code reads this and not the validity, which changes.
    before: the validity of the call before in the same sequence.
    """

    def __init__(self) -> None:
        self.timed = False
        self.last: Chain = None
        self.lock = threading.Lock()
        self.records: list[Call] = []
        self.validity: Validity | None = None
        self.before: Validity | None = None
        self._count = self._longest = self._thread = 0

    def add(self, call: Call, compiling: bool) -> None:
        """Add a call that was made, in whatever thread."""
        if compiling:  # a lock cannot be compiled
            self.last = (call, self.last)
            return
        self._refuse_other_threads()
        with self.lock:
            self.last = (call, self.last)

    def _refuse_other_threads(self) -> None:
        if self.timed and self._thread != _this_thread():
            raise StepError(
                "lengths() or mask() were entered in one thread, and the model runs in another: whose they are cannot "
                "be told. Pack the sequences, which then know their lengths, or give each thread a model of its own"
            )

    def placed(self) -> list[Call]:
        """The calls that gradients reach, each in its place in time."""
        if self.last is None:
            return self.records
        with self.lock:
            link: Chain = self.last
            self.last = None
        new = []
        while link is not None:
            call, link = link
            new.append(call)
        for call in reversed(new):
            placed = call if self.validity is None else self._in_time(call, self.validity)
            if call.observed:
                self.records.append(placed)
        return self.records

    def clear(self) -> None:
        """Drop all recorded calls, but keep counting in time."""
        self.placed().clear()
        self.before = None

    @contextmanager
    def under(self, validity: Validity) -> Iterator[None]:
        """A context in which calls have this validity and are counted from 0."""
        self._refuse_other_threads()
        self.placed()
        outer = (self.timed, self.validity, self._count, self._longest)
        self.timed, self.validity, self._count, self._longest = True, validity, 0, 0
        self._thread = _this_thread()
        try:
            yield
        finally:
            self.placed()  # the last call's validity stays: masks stand around one call each, the next compares
            in_order = self.validity is validity
            self.timed, self.validity, self._count, self._longest = outer if in_order else (False, None, 0, 0)
            if not in_order:
                raise StepError(
                    "lengths() or mask() were left in another order than they were entered, as where coroutines run "
                    "one model in turns: what is data cannot be told. Leave the inner one first; give each coroutine a "
                    "model of its own, or packed sequences, which know their lengths"
                )

    @property
    def longest(self) -> int:
        """The most calls that one sequence took under the validity in force."""
        self.placed()
        return self._longest

    def _in_time(self, call: Call, validity: Validity) -> Call:
        """A call with its validity and its number: for a cell, the place in time."""
        if call.starts:
            self._count, self.before = 0, None
        before, number = self.before, self._count
        self.before, self._count = validity, number + 1
        self._longest = max(self._longest, self._count)
        return call._replace(validity=validity.following(before), number=number)
