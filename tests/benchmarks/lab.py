"""One workload with everything that is compared on it: one set of weights, many ways to train it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import regkit
from regkit import hooks
from tests.benchmarks.timing import Sample, now
from tests.benchmarks.ways import Optimizer, Way
from tests.benchmarks.workloads import Net, Workload
from tests.counting import Counted

_RATE = 1e-6
_OPTIMIZERS: dict[Optimizer, Callable[..., torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=_RATE, foreach=False, fused=False),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=_RATE, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=_RATE, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=_RATE),
}
"""On a CPU, torch's own choice for Adam is the single-tensor loop."""


class Still(torch.optim.Optimizer):
    """Does nothing: its step takes the time of what others do at it."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": _RATE})

    def step(self, closure: Any = None) -> None:
        """Nothing."""


class Lab:
    """A workload's weights, their first values, and the optimizers' states, which all ways to train it share.

    So no way is faster for where in memory its weights happen to be. flat: all weights in one piece, matrices first.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.net, self.x = workload.build()
        self.weights = list(self.net.parameters())
        self.flat, parts = self._in_one_piece()
        for w, part in zip(self.weights, parts, strict=True):
            w.data = part.copy_(w.detach())
        self.matrices = [w.detach() for w in self.weights if w.dim() == 2]
        self.first = [w.detach().clone() for w in self.weights]
        self._states: dict[str, dict[Any, Any]] = {}
        self._bases: dict[Optimizer, Run] = {}

    def _in_one_piece(self) -> tuple[Tensor, list[Tensor]]:
        """Memory for all weights or their gradients, and the part of each."""
        flat, parts, start = torch.zeros(sum(w.numel() for w in self.weights)), {}, 0
        for w in sorted(self.weights, key=lambda w: w.dim() != 2):
            parts[w] = flat[start : start + w.numel()].view(w.shape)
            start += w.numel()
        return flat, [parts[w] for w in self.weights]

    def gradients(self) -> tuple[Tensor, list[Tensor]]:
        """Those of a bare step: in one piece, and by weight."""
        run = self.base("Adam")
        run.backward()
        flat, parts = self._in_one_piece()
        for w, part in zip(run.weights, parts, strict=True):
            assert w.grad is not None
            part.copy_(w.grad)
        return flat, parts

    def base(self, optimizer: Optimizer) -> Run:
        """The bare step of an optimizer."""
        if optimizer not in self._bases:
            self._bases[optimizer] = Run(self, Way(f"bare, {optimizer}", optimizer=optimizer, floor=None))
        return self._bases[optimizer]

    def twin(self) -> Net:
        """A net of other modules and parameters in the same memory: two attachments must not meet on one weight."""
        twin = deepcopy(self.net)
        with torch.no_grad():
            for its, ours in zip(twin.parameters(), self.weights, strict=True):
                its.data = ours.data
        return twin

    def optimizer(self, weights: Sequence[nn.Parameter], kind: Optimizer, shared: bool) -> torch.optim.Optimizer:
        """An optimizer of a twin's parameters, with the state that all of its kind share."""
        optimizer = _OPTIMIZERS[kind](weights)
        if shared:
            states = self._states.setdefault(kind.split()[0], {})
            for mine, first in zip(weights, self.weights, strict=True):
                optimizer.state[mine] = states.setdefault(first, {})
        return optimizer

    @torch.no_grad()
    def restore(self) -> None:
        """Put the first weights back."""
        torch._foreach_copy_(self.weights, self.first)


class Run:
    """One way to train a lab's weights, asleep but for its own steps."""

    def __init__(self, lab: Lab, way: Way) -> None:
        self.lab, self.way, self.name = lab, way, way.name
        self.net = lab.twin()
        if way.parametrize is not None:
            way.parametrize(self.net)
        self.weights = list(self.net.parameters())
        self.optimizer = lab.optimizer(self.weights, way.optimizer, shared=way.parametrize is None)
        self._still = Still(self.weights)
        self._attachment: regkit.Attachment | None = None
        self._asleep: AbstractContextManager[None] | None = None
        if way.rules:
            self._attachment = regkit.attach(self.net, {"rules": list(way.rules)})
            self._sleep()

    @property
    def base(self) -> Run:
        """The bare step of its optimizer."""
        return self.lab.base(self.way.optimizer)

    def close(self) -> None:
        """Take its attachment off."""
        if self._attachment is not None and self._asleep is not None:
            self._asleep.__exit__(None, None, None)
            self._attachment.detach()

    def _sleep(self) -> None:
        assert self._attachment is not None
        self._asleep = self._attachment.detached()
        self._asleep.__enter__()
        hooks.leave()  # or the bare step would have regkit's hooks, with no one to tell

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Inside, it acts: its attachment hears steps, and its optimizer decays."""
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.way.decay
        if self._asleep is not None:
            self._asleep.__exit__(None, None, None)
        try:
            yield
        finally:
            if self._asleep is not None:
                self._sleep()

    def term(self, outputs: Sequence[Tensor]) -> Tensor | None:
        """What it adds to the loss."""
        if self.way.term is not None:
            return self.way.term(self.net, outputs)
        return self._attachment.penalty() if self._attachment is not None and self.way.penalizes else None

    def step(self) -> Sample:
        """Forward, loss, backward and the optimizer's step."""
        self.lab.restore()
        with self.awake():
            start = now()
            self.optimizer.zero_grad()
            outputs = self.net(self.lab.x)
            loss = torch.stack([one.square().mean() for one in outputs]).sum()
            term = self.term(outputs)
            (loss if term is None else loss + term).backward()
            middle = now()
            self.optimizer.step()
            self._loop()
            end = now()
        self.optimizer.zero_grad()
        return (end - start) * 1e-9, (end - middle) * 1e-9

    def counted(self) -> Counted:
        """What runs in a step; where only outputs are acted on, in the term and its gradient."""
        counted = Counted()
        if self.way.outputs:
            self._outputs_alone(counted)
        else:
            with counted:
                self.step()
        return counted

    def backward(self) -> None:
        """Make gradients, and keep them."""
        torch.stack([one.square().mean() for one in self.net(self.lab.x)]).sum().backward()

    def have(self, gradients: Sequence[Tensor]) -> None:
        """Have these gradients."""
        for mine, gradient in zip(self.weights, gradients, strict=True):
            mine.grad = gradient

    def alone(self, calls: int) -> float:
        """The seconds of one call of what it adds to a step, with gradients and outputs in place."""
        self.lab.restore()
        if self.way.decay:
            return self._decay_alone()
        if self.way.outputs:
            return self._outputs_alone()
        with self.awake():
            start = now()
            for _ in range(calls):
                term = self.term(())
                if term is not None:
                    term.backward()
                self._still.step()
                self._loop()
            return (now() - start) * 1e-9 / calls

    def _outputs_alone(self, inside: AbstractContextManager[object] | None = None) -> float:
        """The term and its gradient, as far as the outputs."""
        with self.awake():
            outputs = self.net(self.lab.x)
            with nullcontext() if inside is None else inside:
                start = now()
                term = self.term(outputs)
                assert term is not None
                torch.autograd.grad(term, outputs)
                seconds = (now() - start) * 1e-9
            if self._attachment is not None:
                self._attachment.discard()
        return seconds

    def _decay_alone(self) -> float:
        """The optimizer's step with weight decay, less the mean of two without."""
        seconds = []
        for decay in (0.0, 0.0, self.way.decay, 0.0):  # the first is to warm up
            for group in self.optimizer.param_groups:
                group["weight_decay"] = decay
            start = now()
            self.optimizer.step()
            seconds.append((now() - start) * 1e-9)
        return seconds[2] - (seconds[1] + seconds[3]) / 2

    def _loop(self) -> None:
        if self.way.loop is not None:
            with torch.no_grad():
                self.way.loop([w for w in self.weights if w.dim() == 2] if self.way.matrices else self.weights)


class Floors:
    """What no code can go below: passes over the same bytes in one piece."""

    def __init__(self, lab: Lab, gradients: Tensor) -> None:
        matrices = sum(w.numel() for w in lab.matrices)
        rows = sum(w.size(0) for w in lab.matrices)
        self._w, self._g = lab.flat, gradients
        self._matrices, self._of_matrices = self._w[:matrices], self._g[:matrices]
        width = matrices // rows
        self._rows = self._w[: rows * width].view(rows, width)

    def all(self) -> dict[str, Callable[[], object]]:
        """By their names; those with "matrices" leave out the biases."""
        w, g, matrices, theirs, rows = self._w, self._g, self._matrices, self._of_matrices, self._rows
        return {
            "memcpy": lambda: g.copy_(w),
            "axpy": lambda: g.add_(w, alpha=1e-6),
            "axpy, matrices": lambda: theirs.add_(matrices, alpha=1e-6),
            "row norms, matrices": lambda: torch.linalg.vector_norm(rows, dim=1),
            "read and write, matrices": lambda: matrices.mul_(1.0),
        }


def timed(lab: Lab, call: Callable[[], object], calls: int) -> float:
    """The seconds of one call, on weights that were put back, as those of `Run.alone`."""
    lab.restore()
    start = now()
    for _ in range(calls):
        call()
    return (now() - start) * 1e-9 / calls
