"""Activity penalties in the graph of the loss: one function for all of a `penalty()`, which holds what was recorded.

Their values are computed without autograd. The backward pass makes one gradient for each tensor that was recorded, and
every penalty adds its own to that, in closed form. Penalties that have none are left to autograd, and so is whatever
autograd alone can do: a gradient of a gradient, forward-mode differentiation, transforms of `torch.func`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad

from regkit.activity import Activity, Segment
from regkit.kinds import ActivityPenalty
from regkit.runtime.modes import eager

Told = Callable[[Any, Exception], None]
"""Raises what a kind raised as an error that names its rule: told(where, error)."""


class Term(NamedTuple):
    """amount · the value of a kind. number: of its rule; where: the rule and the site, as an error names them."""

    kind: ActivityPenalty
    amount: float
    number: int
    where: Any


_roots = attrgetter("roots")


class Source(ABC):
    """An activity with the terms that are of it, and the roots: the recorded tensors that gradients leave through."""

    roots: list[Tensor]
    """None once `evaluate` is through: autograd saves them, and frees them with the graph."""

    size: int = 0
    """How many roots there were then."""

    terms: list[Term]

    copied: bool = False
    """Whether the activity is of a copy of the roots. The copy is kept for the backward pass."""

    def copy(self, roots: Sequence[Tensor]) -> list[Tensor]:
        """What the activity is of, made of tensors that are laid out as the roots."""
        return [*roots]

    def parts(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients of roots, from those of a copy."""
        return gradients

    @abstractmethod
    def activity(self, tensors: Sequence[Tensor]) -> Activity:
        """The activity of the roots, of their copy, or of tensors in the place of these."""


class Recorded(Source):
    """The activity of any segments. Its roots are the tensors in them.

    device: where all of it is; None where that is on several devices, or made of what only autograd knows.
    """

    def __init__(self, activity: Activity) -> None:
        self.terms = []
        self.device: torch.device | None = None
        roots: list[Tensor] = []
        numbers: dict[int, int] = {}

        def numbered(tensor: Tensor) -> int:
            number = numbers.setdefault(id(tensor), len(roots))
            if number == len(roots):
                roots.append(tensor)
            return number

        self.roots = roots
        self._segments: list[Segment] = []
        for segment in activity.segments:
            without = segment.at(numbered)
            if without is None:
                return
            self._segments.append(without)
        device = roots[0].device if roots else None
        if all(type(one) in (Tensor, nn.Parameter) and one.device == device for one in roots):
            self.device = device

    def activity(self, tensors: Sequence[Tensor]) -> Activity:
        def placed(number: Any) -> Tensor:  # what it was numbered
            tensor: Tensor = tensors[number]
            return tensor

        found = []
        for one in self._segments:
            segment = one.at(placed)
            assert segment is not None  # as it was not when it was numbered
            found.append(segment)
        return Activity(found)


def only_backward() -> bool:
    """Whether gradients are asked for, and in no other way than backward: then closed forms will do."""
    return torch.is_grad_enabled() and peek_interpreter_stack() is None and forward_ad._current_level < 0


def evaluate(sources: Sequence[Source], told: Told, values: list[tuple[int, Tensor, float]]) -> list[Tensor]:
    """Tensors of which the sum is that of all terms, as part of the graph: one for each device.

    values: to which the number, the value at unit strength and the amount of each term are added.
    """
    by_device: dict[torch.device, list[Source]] = {}
    for source in sources:
        by_device.setdefault(source.roots[0].device, []).append(source)
    sums = []
    for some in by_device.values():
        first = len(values)
        copies: list[Tensor] = []
        torch._C._set_grad_enabled(False)
        try:
            for source in some:
                tensors = source.copy(source.roots) if source.copied else source.roots
                activity = source.activity(tensors)
                for kind, amount, number, where in source.terms:
                    try:
                        values.append((number, kind.value(activity), amount))
                    except Exception as error:  # a kind is a stranger's code: anything can come out
                        told(where, error)
                if source.copied:
                    copies += tensors
        finally:
            torch._C._set_grad_enabled(True)
        roots = list(chain.from_iterable(map(_roots, some)))
        for source in some:
            source.size, source.roots = len(source.roots), []
        # What `apply` itself adds to this one is for transforms, and none is on.
        apply = super(torch.autograd.Function, _Closed).apply
        total: Tensor = apply(some, values[first:], told, len(roots), *roots, *copies)  # type: ignore[no-untyped-call]  # torch leaves it so
        sums.append(total)
    return sums


class _Closed(torch.autograd.Function):
    """The sum of terms, computed before, with the gradients that their kinds add up in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        sources: Sequence[Source],
        values: Sequence[tuple[int, Tensor, float]],
        told: Told,
        count: int,
        *saved: Tensor,
    ) -> Tensor:
        ctx.sources, ctx.told, ctx.count = sources, told, count
        ctx.save_for_backward(*saved)
        total = values[0][1] * values[0][2]
        for _, value, amount in values[1:]:
            total = total.add(value, alpha=amount)
        return total

    @staticmethod
    @eager
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        saved, found = ctx.saved_tensors, []
        roots, copies = saved[: ctx.count], saved[ctx.count :]
        if torch.is_grad_enabled() or is_legacy_batchedtensor(slope):
            found = _by_autograd(ctx.sources, roots, slope, ctx.told)
            return None, None, None, None, *found, *[None] * len(copies)
        root = copy = 0
        for source in ctx.sources:
            own = roots[root : root + source.size]
            root += len(own)
            if source.copied:
                own = copies[copy : copy + 1]
                copy += 1
            slopes = [torch.zeros_like(own[0])] if len(own) == 1 else _zeros(own)
            activity, live = source.activity(own), source.activity(slopes)
            for kind, amount, _, where in source.terms:
                try:
                    kind.add_gradients(activity, live, slope * amount)
                except Exception as error:  # a kind is a stranger's code: anything can come out
                    ctx.told(where, error)
            found += source.parts(slopes) if source.copied else slopes
        return None, None, None, None, *found, *[None] * len(copies)


def _zeros(roots: Sequence[Tensor]) -> Sequence[Tensor]:
    """Zeros like each, all in memory of their own; in one operation where they are alike, as steps of a loop are."""
    first = roots[0]
    alike = all(one.shape == first.shape and one.dtype is first.dtype and one.is_contiguous() for one in roots)
    if not alike:
        return [torch.zeros_like(root) for root in roots]
    all_of_them = first.new_zeros(()).expand(len(roots), *first.shape)
    zeros: Sequence[Tensor] = torch.unbind_copy(all_of_them)  # type: ignore[func-returns-value, assignment]  # torch's stub says None
    return zeros


@torch.enable_grad()
def _by_autograd(sources: Sequence[Source], roots: Sequence[Tensor], slope: Tensor, told: Told) -> list[Tensor | None]:
    """The same gradients as functions of the roots. Views keep apart what leads from one root to another."""
    views = [root.view_as(root) for root in roots]
    ends = [0]
    outputs = []
    for source in sources:
        ends.append(ends[-1] + source.size)
        activity = source.activity(source.copy(views[ends[-2] : ends[-1]]))
        for kind, amount, _, where in source.terms:
            try:
                outputs.append(kind.value(activity) * amount)
            except Exception as error:  # a kind is a stranger's code: anything can come out
                told(where, error)
    outputs = [value for value in outputs if value.requires_grad]
    needed = [view for view in views if view.requires_grad]
    slopes = [slope] * len(outputs)
    found = iter(torch.autograd.grad(outputs, needed, slopes, create_graph=True, materialize_grads=True))
    return [next(found) if view.requires_grad else None for view in views]
