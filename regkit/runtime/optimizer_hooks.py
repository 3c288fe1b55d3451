"""The one pair of torch's global optimizer hooks that every attachment in the process shares.

torch loops over its hooks while it runs them; a hook that is added or removed then (from another thread, or from the
garbage collector, which runs anywhere) would break that loop. So there is one pair, over a tuple of listeners that is
replaced and never changed. The pair leaves torch when the last attachment is detached.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any, Final

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from regkit.runtime.modes import compiler, is_dynamo_compiling, uncompiled


class Listener:
    """An observer of optimizer steps, which by default does nothing.

    frame: the frame of the step, one and the same before and after the step.
    """

    gradients_final: Callable[[], None] | None = None
    """A function to call when all of several listeners have changed the gradients of the step; None for none."""

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any, frame: FrameType) -> tuple[Any, Any] | None:
        """See a step begin. Returns the arguments to go on with, None for the given arguments."""
        return None

    def after(self, frame: FrameType) -> None:
        """See a step end without an error."""


_listeners: tuple[Listener, ...] = ()
_handles: list[RemovableHandle] = []
_waiting: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""The optimizers with a hook of regkit's behind their own: in a step, and until the next where that failed before."""
_lock = threading.RLock()


def add_listener(listener: Listener) -> None:
    """Let the listener see optimizer steps from now on."""
    global _listeners
    with _lock:
        _listeners = (*(one for one in _listeners if one is not listener), listener)
        if not _handles:
            _handles.extend((register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)))


def remove_listener(listener: Listener) -> None:
    """Let the listener see no more optimizer steps. Safe at any moment, in the middle of a step too."""
    global _listeners
    with _lock:
        _listeners = tuple(one for one in _listeners if one is not listener)


def remove_hooks() -> None:
    """Take the pair of hooks out of torch if there are no listeners. Not to be called within a step."""
    with _lock:
        while _handles and not _listeners:
            _handles.pop().remove()
        while _waiting and not _listeners:
            _leave(next(iter(_waiting)))


def keep_clear(*numbers: int) -> None:
    """Reserve the numbers of hooks that came with a model from another process: no new hook gets one of these numbers.

    torch numbers hooks from 0 in each process, and the later of two with one number takes the place of the other.
    """
    RemovableHandle.next_id = max(RemovableHandle.next_id, *(number + 1 for number in numbers), 0)


def _behind_own(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """See a step begin behind the optimizer's own pre-hooks, which may clip gradients or make gradients anew."""
    if is_dynamo_compiling() or compiler() is not None:
        uncompiled_given: tuple[Any, Any] | None = _uncompiled(_leave_and_begin, optimizer, args, kwargs)
        return uncompiled_given
    return _leave_and_begin(optimizer, args, kwargs, sys._getframe(1))


def _leave_and_begin(optimizer: Optimizer, args: Any, kwargs: Any, frame: FrameType) -> tuple[Any, Any] | None:
    _leave(optimizer)  # the last hook may, while torch goes through the hooks
    return _before(optimizer, args, kwargs, frame)


def _wait_behind_own(optimizer: Optimizer) -> None:
    """Put a hook behind the optimizer's own, for one step: torch runs global hooks first and own ones then."""
    _leave(optimizer)  # a step that failed in a hook before ours has left it there
    optimizer._optimizer_step_pre_hooks[_LAST] = _behind_own
    _waiting.add(optimizer)


def _leave(optimizer: Optimizer) -> None:
    optimizer._optimizer_step_pre_hooks.pop(_LAST, None)
    _waiting.discard(optimizer)


def _before(optimizer: Optimizer, args: Any, kwargs: Any, frame: FrameType | None = None) -> tuple[Any, Any] | None:
    if frame is None:
        if is_dynamo_compiling() or compiler() is not None:
            if optimizer._optimizer_step_pre_hooks:
                uncompiled(_wait_behind_own)(optimizer)
                return None
            uncompiled_given: tuple[Any, Any] | None = _uncompiled(_before, optimizer, args, kwargs)
            return uncompiled_given
        if optimizer._optimizer_step_pre_hooks:
            _wait_behind_own(optimizer)
            return None
        frame = sys._getframe(1)
    if _STATES in sys.modules:  # it rehearses steps, at learning rate 0
        lr = optimizer.param_groups[0].get("lr") if optimizer.param_groups else None
        if (isinstance(lr, Tensor) or not lr) and _rehearsed(frame):
            return None
    listeners = _listeners
    if len(listeners) == 1:
        return listeners[0].before(optimizer, args, kwargs, frame)
    given = (args, kwargs)
    for listener in listeners:
        given = listener.before(optimizer, *given, frame) or given
    for listener in listeners:
        if listener.gradients_final is not None:
            listener.gradients_final()
    return given


def _after(*_: Any, frame: FrameType | None = None) -> None:
    if frame is None:
        if is_dynamo_compiling() or compiler() is not None:
            _uncompiled(_after)
            return
        frame = sys._getframe(1)
    listeners = _listeners
    if len(listeners) == 1:
        listeners[0].after(frame)
        return
    with ExitStack() as stack:  # each is called, whatever another raises
        for listener in reversed(listeners):
            stack.callback(listener.after, frame)


@uncompiled
def _uncompiled(hook: Callable[..., Any], *args: Any) -> Any:
    """Call the hook with the frame of the step, out of the compiler's reach."""
    return hook(*args, frame=_frame_of_step())


def _frame_of_step() -> FrameType:
    """The frame that called a hook, past the frames that keep the compiler out."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__") in _COMPILER and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _rehearsed(frame: FrameType) -> bool:
    """Whether torch makes the optimizer step at learning rate 0 only to create its state, as get_state_dict does."""
    above: FrameType | None = frame
    while above is not None:
        if above.f_code.co_name == "_init_optim_state" and above.f_globals.get("__name__") == _STATES:
            return True
        above = above.f_back
    return False


_LAST: Final = -1
"""The key of the hook that stands behind an optimizer's own for one step; torch counts its own from 0."""
_COMPILER: Final = (__name__, "torch._compile", "torch._dynamo.eval_frame")
_STATES: Final = "torch.distributed.checkpoint.state_dict"
