"""The watchdog: weights that change although no step is heard of, and weights that nobody steps.

regkit acts at the steps of torch optimizers. An engine that keeps master copies, an update that is written by hand, an
optimizer that is no `torch.optim.Optimizer` would leave every rule silently off. So one parameter is watched: whether
it moves from one backward pass to the next while no step was heard of.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from regkit.errors import StepError

_TIMES: Final = 2
"""How often in a row the weights may move unheard. Once is what sharpness-aware minimization does at each step."""
_LOOKS: Final = (1, 3, 10, 100)
"""The backward passes at which the numbers themselves are compared, until a first step is heard of: a change through
`.data` does not count as a new version. On a GPU this waits for it, three times in all."""

_UNHEARD: Final = (
    "changed from one backward pass to the next, and no torch optimizer that owns it was heard to step: the rules are "
    "not in force. Put the update into `with attachment.step(lr=...):`, which does all that is done at a step; or, for "
    "constraints alone, call attachment.apply_constraints() and attachment.weights_changed() after it. Call "
    "attachment.weights_changed() where the change was meant, as a new initialization is"
)


class Watch:
    """Watches one parameter from its backward passes.

    find: the name of the parameter to watch, its module, and itself as it is now; inside: whether a step that is acted
    in is running.
    """

    def __init__(
        self, find: Callable[[], tuple[str, nn.Module, nn.Parameter] | None], inside: Callable[[], bool]
    ) -> None:
        self._find, self._inside = find, inside
        self._leaf: Callable[[], Tensor | None] = lambda: None
        self._name = ""
        self._handles: list[RemovableHandle] = []
        self._off = False
        self._ever_stepped = False
        self.accept()

    def accept(self) -> None:
        """Take the weights as they will be at the next backward pass for granted."""
        self._version: int | None = None
        self._moves = 0
        self._looks = 0
        self._numbers: Tensor | None = None

    def arm(self) -> None:
        """Watch the parameter, or the one that is in its place by now."""
        found = self._find()
        if self._off or found is None or found[2] is self._leaf():
            return
        self.disarm()
        self._name, module, leaf = found
        self._leaf = weakref.ref(leaf)
        hook = _Hook(self)
        self._handles = [
            leaf.register_hook(hook.look),  # type: ignore[no-untyped-call]  # torch leaves both unannotated
            module.register_load_state_dict_pre_hook(hook.accept),  # type: ignore[no-untyped-call]
        ]
        self.accept()

    def disarm(self) -> None:
        """Watch nothing. May be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._leaf = [], lambda: None

    def heard(self, parameters: Mapping[int, Any], acts: bool) -> None:
        """An optimizer of these parameters steps. If the attachment does not act with it, its user said so."""
        if id(self._leaf()) in parameters:
            self._ever_stepped = True
            self.accept()
            if not acts:
                self._off = True
                self.disarm()

    def look(self) -> None:
        """A gradient arrives. Raises StepError where the weight has moved unheard once too often."""
        leaf = self._leaf()
        if leaf is None or self._inside():
            self._version = None
            return
        before, self._version = self._version, leaf._version
        moved = before is not None and before != self._version
        self._moves = self._moves + 1 if moved else self._moves
        if self._moves >= _TIMES or (not self._ever_stepped and self._differs(leaf)):
            self.accept()
            raise StepError(f"{self._name} {_UNHEARD}")

    @torch.no_grad()
    def _differs(self, leaf: Tensor) -> bool:
        self._looks += 1
        if self._looks not in _LOOKS or leaf.is_meta:
            return False
        before, self._numbers = self._numbers, torch.stack([leaf.sum(), leaf.square().sum()]).double()
        return before is not None and not torch.equal(before, self._numbers)


class _Hook:
    """What hangs on the parameter and its module. It holds the watch weakly, and a copy of it holds none."""

    def __init__(self, watch: Watch | None = None) -> None:
        self._watch = (lambda: None) if watch is None else weakref.ref(watch)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()

    def look(self, gradient: Tensor) -> None:
        watch = self._watch()
        if watch is not None:
            watch.look()

    def accept(self, *_: object) -> None:
        watch = self._watch()
        if watch is not None:
            watch.accept()


def owned_by_any() -> set[int]:
    """The ids of all parameters of all optimizers in the process.

    torch keeps no list of optimizers; the garbage collector does, and is asked once for each optimizer at most.
    """
    optimizers = [one for one in gc.get_objects() if issubclass(type(one), Optimizer)]
    return {id(p) for one in optimizers for group in getattr(one, "param_groups", ()) for p in group["params"]}
