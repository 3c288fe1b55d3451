"""The mode that a forward pass runs in: whether outputs are to be recorded; and guards of regkit's own functions.

Most forward passes are passes of training. Some only look like it: a trace, an export or a run on fake tensors computes
nothing, and a checkpoint's recomputation in the backward pass was recorded in the forward pass. In a few modes a record
could not be right: there a pass that would be recorded is an error that says what to do.

torch has no public function for most of these questions. Each question takes less than 0.1 µs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from types import CodeType, FrameType
from typing import Final, ParamSpec, TypeVar

import torch
from torch import nn
from torch._C import _current_graph_task_id, _is_tracing
from torch._C import _is_any_autocast_enabled as _casts
from torch._C._dynamo import eval_frame
from torch._C._functorch import peek_interpreter_stack
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling as is_dynamo_compiling
from torch.fx import _symbolic_trace
from torch.utils.checkpoint import CheckpointFunction

from regkit.errors import StepError

_P = ParamSpec("_P")
_R = TypeVar("_R")

compiler: Final = getattr(eval_frame, "get_eval_frame_callback", bool)
"""Returns the compiler of the functions that are called now, None if there is none; False from a torch that cannot say.

To keep a function out of a compiler, torch calls a dozen functions of its own, which are not needed where there is no
compiler. So `is_dynamo_compiling() or compiler() is not None` is asked at each step; the former is true while the
asking code itself is being compiled.
"""
uncompiled: Final = _disable_dynamo
"""Takes a function to one that is never compiled."""

_REENTRANT: Final[CodeType] = CheckpointFunction.backward.__code__


def is_rehearsal(name: str, compiling: bool) -> bool:
    """Whether this forward pass is no training, and is not to be recorded: a recomputation, a trace, an export.

    Raises StepError where the pass recomputes one of which nothing could be recorded.
    """
    if compiling:
        return torch.compiler._is_exporting_flag  # is_exporting() is true in all that torch 2.8 compiles
    if _current_graph_task_id() == -1:
        return _is_tracing() or _symbolic_trace._is_fx_tracing_flag
    # This forward pass runs within a backward pass.
    if _is_below(_REENTRANT):
        raise StepError(
            f"{name} runs in a reentrant checkpoint, whose forward pass leaves no graph through which its activity "
            "could be penalized; call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )
    return True


def verify_recordable(module: nn.Module, name: str, carries_gradient: bool = True) -> None:
    """Raise StepError where the outputs of this forward pass may be trained on and cannot be recorded rightly."""
    if carries_gradient and "_is_replica" in module.__dict__:
        raise StepError(
            f"{name} runs as a replica, as torch.nn.DataParallel makes them for each batch: what it puts out in other "
            "threads and on other devices is not gathered; use torch.nn.parallel.DistributedDataParallel"
        )
    # Within a transform a tensor does not tell whether a gradient will reach it outside.
    if peek_interpreter_stack() is not None and torch.is_grad_enabled():
        raise StepError(
            f"{name} runs within a transform of torch.func (grad, vmap, jvp, …), which its outputs must not leave; "
            "write the penalty into the function that is transformed, and call it in `with attachment.detached():`, "
            "or call it under torch.no_grad() if it is not trained on"
        )


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing may wait for the GPU, and a replay runs no Python."""
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return begun and torch.cuda.is_current_stream_capturing()


def forget_compiled() -> None:
    """Make torch.compile compile anew: its code runs no hook that was registered after compilation."""
    if "torch._dynamo" in sys.modules:  # or nothing was compiled
        torch.compiler.reset()


def eager(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, never compiled, and with autocast off."""
    apart = uncompiled(uncast(function))

    @wraps(function)
    def outer(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if is_dynamo_compiling() or compiler() is not None or _casts():
            return apart(*args, **kwargs)
        return function(*args, **kwargs)

    return outer


def uncast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function with autocast off on every kind of device: penalties are sums of many small numbers."""

    @wraps(function)
    def outer(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch._C._DisableAutocast():
            return function(*args, **kwargs)

    return outer


def plain(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function with autocast and autograd off; its guards are bare, as each step calls such functions."""
    uncasted = uncast(function)

    @wraps(function)
    def outer(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        differentiated = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return uncasted(*args, **kwargs) if _casts() else function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(differentiated)

    return outer


def _is_below(code: CodeType) -> bool:
    """Whether the function of this code is on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
