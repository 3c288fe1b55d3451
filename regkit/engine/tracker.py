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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regkit.engine.engine import Engine
from regkit.engine.program import ActiveStep, Program
from regkit.errors import AttachError, StepError
from regkit.runtime.modes import uncompiled
from regkit.runtime.sharding import distributed, reshard, sharded
from regkit.runtime.step import OwnedParameters, StepCount


class _Thread(threading.local):
    """The steps that a thread is in, outermost first."""

    def __init__(self) -> None:
        self.running: list[ActiveStep] = []


class StepTracker:
    """The optimizer steps of one attachment: hears of all, and acts on its own."""

    def __init__(self, engine: Engine, optimizers: Iterable[Optimizer] | None) -> None:
        self.count = StepCount()
        self._engine = engine
        self._only = None if optimizers is None else weakref.WeakSet(optimizers)
        self._thread = _Thread()
        self.open: set[weakref.ref[ActiveStep]] = set()

    def _running(self, frame: FrameType) -> list[ActiveStep]:
        """The steps that this thread is in, outermost first.

        A step that raised never ends, and would claim its parameters for ever. It is told by its frame: one that is
        not on the stack any more is over. `attachment.step()` has none, and always ends. A frame is told by its id and
        code, for to hold it would keep a batch alive; `before` sees to it that no new one is taken for it.
        """
        running = self._thread.running
        if running:
            on_stack = set()
            above: FrameType | None = frame
            while above is not None:
                on_stack.add(_key(above))
                above = above.f_back
            self._end(running, lambda step: step.frame is not None and step.frame not in on_stack)
        return running

    def _end(self, running: list[ActiveStep], over: Callable[[ActiveStep], bool]) -> None:
        for step in [step for step in running if over(step)]:
            self._leave(running, step)

    def _leave(self, running: list[ActiveStep], step: ActiveStep) -> None:
        if step in running:  # or it was entered in another thread, as asynchronous code may
            running.remove(step)
        self.open.discard(weakref.ref(step))

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any, frame: FrameType) -> tuple[Any, Any] | None:
        """Begin a step, if it is one of the attachment's."""
        engine = self._engine
        model = engine.model()  # or it could be collected while its parameters are looked at
        if model is None:
            return None
        running, key, count = self._thread.running, (id(frame), frame.f_code), self.count
        if running:  # a step that raised may be among them, whose frame has been where this one's is now
            self._end(self._running(frame), lambda step: step.frame == key)
        last = engine.snapshots.last
        program = None if last is None else last.programs.get(id(optimizer))
        if program is None or not program.holds(optimizer):
            program = self._program(model, optimizer)
            if program is None:
                return None
        acts = self._only is None or not program.owned.groups or self._concerns(optimizer)
        program = self._within(running, program, optimizer) if running else program
        owned = program.owned
        if not running:
            engine.step_seen(optimizer, program, acts)
        if not owned.groups or not acts:
            return None
        # Both attributes are set by GradScaler around the step of an optimizer that unscales by itself, and only there.
        # Reading found_inf waits for the GPU; so does GradScaler itself at the step of every other optimizer.
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        index = count.count if count.stepped is owned.ids else count.index(owned.ids)
        skipped = found_inf is not None and bool(found_inf)
        step = ActiveStep(optimizer, owned, scale, skipped, index, key, program=program)
        given = self._around(step, args, kwargs) if kwargs or len(args) > 1 else None
        if given is None and not skipped:
            engine.at_gradients(step)
        running.append(step)
        self.open.add(weakref.ref(step, self.open.discard))  # as a WeakSet, which is Python and slow
        return given

    def _around(self, step: ActiveStep, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Arguments with the work of the step behind their closure; None where there is no closure, or no work."""
        closure, put_back = _closure(args, kwargs)
        return None if closure is None or step.skipped else put_back(_Closure(self, step, closure))

    def _within(self, running: Iterable[ActiveStep], program: Program, optimizer: Optimizer) -> Program:
        """What a step does that runs within others, to whom what they have in common belongs."""
        owned = program.owned
        for outer in running:
            owned = owned.without(outer.groups)
        return Program(optimizer, program.snapshot, owned)

    def _program(self, model: nn.Module, optimizer: Optimizer) -> Program | None:
        """What an optimizer's steps do; None where the model is not what it was, and is not trained by it either."""
        if distributed() and any(sharded(p) for group in optimizer.param_groups for p in group["params"]):
            reshard(model)  # or what it owns might not be in the model at the moment
        moved = self._engine.moved()
        if moved is None:
            snapshot = self._engine.now()
            self.count.keep(snapshot.parameters)
            program = snapshot.programs.get(id(optimizer))
            if program is None or not program.holds(optimizer):
                program = snapshot.programs[id(optimizer)] = Program(optimizer, snapshot)
            return program
        owned_ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in owned_ids for p in model.parameters()):
            raise _replaced(moved)
        return None

    def _concerns(self, optimizer: Optimizer) -> bool:
        """Whether the attachment was restricted to this optimizer."""
        assert self._only is not None
        if not self._only:
            raise StepError("the optimizer that attach(optimizer=...) was restricted to is gone; attach anew")
        return optimizer in self._only

    def upcoming(self) -> int:
        """The number of the step to come, for what is computed before it is known who makes it."""
        return self.count.upcoming(self._engine.expected) if self.count.stepped else self.count.count

    def gradients_final(self) -> None:
        """Whatever else is done before the step is done."""
        mark = self._engine.watch.mark
        if mark.gradient is not None:
            mark.version, mark.renewed = mark.gradient._version, False

    def after(self, frame: FrameType) -> None:
        """End the step of this frame, if it was ours. Another step of the same optimizer may run within it."""
        running, key = self._thread.running, (id(frame), frame.f_code)
        if running and running[-1].frame != key:
            running = self._running(frame)
        if running and running[-1].frame == key:
            step = running.pop()
            self.open.discard(weakref.ref(step))
            count, ids = self.count, step.owned.ids
            if not step.skipped:
                try:
                    self._engine.after(step)
                finally:  # whatever fails behind it, the weights are updated
                    if count.stepped is ids and not count.history:
                        count.count += 1
                    else:
                        count.advance(ids)

    def inside(self) -> bool:
        """Whether a step that the attachment acts in is running, in whatever thread: backward passes have their own."""
        if not self.open:
            return False
        self._running(sys._getframe(1))  # which closes those that are over
        return len(self.open) > 0

    @uncompiled
    def begin_by_hand(self, lr: float | Tensor | None) -> ActiveStep:
        """Begin a step that no optimizer makes."""
        running = self._running(sys._getframe(1))
        if running:
            raise StepError("attachment.step() was entered within a step")
        model = self._engine.model()
        if model is not None:
            reshard(model)
        moved = self._engine.moved()
        if moved is not None:
            raise _replaced(moved)
        group = {} if lr is None else {"lr": lr}
        snapshot = self._engine.now()
        here = snapshot.parameters
        self.count.keep(here)
        owned = OwnedParameters(here, dict.fromkeys(here, group))
        program = Program(None, snapshot, owned)
        step = ActiveStep(None, owned, None, False, self.count.index(owned.ids), None, program=program)
        self._engine.at_gradients(step)
        self.gradients_final()
        running.append(step)
        self.open.add(weakref.ref(step, self.open.discard))
        return step

    def end_by_hand(self, step: ActiveStep, failed: bool) -> None:
        """End it. Where the update failed nothing is done and counted, as where an optimizer fails."""
        self._leave(self._running(sys._getframe(1)), step)
        if not failed:
            try:
                self._engine.after(step)
            finally:
                self.count.advance(step.owned.ids)


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

    hooks: StepTracker
    step: ActiveStep
    closure: Callable[[], Any]

    def __call__(self) -> Any:
        return self._behind(self.closure())

    @uncompiled
    def _behind(self, loss: Any) -> Any:
        """Do the work. A line search gets the loss that goes with the gradients."""
        step, engine = self.step, self.hooks._engine
        if not step.program.snapshot.holds():
            snapshot = engine.now()
            step.owned = step.owned.restrict_to_parameters(snapshot.parameters)
            step.program = Program(step.optimizer, snapshot, step.owned)
        engine.at_gradients(step)
        self.hooks.gradients_final()
        if isinstance(step.optimizer, torch.optim.LBFGS) and loss is not None:
            with torch.no_grad():
                return loss + engine.value(step)
        return loss
