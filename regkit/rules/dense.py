"""Outputs of a known form, many at a time: outputs of one shape side by side, of whichever modules and steps.

A sum of means over tensors of one shape is the mean over all of them, times their number. So 64 modules, or 32 calls of
a cell, take as many operations as one does, and as much of Python.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regkit.activity import Activity, Sequenced
from regkit.activity.reduction import ROOM, Reduction, Total
from regkit.adapters import Form, OutputSite
from regkit.errors import PluginError, RegkitWarning
from regkit.kinds import ActivityPenalty
from regkit.recording.calls import Call
from regkit.recording.recorder import Recorder
from regkit.rules.closed_form import Source, Term


class Entry(NamedTuple):
    """An output of one module under rules.

    kinds, numbers, where: of each rule the kind, its number among all, and the place, for an error.
    in_time: the places of the rules that must find neighbours in time.
    """

    recorder: Recorder
    site: OutputSite
    kinds: tuple[ActivityPenalty, ...]
    numbers: tuple[int, ...]
    where: tuple[Any, ...]
    in_time: tuple[Any, ...]

    def terms(self, amounts: Sequence[float], count: int = 1) -> list[Term]:
        """The terms of the entry's rules, for `count` outputs side by side. amounts: of all rules, by their numbers."""
        found = []
        for number, kind, where in zip(self.numbers, self.kinds, self.where, strict=True):
            amount = amounts[number] if kind.reduction == "sum" else amounts[number] * count
            found.append(Term(kind, amount, number, where))
        return found


@dataclass(eq=False)
class Group(Source):
    """Outputs of one shape, each of `steps` tensors, one after the other in time.

    entry, form: of the first output; the others have the same rules and the same form.
    paired: whether there are neighbours in time.
    left: the bytes of outputs that may yet be added.
    """

    entry: Entry
    form: Form
    steps: int
    paired: bool
    left: int
    roots: list[Tensor] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)

    def copy(self, roots: Sequence[Tensor]) -> list[Tensor]:
        if self.form.before is None:
            return [roots[0] if len(roots) == 1 else torch.cat([*roots], 0 if self.form.batch_first else 1)]
        count = len(roots) // self.steps
        if count > 1:
            roots = [roots[i * self.steps + t] for t in range(self.steps) for i in range(count)]
        return [torch.stack([*roots]).view(self.steps, -1, roots[0].size(-1))]

    def parts(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        (gradient,) = gradients
        if self.form.before is None:
            return gradient.chunk(self.size, 0 if self.form.batch_first else 1)
        count = self.size // self.steps
        parts = gradient.view(self.steps, count, -1, gradient.size(-1))
        return parts.transpose(0, 1).flatten(0, 1).unbind() if count > 1 else parts[:, 0].unbind()

    def activity(self, tensors: Sequence[Tensor]) -> Activity:
        h = tensors[0].transpose(0, 1) if self.form.batch_first else tensors[0]
        directions = self.form.directions
        if len(directions) > 1:
            halves = zip(directions, h.chunk(len(directions), -1), strict=True)
            return Activity(
                [Sequenced(half, None, way == "backward") for way, half in halves if way in self.entry.site.directions]
            )
        small = h.dtype in (torch.float32, torch.float64) and h.numel() * h.element_size() <= ROOM[h.is_cpu]
        return (Dense if small else Activity)((Sequenced(h),))


def gather(entries: Sequence[tuple[Entry, Form]]) -> tuple[list[Group], list[Entry]]:
    """The recorded outputs of entries with forms, in groups of one shape; and entries that have left their form."""
    groups: list[Group] = []
    others: list[Entry] = []
    opened: dict[Any, Group] = {}
    for entry, form in entries:  # of which there may be hundreds: a loop without a call for each
        calls = entry.recorder.calls
        tensors: tuple[Tensor, ...] = ()
        with calls.lock:  # as `placed` does, without a call
            if calls.last is not None and calls.last[1] is None and not calls.records and calls.validity is None:
                calls.records, calls.last = [calls.last[0]], None
        records: Sequence[Call] = calls.records if calls.last is None else calls.placed()
        if form.before is not None:
            tensors = _chain(entry.recorder, form, records)
        elif len(records) == 1 and records[0].validity is None and records[0].observed:
            h, before = records[0].observed[form.role], records[0].observed.get(form.initial or "")
            still = getattr(entry.recorder.alive(), "batch_first", False) is form.batch_first
            still = still and (before is None or not before.requires_grad)
            if still and type(h) is Tensor and h.dim() == 3 and h.requires_grad:
                tensors = (h,)
        size = len(tensors) * tensors[0].numel() * max(tensors[0].element_size(), 4) if tensors else 0
        if not tensors or (form.before is not None and size > ROOM[tensors[0].is_cpu]):
            _tell_of_mixing(entry, form, records)
            others += (entry,) if records else ()
            continue
        for record in records:
            for data, version in record.versions.values():
                if data._version != version:
                    entry.recorder.verify_unchanged(record)
        first, steps = tensors[0], len(tensors)
        key = steps, first.shape, first.dtype, first.device, form, entry.site.directions, entry.numbers
        group = opened.get(key)
        if group is None or size > group.left:
            paired = steps > 1 or (form.before is None and first.shape[form.batch_first] > 1)
            group = opened[key] = Group(entry, form, steps, paired, ROOM[first.is_cpu])
            groups.append(group)
        group.copied = form.before is not None or bool(group.roots)
        group.roots += tensors
        group.left -= size
    return groups, others


def _chain(recorder: Recorder, form: Form, records: Sequence[Call]) -> tuple[Tensor, ...]:
    """The steps of a cell, if each went on from the one before; else an empty tuple."""
    if len(records) > 1:
        recorder.verify_together(records)
    found: list[Tensor] = []
    for record in records:
        h, before = record.observed[form.role], record.observed[form.before or ""]
        if type(h) is not Tensor or record.validity is not None or not h.requires_grad or h.dim() != 2:
            return ()
        if found and (before is not found[-1] or h.shape != before.shape or h.dtype is not before.dtype):
            return ()
        if not found and before is not None and before.requires_grad:
            return ()
        found.append(h)
    return tuple(found)


def _tell_of_mixing(entry: Entry, form: Form, records: Sequence[Call]) -> None:
    """Warn, once for each module, where neighbours in time are compared and a state was changed between two calls."""
    recorder = entry.recorder
    if form.before is None or recorder.told_of_mixing or not any(kind.sequence for kind in entry.kinds):
        return
    put_out: set[int] = set()
    for record in records:
        h, before = record.observed[form.role], record.observed[form.before]
        if type(h) is not Tensor:
            return
        # A leaf is a learned state, with which another sequence begins.
        computed = type(before) is Tensor and before.requires_grad and not before.is_leaf
        if computed and put_out and before.data_ptr() not in put_out:
            recorder.told_of_mixing = True
            warnings.warn(
                f"the state handed to {recorder.title} is none that its calls put out (zoneout, dropout, a mask, a "
                "reset?): its outputs are compared with the state as handed in",
                RegkitWarning,
                stacklevel=2,
            )
            return
        put_out.add(h.data_ptr())


@dataclass(frozen=True)
class Dense(Activity):
    """One sequence without padding that runs forward, in float32 or better and small enough to be reduced at once."""

    segments: tuple[Sequenced]

    def reduce(
        self, f: Callable[[Tensor], Tensor], reduction: Reduction = "mean", total: Total | None = None
    ) -> Tensor:
        if total is None or torch.is_grad_enabled():
            return super().reduce(f, reduction, total)
        h = self.segments[0].h
        by = h.numel() if reduction == "mean" else h.size(1) if reduction == "batch" else 1
        return total(h, scratch=torch.empty_like) / max(by, 1)

    def reduce_pairs(
        self, f: Callable[[Tensor, Tensor], Tensor], reduction: Reduction = "mean", total: Total | None = None
    ) -> Tensor:
        if total is None or torch.is_grad_enabled():
            return super().reduce_pairs(f, reduction, total)
        h = self.segments[0].h
        later = h[1:]
        by = later.numel() if reduction == "mean" else h.size(1) if reduction == "batch" else 1
        return total(later, h[:-1], scratch=torch.empty_like) / max(by, 1)

    def add_slopes(
        self,
        gradients: Activity,
        slope: Callable[[Tensor], Tensor],
        amount: Tensor,
        reduction: Reduction = "mean",
        *,
        times: float = 1.0,
        per_row: bool = False,
    ) -> None:
        h = self.segments[0].h
        found = slope(h)
        if found.shape != h.shape:
            raise PluginError(f"a slope at {tuple(h.shape)} has the shape {tuple(found.shape)}")
        numbers = h.numel() // max(h.size(-1), 1) if per_row else h.numel()
        by = numbers if reduction == "mean" else h.size(1) if reduction == "batch" else 1
        gradients.segments[0].h.addcmul_(found, amount, value=times / max(by, 1))  # type: ignore[attr-defined]  # a Dense, too

    def add_pair_slopes(
        self,
        gradients: Activity,
        slope: Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]],
        amount: Tensor,
        reduction: Reduction = "mean",
        *,
        times: float = 1.0,
        per_row: bool = False,
    ) -> None:
        h = self.segments[0].h
        g: Tensor = gradients.segments[0].h  # type: ignore[attr-defined]  # a Dense, too
        later = h[1:]
        found = slope(later, h[:-1])
        first, second = (found, None) if isinstance(found, Tensor) else found
        if first.shape != later.shape or (second is not None and second.shape != later.shape):
            raise PluginError(f"a slope at {tuple(later.shape)} has another shape")
        numbers = later.numel() // max(h.size(-1), 1) if per_row else later.numel()
        share = times / max(numbers if reduction == "mean" else h.size(1) if reduction == "batch" else 1, 1)
        g[1:].addcmul_(first, amount, value=share)
        if second is None:
            g[:-1].addcmul_(first, amount, value=-share)
        else:
            g[:-1].addcmul_(second, amount, value=share)
