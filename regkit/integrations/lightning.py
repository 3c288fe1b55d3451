"""Lightning: the rules of a document in its Trainer, in its logs and in its checkpoints.

Weight rules need none of this: `regkit.attach(model, spec)` acts at the Trainer's own optimizer steps. This adds the
activity penalties, a value of each rule in the Trainer's log, and a state that a resumed run goes on from:

    trainer = Trainer(callbacks=[RegularizationCallback("spec.json")])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor
from torch.optim import Optimizer

import regkit
from regkit.integrations.copies import Lineage, take_over

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # Lightning has two names, and the Trainer of each takes only callbacks of its own class. This one is of both.
    _names = [name for name in ("lightning.pytorch", "pytorch_lightning") if find_spec(name.partition(".")[0])]
    if not _names:
        raise ImportError("regkit.integrations.lightning needs pip install lightning")
    Callback = type("Callback", tuple(import_module(name).Callback for name in _names), {})


_OF_THE_MODULE: Final = ("log", "log_dict")
"""Methods of the module that is trained, which Lightning gives to each of its callbacks."""


class RegularizationCallback(Callback):
    """A callback that attaches a document as a fit starts, adds the penalty to every loss, and keeps the state.

    The losses are those that Lightning backpropagates: what `training_step` returns, or gives to `manual_backward`.
    What is logged as "prefix/rule" is the value of a penalty, or the violation of a constraint. Each fit attaches anew;
    one of the same model, or a copy of it, counts steps from where the last one stopped, one from a checkpoint from the
    count in it. A copied or pickled callback has the document, and nothing of a fit.

    divided_by: where a manual `training_step` backpropagates several forward passes before a step, what it divides each
        loss by; 1 where it adds them up. Automatic optimization divides by `accumulate_grad_batches` on its own.
    detach: take the rules off the model as the fit ends. Left out, they stay for loops of your own.

    Raises SpecError for a bad document; what `regkit.attach` raises, as a fit starts; StepError where it cannot be told
    how much of the penalty belongs to a loss.

    >>> from lightning.pytorch import LightningModule, Trainer
    >>> from regkit.integrations.lightning import RegularizationCallback
    >>> from torch.utils.data import DataLoader
    >>> class Model(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.rnn = nn.GRU(2, 3)
    ...     def training_step(self, batch):
    ...         return self.rnn(batch)[0].square().mean()
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> callback = RegularizationCallback({"rules": [{"penalty": "l2(1e-4)"}]})
    >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    >>> trainer = Trainer(max_epochs=1, callbacks=[callback], accelerator="cpu", enable_model_summary=False, **quiet)
    >>> trainer.fit(Model(), DataLoader(torch.randn(6, 2), batch_size=3))
    >>> callback.attachment.step_count
    2
    """

    def __init__(
        self,
        spec: str | Path | dict[str, Any] | regkit.Spec,
        *,
        registry: regkit.Registry | None = None,
        divided_by: float | None = None,
        prefix: str = "regkit",
        detach: bool = False,
    ) -> None:
        if divided_by is not None and not divided_by > 0:
            raise ValueError(f"divided_by is greater than 0, got {divided_by}")
        self.spec = regkit.load(spec, registry=registry)
        self.registry = registry
        self.divided_by = divided_by
        self.prefix = prefix
        self.detach = detach
        self._lineage = Lineage()
        self._attachment: regkit.Attachment | None = None
        self._module: LightningModule | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._undo: list[Callable[[], object]] = []
        self._has_penalty = False

    @property
    def attachment(self) -> regkit.Attachment:
        """The rules of the last fit, also of a copy of the callback. Raises RegkitError before any has started."""
        attachment = self._attachment or self._lineage.attachment
        if attachment is None:
            raise regkit.RegkitError("nothing is attached yet: the callback attaches as Trainer.fit starts")
        return attachment

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: one for key, one in vars(self).items() if key not in _OF_THE_MODULE}
        return {**kept, "_attachment": None, "_module": None, "_loaded": None, "_undo": [], "_has_penalty": False}

    # --- from the start of a fit to its end, good or bad -------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._attachment is not None:
            if self._loaded is None and self._module is pl_module:
                self._loaded = self._attachment.state_dict()
            self._attachment.detach()
        plan = regkit.resolve(pl_module, self.spec, registry=self.registry)
        copied = take_over(pl_module, plan)
        self._loaded = copied if self._loaded is None else self._loaded
        self._attachment = self._lineage.attachment = regkit.attach(pl_module, plan)
        self._module = pl_module
        self._join(trainer, pl_module)
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    def _leave(self) -> None:
        """Undo `_join`. Without a fit, as after a test, forget only the state that a test has loaded."""
        self._loaded = None
        if not self._undo:
            return
        while self._undo:
            self._undo.pop()()
        self.attachment.discard()
        if self.detach:
            self.attachment.detach()

    # --- the loss ----------------------------------------------------------------------------------------------------

    def _join(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the penalty into the losses of this Trainer.

        Every loss comes by `strategy.backward`, automatic or manual, before the precision plugin scales it: what is
        added here is scaled by whoever scales the loss. `on_before_backward` comes after the scaling and could add only
        in place, to a tensor that is the user's. Nothing is replaced on the module, which may be copied meanwhile.
        """
        strategy = trainer.strategy
        training_step, backward = strategy.training_step, strategy.backward

        def training_step_or_none(*args: Any, **kwargs: Any) -> Any:
            output = training_step(*args, **kwargs)
            if output is None and pl_module.automatic_optimization:  # this batch is skipped
                self.attachment.discard()
            return output

        def penalized_backward(loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Any:
            if loss.numel() != 1:
                raise regkit.StepError(f"the penalty is one number, and has no place in a loss of {tuple(loss.shape)}")
            penalty = self.attachment.penalty()
            # Lightning has divided an automatic loss already.
            share = trainer.accumulate_grad_batches if pl_module.automatic_optimization else self._manual_share(penalty)
            return backward(loss + penalty / share, optimizer, *args, **kwargs)

        self._replace(strategy, "training_step", training_step_or_none)
        self._replace(strategy, "backward", penalized_backward)
        self._has_penalty = False

    def _replace(self, owner: object, name: str, new: object) -> None:
        """Replace an attribute until the fit ends."""
        own = vars(owner)
        self._undo.append(partial(own.__setitem__, name, own[name]) if name in own else partial(own.pop, name))
        own[name] = new

    def _manual_share(self, penalty: Tensor) -> float:
        """The number by which the penalty is divided in a manual backward pass."""
        if penalty.requires_grad and self._has_penalty and self.divided_by is None:
            raise regkit.StepError(
                "manual_backward() was called for several forward passes before one optimizer step; say "
                "RegularizationCallback(..., divided_by=n) for losses that are divided by n, or 1 for a sum"
            )
        self._has_penalty = self._has_penalty or penalty.requires_grad
        return self.divided_by or 1.0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._has_penalty = False

    # --- the log and the checkpoints ---------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Only where Lightning writes what was logged, as its own callbacks ask: values take time, and nobody reads them
        # in between. They stay tensors, for which nothing waits.
        accumulating = pl_module.automatic_optimization and trainer.fit_loop._should_accumulate()
        if trainer._logger_connector.should_update_logs and not accumulating:
            rules = {**self.attachment.values(), **self.attachment.violations()}
            pl_module.log_dict(
                {f"{self.prefix}/{key}": value for key, value in rules.items()}, on_step=True, on_epoch=False
            )

    def state_dict(self) -> dict[str, Any]:
        return {} if self._attachment is None else self._attachment.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict
        if self._undo:  # some strategies load after the fit has started, most before
            self._restore()

    def _restore(self) -> None:
        if self._loaded is not None:
            self.attachment.load_state_dict(self._loaded)
            self._loaded = None
