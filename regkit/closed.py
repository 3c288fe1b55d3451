"""Activity penalties in the graph of the loss: one function for many, which holds what was recorded, and no more.

Their values are computed without autograd. The backward pass makes one gradient for each tensor that was recorded, and
every penalty adds its own to that, in closed form. Penalties that have none are left to autograd, and so is whatever
autograd alone can do: a gradient of a gradient, forward-mode differentiation, transforms of `torch.func`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad

from regkit.activity import Activity, Segment
from regkit.kinds import ActivityPenalty
from regkit.modes import uncast, uncompiled


class Seen:
    """An activity, and what gives the tensors that it was made of."""

    def __init__(self, activity: Activity, recorded: Callable[[], Sequence[Tensor]]) -> None:
        self.activity, self.recorded = activity, recorded

    @cached_property
    def device(self) -> torch.device | None:
        """Where all of it is; None where it is on several, or made of what only autograd knows."""
        tensors: list[Tensor] = []
        if any(segment.at(tensors.append) is None for segment in self.activity.segments) or not tensors:
            return None
        device = tensors[0].device
        return device if all(type(one) in (Tensor, nn.Parameter) and one.device == device for one in tensors) else None


class Term(NamedTuple):
    """amount · what a kind makes of an activity. run: calls the kind's functions, and names it where one fails."""

    kind: ActivityPenalty
    amount: float
    seen: Seen
    run: Callable[..., Any]

    def value(self) -> Tensor:
        """What the kind makes of it, at unit strength.  -> ()."""
        value: Tensor = self.run(self.kind.value, self.seen.activity)
        return value


def evaluate(terms: Sequence[Term]) -> tuple[list[Tensor], list[Tensor]]:
    """The value of each at unit strength, detached; and tensors of which the sum is Σ amount · value, as part of the
    graph.  -> () each.
    """
    plain = _plain()
    values: list[Tensor] = []
    sums: list[Tensor] = []
    together: dict[torch.device, _Together] = {}
    for term in terms:
        device = term.seen.device if plain and term.kind.offers_gradients else None
        if device is None:
            value = term.value()
            sums.append(value * term.amount)
            values.append(value.detach())
        else:
            values.append(together.setdefault(device, _Together()).add(term))
    return values, [*sums, *(one.total() for one in together.values())]


def _plain() -> bool:
    """Whether gradients are asked for, and in no other way than backward."""
    return torch.is_grad_enabled() and peek_interpreter_stack() is None and forward_ad._current_level < 0


class _Place(NamedTuple):
    """Where a tensor lies in a root: it is the whole of it, or a view of this geometry."""

    root: int
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor that lies there in one of these, which are laid out as the roots are."""
        whole = tensors[self.root]
        if self.size is None:
            return whole
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


class _Together:
    """Terms that are one function in the graph.

    Its inputs are roots, the tensors through which gradients leave: recorded ones for what are views of them, others
    for themselves.
    """

    def __init__(self) -> None:
        self._terms: list[_Placed] = []
        self._value: Tensor | None = None
        self._roots: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._places: dict[Seen, list[Segment]] = {}

    def add(self, term: Term) -> Tensor:
        """Take a term in. Returns its value at unit strength."""
        with torch.no_grad():
            value = term.value()
            amount = term.amount
            self._value = value * amount if self._value is None else self._value.add(value, alpha=amount)
        if term.seen not in self._places:
            self._places[term.seen] = self._placed(term.seen)
        self._terms.append(_Placed(term.kind, amount, self._places[term.seen], term.run))
        return value

    def total(self) -> Tensor:
        """Σ amount · value, as part of the graph.  -> ()."""
        total: Tensor = _Closed.apply([self._value], self._terms, *self._roots)  # type: ignore[no-untyped-call]  # torch's
        return total

    def _placed(self, seen: Seen) -> list[Segment]:
        """The segments of an activity, with places in place of the tensors."""
        sharing: dict[int, list[Tensor]] = {}

        def place(tensor: Tensor) -> _Place:
            if not tensor._is_view() or not tensor.requires_grad:
                return _Place(self._number(tensor))
            if not sharing:
                for one in seen.recorded():
                    sharing.setdefault(one.untyped_storage()._cdata, []).append(one)
            for whole in sharing.get(tensor.untyped_storage()._cdata, ()):
                if whole is tensor:
                    break
                if _holds(whole, tensor):
                    offset = int(tensor.storage_offset() - whole.storage_offset())
                    return _Place(self._number(whole), tensor.size(), tensor.stride(), offset)
            return _Place(self._number(tensor))

        placed = (segment.at(place) for segment in seen.activity.segments)
        return [segment for segment in placed if segment is not None]

    def _number(self, root: Tensor) -> int:
        number = self._numbers.setdefault(id(root), len(self._roots))
        if number == len(self._roots):
            self._roots.append(root)
        return number


def _holds(whole: Tensor, part: Tensor) -> bool:
    """Whether all numbers of a tensor are among those of another one in the same storage, which is dense."""
    first, last = _ends(whole)
    start, end = _ends(part)
    return whole.requires_grad and whole.dtype is part.dtype and first <= start <= end <= last and _is_dense(whole)


def _is_dense(tensor: Tensor) -> bool:
    """Whether it has a place of its own for each number, and no gaps between them."""
    wanted = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size != 1 and stride != wanted:
            return False
        wanted *= size
    return True


def _ends(tensor: Tensor) -> tuple[int, int]:
    """The first and the last place in its storage that a tensor reads."""
    first = int(tensor.storage_offset())
    return first, first + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


class _Placed(NamedTuple):
    """A term whose segments hold places: it keeps no tensor."""

    kind: ActivityPenalty
    amount: float
    segments: list[Segment]
    run: Callable[..., Any]

    def over(self, tensors: Sequence[Tensor]) -> Activity:
        """Its activity, of what is laid out as the roots are."""

        def of(place: Any) -> Tensor:
            found: Tensor = place.of(tensors)
            return found

        found = (segment.at(of) for segment in self.segments)
        return Activity(tuple(segment for segment in found if segment is not None))


class _Closed(torch.autograd.Function):
    """The sum of terms, which was computed before, with the gradients that their kinds add up in the backward pass."""

    @staticmethod
    def forward(ctx: Any, total: list[Tensor], terms: Sequence[_Placed], *roots: Tensor) -> Tensor:
        ctx.terms, ctx.strides = terms, [root.stride() for root in roots]
        ctx.save_for_backward(*roots)
        return total[0]

    @staticmethod
    @uncompiled
    @uncast
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        roots = [_laid(root, stride) for root, stride in zip(ctx.saved_tensors, ctx.strides, strict=True)]
        if torch.is_grad_enabled() or is_legacy_batchedtensor(slope):
            return None, None, *_by_autograd(ctx.terms, roots, slope)
        gradients = _zeros(roots)
        for term in ctx.terms:
            amount = slope * term.amount
            term.run(term.kind.add_gradients, term.over(roots), term.over(gradients), amount)
        return None, None, *gradients


def _zeros(roots: Sequence[Tensor]) -> Sequence[Tensor]:
    """Zeros like each, all in memory of their own; in one operation where they are alike, as steps of a loop are."""
    first, *others = roots
    alike = all(one.shape == first.shape and one.dtype is first.dtype and one.is_contiguous() for one in roots)
    if not others or not alike:
        return [torch.zeros_like(root) for root in roots]
    all_of_them = first.new_zeros(()).expand(len(roots), *first.shape)
    zeros: Sequence[Tensor] = torch.unbind_copy(all_of_them)  # type: ignore[func-returns-value, assignment]  # it does
    return zeros


def _laid(root: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A root as it was laid out: whoever has packed the tensors that a graph saves may have changed that."""
    if root.stride() == stride or 0 in stride:  # of an expanded tensor there are no views
        return root
    return torch.empty_strided(root.size(), stride, dtype=root.dtype, device=root.device).copy_(root)


@torch.enable_grad()
def _by_autograd(terms: Sequence[_Placed], roots: Sequence[Tensor], slope: Tensor) -> Sequence[Tensor | None]:
    """The same gradients as functions of the roots. Views keep apart what leads from one root to another."""
    views = [root.view_as(root) for root in roots]
    values = [term.run(term.kind.value, term.over(views)) * term.amount for term in terms]
    outputs = [value for value in values if value.requires_grad]
    needed = [view for view in views if view.requires_grad]
    slopes = [slope] * len(outputs)
    found = iter(torch.autograd.grad(outputs, needed, slopes, create_graph=True, materialize_grads=True))
    return [next(found) if view.requires_grad else None for view in views]
