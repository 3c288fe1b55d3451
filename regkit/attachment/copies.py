"""Copies of a model that has an attachment, and how rules stay in force on copies.

`copy.deepcopy`, pickle and `torch.save` copy a model with all that hangs on the model, and so a `ModelCompanion`. The
companion's copy knows the model's copy, and attaches the same plan there when `regkit.attachments` is asked, or when an
optimizer first steps the copy. Until then it sleeps, holds nothing and records nothing; a copy that is never trained
(an average of weights, a target network) stays as good as bare. However many companions sleep, one listener sees steps
for all, and looks at each optimizer once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import dropwhile
from types import FrameType
from typing import Any, Final, TypeVar

from torch import nn
from torch.optim import Optimizer

from regkit import _pickled
from regkit.adapters import OutputSite, WeightSite
from regkit.errors import AttachError, StepError
from regkit.plan.plan import Plan
from regkit.recording.injector import Scale
from regkit.runtime.optimizer_hooks import Listener, add_listener, remove_listener

ATTRIBUTE: Final = "_regkit_companions"
"""The name of the companions in the model's `__dict__`: no module, parameter or buffer, and in no state_dict."""

_COMPILED: Final = "_orig_mod"
"""The name under which a module from torch.compile keeps its original."""

_Site = TypeVar("_Site", WeightSite, OutputSite)

Attach = Callable[[nn.Module, Plan, int, float | None], Listener]
"""A function that puts a plan in force on a model, from a step count on and with a loss scale, where there is one.

Returns the attachment's listener.
"""

_OF_A_COPY: Final = (
    "This model is a copy of one with rules, which are in force on it too: regkit.attachments(model) has its "
    "attachment. What is copied inside `with attachment.detached():` carries no rules"
)


class ModelCompanion:
    """The part of an attachment that travels with copies of the model.

    model: the model of the attachment.
    count: a function that returns the attachment's step count.
    scale: the loss scale of rules via inject; a copy shares one that is a number.
    """

    _attach: Attach
    """The function that attaches the plan to a copy; set as a copy is made."""

    def __init__(self, model: nn.Module, plan: Plan, count: Callable[[], int], scale: Scale | None = None) -> None:
        *_, host = compiled_from(model)
        self._model: Callable[[], nn.Module | None] = weakref.ref(host)
        self._plan = plan if host is model else _of_original(plan)
        self._count = count
        self._scale = None if callable(scale) else scale
        self.dormant = False

    def __reduce__(self) -> _pickled.Call:
        # The model is in the state, not in the arguments: by then deepcopy and pickle have made the copy of it, empty
        # as yet, and put that in its place.
        return *_pickled.call("companion"), (self._model(), self._plan, self._count(), self._scale)

    def __setstate__(self, state: tuple[nn.Module | None, Plan, int] | tuple[Any, ...]) -> None:
        model, self._plan, count, *scale = state
        self._scale = scale[0] if scale else None
        self._count = lambda: count
        self._model = (lambda: None) if model is None else weakref.ref(model)
        self.dormant = model is not None
        if self.dormant:
            _sleeping.take_in(self)

    def join(self) -> None:
        """Hang on the model."""
        model = self._model()
        if model is not None:
            model.__dict__[ATTRIBUTE] = [*companions(model), self]

    def leave(self) -> None:
        """Hang on the model no more. May be called again."""
        model = self._model()
        if model is not None:
            others = [companion for companion in companions(model) if companion is not self]
            model.__dict__.pop(ATTRIBUTE, None)
            model.__dict__.update({ATTRIBUTE: others} if others else {})

    def wake(self) -> Listener | None:
        """Attach the plan to the copy of the model. Returns None if that is gone.

        Raises AttachError where the copy is not what it was; then the companion sleeps on: the rules are still meant.
        """
        model = self._model()
        if model is None:
            return None
        try:
            listener = self._attach(model, self._plan, self._count(), self._scale)
        except AttachError as error:
            raise AttachError(f"{error}. {_OF_A_COPY}") from error
        self.leave()  # the attachment has brought a companion of its own
        self.dormant = False
        _sleeping.let_go(id(self))
        return listener

    def is_stepped_by(self, owned: set[int]) -> bool:
        """Whether the copy has a parameter with one of these ids."""
        model = self._model()
        return model is not None and any(id(p) in owned for p in model.parameters())


class _SleepingCopies(Listener):
    """The one listener for all sleeping companions, which are held weakly: each belongs to the copy of a model."""

    def __init__(self) -> None:
        self._asleep: dict[int, weakref.ref[ModelCompanion]] = {}
        self._ever = 0
        """How many companions have ever slept."""
        self._strangers: weakref.WeakKeyDictionary[Optimizer, tuple[int, list[int]]] = weakref.WeakKeyDictionary()
        """For optimizers that were looked at, how many companions had slept by then, and the ids of parameters."""

    def take_in(self, companion: ModelCompanion) -> None:
        """See steps for a companion from now on, until the companion wakes or is gone."""
        key = id(companion)
        self._ever += 1
        self._asleep[key] = weakref.ref(companion, lambda _: self.let_go(key))
        add_listener(self)

    def let_go(self, key: int) -> None:
        """See steps no more for the companion of this id."""
        self._asleep.pop(key, None)
        if not self._asleep:
            remove_listener(self)
            if self._asleep:  # one came from another thread meanwhile
                add_listener(self)

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any, frame: FrameType) -> tuple[Any, Any] | None:
        """Wake the companions of copies that the optimizer steps, and pass the step on to the new attachments."""
        ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
        seen = (self._ever, ids)
        if self._strangers.get(optimizer) == seen:
            return None
        owned, given = set(ids), (args, kwargs)
        for companion in [reference() for reference in list(self._asleep.values())]:
            listener = companion.wake() if companion is not None and companion.is_stepped_by(owned) else None
            if listener is not None:
                try:
                    given = listener.before(optimizer, *given, frame) or given
                except StepError as error:
                    raise StepError(f"{error}. {_OF_A_COPY}") from error
        self._strangers[optimizer] = seen
        return given


_sleeping: Final = _SleepingCopies()


def compiled_from(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and the modules that torch.compile made the model from: a copy of the model is made with these."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        inner = inner._modules.get(_COMPILED)


def _of_original(plan: Plan) -> Plan:
    """The plan of a model from torch.compile, as a plan of the model's original."""

    def moved(sites: tuple[_Site, ...]) -> tuple[_Site, ...]:
        paths = (".".join(dropwhile(_COMPILED.__eq__, site.path.split("."))) for site in sites)
        return tuple(replace(site, path=path) for site, path in zip(sites, paths, strict=True))

    bindings = (replace(one, weights=moved(one.weights), outputs=moved(one.outputs)) for one in plan.bindings)
    return replace(plan, bindings=tuple(bindings))


def companions(model: nn.Module) -> list[ModelCompanion]:
    """The companions that hang on the model."""
    return list(model.__dict__.get(ATTRIBUTE, []))
