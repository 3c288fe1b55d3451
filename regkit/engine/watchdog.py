"""The watchdog, which raises when weights change although no optimizer step is seen.

regkit acts at the steps of torch optimizers. An engine that keeps master copies, an update that is written by hand, an
optimizer that is no `torch.optim.Optimizer` would leave every rule silently off. So one parameter is watched: whether
it moves from one backward pass to the next while no step was seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle, unserializable_hook

from regkit.engine.failed_step import FailedSteps
from regkit.errors import StepError
from regkit.runtime.inert_hook import ModelHook
from regkit.runtime.modes import compiler, is_capturing, is_dynamo_compiling, uncompiled
from regkit.runtime.sharding import sharded

_TIMES: Final = 8
"""How many times the weights may move with no step seen between: sharpness-aware minimization, weight noise under
accumulation and finite differences move weights before each step."""
_CLOSELY: Final = 256
"""How many of the first backward passes compare the numbers themselves, until a first step is seen: a change through
`.data` does not count as a new version. The comparison waits for a GPU."""

_UNHEARD: Final = (
    "changed from one backward pass to the next, and no torch optimizer that owns it was heard to step: the rules are "
    "not in force. Put the update into `with attachment.step(lr=...):`, which does all that is done at a step; or, for "
    "constraints alone, call attachment.apply_constraints() and attachment.weights_changed() after it. Call "
    "attachment.weights_changed() where the change was meant, as a new initialization is"
)


class Watchdog:
    """The watch over one parameter, from its backward passes.

    find: looks for the parameter to watch: its name, its module, itself; None where there is none.
    failed_steps: is told of backward passes.
    open_steps: the steps that may be running. step_runs: whether one does.
    """

    def __init__(
        self, find: Callable[[], tuple[str, nn.Module, nn.Parameter] | None], failed_steps: FailedSteps
    ) -> None:
        self._find = find
        self._failed_steps = failed_steps
        self.open_steps: Collection[object] = ()
        self.step_runs: Callable[[], bool] = bool  # never, until there are steps
        # torch converts no sharded parameter that has a weak reference
        self.parameter: Tensor | None = None
        self._name = ""
        self._gradient_handles: list[RemovableHandle] = []
        self._loading: tuple[weakref.ref[nn.Module], _Hook] | None = None
        """The parameter's module, and the hook that is called when the module has loaded a state."""
        self._off = False
        self._version: int | None = None
        self._numbers: Tensor | None = None
        self._moves = self._comparisons = 0
        self.step_ever_seen = False
        """Whether any optimizer step that owns the parameter was seen."""
        self.accepted = True
        """Whether the weights of the next backward pass are taken for granted, however the weights have changed."""

    def arm(self) -> None:
        """Watch the parameter, or the one that is in the parameter's place by now."""
        found = None if self._off else self._find()
        if found is None or found[2] is self.parameter:
            return
        self._name, module, parameter = found
        hook = self._hook_on(module)
        self.parameter = parameter
        handle = parameter.register_hook(hook.look)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._gradient_handles = [handle]
        if sharded(parameter):  # FSDP2 puts gradients where they belong past autograd, and calls these hooks itself
            handle = parameter.register_post_accumulate_grad_hook(hook.look)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            self._gradient_handles.append(handle)
        self.accepted = True

    def _hook_on(self, module: nn.Module) -> _Hook:
        """The hook that sees a module load state dicts. A hook that is there stays, for the hook may be running now."""
        for handle in self._gradient_handles:
            handle.remove()
        if self._loading is None or self._loading[0]() is not module:
            self.disarm()
            hook = _Hook(self)
            hook.handle = module.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            self._loading = weakref.ref(module), hook
        return self._loading[1]

    def disarm(self) -> None:
        """Watch nothing. May be called again."""
        for handle in self._gradient_handles:
            handle.remove()
        if self._loading is not None:
            self._loading[1].remove()
        self._gradient_handles, self._loading, self.parameter, self._numbers = [], None, None, None
        self.accepted = True

    def give_up(self) -> None:
        """Watch nothing from now on: the attachment was told not to act in the steps of the parameter."""
        self._off = True
        self.disarm()

    def weights_changed(self) -> None:
        """Accept that the weights have changed, or been replaced, without a step."""
        self.accepted = True
        if self._gradient_handles:
            self.arm()

    def look(self) -> None:
        """Compare the parameter with the backward pass before. Raises StepError once too many moves have no step."""
        if self._failed_steps.begun:
            self._failed_steps.backward_begins()
        parameter = self.parameter
        if self.accepted:
            self._version = self._numbers = None
            self._moves = self._comparisons = 0
            self.accepted = False
        if parameter is None or (self.open_steps and self.step_runs()):
            self._version = self._numbers = None
            return
        before, self._version = self._version, parameter._version
        newer = before is not None and before != self._version
        if newer:
            self._numbers = None
        self._moves += (not self.step_ever_seen and self._differs(parameter)) or newer
        if self._moves >= _TIMES:
            self.accepted = True
            raise StepError(f"{self._name} {_UNHEARD}")

    def _differs(self, parameter: Tensor) -> bool:
        """Whether the parameter's numbers are others than at the backward pass before, as far as can be told."""
        self._comparisons += 1
        if parameter.is_meta or self._comparisons > _CLOSELY or is_capturing():
            return False
        shard = parameter.to_local() if sharded(parameter) else parameter
        before, self._numbers = self._numbers, shard.detach().clone()
        if before is None or before.dtype != shard.dtype or before.device != shard.device:
            return False
        return not torch.equal(before, self._numbers)


class _Hook(ModelHook):
    """The hooks on the watched parameter and its module. The watchdog is held weakly; a copy holds none."""

    word = "watch"

    def __init__(self, watchdog: Watchdog | None = None) -> None:
        super().__init__(inert=watchdog is None)
        self._watchdog = (lambda: None) if watchdog is None else weakref.ref(watchdog)

    # Or torch warns that the hook is left out of a parameter which is sent to another process.
    @unserializable_hook  # type: ignore[untyped-decorator]  # torch leaves it unannotated
    def look(self, gradient: Tensor) -> None:
        """Have the watchdog look at the parameter as a gradient arrives."""
        if is_dynamo_compiling() or compiler() is not None:
            self._look_uncompiled()
            return
        watchdog = self._watchdog()
        if watchdog is not None:
            watchdog.look()

    @uncompiled
    def _look_uncompiled(self) -> None:
        watchdog = self._watchdog()
        if watchdog is not None:
            watchdog.look()

    def __call__(self, module: nn.Module, incompatible: object) -> None:
        """Accept the state that the module has loaded."""
        watchdog = self._watchdog()
        if watchdog is not None:
            watchdog.weights_changed()
