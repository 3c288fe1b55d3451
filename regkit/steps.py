"""The optimizer hooks: which step is ours, when its gradients are complete, and at what scale they are.

torch's global step hooks need no handle on an optimizer and see every optimizer in the process. A step is acted on
where its optimizer owns parameters of ours, found anew at each step. Where optimizers wrap one another, both fire: the
outermost that owns a parameter owns its step. Under `step(closure)` the pre-hook fires before the backward pass, so the
closure is wrapped and the work done behind it.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


@dataclass(eq=False)
class Step:
    """One optimizer step that owns parameters of ours.

    groups: the parameter group of each owned parameter, by its id.
    scale: the loss scale still in the gradients; a fused optimizer divides by it itself.
    index: how many steps came before it.
    trained: the ids of owned parameters that have a gradient, once gradients are complete.
    """

    optimizer: Optimizer
    groups: dict[int, dict[str, Any]]
    scale: Tensor | None
    skipped: bool
    index: int
    frame: FrameType
    trained: set[int] = field(default_factory=set)
    evaluations: int = 0


class Work(Protocol):
    """What is to be done at a step. It is called without autograd."""

    def parameters(self) -> Iterable[Tensor]:
        """Every parameter that makes a step ours, as the model has them now."""

    def at_gradients(self, step: Step) -> None:
        """Gradients are complete, weights not yet updated. Comes once for each evaluation of a closure."""

    def value(self, step: Step) -> Tensor:
        """The value of what at_gradients added to the gradients: a line search needs it."""

    def after(self, step: Step) -> None:
        """Weights are updated."""


class StepCount:
    """Optimizer steps, where several optimizers that take turns count once: a new step begins when one comes again."""

    def __init__(self) -> None:
        self.count = 0
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def _joins(self, optimizer: Optimizer) -> bool:
        return len(self._stepped) > 0 and optimizer not in self._stepped

    def index(self, optimizer: Optimizer) -> int:
        """The number, from 0, of the step that this optimizer is about to take part in."""
        return self.count - 1 if self._joins(optimizer) else self.count

    def advance(self, optimizer: Optimizer) -> None:
        """This optimizer has stepped."""
        if not self._joins(optimizer):
            self.count += 1
            self._stepped.clear()
        self._stepped.add(optimizer)

    def restore(self, count: int) -> None:
        """Go on from a saved count."""
        self.count = count
        self._stepped.clear()


_retired: list[StepHooks] = []


def remove_retired() -> None:
    """Take out the hooks of models that are gone. Not to be called within a step."""
    while _retired:
        _retired.pop().remove()


class StepHooks:
    """The two global hooks of one attachment."""

    def __init__(self, work: Work, optimizers: Iterable[Optimizer] | None) -> None:
        self.count = StepCount()
        self._work = work
        self._only = None if optimizers is None else weakref.WeakSet(optimizers)
        self._thread = threading.local()
        self._handles: list[RemovableHandle] = []
        self._retired = False

    def install(self) -> None:
        """Begin to see steps."""
        self._handles = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]

    def retire(self) -> None:
        """Do nothing at any further step: the model is gone.

        Garbage is collected at any moment, in the middle of torch's loop over these hooks too, and would break it by
        taking one out. The hooks leave when the next attachment comes or goes.
        """
        self._retired = True
        _retired.append(self)

    def remove(self) -> None:
        """See no more steps. May be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _running(self) -> list[Step]:
        """The steps that this thread is in, outermost first.

        A step that raised never reaches its post-hook, and would claim its parameters for ever. It is told by its
        frame: one that is not on the stack any more is over.
        """
        running: list[Step] = getattr(self._thread, "running", [])
        if running:
            on_stack: set[FrameType] = set()
            frame: FrameType | None = sys._getframe()
            while frame is not None:
                on_stack.add(frame)
                frame = frame.f_back
            running = [step for step in running if step.frame in on_stack]
        self._thread.running = running
        return running

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._retired or (self._only is not None and optimizer not in self._only):
            return None
        running = self._running()
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        ours = {i: groups[i] for i in map(id, self._work.parameters()) if i in groups}
        for outer in running:
            ours = {i: group for i, group in ours.items() if i not in outer.groups}
        if not ours:
            return None
        # Both attributes are set by GradScaler around the step of an optimizer that unscales by itself, and only there.
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        skipped = found_inf is not None and bool(found_inf)
        step = Step(optimizer, ours, scale, skipped, self.count.index(optimizer), sys._getframe(1))
        closure, put_back = _closure(args, kwargs)
        if closure is None and not skipped:
            self._at_gradients(step)
        running.append(step)
        return None if closure is None or skipped else put_back(_Closure(self, step, closure))

    def _at_gradients(self, step: Step) -> None:
        step.evaluations += 1
        with torch.no_grad():
            mine = (p for p in self._work.parameters() if id(p) in step.groups)
            step.trained = {id(p) for p in mine if p.requires_grad and p.grad is not None}
            self._work.at_gradients(step)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        running = self._running()
        if not running or running[-1].optimizer is not optimizer:
            return
        step = running.pop()
        if not step.skipped:
            with torch.no_grad():
                self._work.after(step)
            self.count.advance(optimizer)


def _closure(args: Any, kwargs: Any) -> tuple[Callable[[], Any] | None, Callable[[Any], tuple[Any, Any]]]:
    """The closure in the arguments of `step`, whose first is the optimizer, and how to put another in its place."""
    if callable(kwargs.get("closure")):
        return kwargs["closure"], lambda new: (args, {**kwargs, "closure": new})
    if len(args) > 1 and callable(args[1]):
        return args[1], lambda new: ((args[0], new, *args[2:]), kwargs)
    return None, lambda new: (args, kwargs)


@dataclass(eq=False)
class _Closure:
    """A training closure with the work of a step behind it."""

    hooks: StepHooks
    step: Step
    closure: Callable[[], Any]

    def __call__(self) -> Any:
        loss = self.closure()
        self.hooks._at_gradients(self.step)
        if isinstance(self.step.optimizer, torch.optim.LBFGS) and loss is not None:
            with torch.no_grad():
                return loss + self.hooks._work.value(self.step)
        return loss
