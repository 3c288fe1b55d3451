"""The calls of one module: what each put out, and its place in time, which is told from their order afterwards.

A forward hook adds to them, also within compiled code. That would be compiled anew whenever something changes that it
has read: a count, a length, the lengths of a batch. So the calls are a chain, of which adding replaces the last link
and reads nothing.
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
    """One call. observed: what it put out; None if no gradient reaches that, and the call counts in time alone.

    starts: whether it begins a new sequence; versions: by role, tensors and the versions they had, to see changes in
    place. validity: none, until it is placed.
    """

    observed: Mapping[str, Any] | None
    versions: Mapping[str, tuple[Tensor, int]]
    training: bool
    starts: bool
    validity: None = None


class Record(NamedTuple):
    """What one call put out, and which of it is data.  call: how many calls came before it under the same validity."""

    observed: Mapping[str, Any]
    versions: Mapping[str, tuple[Tensor, int]]
    training: bool
    validity: Validity | None
    call: int


Chain = tuple[Call, "Chain"] | None
"""The last call, and those before it."""


@uncompiled
def _this_thread() -> int:
    return threading.get_ident()


class Calls:
    """The calls of one module since they were last cleared.

    timed: whether calls count in time now. before: the validity of the call before, in the same sequence.
    """

    def __init__(self) -> None:
        self.timed = False
        self.last: Chain = None
        self.lock = threading.Lock()
        self.records: list[Record] = []
        self.validity: Validity | None = None
        self.before: Validity | None = None
        self._count = self._longest = self._thread = 0

    def add(self, call: Call, compiling: bool) -> None:
        """A call was made, in whatever thread."""
        if compiling:  # and a lock cannot be
            self.last = (call, self.last)
            return
        if self.timed:
            self._refuse_other_threads()
        with self.lock:
            self.last = (call, self.last)

    def _refuse_other_threads(self) -> None:
        if self.timed and self._thread != _this_thread():
            raise StepError(
                "lengths() or mask() were entered in one thread, and the model runs in another: whose they are cannot "
                "be told. Pack the sequences, which then know their lengths, or give each thread a model of its own"
            )

    @property
    def empty(self) -> bool:
        """Whether nothing has been called."""
        return self.last is None and not self.records

    def placed(self) -> list[Record]:
        """The calls that gradients reach, each in its place."""
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
            validity, index = (None, 0) if self.validity is None else self._in_time(call, self.validity)
            if call.observed is not None:
                self.records.append(Record(call.observed, call.versions, call.training, validity, index))
        return self.records

    def clear(self) -> bool:
        """Drop them. Time goes on. Returns whether there were any."""
        records = self.records if self.last is None else self.placed()
        any_were = bool(records)
        records.clear()
        self.before = None
        return any_were

    @contextmanager
    def under(self, validity: Validity) -> Iterator[None]:
        """Inside, calls have this validity, and are counted from 0."""
        self._refuse_other_threads()
        self.placed()
        outer = (self.timed, self.validity, self._count, self._longest)
        self.timed, self.validity, self._count, self._longest = True, validity, 0, 0
        self._thread = _this_thread()
        try:
            yield
        finally:
            self.placed()  # the last call's validity stays: masks stand around one call each, the next compares
            self.timed, self.validity, self._count, self._longest = outer

    @property
    def longest(self) -> int:
        """The most calls that one sequence took under the validity in force."""
        self.placed()
        return self._longest

    def _in_time(self, call: Call, validity: Validity) -> tuple[Validity, int]:
        """The validity of a call, and which call under it this is: for a cell, its place in time."""
        if call.starts:
            self._count, self.before = 0, None
        before, index = self.before, self._count
        self.before, self._count = validity, index + 1
        self._longest = max(self._longest, self._count)
        return validity.following(before), index
