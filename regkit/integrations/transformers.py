"""Hugging Face Transformers: the rules of a document in its Trainer, in its logs and in its checkpoints.

Weight rules need none of this: `regkit.attach(model, spec)` acts at the Trainer's own optimizer steps. This adds the
activity penalties, a value of each rule in the Trainer's log, and a step count that a resumed run goes on from:

    trainer = RegularizedTrainer(model, args, train_dataset=data, spec="spec.json")

A Trainer of your own becomes one by `class Mine(RegularizedTrainer, YourTrainer)`. Where weight rules are all there is,
`Trainer(..., callbacks=[RegularizationCallback("spec.json")])` leaves the Trainer as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

import regkit
from regkit.integrations.copies import Lineage, take_over

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("regkit.integrations.transformers needs pip install 'transformers[torch]'") from error

Document = str | Path | dict[str, Any] | regkit.Spec
"""A document, as `regkit.load` takes one: a path, a JSON text, a dict or a Spec."""

_KEY: Final = "regkit"


class RegularizationCallback(TrainerCallback):
    """A callback that attaches a document as training begins, and keeps the state in the Trainer's checkpoints.

    Each `train()` attaches anew and counts steps from 0, as the Trainer and its learning rate do; one that resumes from
    a checkpoint goes on from the count in it. The state lies in `trainer_state.json`. One callback for each Trainer: a
    document has room for all rules. A copied or pickled callback has the document, and nothing of a training.

    detach: take the rules off the model when training has ended. Left out, they stay for loops of your own.

    >>> import tempfile
    >>> from transformers import Trainer, TrainingArguments
    >>> from regkit.integrations.transformers import RegularizationCallback
    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.rnn = nn.GRU(2, 3, batch_first=True)
    ...     def forward(self, x):
    ...         return {"loss": self.rnn(x)[0].square().mean()}
    >>> callback = RegularizationCallback({"rules": [{"penalty": "l2(1e-4)"}]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    ...     data = [{"x": torch.randn(5, 2)} for _ in range(8)]
    ...     arguments = TrainingArguments(folder, max_steps=2, use_cpu=True, **quiet)
    ...     trainer = Trainer(Model(), arguments, train_dataset=data, callbacks=[callback])
    ...     result = trainer.train()
    {'train_runtime': ...}
    >>> callback.attachment.step_count
    2
    """

    def __init__(self, spec: Document, *, registry: regkit.Registry | None = None, detach: bool = False) -> None:
        self.spec = regkit.load(spec, registry=registry)
        self.registry = registry
        self.detach = detach
        self._lineage = Lineage()
        self._attachment: regkit.Attachment | None = None

    @property
    def attachment(self) -> regkit.Attachment:
        """The rules in force, also of a copy of the callback. Raises RegkitError before training has begun."""
        attachment = self._attachment or self._lineage.attachment
        if attachment is None:
            raise regkit.RegkitError("nothing is attached yet: the Trainer attaches as train() begins")
        return attachment

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_attachment": None}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._attachment is not None:
            self._attachment.detach()
        model: nn.Module = kwargs["model"]
        plan = regkit.resolve(model, self.spec, registry=self.registry)
        take_over(model, plan)
        self._attachment = self._lineage.attachment = regkit.attach(model, plan)
        saved = _states(state).get(_KEY)
        if saved is not None:
            self._attachment.load_state_dict(saved)
        self._keep(state)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._keep(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.detach:
            self.attachment.detach()

    def _keep(self, state: TrainerState) -> None:
        # Not through ExportableState: what that restores is another callback, with the document of the checkpoint.
        _states(state)[_KEY] = self.attachment.state_dict()


def _states(state: TrainerState) -> dict[str, Any]:
    """The callbacks' states that the Trainer saves, by name; Transformers annotates a list."""
    return cast("dict[str, Any]", state.stateful_callbacks)


class RegularizedTrainer(Trainer):
    """A Trainer that adds the penalty to the training loss, and the rules' values to the log.

    spec, registry, detach: as of RegularizationCallback; all else goes to the Trainer.

    To the loss of an optimizer step comes (1/K) Σ_k penalty_k over its K batches, be they fewer at the end of an epoch,
    and whoever divides: the Trainer divides what `compute_loss` returns by K only where nobody is known to have divided
    by `num_items_in_batch` before. The loss in evaluation is the model's own.

    >>> import tempfile
    >>> from transformers import TrainingArguments
    >>> from regkit.integrations.transformers import RegularizedTrainer
    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.rnn = nn.GRU(2, 3, batch_first=True)
    ...     def forward(self, x):
    ...         return {"loss": self.rnn(x)[0].square().mean()}
    >>> spec = {"rules": [{"penalty": "activity_l2(0.1)"}]}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    ...     data = [{"x": torch.randn(5, 2)} for _ in range(8)]
    ...     arguments = TrainingArguments(folder, max_steps=2, use_cpu=True, **quiet)
    ...     trainer = RegularizedTrainer(Model(), arguments, train_dataset=data, spec=spec)
    ...     result = trainer.train()
    {'train_runtime': ...}
    >>> trainer.attachment.step_count
    2
    """

    def __init__(
        self,
        *args: Any,
        spec: Document,
        registry: regkit.Registry | None = None,
        detach: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.regularization = RegularizationCallback(spec, registry=registry, detach=detach)
        self.add_callback(self.regularization)

    @property
    def attachment(self) -> regkit.Attachment:
        """The rules in force. Raises RegkitError before training has begun."""
        return self.regularization.attachment

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The Trainer's loss; where gradients are asked for, with the penalty of this batch."""
        computed: Tensor | tuple[Tensor, Any] = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not torch.is_grad_enabled():
            return computed
        penalty = self.attachment.penalty()
        if self._is_whole(num_items_in_batch):
            penalty = penalty / self.current_gradient_accumulation_steps
        if isinstance(computed, tuple):
            return computed[0] + penalty, computed[1]
        return computed + penalty

    def _is_whole(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the Trainer leaves the loss undivided by the number of batches in the step."""
        scaled: bool | None = getattr(self, "loss_is_scaled_for_ga", None)  # older Trainers have no such attribute
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return scaled if scaled is not None else counted or self.compute_loss_func is not None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log; in training, with `regkit/<rule>`: a penalty's value, or a constraint's violation."""
        if self.is_in_train and "loss" in logs:
            rules = {**self.attachment.values(), **self.attachment.violations()}
            logs = {**logs, **{f"regkit/{key}": float(value) for key, value in rules.items()}}
        super().log(logs, start_time)
