"""The watchdog: weights that change although no step is heard of, and weights that nobody steps.

regkit acts at the steps of torch optimizers. An engine that keeps master copies, an update that is written by hand, an
optimizer that is no `torch.optim.Optimizer` would leave every rule silently off. So one parameter is watched: whether
it moves from one backward pass to the next while no step was heard of.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle, unserializable_hook

from regkit import _pickled
from regkit.engine.failed_step import FailedStep
from regkit.errors import StepError
from regkit.runtime.modes import compiler, is_capturing, is_dynamo_compiling, uncompiled
from regkit.runtime.sharding import sharded

_TIMES: Final = 8
"""How many times the weights may move with no step heard of between: sharpness-aware minimization, weight noise under
accumulation and finite differences move them before each step."""
_CLOSELY: Final = 256
"""The first backward passes, at each of which the numbers themselves are compared until a first step is heard of: a
change through `.data` does not count as a new version. On a GPU it is waited for."""

_UNHEARD: Final = (
    "changed from one backward pass to the next, and no torch optimizer that owns it was heard to step: the rules are "
    "not in force. Put the update into `with attachment.step(lr=...):`, which does all that is done at a step; or, for "
    "constraints alone, call attachment.apply_constraints() and attachment.weights_changed() after it. Call "
    "attachment.weights_changed() where the change was meant, as a new initialization is"
)


class Watchdog:
    """Watches one parameter from its backward passes.

    find: the name of the parameter to watch, its module, and itself as it is now. inside: whether a step that is acted
    in is running. mark: what a step has added to gradients that may still be in them; it is told of backward passes.
    """

    def __init__(self, find: Callable[[], tuple[str, nn.Module, nn.Parameter] | None]) -> None:
        self._find = find
        self.inside: Callable[[], bool] = bool  # never, until there are steps
        self.open: Collection[object] = ()  # the steps that may be running
        self.mark = FailedStep()
        # torch converts no sharded parameter that has a weak reference
        self.parameter: Tensor | None = None
        self._name = ""
        self._handles: list[RemovableHandle] = []  # on the parameter
        self._loading: tuple[weakref.ref[nn.Module], _Hook, RemovableHandle] | None = None  # on its module
        self._off = False
        self._version: int | None = None
        self._numbers: Tensor | None = None
        self._moves = self._looks = 0
        self.step_ever_seen = False
        """Whether any step of what is watched was heard of."""
        self.accepted = True
        """Whether the weights as they will be at the next backward pass are taken for granted."""

    def arm(self) -> None:
        """Watch the parameter, or the one that is in its place by now."""
        found = None if self._off else self._find()
        if found is None or found[2] is self.parameter:
            return
        self._name, module, leaf = found
        hook = self._listen(module)
        self.parameter = leaf
        self._handles = [leaf.register_hook(hook.look)]  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        if sharded(leaf):  # FSDP2 puts gradients where they belong past autograd, and calls these hooks itself
            handle = leaf.register_post_accumulate_grad_hook(hook.look)  # type: ignore[no-untyped-call]  # and this
            self._handles.append(handle)
        self.accepted = True

    def _listen(self, module: nn.Module) -> _Hook:
        """Hear of state dicts that the module loads. Its hook stays while it is the module: it may be running now."""
        for handle in self._handles:
            handle.remove()
        if self._loading is None or self._loading[0]() is not module:
            self.disarm()
            hook = _Hook(self)
            handle = module.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]  # and this
            hook.number = handle.id
            self._loading = weakref.ref(module), hook, handle
        return self._loading[1]

    def disarm(self) -> None:
        """Watch nothing. May be called again."""
        for handle in self._handles:
            handle.remove()
        if self._loading is not None:
            self._loading[2].remove()
        self._handles, self._loading, self.parameter, self._numbers = [], None, None, None
        self.accepted = True

    def give_up(self) -> None:
        """The attachment does not act in the steps of what is watched: its user said so."""
        self._off = True
        self.disarm()

    def weights_changed(self) -> None:
        """The weights have changed, or been replaced, and it is all right."""
        self.accepted = True
        if self._handles:
            self.arm()

    def look(self) -> None:
        """A gradient arrives. Raises StepError where the weight has moved unheard once too often."""
        if self.mark.gradient is not None:
            self.mark.passed()
        leaf = self.parameter
        if self.accepted:
            self._version = self._numbers = None
            self._moves = self._looks = 0
            self.accepted = False
        if leaf is None or (self.open and self.inside()):
            self._version = self._numbers = None
            return
        before, self._version = self._version, leaf._version
        newer = before is not None and before != self._version
        if newer:
            self._numbers = None
        if self.step_ever_seen:
            self._moves += newer
        else:
            self._moves += self._differs(leaf) or newer
        if self._moves >= _TIMES:
            self.accepted = True
            raise StepError(f"{self._name} {_UNHEARD}")

    def _differs(self, leaf: Tensor) -> bool:
        self._looks += 1
        if leaf.is_meta or self._looks > _CLOSELY or is_capturing():
            return False
        mine = leaf.to_local() if sharded(leaf) else leaf
        before, self._numbers = self._numbers, mine.detach().clone()
        if before is None or before.dtype != mine.dtype or before.device != mine.device:
            return False
        return not torch.equal(before, self._numbers)


class _Hook:
    """What hangs on the parameter and its module. It holds the watch weakly, and a copy of it holds none."""

    def __init__(self, watch: Watchdog | None = None) -> None:
        self._watch = (lambda: None) if watch is None else weakref.ref(watch)
        self.inert = watch is None
        self.number = -1

    def __reduce__(self) -> _pickled.Call:
        return _pickled.call("hook", "watch", self.number)

    # Or torch warns that it is left out of a parameter which is sent to another process.
    @unserializable_hook  # type: ignore[untyped-decorator]  # torch leaves it unannotated
    def look(self, gradient: Tensor) -> None:
        if is_dynamo_compiling() or compiler() is not None:
            self._look_uncompiled()
            return
        watch = self._watch()
        if watch is not None:
            watch.look()

    @uncompiled
    def _look_uncompiled(self) -> None:
        watch = self._watch()
        if watch is not None:
            watch.look()

    def __call__(self, module: nn.Module, incompatible: object) -> None:
        """Hear that the module has loaded a state."""
        watch = self._watch()
        if watch is not None:
            watch.weights_changed()


def drop_copied_hooks(model: nn.Module) -> None:
    """Take the hooks of its original's watch off a copied model."""
    for module in model.modules():
        held = module._load_state_dict_post_hooks
        for number, hook in list(held.items()):
            if isinstance(hook, _Hook) and hook.inert:
                del held[number]


def owned_by_any() -> set[int]:
    """The ids of all parameters of all optimizers in the process.

    torch keeps no list of optimizers; the garbage collector does, and is asked once for each optimizer at most.
    """
    optimizers = [one for one in gc.get_objects() if issubclass(type(one), Optimizer)]
    return {id(p) for one in optimizers for group in getattr(one, "param_groups", ()) for p in group["params"]}
