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
from regkit.modes import eager


class Seen:
    """An activity, the tensors in it, and what gives the tensors that were recorded for it.

    segments: its own, with numbers in place of the tensors; device: where all of it is, None where that is on several
    or made of what only autograd knows.
    """

    def __init__(self, activity: Activity, recorded: Callable[[], Sequence[Tensor]]) -> None:
        self.activity, self.device = activity, None
        self.tensors: list[Tensor] = []
        self.segments: list[Segment] = []
        self._recorded = recorded
        for segment in activity.segments:
            numbered = segment.at(self._number)
            if numbered is None:
                return
            self.segments.append(numbered)
        device = self.tensors[0].device if self.tensors else None
        for one in self.tensors:
            if type(one) not in (Tensor, nn.Parameter) or one.device != device:
                return
        self.device = device

    def _number(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def root(self, tensor: Tensor) -> Tensor:
        """The recorded tensor of which it is a view, or itself."""
        for whole in self._sharing.get(tensor.untyped_storage()._cdata, ()):
            if whole is tensor:
                break
            if _holds(whole, tensor):
                return whole
        return tensor

    @cached_property
    def _sharing(self) -> dict[int, list[Tensor]]:
        """The recorded tensors in each storage."""
        found: dict[int, list[Tensor]] = {}
        for one in self._recorded():
            found.setdefault(one.untyped_storage()._cdata, []).append(one)
        return found


class Term(NamedTuple):
    """amount · what a kind makes of an activity. run: calls the kind's functions, and names it where one fails."""

    kind: ActivityPenalty
    amount: float
    run: Callable[..., Any]


Terms = list[tuple[Term, Seen]]
"""Each with what it is of."""


def evaluate(terms: Terms) -> tuple[list[Tensor], list[Tensor]]:
    """The value of each at unit strength, detached; and tensors of which the sum is Σ amount · value, as part of the
    graph.  -> () each.
    """
    plain = _plain()
    values: list[Tensor] = []
    sums: list[Tensor] = []
    together: dict[torch.device, list[tuple[Term, Seen, Tensor]]] = {}
    for term, seen in terms:
        if plain and seen.device is not None and term.kind.offers_gradients:
            torch._C._set_grad_enabled(False)
            try:
                value: Tensor = term.run(term.kind.value, seen.activity)
            finally:
                torch._C._set_grad_enabled(True)
            together.setdefault(seen.device, []).append((term, seen, value))
            values.append(value)
        else:
            value = term.run(term.kind.value, seen.activity)
            sums.append(value * term.amount)
            values.append(value.detach())
    sums.extend(map(_joined, together.values()))
    return values, sums


def _plain() -> bool:
    """Whether gradients are asked for, and in no other way than backward."""
    return torch.is_grad_enabled() and peek_interpreter_stack() is None and forward_ad._current_level < 0


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


_Place = tuple[int, tuple[Any, Any, Any] | None]
"""Where a tensor lies: the number of a root, and the (size, stride, offset) of the view of it, None for the whole."""

_Placed = tuple[list[Segment], list[_Place]]
"""An activity without its tensors: its segments, with numbers in place of them, and where each lies."""


def _joined(terms: Sequence[tuple[Term, Seen, Tensor]]) -> Tensor:
    """Σ amount · value of terms and their values, as one function in the graph.  -> ().

    Its inputs are roots, the tensors through which gradients leave: recorded ones for what are views of them, others
    for themselves.
    """
    roots: list[Tensor] = []
    strides: list[tuple[int, ...]] = []
    numbers: dict[int, int] = {}
    placed: dict[Seen, _Placed] = {}
    own: list[tuple[Term, _Placed]] = []
    values = []
    for term, seen, value in terms:
        values.append(value)
        if seen in placed:
            own.append((term, placed[seen]))
            continue
        places: list[_Place] = []
        for tensor in seen.tensors:
            root = seen.root(tensor) if tensor._is_view() and tensor.requires_grad else tensor
            if id(root) not in numbers:
                numbers[id(root)] = len(roots)
                roots.append(root)
                strides.append(root.stride())
            view = None
            if root is not tensor:
                view = tensor.size(), tensor.stride(), tensor.storage_offset() - root.storage_offset()
            places.append((numbers[id(root)], view))
        placed[seen] = seen.segments, places
        own.append((term, placed[seen]))
    # What `apply` itself adds to this one is for transforms, and none is on.
    total: Tensor = super(torch.autograd.Function, _Closed).apply(own, strides, values, *roots)  # type: ignore[no-untyped-call]  # torch leaves it so
    return total


def _over(placed: _Placed, roots: Sequence[Tensor]) -> Activity:
    """The activity of what is laid out as the roots are."""
    numbered, places = placed
    tensors = []
    for number, view in places:
        root = roots[number]
        if view is not None:
            size, stride, offset = view
            root = root.as_strided(size, stride, root.storage_offset() + offset)
        tensors.append(root)
    segments = []
    for one in numbered:
        segment = one.at(tensors.__getitem__)
        assert segment is not None  # as it was not when it was numbered
        segments.append(segment)
    return Activity(segments)


class _Closed(torch.autograd.Function):
    """The sum of terms, which was computed before, with the gradients that their kinds add up in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        terms: Sequence[tuple[Term, _Placed]],
        strides: Sequence[tuple[int, ...]],
        values: Sequence[Tensor],
        *roots: Tensor,
    ) -> Tensor:
        ctx.terms, ctx.strides = terms, strides
        ctx.save_for_backward(*roots)
        total = values[0] * terms[0][0].amount
        for (term, _), value in zip(terms[1:], values[1:], strict=True):
            total = total.add(value, alpha=term.amount)
        return total

    @staticmethod
    @eager
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        roots = list(ctx.saved_tensors)
        for number, stride in enumerate(ctx.strides):
            if roots[number].stride() != stride:
                roots[number] = _laid(roots[number], stride)
        if torch.is_grad_enabled() or is_legacy_batchedtensor(slope):
            return None, None, None, *_by_autograd(ctx.terms, roots, slope)
        gradients = _zeros(roots)
        over: dict[int, tuple[Activity, Activity]] = {}
        for term, placed in ctx.terms:
            if id(placed) not in over:
                over[id(placed)] = _over(placed, roots), _over(placed, gradients)
            term.run(term.kind.add_gradients, *over[id(placed)], slope * term.amount)
        return None, None, None, *gradients


def _zeros(roots: Sequence[Tensor]) -> Sequence[Tensor]:
    """Zeros like each, all in memory of their own; in one operation where they are alike, as steps of a loop are."""
    if len(roots) == 1:
        return [torch.zeros_like(roots[0])]
    first = roots[0]
    alike = all(one.shape == first.shape and one.dtype is first.dtype and one.is_contiguous() for one in roots)
    if not alike:
        return [torch.zeros_like(root) for root in roots]
    all_of_them = first.new_zeros(()).expand(len(roots), *first.shape)
    zeros: Sequence[Tensor] = torch.unbind_copy(all_of_them)  # type: ignore[func-returns-value, assignment]  # torch's stub says None
    return zeros


def _laid(root: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A root as it was laid out: whoever has packed the tensors that a graph saves may have changed that."""
    if 0 in stride:  # of an expanded tensor there are no views
        return root
    return torch.empty_strided(root.size(), stride, dtype=root.dtype, device=root.device).copy_(root)


@torch.enable_grad()
def _by_autograd(
    terms: Sequence[tuple[Term, _Placed]], roots: Sequence[Tensor], slope: Tensor
) -> Sequence[Tensor | None]:
    """The same gradients as functions of the roots. Views keep apart what leads from one root to another."""
    views = [root.view_as(root) for root in roots]
    values = [term.run(term.kind.value, _over(placed, views)) * term.amount for term, placed in terms]
    outputs = [value for value in values if value.requires_grad]
    needed = [view for view in views if view.requires_grad]
    slopes = [slope] * len(outputs)
    found = iter(torch.autograd.grad(outputs, needed, slopes, create_graph=True, materialize_grads=True))
    return [next(found) if view.requires_grad else None for view in views]
