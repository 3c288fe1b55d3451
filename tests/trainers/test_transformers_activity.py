"""Activity penalties, logs and lifecycle in Transformers' Trainer: the integration against loops written by hand."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

import regkit
from regkit.integrations.transformers import RegularizationCallback, RegularizedTrainer
from tests.support.loops import assert_equal_weights
from tests.support.trainers.text_trainer import (
    CountingModel,
    TextModel,
    items,
    make_text_model,
    summed,
    texts,
    train_by_hand,
    trained,
)

pytestmark = [pytest.mark.slow, pytest.mark.works_with("Transformers: activity penalties")]
SPEC = {
    "rules": [
        {"name": "ar", "penalty": "activity_l2(20.0)"},
        {"name": "tar", "penalty": "temporal(10.0)"},
        {"name": "l1", "target": {"role": "recurrent"}, "penalty": "l1(0.05)", "via": "loss"},
        {"name": "norm", "target": {"role": "kernel"}, "constraint": "max_norm(0.8)"},
    ]
}
ACCUMULATED = pytest.mark.parametrize("accumulation", [1, 3])
Batch = dict[str, Tensor]


def penalty(model: TextModel, h: Tensor) -> Tensor:
    """The three penalties of SPEC by hand.  h: (batch, time, units)."""
    smooth = 20.0 * h.square().mean() + 10.0 * (h[:, 1:] - h[:, :-1]).square().mean()
    return smooth + 0.05 * model.rnn.weight_hh_l0.abs().sum()


def per_batch(model: TextModel, batch: Batch, window: list[Batch]) -> Tensor:
    """The mean over the batches of a step: of the loss, and of the penalty."""
    outputs = model(**batch)
    return (outputs.loss + penalty(model, outputs.logits)) / len(window)


def per_item(model: TextModel, batch: Batch, window: list[Batch]) -> Tensor:
    """The mean over all words of a step for the loss; for the penalty, the mean over its batches."""
    h = model.logits(batch["input_ids"])
    words = items([one["labels"] for one in window])
    return summed(h, batch["labels"]) / words + penalty(model, h) / len(window)


def undivided(model: TextModel, batch: Batch, window: list[Batch]) -> Tensor:
    """What the Trainer makes of a loss that ignores `num_items_in_batch` while the model takes it: a sum."""
    h = model.logits(batch["input_ids"])
    return summed(h, batch["labels"]) / items([batch["labels"]]) + penalty(model, h) / len(window)


def projected(model: TextModel, lr: float) -> None:
    w = model.rnn.weight_ih_l0
    w.mul_((0.8 / w.norm(dim=1, keepdim=True)).clamp(max=1.0))


def loss_over_items(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    return summed(outputs.logits, labels) / num_items_in_batch


class UncountedModel(TextModel):
    """It takes `num_items_in_batch`, but is not given any: the Trainer counts in `labels` alone."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, kwargs.get("targets", labels))


def renamed(examples: list[Batch]) -> Batch:
    return {name: torch.stack([one[old] for one in examples]) for name, old in RENAMED.items()}


RENAMED = {"input_ids": "input_ids", "targets": "labels"}


class MeansTrainer(Trainer):
    """A user's own loss: a mean over each batch, whatever the model takes."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        loss = summed(outputs.logits, inputs["labels"]) / items([inputs["labels"]])
        return (loss, outputs) if return_outputs else loss


class TellingTrainer(MeansTrainer):
    """The same, telling the Trainer to divide it."""

    loss_is_scaled_for_ga = False


class DividingTrainer(MeansTrainer):
    """The same, divided by itself, and telling so."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) / self.current_gradient_accumulation_steps


@ACCUMULATED
@pytest.mark.parametrize(
    ("kind", "base", "options", "by_hand"),
    [
        pytest.param(TextModel, Trainer, {}, per_batch, id="plain model"),
        pytest.param(CountingModel, Trainer, {}, per_item, id="model that takes num_items_in_batch"),
        pytest.param(UncountedModel, Trainer, {"data_collator": renamed}, per_batch, id="model with no items to count"),
        pytest.param(TextModel, Trainer, {"compute_loss_func": loss_over_items}, per_item, id="compute_loss_func"),
        pytest.param(TextModel, MeansTrainer, {}, per_batch, id="own loss"),
        pytest.param(CountingModel, MeansTrainer, {}, undivided, id="own loss that nobody divides"),
        pytest.param(CountingModel, TellingTrainer, {}, per_batch, id="own loss that the Trainer divides"),
        pytest.param(TextModel, DividingTrainer, {}, per_batch, id="own loss that divides itself"),
    ],
)
def test_the_penalty_is_the_mean_over_the_batches_of_a_step_whoever_divides_the_loss(
    kind, base, options, by_hand, accumulation, tmp_path
):
    """Clipping, a scheduled learning rate, and a last step of fewer batches included."""

    class Regularized(RegularizedTrainer, base):
        pass

    reference, regularized = make_text_model(kind), make_text_model(kind)
    train_by_hand(reference, by_hand, accumulation, after=projected)
    trainer = trained(
        regularized, tmp_path, Regularized, spec=SPEC, gradient_accumulation_steps=accumulation, **options
    )
    assert_equal_weights(reference, regularized)
    assert trainer.attachment.step_count == trainer.state.global_step == {1: 8, 3: 4}[accumulation]


def test_evaluating_while_training_changes_nothing_and_its_loss_is_the_models_own(tmp_path):
    alone, evaluated = make_text_model(CountingModel), make_text_model(CountingModel)
    trained(alone, tmp_path, RegularizedTrainer, spec=SPEC)
    trainer = trained(
        evaluated, tmp_path, RegularizedTrainer, spec=SPEC, eval_strategy="steps", eval_steps=1, eval_dataset=texts(3)
    )
    assert_equal_weights(alone, evaluated, 0.0)
    last = [logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs][-1]
    batch = {key: torch.stack([one[key] for one in texts(3)]) for key in texts(1)[0]}
    with torch.no_grad():
        assert last == pytest.approx(float(evaluated(**batch).loss), abs=1e-6)


@pytest.mark.works_with("Transformers: activity penalties")
def test_the_trainers_log_has_one_value_for_each_rule_and_reporters_see_it(tmp_path):
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    model = make_text_model()
    trainer = trained(
        model,
        tmp_path,
        RegularizedTrainer,
        spec=SPEC,
        callbacks=[Reporter()],
        logging_strategy="steps",
        logging_steps=1,
        eval_strategy="epoch",
        eval_dataset=texts(3),
    )
    rules = {"regkit/ar", "regkit/tar", "regkit/l1", "regkit/norm"}
    logged = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert len(logged) == 8
    assert all(rules <= logs.keys() for logs in logged)
    assert not any(rules & logs.keys() for logs in trainer.state.log_history if "loss" not in logs)
    assert [logs for logs in seen if "loss" in logs] == [
        {key: value for key, value in logs.items() if key != "step"} for logs in logged
    ]
    values = {**trainer.attachment.values(), **trainer.attachment.violations()}
    assert {key: logged[-1][f"regkit/{key}"] for key in values} == {key: float(v) for key, v in values.items()}
    assert logged[-1]["regkit/l1"] == pytest.approx(0.05 * float(model.rnn.weight_hh_l0.detach().abs().sum()))


def test_padding_is_left_out_where_a_users_own_trainer_names_the_lengths(tmp_path):
    class Padded(RegularizedTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with self.attachment.lengths(inputs["labels"].ne(-100).sum(1)):
                return super().compute_loss(model, inputs, *args, **kwargs)

    def by_hand(model: TextModel, batch: Batch, window: list[Batch]) -> Tensor:
        outputs = model(**batch)
        return (outputs.loss + 20.0 * outputs.logits[batch["labels"] != -100].square().mean()) / len(window)

    reference, regularized = make_text_model(), make_text_model()
    train_by_hand(reference, by_hand, 3)
    spec = {"rules": [{"penalty": "activity_l2(20.0)"}]}
    trained(regularized, tmp_path, Padded, spec=spec, gradient_accumulation_steps=3)
    assert_equal_weights(reference, regularized)


def test_under_bf16_autocast_the_penalty_is_that_of_the_outputs_in_float32(tmp_path):
    def by_hand(model: TextModel, batch: Batch, window: list[Batch]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(**batch)
        assert outputs.logits.dtype == torch.bfloat16
        return (outputs.loss + 20.0 * outputs.logits.float().square().mean()) / len(window)

    reference, regularized = make_text_model().float(), make_text_model().float()
    train_by_hand(reference, by_hand, 3)
    spec = {"rules": [{"penalty": "activity_l2(20.0)"}]}
    trained(regularized, tmp_path, RegularizedTrainer, spec=spec, gradient_accumulation_steps=3, bf16=True)
    assert_equal_weights(reference, regularized, 1e-6)


def test_the_plain_trainer_with_an_activity_rule_is_an_error_and_not_silence(tmp_path):
    with pytest.raises(regkit.StepError, match=r"'ar'.*not consumed.*penalty\(\)"):
        trained(make_text_model(), tmp_path, callbacks=[RegularizationCallback(SPEC)])


@pytest.mark.parametrize("detach", [False, True])
def test_it_detaches_at_the_end_of_training_on_request(detach, tmp_path):
    model = make_text_model()
    trainer = trained(model, tmp_path, RegularizedTrainer, spec=SPEC, detach=detach)
    assert bool(model.rnn._forward_hooks) is not detach
    assert trainer.attachment.step_count == 8
    if detach:
        with pytest.raises(regkit.RegkitError, match="detached"):
            trainer.attachment.penalty()
    else:
        trainer.attachment.penalty()


@pytest.mark.parametrize("detach", [False, True])
def test_training_again_attaches_anew_and_counts_from_0_as_the_trainer_does(detach, tmp_path):
    trainer = trained(make_text_model(), tmp_path, RegularizedTrainer, spec=SPEC, detach=detach)
    first = trainer.attachment
    trainer.train()
    assert trainer.attachment is not first
    assert trainer.attachment.step_count == trainer.state.global_step == 8


def test_a_trainer_may_load_a_checkpoint_into_a_model_that_it_has_trained_already(tmp_path):
    once, twice = make_text_model(), make_text_model()
    trained(once, tmp_path, RegularizedTrainer, spec=SPEC)
    trainer = trained(twice, tmp_path, RegularizedTrainer, spec=SPEC, save_strategy="epoch")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.attachment.step_count == 8
    assert_equal_weights(once, twice, 0.0)


def test_a_model_made_by_model_init_is_the_one_that_is_regularized(tmp_path):
    reference = make_text_model()
    train_by_hand(reference, per_batch, after=projected)
    trainer = trained(None, tmp_path, RegularizedTrainer, spec=SPEC, model_init=lambda: make_text_model())
    assert_equal_weights(reference, trainer.model)


def test_mistakes_are_told_early_and_clearly(tmp_path, monkeypatch):
    with pytest.raises(regkit.SpecError, match="nuclear"):
        RegularizationCallback({"rules": [{"penalty": "nuclear(0.1)"}]})
    with pytest.raises(regkit.RegkitError, match=r"train\(\) begins"):
        RegularizationCallback(SPEC).attachment  # noqa: B018  # that it raises is the point
    spec = {"rules": [{"target": {"module": "decoder"}, "penalty": "l2(0.1)"}]}
    with pytest.raises(regkit.ResolveError, match="decoder"):
        trained(make_text_model(), tmp_path, RegularizedTrainer, spec=spec)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "regkit.integrations.transformers")
    with pytest.raises(ImportError, match=r"regkit\.integrations\.transformers needs pip install 'transformers"):
        importlib.import_module("regkit.integrations.transformers")
