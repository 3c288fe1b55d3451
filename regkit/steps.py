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

from regkit.errors import AttachError, StepError
from regkit.modes import uncompiled
from regkit.ownership import Met, Owned, Ownership
from regkit.rounds import StepCount
from regkit.routine import Routine
from regkit.shards import distributed, reshard, sharded
from regkit.step import Step
from regkit.work import Work


class Steps:
    """The optimizer steps of one attachment: hears of all, and acts on its own."""

    def __init__(self, work: Work, optimizers: Iterable[Optimizer] | None) -> None:
        self.count = StepCount()
        self._work = work
        self._only = None if optimizers is None else weakref.WeakSet(optimizers)
        self._ownership = Ownership()
        self._routines: dict[int, Routine] = {}  # by the optimizer's id, which each of them holds weakly
        self._thread = threading.local()
        self._open: set[weakref.ref[Step]] = set()

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
        self._open.add(weakref.ref(step, self._open.discard))  # as a WeakSet, which is Python and slow

    def _leave(self, running: list[Step], step: Step) -> None:
        if step in running:  # or it was entered in another thread, as asynchronous code may
            running.remove(step)
        self._open.discard(weakref.ref(step))

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any, frame: FrameType) -> tuple[Any, Any] | None:
        """Begin a step, if it is ours."""
        model = self._work.hold()  # or it could be collected while its parameters are looked at
        if model is None or self._repeated(optimizer, args, kwargs, frame):
            return None
        running = self._running(frame)
        for over in [one for one in running if one.frame == _key(frame)]:
            self._leave(running, over)  # its step raised, and this one's frame has come to be where that was
        met = self._meet(model, optimizer)
        if met is None:
            return None
        owned = met.owned
        acts = self._concerns(optimizer) if owned.ours else True
        for outer in running:
            owned = owned.without(outer.groups)
        if not running:
            self._work.met(optimizer, owned.groups, acts)
        if not owned.ours or not acts:
            return None
        # Both attributes are set by GradScaler around the step of an optimizer that unscales by itself, and only there.
        # Reading found_inf waits for the GPU; so does GradScaler itself at the step of every other optimizer.
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        skipped = found_inf is not None and bool(found_inf)
        step = Step(optimizer, owned, scale, skipped, self.count.index(owned.ours), _key(frame))
        closure, put_back = _closure(args, kwargs)
        if closure is None and not skipped:
            self._at_gradients(step)
            self._keep_in_mind(step, met)
        self._enter(running, step)
        return None if closure is None or skipped else put_back(_Closure(self, step, closure))

    def _repeated(self, optimizer: Optimizer, args: Any, kwargs: Any, frame: FrameType) -> bool:
        """Begin the step as the one before it, if it is like that."""
        routine = self._routines.get(id(optimizer))
        if routine is None or len(args) > 1 or kwargs or getattr(self._thread, "running", True):
            return False
        found = routine.gradients(optimizer)
        if found is None:
            return False
        owned, key = routine.met.owned, (id(frame), frame.f_code)
        step = Step(optimizer, owned, None, False, self.count.index(owned.ours), key, owned.ids, 1)
        if not self._work.repeat(step, routine, found):
            return False
        self._enter(self._thread.running, step)
        return True

    def _keep_in_mind(self, step: Step, met: Met) -> None:
        """Make a routine of a step, if it may be repeated."""
        if step.owned is not met.owned or step.trained is not met.owned.ids or step.scale is not None:
            return
        known = self._routines.get(id(step.optimizer))
        if known is None or not known.is_of(met):
            self._routines = {key: one for key, one in self._routines.items() if one.met.alive}
            routine = self._work.routine(step, met)
            if routine is not None:
                self._routines[id(step.optimizer)] = routine

    def _meet(self, model: nn.Module, optimizer: Optimizer) -> Met | None:
        """What it owns of ours; None where the model is not what it was, and is not trained by it either."""
        last = self._ownership.last(optimizer)
        # The step of another model's optimizer costs next to nothing, however much there is here.
        if last is not None:
            same = self._work.unchanged if last.owned.ours else self._work.as_ever
            if same(last.owned.here):
                return last
        if distributed() and any(sharded(p) for group in optimizer.param_groups for p in group["params"]):
            reshard(model)  # or what it owns might not be in the model at the moment
        moved = self._work.moved()
        if moved is None:
            here = self._work.here()
            self.count.keep(here)
            return last if last is not None and last.owned.here is here else self._ownership.meet(optimizer, here)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in owned for p in model.parameters()):
            raise _replaced(moved)
        return None

    def release(self) -> None:
        """Hold no parameter any more."""
        self._ownership.release()
        self._routines = {}

    def _concerns(self, optimizer: Optimizer) -> bool:
        """Whether the attachment was restricted to this optimizer, or to none."""
        if self._only is None:
            return True
        if not self._only:
            raise StepError("the optimizer that attach(optimizer=...) was restricted to is gone; attach anew")
        return optimizer in self._only

    def _at_gradients(self, step: Step) -> None:
        step.evaluations += 1
        idle = [p for p in step.owned.leaves if p.grad is None or not p.requires_grad]
        step.trained = step.owned.ids.difference(map(id, idle)) if idle else step.owned.ids
        self._work.at_gradients(step)

    def settled(self) -> None:
        """Whatever else is done before the step is done."""
        self._work.settled()

    def after(self, frame: FrameType) -> None:
        """End the step of this frame, if it was ours. Another step of the same optimizer may run within it."""
        running: list[Step] = getattr(self._thread, "running", [])
        key = id(frame), frame.f_code
        if running and running[-1].frame != key:
            running = self._running(frame)
        if running and running[-1].frame == key:
            step = running[-1]
            self._leave(running, step)
            self._end(step)

    def _end(self, step: Step) -> None:
        if not step.skipped:
            try:
                self._work.after(step)
            finally:  # whatever fails behind it, the weights are updated
                self.count.advance(step.owned.ours)

    def inside(self) -> bool:
        """Whether a step that the attachment acts in is running, in whatever thread: backward passes have their own."""
        if not self._open:
            return False
        self._running(sys._getframe(1))  # which closes those that are over
        return len(self._open) > 0

    @uncompiled
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
        here = self._work.here()
        self.count.keep(here)
        step = Step(None, Owned(here, dict.fromkeys(here, group)), None, False, self.count.index(here), None)
        self._at_gradients(step)
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
        return self._behind(self.closure())

    @uncompiled
    def _behind(self, loss: Any) -> Any:
        """Do the work. A line search gets the loss that goes with the gradients."""
        self.step.owned = self.step.owned.among(self.hooks._work.here())
        self.hooks._at_gradients(self.step)
        self.hooks.settled()
        if isinstance(self.step.optimizer, torch.optim.LBFGS) and loss is not None:
            with torch.no_grad():
                return loss + self.hooks._work.value(self.step)
        return loss
