"""Activity penalties in the graph of the loss: one autograd function for all terms of a `penalty()`.

Values are computed without autograd. The backward pass makes one gradient for each recorded tensor, and every penalty
adds its own to that, in closed form. Penalties without a closed form are left to autograd, and so is everything that
autograd alone can do: a gradient of a gradient, forward-mode differentiation, transforms of `torch.func`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain, islice
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad

from regkit.activity import Activity, Segment
from regkit.kinds import ActivityPenalty
from regkit.runtime.modes import eager

RaiseNamed = Callable[[Any, Exception], NoReturn]
"""Raises an error of a kind as one that names the rule: raise_named(where, error)."""

Values = list[tuple[int, Tensor, float]]
"""Of each term the number of its rule, the value of its kind at unit strength, and the amount."""


class Term(NamedTuple):
    """A term of the loss: amount · the value of a kind.

    number: of the kind's rule among all.
    where: the rule and the site, for an error that names them.
    """

    kind: ActivityPenalty
    amount: float
    number: int
    where: Any


_roots = attrgetter("roots")


class Source(ABC):
    """An activity and its terms in the loss.

    roots: the recorded tensors that the activity is of, through which gradients leave. Empty after `evaluate`: from
    then on autograd holds the roots, and frees them with the graph.
    size: how many roots there were.
    copied: whether the activity is of a copy of the roots, which is kept for the backward pass.
    """

    roots: list[Tensor]
    terms: list[Term]
    size: int = 0
    copied: bool = False

    def copy(self, roots: Sequence[Tensor]) -> list[Tensor]:
        """The copy of roots, or of tensors in their place, that the activity is of."""
        return [*roots]

    def parts(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients of the roots, from the gradients of a copy."""
        return gradients

    @abstractmethod
    def activity(self, tensors: Sequence[Tensor]) -> Activity:
        """The activity of the roots, of a copy of the roots, or of gradients in the place of either."""


class Recorded(Source):
    """The activity of any segments, with the tensors in the segments as roots.

    device: of all roots; None where there are several, or where only autograd will do.
    """

    def __init__(self, activity: Activity) -> None:
        self.terms = []
        self.device: torch.device | None = None
        roots: dict[int, Tensor] = {}
        self._segments: list[Segment] = []  # with ids in the place of tensors
        for segment in activity.segments:
            without = segment.at(lambda tensor: id(roots.setdefault(id(tensor), tensor)))
            if without is None:
                return
            self._segments.append(without)
        self.roots, self._ids = list(roots.values()), list(roots)
        device = self.roots[0].device if roots else None
        if all(type(one) in (Tensor, nn.Parameter) and one.device == device for one in self.roots):
            self.device = device

    def activity(self, tensors: Sequence[Tensor]) -> Activity:
        place: Any = dict(zip(self._ids, tensors, strict=True)).__getitem__
        found = []
        for one in self._segments:
            segment = one.at(place)
            assert segment is not None  # or there would be no device
            found.append(segment)
        return Activity(found)


def only_backward() -> bool:
    """Whether gradients can be asked for, and only by a backward pass: then closed forms will do."""
    return torch.is_grad_enabled() and peek_interpreter_stack() is None and forward_ad._current_level < 0


def evaluate(sources: Sequence[Source], raise_named: RaiseNamed, values: Values) -> list[Tensor]:
    """Tensors of which the sum is that of all terms, as part of the graph: one for each device.

    values: to which the value of each term is added.
    """
    by_device: dict[torch.device, list[Source]] = {}
    for source in sources:
        by_device.setdefault(source.roots[0].device, []).append(source)
    sums = []
    for on_device in by_device.values():
        first = len(values)
        copies: list[Tensor] = []
        torch._C._set_grad_enabled(False)
        try:
            for source in on_device:
                tensors = source.copy(source.roots) if source.copied else source.roots
                activity = source.activity(tensors)
                for kind, amount, number, where in source.terms:
                    try:
                        values.append((number, kind.value(activity), amount))
                    except Exception as error:  # a kind is a stranger's code: anything can come out
                        raise_named(where, error)
                if source.copied:
                    copies += tensors
        finally:
            torch._C._set_grad_enabled(True)
        roots = list(chain.from_iterable(map(_roots, on_device)))
        for source in on_device:
            source.size, source.roots = len(source.roots), []
        # `Function.apply` does more than its base's, all of it for transforms, of which none is on.
        apply = super(torch.autograd.Function, _Closed).apply
        saved = *roots, *copies
        sums.append(apply(on_device, values[first:], raise_named, len(roots), *saved))  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return sums


class _Closed(torch.autograd.Function):
    """The sum of terms that are computed already, with the gradients that the kinds add up in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, sources: Sequence[Source], values: Values, raise_named: RaiseNamed, count: int, *saved: Tensor
    ) -> Tensor:
        ctx.sources, ctx.raise_named, ctx.count = sources, raise_named, count
        ctx.save_for_backward(*saved)
        total = values[0][1] * values[0][2]
        for _, value, amount in values[1:]:
            total = total.add(value, alpha=amount)
        return total

    @staticmethod
    @eager
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        roots, copies = saved[: ctx.count], saved[ctx.count :]
        rest = [None] * len(copies)
        if torch.is_grad_enabled() or is_legacy_batchedtensor(slope):
            return None, None, None, None, *_by_autograd(ctx.sources, roots, slope, ctx.raise_named), *rest
        found: list[Tensor] = []
        roots, copies = iter(roots), iter(copies)
        for source in ctx.sources:
            own = tuple(islice(roots, source.size))
            if source.copied:
                own = (next(copies),)
            slopes = [torch.zeros_like(own[0])] if len(own) == 1 else _zeros(own)
            activity, live = source.activity(own), source.activity(slopes)
            for kind, amount, _, where in source.terms:
                try:
                    kind.add_gradients(activity, live, slope * amount)
                except Exception as error:  # a kind is a stranger's code: anything can come out
                    ctx.raise_named(where, error)
            found += source.parts(slopes) if source.copied else slopes
        return None, None, None, None, *found, *rest


def _zeros(roots: Sequence[Tensor]) -> Sequence[Tensor]:
    """Zeros like each root, in memory of their own; one operation where roots are alike, as steps of a loop are."""
    first = roots[0]
    alike = all(one.shape == first.shape and one.dtype is first.dtype and one.is_contiguous() for one in roots)
    if not alike:
        return [torch.zeros_like(root) for root in roots]
    all_of_them = first.new_zeros(()).expand(len(roots), *first.shape)
    zeros: Sequence[Tensor] = torch.unbind_copy(all_of_them)  # type: ignore[func-returns-value, assignment]  # torch's stub says None
    return zeros


@torch.enable_grad()
def _by_autograd(
    sources: Sequence[Source], roots: Sequence[Tensor], slope: Tensor, raise_named: RaiseNamed
) -> list[Tensor | None]:
    """The gradients of the roots as functions of the roots."""
    views = [root.view_as(root) for root in roots]  # or a gradient would go on from one root to another
    left = iter(views)
    outputs = []
    for source in sources:
        activity = source.activity(source.copy(list(islice(left, source.size))))
        for kind, amount, _, where in source.terms:
            try:
                outputs.append(kind.value(activity) * amount)
            except Exception as error:  # a kind is a stranger's code: anything can come out
                raise_named(where, error)
    outputs = [value for value in outputs if value.requires_grad]
    needed = [view for view in views if view.requires_grad]
    slopes = [slope] * len(outputs)
    found = iter(torch.autograd.grad(outputs, needed, slopes, create_graph=True, materialize_grads=True))
    return [next(found) if view.requires_grad else None for view in views]
