"""The steps of an attachment: which optimizer steps are its own, when gradients are complete, and at what scale.

Every step of every optimizer in the process is heard of. One is acted on where its optimizer owns parameters of ours,
found anew at each step. Where optimizers wrap one another, both are heard of: the outermost that owns a parameter owns
its step. Under `step(closure)` a step is heard of before the backward pass, so the closure is wrapped and the work done
behind it.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regkit.errors import AttachError, StepError
from regkit.modes import uncompiled
from regkit.rounds import StepCount
from regkit.shards import distributed, reshard, sharded


@dataclass(eq=False)
class Step:
    """One optimizer step that owns parameters of ours.

    optimizer: None for an update that is not made by a torch optimizer, inside `attachment.step()`.
    groups: the parameter group of each owned parameter, by its id.
    scale: the loss scale still in the gradients; a fused optimizer divides by it itself.
    index: how many steps came before it.
    trained: the ids of owned parameters that have a gradient, once gradients are complete.
    """

    optimizer: Optimizer | None
    groups: dict[int, dict[str, Any]]
    scale: Tensor | None
    skipped: bool
    index: int
    frame: tuple[int, CodeType] | None
    trained: set[int] = field(default_factory=set)
    evaluations: int = 0

    @property
    def by(self) -> str:
        """Who makes the step, for a sentence."""
        return "attachment.step()" if self.optimizer is None else type(self.optimizer).__name__


class Work(Protocol):
    """What is to be done at a step. It is called without autograd."""

    def hold(self) -> nn.Module | None:
        """The model, to keep it alive for a moment; None where it is gone."""

    def moved(self) -> str | None:
        """The name of a bound module that is not where it was bound any more, if there is one."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Every parameter that makes a step ours, as the model has them now."""

    def met(self, optimizer: Optimizer, groups: Mapping[int, Any], acts: bool) -> None:
        """An optimizer of these parameters is about to step; whether it is one that the attachment acts with."""

    def at_gradients(self, step: Step) -> None:
        """Gradients are complete, weights not yet updated. Comes once for each evaluation of a closure."""

    def settled(self) -> None:
        """Nothing more is done to the gradients before the step."""

    def value(self, step: Step) -> Tensor:
        """The value of what at_gradients added to the gradients: a line search needs it."""

    def after(self, step: Step) -> None:
        """Weights are updated."""


class Steps:
    """The optimizer steps of one attachment: hears of all, and acts on its own."""

    def __init__(self, work: Work, optimizers: Iterable[Optimizer] | None) -> None:
        self.count = StepCount()
        self._work = work
        self._only = None if optimizers is None else weakref.WeakSet(optimizers)
        self._thread = threading.local()
        self._open: weakref.WeakSet[Step] = weakref.WeakSet()

    def _running(self, frame: FrameType) -> list[Step]:
        """The steps that this thread is in, outermost first.

        A step that raised never ends, and would claim its parameters for ever. It is told by its frame: one that is
        not on the stack any more is over. `attachment.step()` has none, and always ends. A frame is told by its id and
        code, for to hold it would keep a batch alive; `before` sees to it that no new one is taken for it.
        """
        running: list[Step] = getattr(self._thread, "running", [])
        if running:
            on_stack = set()
            above: FrameType | None = frame
            while above is not None:
                on_stack.add(_key(above))
                above = above.f_back
            for step in [step for step in running if step.frame is not None and step.frame not in on_stack]:
                self._leave(running, step)
        self._thread.running = running
        return running

    def _enter(self, running: list[Step], step: Step) -> None:
        running.append(step)
        self._open.add(step)

    def _leave(self, running: list[Step], step: Step) -> None:
        if step in running:  # or it was entered in another thread, as asynchronous code may
            running.remove(step)
        self._open.discard(step)

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any, frame: FrameType) -> tuple[Any, Any] | None:
        """Begin a step, if it is ours."""
        model = self._work.hold()  # or it could be collected while its parameters are looked at
        if model is None:
            return None
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        if distributed() and any(sharded(p) for group in optimizer.param_groups for p in group["params"]):
            reshard(model)  # or what it owns might not be in the model at the moment
        moved = self._work.moved()
        if moved is not None:
            if any(id(p) in groups for p in model.parameters()):
                raise _replaced(moved)
            return None
        running = self._running(frame)
        for over in [one for one in running if one.frame == _key(frame)]:
            self._leave(running, over)  # its step raised, and this one's frame has come to be where that was
        here = {id(parameter): parameter for parameter in self._work.parameters()}
        self.count.keep(here)
        ours = {i: groups[i] for i in here if i in groups}
        acts = self._concerns(optimizer) if ours else True
        for outer in running:
            ours = {i: group for i, group in ours.items() if i not in outer.groups}
        if not running:
            self._work.met(optimizer, groups, acts)
        if not ours or not acts:
            return None
        # Both attributes are set by GradScaler around the step of an optimizer that unscales by itself, and only there.
        # Reading found_inf waits for the GPU; so does GradScaler itself at the step of every other optimizer.
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        skipped = found_inf is not None and bool(found_inf)
        step = Step(optimizer, ours, scale, skipped, self.count.index(ours), _key(frame))
        closure, put_back = _closure(args, kwargs)
        if closure is None and not skipped:
            self._at_gradients(step, here.values())
        self._enter(running, step)
        return None if closure is None or skipped else put_back(_Closure(self, step, closure))

    def _concerns(self, optimizer: Optimizer) -> bool:
        """Whether the attachment was restricted to this optimizer, or to none."""
        if self._only is None:
            return True
        if not self._only:
            raise StepError("the optimizer that attach(optimizer=...) was restricted to is gone; attach anew")
        return optimizer in self._only

    @uncompiled
    def _at_gradients(self, step: Step, here: Iterable[nn.Parameter]) -> None:
        step.evaluations += 1
        with torch.no_grad():
            mine = (p for p in here if id(p) in step.groups)
            step.trained = {id(p) for p in mine if p.requires_grad and p.grad is not None}
            self._work.at_gradients(step)

    def settled(self) -> None:
        """Whatever else is done before the step is done."""
        self._work.settled()

    def after(self, frame: FrameType) -> None:
        """End the step of this frame, if it was ours. Another step of the same optimizer may run within it."""
        running = self._running(frame)
        if running and running[-1].frame == _key(frame):
            step = running[-1]
            self._leave(running, step)
            self._end(step)

    def _end(self, step: Step) -> None:
        if not step.skipped:
            try:
                with torch.no_grad():
                    self._work.after(step)
            finally:  # whatever fails behind it, the weights are updated
                self.count.advance(step.groups)

    def inside(self) -> bool:
        """Whether a step that the attachment acts in is running, in whatever thread: backward passes have their own."""
        self._running(sys._getframe(1))
        return len(self._open) > 0

    def begin_by_hand(self, lr: float | Tensor | None) -> Step:
        """Begin a step that no optimizer makes."""
        running = self._running(sys._getframe(1))
        if running:
            raise StepError("attachment.step() was entered within a step")
        model = self._work.hold()
        if model is not None:
            reshard(model)
        moved = self._work.moved()
        if moved is not None:
            raise _replaced(moved)
        group = {} if lr is None else {"lr": lr}
        groups = {id(parameter): group for parameter in self._work.parameters()}
        step = Step(None, groups, None, False, self.count.index(groups), None)
        self._at_gradients(step, self._work.parameters())
        self._work.settled()
        self._enter(running, step)
        return step

    def end_by_hand(self, step: Step, failed: bool) -> None:
        """End it. Where the update failed nothing is done and counted, as where an optimizer fails."""
        self._leave(self._running(sys._getframe(1)), step)
        if not failed:
            self._end(step)


@dataclass(eq=False)
class ByHand:
    """The context of an update that no torch optimizer makes: what is before and after a step is done around it.

    lr: what proximal and decoupled rules multiply by.
    """

    hooks: Steps
    lr: float | Tensor | None
    step: Step | None = None

    def __enter__(self) -> None:
        self.step = self.hooks.begin_by_hand(self.lr)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        assert self.step is not None
        self.hooks.end_by_hand(self.step, failed=kind is not None)


def _key(frame: FrameType) -> tuple[int, CodeType]:
    return id(frame), frame.f_code


def _replaced(name: str) -> AttachError:
    return AttachError(f"the module {name!r} was replaced or removed after attach(); detach(), attach anew")


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

    hooks: Steps
    step: Step
    closure: Callable[[], Any]

    def __call__(self) -> Any:
        loss = self.closure()
        self.hooks._at_gradients(self.step, self.hooks._work.parameters())
        self.hooks.settled()
        if isinstance(self.step.optimizer, torch.optim.LBFGS) and loss is not None:
            with torch.no_grad():
                return loss + self.hooks._work.value(self.step)
        return loss
