"""One workload with everything that is compared on it: one net, one set of weights, many ways to train it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import regkit
from tests.benchmarks.timing import Sample, faults, now, undisturbed
from tests.benchmarks.ways import Optimizer, Way
from tests.benchmarks.workloads import Net, Workload
from tests.support.counting import Counted

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
    """A workload's net, its first weights, and the optimizers' states, which all ways to train it share.

    So no way is faster for where in memory its weights happen to be. Every step, a bare one too, ends with the first
    weights put back, as a hook of its optimizer: what a constraint finds is the same at each. That time is taken off.

    flat: all weights in one piece, matrices first. aside: nanoseconds of the step in progress that are not its own.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.net, self.x = workload.build()
        self.weights = list(self.net.parameters())
        self.flat, parts = self._in_one_piece()
        for w, part in zip(self.weights, parts, strict=True):
            w.data = part.copy_(w.detach())
        self.matrices = [w.detach() for w in self.weights if w.dim() == 2]
        self.aside = 0
        self._first = [w.detach().clone() for w in self.weights]
        self._states: dict[str, dict[Any, Any]] = {}
        self._optimizers: dict[Optimizer, torch.optim.Optimizer] = {}
        self._bases: dict[Optimizer, Run] = {}
        self.still = self._returning(Still(self.weights))

    def _in_one_piece(self) -> tuple[Tensor, list[Tensor]]:
        """Memory for all weights or their gradients, and the part of each."""
        flat, parts, start = torch.zeros(sum(w.numel() for w in self.weights)), {}, 0
        for w in sorted(self.weights, key=lambda w: w.dim() != 2):
            parts[w] = flat[start : start + w.numel()].view(w.shape)
            start += w.numel()
        return flat, [parts[w] for w in self.weights]

    def make_gradients(self) -> Tensor:
        """Give the weights the gradients of a bare step, which are returned in one piece."""
        loss_of(self.net(self.x)).backward()
        flat, parts = self._in_one_piece()
        for w, part in zip(self.weights, parts, strict=True):
            assert w.grad is not None
            w.grad = part.copy_(w.grad)
        return flat

    def base(self, kind: Optimizer) -> Run:
        """The bare step of an optimizer."""
        if kind not in self._bases:
            self._bases[kind] = Run(self, Way(f"bare, {kind}", optimizer=kind, floor=None))
        return self._bases[kind]

    def optimizer(self, kind: Optimizer) -> torch.optim.Optimizer:
        """The one of this kind, with the state that all of one algorithm share."""
        if kind not in self._optimizers:
            optimizer = self._optimizers[kind] = self._returning(_OPTIMIZERS[kind](self.weights))
            states = self._states.setdefault(kind.split()[0], {})
            for w in self.weights:
                optimizer.state[w] = states.setdefault(w, {})
        return self._optimizers[kind]

    def parametrized(self, how: Callable[[nn.Module], None], kind: Optimizer) -> tuple[Net, torch.optim.Optimizer]:
        """A net of other parameters, and their optimizer."""
        net = deepcopy(self.net)
        how(net)
        return net, self._returning(_OPTIMIZERS[kind](net.parameters()))

    def _returning(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        optimizer.register_step_post_hook(lambda *_: self.put_back())
        return optimizer

    @torch.no_grad()
    def put_back(self) -> None:
        """Put the first weights back, and take down how long that takes."""
        start = now()
        torch._foreach_copy_(self.weights, self._first)
        self.aside += now() - start


class Run:
    """One way to train a lab's weights. What it does is only there in its own blocks."""

    def __init__(self, lab: Lab, way: Way) -> None:
        self.lab, self.way, self.name = lab, way, way.name
        if way.parametrize is None:
            self.net, self.optimizer = lab.net, lab.optimizer(way.optimizer)
        else:
            self.net, self.optimizer = lab.parametrized(way.parametrize, way.optimizer)
        self.weights = list(self.net.parameters())
        self.attachment: regkit.Attachment | None = None

    @property
    def base(self) -> Run:
        """The bare step of its optimizer."""
        return self.lab.base(self.way.optimizer)

    @property
    def apart(self) -> bool:
        """Whether it acts on outputs of which each is one tensor, so that its work can be done without a step."""
        return self.way.outputs and not self.lab.workload.loops

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Inside, its document is attached, and its optimizer decays."""
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.way.decay
        with self._attached():
            yield
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.0

    @contextmanager
    def _attached(self) -> Iterator[None]:
        if not self.way.rules:
            yield
            return
        with regkit.attach(self.net, {"rules": list(self.way.rules)}) as self.attachment:
            yield
        self.attachment = None

    def term(self, outputs: Sequence[Tensor]) -> Tensor | None:
        """What it adds to the loss."""
        if self.way.term is not None:
            return self.way.term(self.net, outputs)
        return self.attachment.penalty() if self.attachment is not None and self.way.penalizes else None

    def backward(self, loss: Tensor, term: Tensor | None) -> None:
        """The gradient of the loss with what is added to it."""
        (loss if term is None else loss + term).backward()

    def step(self) -> tuple[float, float]:
        """Forward, loss, backward and the optimizer's step: seconds of it all, and of the last."""
        self.lab.aside = 0
        start = now()
        self.optimizer.zero_grad()
        outputs = self.net(self.lab.x)
        self.backward(loss_of(outputs), self.term(outputs))
        middle = now()
        self.optimizer.step()
        self._loop()
        end = now() - self.lab.aside
        return (end - start) * 1e-9, (end - middle) * 1e-9

    def block(self, steps: int) -> Sample:
        """Consecutive steps after one or two that are not timed, in which whatever is made once is made."""
        self.lab.put_back()
        with undisturbed(), self.acting():
            for _ in range(min(2, steps)):
                self.step()
            before = faults()
            taken = [self.step() for _ in range(steps)]
            more = faults() - before
        seconds, at_step = (sum(part) / steps for part in zip(*taken, strict=True))
        return Sample(seconds, at_step, more / steps)

    def counted(self) -> Counted:
        """What runs in a later step; where its work can be done apart, in that."""
        counted = Counted()
        if self.apart:
            self._outputs_alone(1, counted)
            return counted
        with self.acting():
            self.step()
            self.step()
            with counted:
                self.step()
        return counted

    def alone(self, calls: int) -> float:
        """The seconds of one call of what it adds to a step, with gradients and outputs in place."""
        self.lab.put_back()
        if self.way.decay:
            return self._decay_alone()
        if self.way.outputs:
            return self._outputs_alone(calls)
        with self.acting():
            self._work()  # what is made once is made
            self.lab.aside = 0
            start = now()
            for _ in range(calls):
                self._work()
            return (now() - start - self.lab.aside) * 1e-9 / calls

    def _work(self) -> None:
        term = self.term(())
        if term is not None:
            term.backward()
        self.lab.still.step()
        self._loop()

    def _outputs_alone(self, calls: int, inside: AbstractContextManager[object] | None = None) -> float:
        """The term and its gradient, as far as the outputs."""
        taken = 0
        with self.acting():
            for _ in range(calls):
                outputs = self.net(self.lab.x)
                with nullcontext() if inside is None else inside:
                    start = now()
                    term = self.term(outputs)
                    assert term is not None
                    torch.autograd.grad(term, outputs)
                    taken += now() - start
                if self.attachment is not None:
                    self.attachment.discard()
        return taken * 1e-9 / calls

    def _decay_alone(self) -> float:
        """The optimizer's step with weight decay, less the mean of two without."""
        seconds = []
        for decay in (0.0, 0.0, self.way.decay, 0.0):  # the first is to warm up
            for group in self.optimizer.param_groups:
                group["weight_decay"] = decay
            self.lab.aside = 0
            start = now()
            self.optimizer.step()
            seconds.append((now() - start - self.lab.aside) * 1e-9)
        return seconds[2] - (seconds[1] + seconds[3]) / 2

    def _loop(self) -> None:
        if self.way.loop is not None:
            with torch.no_grad():
                self.way.loop([w for w in self.weights if w.dim() == 2] if self.way.matrices else self.weights)


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    """A loss that reads every output once."""
    return torch.stack([one.square().mean() for one in outputs]).sum()


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
    lab.put_back()
    start = now()
    for _ in range(calls):
        call()
    return (now() - start) * 1e-9 / calls
