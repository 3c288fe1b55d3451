"""Copies of a model that has an attachment: what makes the rules stay in force on them.

`copy.deepcopy`, pickle and `torch.save` copy a model with all that hangs on it. A `Companion` hangs on it for that: its
copy knows the model's copy, and attaches the same plan to it when that is asked for, or when the copy is first trained.
Until then it holds nothing, records nothing, and costs a look at each optimizer's first step; a copy that is never
trained (an average of weights, a target network) stays as good as bare.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer

from regkit import hooks
from regkit.errors import StepError
from regkit.plan import Plan

ATTRIBUTE: Final = "_regkit_companions"
"""Where the companions are in the model's `__dict__`: no module, parameter or buffer, and in no state_dict."""

Attach = Callable[[nn.Module, Plan, int], hooks.Listener]
"""Puts a plan in force on a model, from a step count on; what it returns hears of steps from then on."""


class Companion:
    """What of one attachment travels with copies of its model.

    count: the attachment's step count when it is asked for. attach: how a copy of this one attaches.
    """

    def __init__(self, model: nn.Module, plan: Plan, count: Callable[[], int], attach: Attach) -> None:
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._plan, self._count, self._attach = plan, count, attach
        self._strangers: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self.dormant = False
        model.__dict__.setdefault(ATTRIBUTE, []).append(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # The model is in the state, not in the arguments: by then deepcopy and pickle have made the copy of it, empty
        # as yet, and put that in its place.
        return object.__new__, (Companion,), (self._model(), self._plan, self._count(), self._attach)

    def __setstate__(self, state: tuple[nn.Module | None, Plan, int, Attach]) -> None:
        model, self._plan, count, self._attach = state
        self._count = lambda: count
        self._strangers = weakref.WeakKeyDictionary()
        self._model = (lambda: None) if model is None else weakref.ref(model)
        self.dormant = model is not None
        if model is not None:
            hooks.enlist(self)
            weakref.finalize(model, hooks.dismiss, self).atexit = False

    def leave(self) -> None:
        """Travel no more."""
        model = self._model()
        self._sleep_no_more()
        if model is not None:
            self._let_go(model)

    def _let_go(self, model: nn.Module) -> None:
        others = [one for one in companions(model) if one is not self]
        model.__dict__.pop(ATTRIBUTE, None)
        if others:
            model.__dict__[ATTRIBUTE] = others

    def _sleep_no_more(self) -> None:
        self.dormant = False
        hooks.dismiss(self)

    def wake(self) -> hooks.Listener | None:
        """Attach the plan to the copy of the model; None where there is none any more."""
        model = self._model()
        self._sleep_no_more()
        if model is None:
            return None
        self._let_go(model)  # the attachment brings a companion of its own
        return self._attach(model, self._plan, self._count())

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any, frame: FrameType) -> tuple[Any, Any] | None:
        """Wake where this optimizer trains the copy, and pass its step on."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        model = self._model()
        if model is None or self._strangers.get(optimizer) == size:
            return None
        mine = set(map(id, model.parameters()))
        if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            listener = self.wake()
            try:
                return None if listener is None else listener.before(optimizer, args, kwargs, frame)
            except StepError as error:
                raise StepError(
                    f"{error}. (This model is a copy: regkit.attachments(model) has its attachment)"
                ) from error
        self._strangers[optimizer] = size
        return None

    def after(self, frame: FrameType) -> None:
        """Nothing of it is in any step."""


def companions(model: nn.Module) -> list[Companion]:
    """The companions that hang on the model."""
    return list(model.__dict__.get(ATTRIBUTE, []))
