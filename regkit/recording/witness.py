"""Witnesses of the forward hooks behind a recorder's, which may change outputs that were recorded before."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from operator import is_
from typing import Any, Final

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from regkit.errors import RegkitWarning
from regkit.recording.recorder import Recorder
from regkit.runtime.inert_hook import ModelHook

_CHANGED: Final = (
    "a forward hook changes the output of {}, and was registered behind that of regkit: rules on outputs are about the "
    "output before the change. If they should be about what the model goes on with, register the hook before attach()"
)


class Witness(ModelHook):
    """One of two hooks, around all that stand behind a recorder's, which compare the outputs of one call.

    recorder: whose module is called. first: the witness before the others, where this one is behind.
    """

    word = "witness"

    def __init__(self, recorder: Recorder | None = None, first: Witness | None = None) -> None:
        super().__init__(inert=recorder is None)
        self._recorder, self._first = recorder, first
        self._seen: list[Any] | None = None

    def install(self, module: nn.Module) -> None:
        """Put the hook behind all others of the module."""
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        if self._recorder is None or torch.compiler.is_compiling() or "_is_replica" in module.__dict__:
            return
        if self._first is None:
            self._seen = tree_leaves(result)
            return
        seen, now = self._first._seen, tree_leaves(result)
        self._first.remove()
        self.remove()
        if seen is not None and not (len(seen) == len(now) and all(map(is_, seen, now))):
            self._recorder.told_of_hooks = True
            warnings.warn(_CHANGED.format(self._recorder.title), RegkitWarning, stacklevel=2)

    def remove(self) -> None:
        super().remove()
        self._seen = None


def watch(recorders: Iterable[Recorder]) -> None:
    """Have the next call of each module watched where hooks stand behind the recorder's."""
    for recorder in recorders:
        module, handle = recorder.alive(), recorder.handle
        if module is not None and handle is not None and not recorder.told_of_hooks:
            _watch(recorder, module, handle.id)


def _watch(recorder: Recorder, module: nn.Module, own: int) -> None:
    hooks = module._forward_hooks
    for number in [number for number, hook in hooks.items() if isinstance(hook, Witness) and not hook.inert]:
        del hooks[number]  # of a call that never came
    numbers = list(hooks)
    behind = numbers[numbers.index(own) + 1 :]
    if not all(isinstance(hooks[number], ModelHook) for number in behind):
        first = Witness(recorder)
        first.install(module)
        for number in behind:
            hooks[number] = hooks.pop(number)  # to the end
        Witness(recorder, first).install(module)
