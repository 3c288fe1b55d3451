"""The watchdog, which raises when weights change although no optimizer step is seen.

regkit acts at the steps of torch optimizers. An engine that keeps master copies, an update that is written by hand, an
optimizer that is no `torch.optim.Optimizer` would leave every rule silently off. So one parameter is watched: whether
it moves from one backward pass to the next while no step was seen.
"""

from __future__ import annotations

import atexit
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle, unserializable_hook

from regkit.engine.failed_step import FailedSteps
from regkit.errors import RegkitWarning, StepError
from regkit.runtime.inert_hook import ModelHook
from regkit.runtime.modes import compiler, is_capturing, is_dynamo_compiling, uncompiled
from regkit.runtime.sharding import sharded
from regkit.weights.links import replaced

_TIMES: Final = 8
"""How many times the weights may move with no step seen between: sharpness-aware minimization, weight noise and
finite differences move weights before each step."""
_CLOSELY: Final = 256
"""How many of the first backward passes compare the numbers themselves, until a first step is seen: a change through
`.data` does not count as a new version. The comparison waits for a GPU."""

_UNHEARD: Final = (
    "changed from one backward pass to the next, and no torch optimizer that owns it was heard to step: the rules are "
    "not in force. Put the update into `with attachment.step(lr=...):`, which does all that is done at a step; or, for "
    "constraints alone, call attachment.apply_constraints() and attachment.weights_changed() after it. Call "
    "attachment.weights_changed() where the change was meant, as a new initialization is"
)
_NEVER_HEARD: Final = (
    "changed {} after backward passes, and no torch optimizer that owns it was ever heard to step: the rules end, and "
    "were not in force. Put updates into `with attachment.step(lr=...):`; call attachment.weights_changed() where the "
    "change was meant"
)
_armed: Final[weakref.WeakSet[Watchdog]] = weakref.WeakSet()
"""Every watchdog that may have something to tell as Python ends."""


class Noise:
    """The places of the watched parameter under accumulation, which tell noise on weights from training.

    Noise on weights moves them before each pass and puts them back after it, while gradients add up. An update uses
    gradients up, so that they are zeroed or made anew; one that does not goes further at each pass.
    """

    def __init__(self) -> None:
        self._stamp: tuple[int, int] | None = None
        """The gradient's id and version before the last pass; None where there was no gradient."""
        self._adds_up = True
        self._places: list[Tensor] = []

    def look(self, parameter: Tensor, moved: bool) -> None:
        """See the parameter in a backward pass, which adds to its gradient afterwards."""
        gradient, before = parameter.grad, self._stamp
        self._stamp = None if gradient is None else (id(gradient), gradient._version)
        if moved:
            after = None if before is None else (before[0], before[1] + 1)
            self._adds_up &= self._stamp is not None and (after is None or self._stamp == after)
            if self._adds_up and len(self._places) < 2:
                self._places.append(parameter.detach().clone())

    def is_all(self, parameter: Tensor) -> bool:
        """Whether the parameter has gone nowhere: not much further from its first place than its second place is."""
        if not self._adds_up or len(self._places) < 2 or parameter.is_meta or is_capturing():
            return False
        first, second, now = (one.double() for one in (*self._places, parameter.detach()))
        return first.shape == now.shape and bool((now - first).norm() < 3 * (second - first).norm())


class Watchdog:
    """The watch over one parameter, from its backward passes.

    find: looks for the parameter to watch: its name, its module, itself; None where there is none.
    failed_steps: is told of backward passes.
    open_steps: the steps that may be running. step_runs: whether one does.
    moved_module: gives the name of a bound module that has left its place in the model.
    """

    def __init__(
        self, find: Callable[[], tuple[str, nn.Module, nn.Parameter] | None], failed_steps: FailedSteps
    ) -> None:
        self._find = find
        self._failed_steps = failed_steps
        self.open_steps: Collection[object] = ()
        self.step_runs: Callable[[], bool] = bool  # never, until there are steps
        self.moved_module: Callable[[], str | None] = lambda: None
        # torch converts no sharded parameter that has a weak reference
        self.parameter: Tensor | None = None
        self._name = ""
        self._gradient_handles: list[RemovableHandle] = []
        self._loading: tuple[weakref.ref[nn.Module], _Hook] | None = None
        """The parameter's module, and the hook that is called when the module has loaded a state."""
        self._off = False
        self._version: int | None = None
        self._numbers: Tensor | None = None
        self._first: Tensor | None = None
        """The numbers at the first backward pass, until a step is seen."""
        self._noise: Noise | None = None
        """Since the first move."""
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
        _armed.add(self)
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
        self._gradient_handles, self._loading, self.parameter = [], None, None
        self._numbers = self._first = self._noise = None
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
            self._version = self._numbers = self._first = self._noise = None
            self._moves = self._comparisons = 0
            self.accepted = False
        if parameter is None or (self.open_steps and self.step_runs()):
            self._version = self._numbers = None
            return
        before, self._version = self._version, parameter._version
        newer = before is not None and before != self._version
        if newer:
            self._numbers = None
        moved = (not self.step_ever_seen and self._differs(parameter)) or newer
        if moved or self._noise is not None:
            self._count(parameter, moved)

    def _count(self, parameter: Tensor, moved: bool) -> None:
        """Count a move. Raises StepError once there are too many, unless all of these are noise.

        Raises AttachError at once where a module has left the model, and is trained on by hand.
        """
        gone = self.moved_module() if moved else None
        if gone is not None:
            self.accepted = True
            raise replaced(gone)
        noise = self._noise = self._noise or Noise()
        noise.look(parameter, moved)
        self._moves += moved
        if self._moves < _TIMES:
            return
        if noise.is_all(parameter):
            self._moves, self._noise = 0, None
        else:
            self.accepted = True
            raise StepError(f"{self._name} {_UNHEARD}")

    def _differs(self, parameter: Tensor) -> bool:
        """Whether the parameter's numbers are others than at the backward pass before, as far as can be told."""
        self._comparisons += 1
        if parameter.is_meta or self._comparisons > _CLOSELY or is_capturing():
            return False
        shard = parameter.to_local() if sharded(parameter) else parameter
        before, self._numbers = self._numbers, shard.detach().clone()
        if self._first is None:
            self._first = self._numbers
        if before is None or before.dtype != shard.dtype or before.device != shard.device:
            return False
        return not torch.equal(before, self._numbers)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """The context in which rules end. Warns at last where weights have moved and no step was ever seen."""
        words = self._last_words()
        yield
        if words is not None:
            warnings.warn(words, RegkitWarning, stacklevel=4)

    def _last_words(self) -> str | None:
        """The sentence that the parameter has moved since the first backward pass, though no step was seen."""
        parameter, moves = self.parameter, self._moves
        if parameter is None or self._first is None or self.accepted or self.step_ever_seen:
            return None
        moves += self._differs(parameter)
        self._numbers, self._first = self._first, None
        if not self._differs(parameter):
            return None
        return f"{self._name} {_NEVER_HEARD.format(f'{moves} times' if moves > 1 else 'once')}"


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


@atexit.register
def _tell_at_exit() -> None:
    for one in list(_armed):
        with one.ending():
            pass
