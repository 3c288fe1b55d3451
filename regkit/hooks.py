"""The one pair of torch's global optimizer hooks that every attachment in the process shares.

torch loops over its hooks while they run; adding or removing one then (from another thread, or from the garbage
collector, which runs anywhere) would break that loop. So there is one pair, over a tuple of listeners that is replaced
and never changed. The pair leaves torch when the last attachment is detached.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class Listener(Protocol):
    """What wants to see optimizer steps. frame: of the step, the same before and after it."""

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any, frame: FrameType) -> tuple[Any, Any] | None:
        """A step begins. Returns the arguments to go on with, None for those given."""

    def after(self, frame: FrameType) -> None:
        """A step has ended without an error."""


_listeners: tuple[Listener, ...] = ()
_handles: list[RemovableHandle] = []
_lock = threading.RLock()


def enlist(listener: Listener) -> None:
    """Let it see steps from now on."""
    global _listeners
    with _lock:
        _listeners = (*_listeners, listener)
        if not _handles:
            _handles.extend((register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)))


def dismiss(listener: Listener) -> None:
    """Let it see no more. Safe at any moment, in the middle of a step too."""
    global _listeners
    with _lock:
        _listeners = tuple(one for one in _listeners if one is not listener)


def leave() -> None:
    """Take the pair out of torch if nobody listens. Not to be called within a step."""
    with _lock:
        while _handles and not _listeners:
            _handles.pop().remove()


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    frame = sys._getframe(1)
    given = (args, kwargs)
    for listener in _listeners:
        given = listener.before(optimizer, *given, frame) or given
    return given


def _after(*_: Any) -> None:
    frame = sys._getframe(1)
    for listener in _listeners:
        listener.after(frame)
