"""Copies of a model that has an attachment: how the rules stay in force on them.

`copy.deepcopy`, pickle and `torch.save` copy a model with all that hangs on it. A `ModelCompanion` hangs on it for
that: its copy knows the model's copy, and attaches the same plan to it when that is asked for, or when an optimizer
first steps it. Until then it sleeps, holds nothing and records nothing; a copy that is never trained (an average of
weights, a target network) stays as good as bare. However many sleep, one listener hears of steps for all of them, and
asks about each optimizer once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import dropwhile
from types import FrameType
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer

from regkit import _pickled
from regkit.adapters import Site
from regkit.errors import AttachError, StepError
from regkit.plan.plan import Plan
from regkit.runtime import optimizer_hooks

ATTRIBUTE: Final = "_regkit_companions"
"""Where the companions are in the model's `__dict__`: no module, parameter or buffer, and in no state_dict."""

_COMPILED: Final = "_orig_mod"
"""Where torch.compile keeps the module that it made another from."""

Attach = Callable[[nn.Module, Plan, int], optimizer_hooks.Listener]
"""Puts a plan in force on a model, from a step count on; what it returns hears of steps from then on."""

_OF_A_COPY: Final = (
    "This model is a copy of one with rules, which are in force on it too: regkit.attachments(model) has its "
    "attachment. What is copied inside `with attachment.detached():` carries no rules"
)


class ModelCompanion:
    """What of one attachment travels with copies of its model.

    count: the attachment's step count when it is asked for.
    """

    _attach: Attach
    """How a copy attaches: given to it when it is made."""

    def __init__(self, model: nn.Module, plan: Plan, count: Callable[[], int]) -> None:
        *_, host = compiled_from(model)
        self._model: Callable[[], nn.Module | None] = weakref.ref(host)
        self._plan = plan if host is model else _of_what_was_compiled(plan)
        self._count = count
        self.dormant = False

    def __reduce__(self) -> _pickled.Call:
        # The model is in the state, not in the arguments: by then deepcopy and pickle have made the copy of it, empty
        # as yet, and put that in its place.
        return *_pickled.call("companion"), (self._model(), self._plan, self._count())

    def __setstate__(self, state: tuple[nn.Module | None, Plan, int]) -> None:
        model, self._plan, count = state
        self._count = lambda: count
        self._model = (lambda: None) if model is None else weakref.ref(model)
        self.dormant = model is not None
        if self.dormant:
            _dormitory.take_in(self)

    def join(self) -> None:
        """Travel with the model."""
        model = self._model()
        if model is not None:
            model.__dict__[ATTRIBUTE] = [*companions(model), self]

    def leave(self) -> None:
        """Travel no more."""
        model = self._model()
        others = [] if model is None else [one for one in companions(model) if one is not self]
        if model is not None:
            model.__dict__.pop(ATTRIBUTE, None)
            model.__dict__.update({ATTRIBUTE: others} if others else {})

    def wake(self) -> optimizer_hooks.Listener | None:
        """Attach the plan to the copy of the model; None where there is none any more.

        Raises AttachError where the copy is not what it was; then it sleeps on, for the rules are still meant.
        """
        model = self._model()
        if model is None:
            return None
        try:
            listener = self._attach(model, self._plan, self._count())
        except AttachError as error:
            raise AttachError(f"{error}. {_OF_A_COPY}") from error
        self.leave()  # the attachment has brought a companion of its own
        self.dormant = False
        _dormitory.let_go(self)
        return listener

    def is_stepped_by(self, owned: set[int]) -> bool:
        """Whether the copy has any of these parameters."""
        model = self._model()
        return model is not None and any(id(p) in owned for p in model.parameters())


class _SleepingCopies:
    """The one listener for all companions that sleep. It holds them weakly: they belong to their models."""

    def __init__(self) -> None:
        self._asleep: dict[int, weakref.ref[ModelCompanion]] = {}
        self._ever = 0
        self._strangers: weakref.WeakKeyDictionary[Optimizer, tuple[int, list[int]]] = weakref.WeakKeyDictionary()

    def take_in(self, companion: ModelCompanion) -> None:
        """Listen for it from now on, until it wakes or is gone."""
        key = id(companion)
        self._ever += 1
        self._asleep[key] = weakref.ref(companion, lambda _: self._forget(key))
        optimizer_hooks.add_listener(self)

    def let_go(self, companion: ModelCompanion) -> None:
        """Listen for it no more."""
        self._forget(id(companion))

    def _forget(self, key: int) -> None:
        self._asleep.pop(key, None)
        if not self._asleep:
            optimizer_hooks.remove_listener(self)
            if self._asleep:  # one came from another thread meanwhile
                optimizer_hooks.add_listener(self)

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any, frame: FrameType) -> tuple[Any, Any] | None:
        """Wake those whose copies this optimizer steps, and pass the step on to them."""
        ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
        met = (self._ever, ids)
        if self._strangers.get(optimizer) == met:
            return None
        owned, given = set(ids), (args, kwargs)
        for companion in [reference() for reference in list(self._asleep.values())]:
            listener = companion.wake() if companion is not None and companion.is_stepped_by(owned) else None
            if listener is not None:
                given = self._pass_on(listener, optimizer, given, frame) or given
        self._strangers[optimizer] = met
        return given

    def _pass_on(
        self, listener: optimizer_hooks.Listener, optimizer: Optimizer, given: tuple[Any, Any], frame: FrameType
    ) -> tuple[Any, Any] | None:
        try:
            return listener.before(optimizer, *given, frame)
        except StepError as error:
            raise StepError(f"{error}. {_OF_A_COPY}") from error

    gradients_final = None

    def after(self, frame: FrameType) -> None:
        """Nothing of it is in any step."""


_dormitory: Final = _SleepingCopies()


def compiled_from(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and what torch.compile made it from: a copy of what it made has nothing else of it."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        inner = inner._modules.get(_COMPILED)


def _of_what_was_compiled(plan: Plan) -> Plan:
    def path(site: Site) -> str:
        return ".".join(dropwhile(_COMPILED.__eq__, site.path.split(".")))

    return replace(
        plan,
        bindings=tuple(
            replace(
                binding,
                weights=tuple(replace(site, path=path(site)) for site in binding.weights),
                outputs=tuple(replace(site, path=path(site)) for site in binding.outputs),
            )
            for binding in plan.bindings
        ),
    )


def companions(model: nn.Module) -> list[ModelCompanion]:
    """The companions that hang on the model."""
    return list(model.__dict__.get(ATTRIBUTE, []))
