"""Activity penalties for loops that nobody can edit: their gradient joins the outputs' own as that flows back.

A module's outputs pass through an identity that adds the penalty's gradient in the backward pass. The gradient of all
forward passes is computed when the backward pass reaches the first of them, so that a mean is over all, as in
`penalty()`; each then takes its own part along. An output that no backward pass reaches cannot carry anything: that is
an error at the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils.rnn import PackedSequence

from regkit.adapters import Adapter
from regkit.errors import StepError
from regkit.recording.calls import Call
from regkit.recording.recorder import Recorder, data_of
from regkit.recording.tickets import Ticket
from regkit.runtime import modes

Scale = float | Callable[[], float | Tensor]
"""The number by which the loop multiplies the loss before the backward pass, or a function that gives the number."""

Consume = Callable[[int], Sequence[Tensor]]
"""A function that consumes an injector's records: the penalties at a step, () each, of which the sum joins the loss."""

_UNREACHED: Final = (
    "put out what no backward pass reached, so that the penalty of it was carried nowhere; run forward passes that are "
    "not trained on under torch.no_grad(), or call attachment.discard() for a skipped batch"
)


class Injector(Recorder):
    """The forward hook of one module that has rules via inject."""

    def __init__(self, module: nn.Module, adapter: Adapter | None, name: str) -> None:
        super().__init__(module, adapter, name)
        self._consume: Consume = lambda _: ()
        self._index: Callable[[], int] = int
        self._scale: Scale = 1.0
        self._run: Callable[..., Any] = self._carry

    def configure(self, consume: Consume, index: Callable[[], int], scale: Scale) -> None:
        """Set the function that gives the penalties, the one that gives the step to come, and the loss scale."""
        self._consume, self._index, self._scale = consume, index, scale

    def install(self) -> None:
        # A compiled forward pass cannot contain what is done to gradients as they flow back: the compiler leaves a gap.
        self._run = torch.compiler.disable(self._carry)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        super().install()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        return self._run(module, args, kwargs, result)

    def _carry(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """The module's result, in which one `_Pass` takes care of every output that a gradient reaches."""
        if self.inert or modes.is_rehearsal(self.title, False):
            return None
        observed = self.observe(module, args, kwargs, result)
        sources = {id(data): data for data in map(data_of, observed.values()) if _carries(data)}
        starts = self.starts(observed)
        if not sources:
            if self.calls.timed:
                self.calls.add(Call({}, {}, module.training, starts), False)
            return None
        modes.verify_recordable(module, self.title)
        outputs = {id(data): data for data in _tensors(result) if _carries(data)}
        everything = [*outputs.values(), *(data for key, data in sources.items() if key not in outputs)]
        carrier = _Pass(self, everything)
        leaves = {id(data): leaf for data, leaf in zip(everything, carrier.leaves, strict=True)}
        self.calls.add(
            Call({role: _replaced(one, leaves) for role, one in observed.items()}, {}, module.training, starts), False
        )
        self.waiting.append(carrier)
        carried = _Carry.apply(carrier, len(outputs), *everything)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return _replaced(result, dict(zip(outputs, carried, strict=True)))

    @modes.uncast
    def compute(self) -> None:
        """Compute the gradient of all forward passes so far, of which each takes its part along."""
        with torch.enable_grad():
            scale = self._scale() if callable(self._scale) else self._scale
            total = torch.stack([*self._consume(self._index())]).sum() * scale
            new = [one for one in self.waiting if one.gradients is None]
            leaves = [leaf for one in new for leaf in one.leaves]
            gradients = iter(torch.autograd.grad(total, leaves, materialize_grads=True))
        for one in new:
            one.gradients = [next(gradients) for _ in one.leaves]
        super().clear()
        ticket = Ticket()
        ticket.backpropagated = True
        self.ledger.tickets.append(ticket)

    def trains(self) -> bool:
        """Whether the running backward pass is one of training, which gives parameters of the module their gradients.

        Raises StepError where that is unknown: gradients of parameters are asked for, and the graph is kept.
        """
        trained = [p for p in self.parameters if p.requires_grad]
        if not trained:
            return True  # the gradients are of modules before this one
        try:
            return any(torch._C._will_engine_execute_node(get_gradient_edge(p).node) for p in trained)
        except RuntimeError:  # of torch.autograd.grad(loss, parameters), which an update by hand may be made of
            if not torch._C._autograd._get_current_graph_task_keep_graph():
                return True
        raise StepError(
            f"torch.autograd.grad is asked for gradients of parameters of {self.title}, and keeps the graph: whether "
            'they are trained with cannot be told; use via "loss" here'
        )

    def delivered(self, carrier: _Pass) -> None:
        """Take note that a forward pass has taken its part of the gradient along."""
        self.waiting = [one for one in self.waiting if one is not carrier]

    def clear(self) -> None:
        super().clear()
        self.waiting.clear()

    def missing(self, trained: frozenset[int], optional: bool) -> str | None:
        return _UNREACHED if self.waiting else super().missing(trained, optional)


class _Pass:
    """One forward pass of the module.

    leaves: tensors in the place of the module's inputs and outputs, of which the penalties are a function.
    gradients: the penalties' gradients at the leaves, once computed.
    """

    def __init__(self, injector: Injector, tensors: Sequence[Tensor]) -> None:
        self.leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        self.gradients: list[Tensor] | None = None
        self._injector = injector

    def consume(self) -> list[Tensor] | None:
        """The part of the gradient that belongs to this pass; None if there is none to be carried now."""
        if not any(one is self for one in self._injector.waiting):
            return None  # discarded, or taken before
        if not self._injector.trains():
            return None  # a gradient is only looked at, and carries nothing away
        if self.gradients is None:
            self._injector.compute()
        gradients, self.gradients, self.leaves = self.gradients, None, []
        self._injector.delivered(self)
        return gradients


class _Carry(torch.autograd.Function):
    """The identity of the first `count` tensors. Its backward pass adds the penalty's part to each gradient."""

    @staticmethod
    def forward(ctx: Any, carrier: _Pass, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.carrier, ctx.rest = carrier, len(tensors) - count
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own: tuple[Tensor | None, ...] = (*gradients, *[None] * ctx.rest)
        added = ctx.carrier.consume()
        if added is not None:
            own = tuple(new if old is None else old + new for old, new in zip(own, added, strict=True))
        return None, None, *own


def _carries(data: Any) -> bool:
    """Whether a gradient can reach an output of a call, or a state that was handed in."""
    return isinstance(data, Tensor) and data.requires_grad and torch.is_grad_enabled()


def _tensors(result: Any) -> list[Tensor]:
    """The tensors in a module's result."""
    if isinstance(result, tuple | list) and not isinstance(result, PackedSequence):
        return [tensor for one in result for tensor in _tensors(one)]
    data = data_of(result)
    return [data] if isinstance(data, Tensor) else []


def _replaced(result: Any, new: dict[int, Tensor]) -> Any:
    """A copy of a module's result in which tensors are replaced.  new: the new ones, by the ids of the old."""
    if isinstance(result, PackedSequence):
        return result._replace(data=new.get(id(result.data), result.data))
    if isinstance(result, tuple | list):
        parts = [_replaced(one, new) for one in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    return new.get(id(result), result)
