"""Callbacks that are copied, pickled, saved with hyperparameters, or handed on by libraries that copy models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import regkit
from regkit.integrations import lightning, skorch
from regkit.integrations.transformers import RegularizationCallback, RegularizedTrainer
from tests.support.loops import Batches, assert_equal_weights
from tests.support.trainers.lightning_activity import SPEC, watched
from tests.support.trainers.lightning_runs import SILENCED, Automatic, by_hand, fit, loader, trainer

pytestmark = SILENCED

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
}
copied_by = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
lightning_row = pytest.mark.works_with("Lightning: RegularizationCallback")


def test_an_attachment_cannot_be_copied_and_python_is_told_so_in_its_own_way():
    attachment = regkit.attach(nn.GRU(2, 3), {"rules": [{"penalty": "l2(0.1)"}]})
    for copied in COPIES.values():
        with pytest.raises(TypeError, match="its model can") as caught:
            copied(attachment)
        assert isinstance(caught.value, regkit.RegkitError)


@lightning_row
@copied_by
def test_a_callback_can_be_copied_after_a_fit_and_begins_anew_on_another_model(copied, make_model, batches):
    callback = lightning.RegularizationCallback(SPEC)
    fit(Automatic(make_model()), batches, callbacks=[callback])
    twin = copied(callback)
    reference, regularized = make_model(), make_model()
    by_hand(reference, batches, penalty=watched(reference))
    fit(Automatic(regularized), batches, callbacks=[twin])
    assert_equal_weights(reference, regularized)
    assert twin.attachment.step_count == callback.attachment.step_count == len(batches)  # from 0 each
    assert twin.attachment is not callback.attachment


@lightning_row
@copied_by
def test_a_callback_can_be_copied_during_a_fit_and_the_copy_is_no_part_of_it(copied, make_model, batches):
    twins: list[Any] = []

    class Copying(Automatic):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            twins.append(copied(callback))

    callback = lightning.RegularizationCallback(SPEC)
    reference, regularized = make_model(), make_model()
    by_hand(reference, batches, penalty=watched(reference))
    fit(Copying(regularized), batches, callbacks=[callback])
    assert_equal_weights(reference, regularized)
    assert all(twin.state_dict() == {} for twin in twins)


class Keeping(Automatic):
    """A model that keeps its trainer's callbacks, as forecasting libraries do."""

    def __init__(self, model: nn.Module, callbacks: list[Any]) -> None:
        super().__init__(model)
        self.save_hyperparameters(ignore=["model"])
        self.__dict__["callbacks"] = callbacks

    def train_on(self, batches: Batches) -> None:
        fit(self, batches, callbacks=self.__dict__["callbacks"])


@lightning_row
@pytest.mark.parametrize("copied", [COPIES["deepcopy"], COPIES["pickle"]])
@pytest.mark.parametrize("fitted", [False, True])
def test_a_model_that_keeps_its_callbacks_is_copied_with_them_and_its_copy_goes_on(fitted, copied, make_model, batches):
    callback = lightning.RegularizationCallback(SPEC)
    model, reference = Keeping(make_model(), [callback]), make_model()
    if fitted:
        model.train_on(batches)
    model._trainer = None  # or Lightning's own Trainer would have to be copied, too
    twin = copied(model)
    (copy_of_callback,) = twin.__dict__["callbacks"]
    reference.load_state_dict(twin.model.state_dict())
    twin.train_on(batches)
    by_hand(reference, batches, penalty=watched(reference))
    assert_equal_weights(reference, twin.model)
    assert copy_of_callback.attachment.step_count == len(batches) * (2 if fitted else 1)
    assert len(regkit.attachments(twin)) == 1


@lightning_row
def test_a_callback_finds_the_copy_that_was_trained(make_model, batches):
    callback = lightning.RegularizationCallback(SPEC)
    kept = Keeping(make_model(), [callback])
    with pytest.raises(regkit.RegkitError, match="nothing is attached yet"):
        _ = callback.attachment
    trained = copy.deepcopy(kept)
    trained.train_on(batches)
    assert callback.attachment is trained.__dict__["callbacks"][0].attachment
    assert regkit.attachments(trained) == (callback.attachment,)


@lightning_row
def test_a_model_with_callbacks_among_its_hyperparameters_is_saved_and_loaded(make_model, batches, tmp_path):
    model = Keeping(make_model(), [lightning.RegularizationCallback(SPEC)])
    run = trainer(callbacks=model.__dict__["callbacks"])
    run.fit(model, loader(batches))
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Keeping.load_from_checkpoint(tmp_path / "model.ckpt", model=make_model(), weights_only=False)
    assert_equal_weights(model.model, loaded.model)
    loaded.train_on(batches)
    assert loaded.__dict__["callbacks"][0].attachment.step_count == len(batches)


def text_trainer(folder: Path, model: nn.Module, cls: type = transformers.Trainer, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=2, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True
    )
    data = [{"x": torch.randn(5, 2)} for _ in range(16)]
    return cls(model, arguments, train_dataset=data, **options)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.rnn(x)[0].square().mean()}


@pytest.mark.works_with("Transformers: weights")
@copied_by
def test_a_callback_of_a_trainer_is_copied_after_training(copied, tmp_path):
    callback = RegularizationCallback({"rules": [{"penalty": "l2(0.1)"}]})
    model = Text()
    text_trainer(tmp_path, model, callbacks=[callback]).train()
    twin = copied(callback)
    assert twin.spec == callback.spec
    trained = copy.deepcopy(model)  # which has the rules, and the callback takes these over
    text_trainer(tmp_path, trained, callbacks=[twin]).train()
    assert regkit.attachments(trained) == (twin.attachment,)
    assert twin.attachment.step_count == 2
    assert regkit.attachments(model) == (callback.attachment,)


@pytest.mark.works_with("Transformers: activity penalties")
def test_a_callback_of_a_trainer_finds_the_copy_that_was_trained(tmp_path):
    callback = RegularizationCallback({"rules": [{"penalty": "l2(0.1)"}]})
    text_trainer(tmp_path, Text(), callbacks=[copy.deepcopy(callback)]).train()
    assert callback.attachment.step_count == 2
    run = text_trainer(tmp_path, Text(), RegularizedTrainer, spec={"rules": [{"penalty": "activity_l2(0.1)"}]})
    run.train()
    assert pickle.loads(pickle.dumps(run.regularization)).spec == run.regularization.spec


@pytest.mark.works_with("skorch: weights")
@copied_by
def test_the_callback_of_a_net_is_copied_before_training(copied):
    callback = skorch.RegularizationCallback({"rules": [{"penalty": "l2(0.1)"}]})
    assert copied(callback).spec == callback.spec
