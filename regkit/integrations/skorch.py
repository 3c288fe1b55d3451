"""skorch: the rules of a document in a net's training, in its loss, its history and its checkpoints.

Weight rules need none of this: `regkit.attach(net.module_, spec)` acts at the net's own optimizer steps. But `fit`
makes a new module where it was given a class; the callback attaches to whatever module is trained. Activity penalties
also need the mixin, which stands right before skorch's class:

    class Net(RegularizedLoss, NeuralNetClassifier): ...

    net = Net(Module, callbacks=[RegularizationCallback("spec.json")])
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import regkit

if TYPE_CHECKING:

    class Callback:  # skorch has no types: to a checker its callbacks would be Any, and so would their subclasses
        """The base class of skorch's callbacks."""
else:
    try:
        from skorch.callbacks import Callback
    except ImportError as error:
        raise ImportError("regkit.integrations.skorch needs pip install skorch") from error


class RegularizationCallback(Callback):
    """A callback that attaches a document to `net.module_` as training begins, logs its rules and keeps its state.

    At the end of each epoch the history gets "prefix/rule" for each rule: the value of a penalty (for an activity
    penalty, in the last batch), or the violation of a constraint. `fit` begins anew; `partial_fit` and a warm start go
    on. A copied or pickled net goes on from where it was; `sklearn.base.clone` makes a fresh one.

    The net gets itself a `regularization_`, so that skorch saves the state and loads it: `Checkpoint(f_regularization=
    "regularization.pt")`, `net.save_params(f_regularization=...)`, and `LoadInitState` behind this one in `callbacks`.

    detach: take the rules off as training ends; the next `partial_fit` goes on with them. Left out, they stay.
    registry: where the kinds are found; left out, everything installed.

    Raises SpecError for a bad document; what `regkit.attach` raises, as training begins.

    >>> from regkit.integrations.skorch import RegularizationCallback
    >>> from skorch import NeuralNet
    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.rnn = nn.GRU(2, 3, batch_first=True)
    ...     def forward(self, x):
    ...         return self.rnn(x)[0]
    >>> callback = RegularizationCallback({"rules": [{"name": "decay", "penalty": "l2(1e-4)"}]})
    >>> options = {"train_split": None, "verbose": 0, "callbacks": [callback]}
    >>> net = NeuralNet(Model, nn.MSELoss, max_epochs=2, **options)
    >>> net = net.fit(torch.randn(4, 5, 2), torch.randn(4, 5, 3))
    >>> net.history[:, "regkit/decay"]
    [..., ...]
    """

    def __init__(
        self,
        spec: str | Path | dict[str, Any] | regkit.Spec,
        *,
        prefix: str = "regkit",
        detach: bool = False,
        registry: regkit.Registry | None = None,
    ) -> None:
        # Mistakes are told here; what is kept is what was given, as scikit-learn's clone() wants it.
        regkit.load(spec, registry=registry)
        self.spec = spec
        self.prefix = prefix
        self.detach = detach
        self.registry = registry
        self.attachment_: regkit.Attachment | None = None
        self.state_: Mapping[str, Any] = {}

    @property
    def attachment(self) -> regkit.Attachment:
        """The rules in force. Raises RegkitError before training has begun."""
        if self.attachment_ is None:
            raise regkit.RegkitError("nothing is attached: the callback attaches as training begins")
        return self.attachment_

    def initialize(self) -> RegularizationCallback:
        self._release()
        self.state_ = {}
        return self

    def _release(self) -> None:
        if self.attachment_ is not None:
            self.attachment_.detach()
            self.attachment_ = None

    def on_train_begin(self, net: Any, **_: Any) -> None:
        plan = regkit.resolve(net.module_, self.spec, registry=self.registry)
        # A copied module has brought the rules along; one that skorch has made anew has none.
        present = next((one for one in regkit.attachments(net.module_) if one.plan == plan), None)
        if present is None or present is not self.attachment_:
            self._release()
            self.attachment_ = regkit.attach(net.module_, plan) if present is None else present
            self.load_state_dict(self.state_)
        net.regularization_ = self

    def on_epoch_end(self, net: Any, **_: Any) -> None:
        for key, value in {**self.attachment.values(), **self.attachment.violations()}.items():
            net.history.record(f"{self.prefix}/{key}", float(value))

    def on_train_end(self, net: Any, **_: Any) -> None:
        if self.detach:
            self.state_ = self.state_dict()
            self._release()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state_) if self.attachment_ is None else self.attachment_.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state_ = state
        if self.attachment_ is not None and state:
            self.attachment_.load_state_dict(state)
            self.state_ = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "attachment_": None, "state_": self.state_dict()}


class RegularizedLoss:
    """A mixin that adds the penalties of everything attached to `net.module_` to `get_loss`, in training.

    It stands right before skorch's class, and a `get_loss` of yours before it: one that divides its loss, as for
    accumulated batches, then divides the penalty too. Otherwise the class is refused with a TypeError. A net whose
    `get_loss` does not call `super().get_loss` adds `attachment.penalty()` itself.

    >>> from regkit.integrations.skorch import RegularizationCallback, RegularizedLoss
    >>> from skorch import NeuralNet
    >>> class Net(RegularizedLoss, NeuralNet):
    ...     pass
    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.rnn = nn.GRU(2, 3, batch_first=True)
    ...     def forward(self, x):
    ...         return self.rnn(x)[0]
    >>> callback = RegularizationCallback({"rules": [{"penalty": "activity_l2(0.1)"}]})
    >>> net = Net(Model, nn.MSELoss, max_epochs=1, train_split=None, verbose=0, callbacks=[callback])
    >>> net = net.fit(torch.randn(4, 5, 2), torch.randn(4, 5, 3))
    >>> callback.attachment.step_count
    1
    """

    module_: torch.nn.Module

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for base in cls.__mro__[cls.__mro__.index(RegularizedLoss) + 1 :]:
            if "get_loss" in vars(base) and base.__module__.partition(".")[0] != "skorch":
                raise TypeError(
                    f"{cls.__name__}: RegularizedLoss stands before {base.__name__}, whose get_loss would not see the "
                    f"penalty; derive {base.__name__} from RegularizedLoss and skorch's class instead"
                )

    def get_loss(self, *args: Any, **options: Any) -> Tensor:
        loss: Tensor = super().get_loss(*args, **options)  # type: ignore[misc]  # skorch's, whose class comes next
        if self.module_.training and torch.is_grad_enabled():
            for module in self.module_.modules():
                for attachment in regkit.attachments(module):
                    loss = loss + attachment.penalty()
        return loss
