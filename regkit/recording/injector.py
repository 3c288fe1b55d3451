"""Activity penalties for loops that nobody can edit: their gradient joins that of the outputs as it flows back.

What a module puts out passes through an identity that adds the penalty's gradient in the backward pass. The gradient of
all passes is computed when the first of them is reached, so that a mean is over all of them, as in `penalty()`; each
then takes its own part along. What no backward pass reaches cannot carry anything: that is an error at the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils.rnn import PackedSequence

from regkit.errors import StepError
from regkit.recording.calls import Call
from regkit.recording.recorder import Recorder, data_of
from regkit.recording.tickets import Ticket
from regkit.runtime import modes

Scale = float | Callable[[], float | Tensor]
"""What the loop multiplies its loss by before the backward pass: a number, or a function that is asked each time."""

Take = Callable[[int], Sequence[Tensor]]
"""Consumes the recorded outputs of an injector: penalties at a step, () each, of which the sum joins the loss."""

_UNREACHED: Final = (
    "put out what no backward pass reached, so that the penalty of it was carried nowhere; run forward passes that are "
    "not trained on under torch.no_grad(), or call attachment.discard() for a skipped batch"
)


class Injector(Recorder):
    """The forward hook of one module that has rules via inject."""

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        self._take: Take = lambda _: ()
        self._index: Callable[[], int] = int
        self._scale: Scale = 1.0
        self.waiting: list[_Pass] = []
        self._run: Callable[..., Any] = self._carry

    def configure(self, take: Take, index: Callable[[], int], scale: Scale) -> None:
        """Set where penalties come from, the step to come that they are asked for, and the scale of the loss."""
        self._take, self._index, self._scale = take, index, scale

    def install(self) -> None:
        # What becomes of a gradient as it flows back is no part of a compiled forward pass: the compiler leaves a gap.
        self._run = torch.compiler.disable(self._carry)  # type: ignore[no-untyped-call]  # torch leaves it so
        super().install()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        return self._run(module, args, kwargs, result)

    def _carry(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """What the module returned, with every output that a gradient reaches in the care of one pass."""
        if self.inert or modes.is_rehearsal(self.title, False):
            return None
        observed = self.observe(module, args, kwargs, result)
        sources = {id(data): data for data in map(data_of, observed.values()) if _carries(data)}
        starts = self.starts(observed)
        if not sources:
            if self.calls.timed:
                self.calls.add(Call(None, {}, module.training, starts), False)
            return None
        modes.verify_recordable(module, self.title)
        outputs = {id(data): data for data in _tensors(result) if _carries(data)}
        everything = [*outputs.values(), *(data for key, data in sources.items() if key not in outputs)]
        carrier = _Pass(self, everything)
        # Views of the leaves have a past, as the originals have: what has none is no neighbour in time.
        leaves = {id(data): leaf.view_as(leaf) for data, leaf in zip(everything, carrier.leaves, strict=True)}
        self.calls.add(
            Call({role: _with(one, leaves) for role, one in observed.items()}, {}, module.training, starts), False
        )
        self.waiting.append(carrier)
        carried = _Carry.apply(carrier, len(outputs), *everything)  # type: ignore[no-untyped-call]  # torch leaves it so
        return _with(result, dict(zip(outputs, carried, strict=True)))

    @modes.uncast
    def compute(self) -> None:
        """The gradient of all passes so far, to be taken along by each."""
        with torch.enable_grad():
            scale = self._scale() if callable(self._scale) else self._scale
            total = torch.stack([*self._take(self._index())]).sum() * scale
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
        """Whether the backward pass that runs is one of training: it gives parameters of the module their gradients.

        Raises StepError where that cannot be told: gradients of parameters are asked for, and the graph is kept.
        """
        trained = [p for p in self.parameters if p.requires_grad]
        if not trained:
            return True  # its parameters have no part in any; what is before it in the model has
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
        """A pass has taken its part along."""
        self.waiting = [one for one in self.waiting if one is not carrier]

    def clear(self) -> None:
        super().clear()
        self.waiting.clear()

    def missing(self, trained: frozenset[int], optional: bool) -> str | None:
        return _UNREACHED if self.waiting else super().missing(trained, optional)


class _Pass:
    """One call of the module: leaves in the place of what it put out and was given, and their part of the gradient."""

    def __init__(self, injector: Injector, tensors: Sequence[Tensor]) -> None:
        self.leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        self.gradients: list[Tensor] | None = None
        self._injector = injector

    def consume(self) -> list[Tensor] | None:
        """Its part of the gradient, the first time that it is asked for."""
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
    """The identity of the first `count` tensors; in the backward pass, each of all gets its part of the gradient."""

    @staticmethod
    def forward(ctx: Any, carrier: _Pass, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.carrier, ctx.rest = carrier, len(tensors) - count
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own: tuple[Tensor | None, ...] = (*gradients, *[None] * ctx.rest)
        added = ctx.carrier.consume()
        if added is None:
            return None, None, *own
        return None, None, *(new if old is None else old + new for old, new in zip(own, added, strict=True))


def _carries(data: Any) -> bool:
    return isinstance(data, Tensor) and data.requires_grad


def _tensors(result: Any) -> list[Tensor]:
    """The tensors in what a module returns."""
    if isinstance(result, tuple | list) and not isinstance(result, PackedSequence):
        return [tensor for one in result for tensor in _tensors(one)]
    data = data_of(result)
    return [data] if isinstance(data, Tensor) else []


def _with(result: Any, new: dict[int, Tensor]) -> Any:
    """The same structure with new tensors in the place of those of these ids."""
    if isinstance(result, PackedSequence):
        return result._replace(data=new.get(id(result.data), result.data))
    if isinstance(result, tuple | list):
        parts = [_with(one, new) for one in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    return new.get(id(result), result)
