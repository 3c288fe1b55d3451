"""Optimizer steps: which ones are the attachment's, when gradients are complete, and at which loss scale.

Every step of every optimizer in the process is seen. The attachment acts in a step if the optimizer owns parameters of
the model, looked up anew at each step. Where optimizers wrap one another, each is seen: the outermost that owns a
parameter owns the parameter's step. Under `step(closure)` a step is seen before the backward pass, so the closure is
wrapped and the work done behind it.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from regkit.engine.engine import Engine
from regkit.engine.finite import EVERY
from regkit.engine.program import ActiveStep, Program
from regkit.errors import StepError
from regkit.runtime.modes import uncompiled
from regkit.runtime.optimizer_hooks import Listener
from regkit.runtime.sharding import distributed, reshard, sharded
from regkit.runtime.step import StepCount
from regkit.weights.links import replaced


class _Thread(threading.local):
    """The steps that a thread is in, outermost first."""

    def __init__(self) -> None:
        self.running: list[ActiveStep] = []


class StepTracker(Listener):
    """The listener of one attachment: sees every optimizer step, and has the engine act in the attachment's.

    optimizers: those to act in the steps of; None: all.
    count: of the attachment's steps.
    open_steps: the steps that may be running, in any thread.
    """

    def __init__(self, engine: Engine, optimizers: Iterable[Optimizer] | None) -> None:
        self.count = StepCount()
        self.engine = engine
        self.gradients_final = engine.failed_steps.gradients_final
        self.changed: Callable[[nn.Module, AbstractSet[int]], None] | None = None
        """Raises an error where the model, which may have changed, is not optimized as the rules say any more, given
        the ids of the parameters that are trained. Called as an optimizer begins, and at every 64th step."""
        self._only = None if optimizers is None else weakref.WeakSet(optimizers)
        self._thread = _Thread()
        self.open_steps: set[weakref.ref[ActiveStep]] = set()
        engine.watchdog.open_steps, engine.watchdog.step_runs = self.open_steps, self.step_runs
        engine.watchdog.moved_module = engine.moved_module

    def running_steps(self, new: tuple[int, CodeType] | None = None) -> list[ActiveStep]:
        """The steps that this thread is in, outermost first. Steps that have raised are ended before.

        A step that raised never ends by itself, and would claim its parameters for ever. A step whose frame is not on
        the stack any more is over; a manual step has no frame, and always ends. A frame is known by its id and code,
        for to hold it would keep a batch alive.

        new: the frame of a step to come, which may be where the frame of a step that raised has been.
        """
        running = self._thread.running
        if running:
            on_stack: set[tuple[int, CodeType] | None] = set()
            frame: FrameType | None = sys._getframe(1)
            while frame is not None:
                on_stack.add((id(frame), frame.f_code))
                frame = frame.f_back
            on_stack.discard(new)
            for step in [step for step in running if step.frame is not None and step.frame not in on_stack]:
                self.leave(step)
        return running

    def leave(self, step: ActiveStep) -> None:
        """Take a step for ended, whether done or failed."""
        if step in self._thread.running:  # or it was entered in another thread, as asynchronous code may
            self._thread.running.remove(step)
        self.open_steps.discard(weakref.ref(step))

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any, frame: FrameType) -> tuple[Any, Any] | None:
        """Begin a step that the attachment acts in. Returns the arguments with the closure wrapped, if there is one."""
        engine = self.engine
        model = engine.model()  # or it could be collected while its parameters are looked at
        if model is None:
            return None
        running, key, count = self._thread.running, (id(frame), frame.f_code), self.count
        if running:
            self.running_steps(key)
        last = engine.snapshots.last
        program = None if last is None else last.programs.get(id(optimizer))
        if program is None or not program.holds(optimizer):
            program = self._program(model, optimizer)
            if program is None:
                return None
        acts = self._only is None or not program.owned.groups or self._acts_for(optimizer)
        if running:
            program = _within(running, program, optimizer)
        else:
            engine.step_seen(optimizer, program, acts)
        owned = program.owned
        if not owned.groups or not acts:
            return None
        # Both attributes are set by GradScaler around the step of an optimizer that unscales by itself, and only there.
        # Reading found_inf waits for the GPU; so does GradScaler itself at the step of every other optimizer.
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        index = count.count if count.stepped is owned.ids else count.index(owned.ids)
        if index % EVERY == 0 and self.changed is not None:  # a module may join that an optimizer had before
            self.changed(model, {key for one in program.snapshot.programs.values() for key in one.owned.all_groups})
        skipped = found_inf is not None and bool(found_inf)
        step = ActiveStep(optimizer, owned, scale, skipped, index, key, program=program)
        given = None if skipped or not (kwargs or len(args) > 1) else _wrapped(engine, step, args, kwargs)
        if given is None and not skipped:
            engine.at_gradients(step)
        running.append(step)
        self.open_steps.add(weakref.ref(step, self.open_steps.discard))  # as a WeakSet, which is Python and slow
        return given

    def _program(self, model: nn.Module, optimizer: Optimizer) -> Program | None:
        """The work of an optimizer's steps on the model of now; None if a bound module has moved.

        Raises AttachError if a bound module has moved and the optimizer trains it, or the model.
        """
        if distributed() and any(sharded(p) for group in optimizer.param_groups for p in group["params"]):
            reshard(model)  # or what it owns might not be in the model at the moment
        moved = self.engine.moved_module()
        if moved is None:
            snapshot = self.engine.now()
            self.count.keep(snapshot.parameters)
            program = snapshot.programs.get(id(optimizer))
            if program is None or not program.holds(optimizer):
                if self.changed is not None:
                    self.changed(model, {id(p) for group in optimizer.param_groups for p in group["params"]})
                program = snapshot.programs[id(optimizer)] = Program(optimizer, snapshot)
            return program
        owned_ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        taken_out = (module.parameters() for _, module in self.engine.modules())
        if any(id(p) in owned_ids for p in chain(model.parameters(), *taken_out)):
            raise replaced(moved)
        return None

    def _acts_for(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer is one that the attachment is restricted to. Raises StepError where all are gone."""
        assert self._only is not None
        if not self._only:
            raise StepError("the optimizer that attach(optimizer=...) was restricted to is gone; attach anew")
        return optimizer in self._only

    def upcoming(self, trained: Callable[[], AbstractSet[int]], optimizer: Optimizer | None = None) -> int:
        """The number of the step that a loss is for: of an optimizer, or of the one that is likely to step next.

        trained: returns the ids of the parameters that the loss is of.

        Raises StepError where the given optimizer trains nothing here.
        """
        parameters = self.engine.snapshots.now().parameters
        self.count.keep(parameters)
        self.count.asked = frozenset(trained() & self.engine.expected())
        if optimizer is None:
            return self.count.upcoming(self.engine.expected, trained)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}.intersection(parameters)
        if not owned:
            raise StepError(f"penalty(optimizer): {type(optimizer).__name__} owns no parameter that rules are about")
        return self.count.index(owned)

    def after(self, frame: FrameType) -> None:
        """End the step of a frame that the attachment acts in. Another of the same optimizer may run within."""
        running, key = self._thread.running, (id(frame), frame.f_code)
        if running and running[-1].frame != key:
            self.running_steps()
        if running and running[-1].frame == key:
            step = running.pop()
            self.open_steps.discard(weakref.ref(step))
            count, ids = self.count, step.owned.ids
            if not step.skipped:
                try:
                    self.engine.after(step)
                finally:  # whatever fails behind the update, the weights are updated
                    if count.stepped is ids and not count.history:
                        count.count += 1
                        count.asked = None
                    else:
                        count.advance(ids)

    def step_runs(self) -> bool:
        """Whether a step that the attachment acts in is running, in any thread: backward passes have their own."""
        if self.open_steps:
            self.running_steps()  # ends those that have raised
        return bool(self.open_steps)


def _within(running: Iterable[ActiveStep], program: Program, optimizer: Optimizer) -> Program:
    """The work of a step within others, less the parameters that an outer step owns."""
    owned = program.owned
    for outer in running:
        owned = owned.without(outer.groups)
    return Program(optimizer, program.snapshot, owned)


def _wrapped(engine: Engine, step: ActiveStep, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """The arguments of `optimizer.step`, with the closure wrapped; None where there is none. args[0]: the optimizer."""
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": _Closure(engine, step, kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):
        return (args[0], _Closure(engine, step, args[1]), *args[2:]), kwargs
    return None


@dataclass(eq=False)
class _Closure:
    """A training closure, and the work of a step behind the closure."""

    engine: Engine
    step: ActiveStep
    closure: Callable[[], Any]

    def __call__(self) -> Any:
        return self._behind(self.closure())

    @uncompiled
    def _behind(self, loss: Any) -> Any:
        """Do the work of the step. Returns the loss that goes with the gradients, which a line search needs."""
        step, engine = self.step, self.engine
        if not step.program.snapshot.holds():
            snapshot = engine.now()
            step.owned = step.owned.restrict_to_parameters(snapshot.parameters)
            step.program = Program(step.optimizer, snapshot, step.owned)
        engine.at_gradients(step)
        engine.failed_steps.gradients_final()
        if isinstance(step.optimizer, torch.optim.LBFGS) and loss is not None:
            with torch.no_grad():
                return loss + engine.value(step)
        return loss
