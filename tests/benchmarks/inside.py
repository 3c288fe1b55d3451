"""The time that regkit itself takes in training steps, in whatever version is imported: a process of its own.

A difference of whole steps would be less than their noise: L2 adds two hundredths to a step that varies by five. So the
clock is read where regkit begins and ends, from outside and by torch's public hooks alone: by hooks right before and
right after its own, at the optimizer's step and at each recurrent module's output; around `penalty()`; and before and
after each node of that one's graph, as far as the outputs. Reading it adds some tenths of a microsecond for each pair,
in all versions. Whatever is missed so is in the whole step, which is timed beside bare ones, as in the lab.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import regkit_standard
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import regkit
from tests.benchmarks.lab import Lab, Run
from tests.benchmarks.timing import beside, now
from tests.benchmarks.ways import WAYS, Way
from tests.benchmarks.workloads import workloads


class Watched(Run):
    """A way whose own work is timed. inside: the seconds of it in every step so far."""

    def __init__(self, lab: Lab, way: Way) -> None:
        super().__init__(lab, way)
        self.inside: list[float] = []
        self._since = self._taken = 0
        self._outputs: list[Tensor] = []

    def _begin(self, *_: Any) -> None:
        self._since = now()

    def _end(self, *_: Any) -> None:
        self._taken += now() - self._since

    def _put_out(self, module: nn.Module, given: Any, output: Any) -> None:
        self._end()
        self._outputs.append(output if isinstance(output, Tensor) else output[0])

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """Its hooks stand between two of the clock."""
        register = register_optimizer_step_pre_hook, register_optimizer_step_post_hook
        with ExitStack() as stack:
            for one in register:
                stack.callback(one(self._begin).remove)
            stack.enter_context(super()._attached())
            for one in register:
                stack.callback(one(self._end).remove)
            for module in self.net.modules() if self.way.outputs else ():
                if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
                    stack.callback(module.register_forward_hook(self._begin, prepend=True).remove)
                    stack.callback(module.register_forward_hook(self._put_out).remove)
            yield

    def term(self, outputs: Sequence[Tensor]) -> Tensor | None:
        self._begin()
        term = super().term(outputs)
        self._end()
        return term

    def backward(self, loss: Tensor, term: Tensor | None) -> None:
        start = now()
        for node in () if term is None else nodes(term, self._outputs):
            node.register_prehook(self._begin)
            node.register_hook(self._end)
        self.lab.aside += now() - start
        super().backward(loss, term)

    def step(self) -> tuple[float, float]:
        self._taken, self._outputs = 0, []
        taken = super().step()
        self.inside.append(self._taken * 1e-9)
        return taken


def nodes(term: Tensor, outputs: Sequence[Tensor]) -> set[Node]:
    """All of a term's graph that lies before these outputs."""
    past = {one.grad_fn for one in outputs}
    found: set[Node] = set()
    ahead = [term.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in past and node not in found:
            found.add(node)
            ahead += [one for one, _ in node.next_functions]
    return found


def measured(workload: str, ways: Sequence[str], seconds: float, tiny: bool, shorter: int) -> dict[str, Any]:
    """The median step of each way: `own`, the seconds of regkit's own work; `step`, how many bare ones it takes."""
    one = next(one for one in workloads(tiny, shorter) if one.name == workload)
    lab = Lab(one)
    runs = [Watched(lab, way) for way in WAYS if way.name in ways]
    pairs = beside(runs, one.steps, seconds, 1)
    return {
        run.name: {
            "own": median(_later(run.inside, one.steps)),
            "step": median(here.seconds / base.seconds for here, base in pairs[run.name]),
        }
        for run in runs
    }


def _later(steps: Sequence[float], block: int) -> list[float]:
    """Without those at the head of each block."""
    first = min(2, block)
    return [one for place, one in enumerate(steps) if place % (first + block) >= first]


def main() -> None:
    """Measure what the first argument says, on one core, and print it with the places of what was imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    places = [str(package.__file__) for package in (regkit, regkit_standard)]
    print(json.dumps({"places": places, "rows": measured(**json.loads(sys.argv[1]))}))


if __name__ == "__main__":
    main()
