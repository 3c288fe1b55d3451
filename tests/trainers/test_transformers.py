"""`regkit.attach` alone in Hugging Face Transformers' Trainer: weight penalties, proximal steps and constraints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

import regkit
from tests.support.loops import assert_equal_weights
from tests.support.trainers.text_trainer import DECAY, TextModel, make_text_model, texts, train_by_hand, trained

pytestmark = pytest.mark.slow

WEIGHTS = {"role": ["kernel", "recurrent"]}  # the Trainer's own weight decay leaves biases out
L2 = {"target": WEIGHTS, "penalty": {"kind": "l2", "strength": DECAY / 2}}
ACCUMULATED = pytest.mark.parametrize("accumulation", [1, 3])


def own_loss(model: TextModel, batch: dict[str, Tensor], window: list[dict[str, Tensor]]) -> Tensor:
    """What one batch of a step adds to the loss, where the model does not divide by the words of the step itself."""
    return model(**batch).loss / len(window)


def decayed_groups(model: TextModel, decay: float) -> list[dict[str, Any]]:
    named = dict(model.rnn.named_parameters())
    return [
        {"params": [p for name, p in named.items() if "bias" not in name], "weight_decay": decay},
        {"params": [p for name, p in named.items() if "bias" in name], "weight_decay": 0.0},
    ]


@pytest.mark.works_with("Transformers: weights")
@ACCUMULATED
def test_decoupled_l2_equals_the_weight_decay_of_the_trainers_default_fused_adamw(accumulation, tmp_path):
    bare, decayed, regularized = make_text_model(), make_text_model(), make_text_model()
    trained(bare, tmp_path, gradient_accumulation_steps=accumulation)
    trained(decayed, tmp_path, gradient_accumulation_steps=accumulation, weight_decay=DECAY)
    attachment = regkit.attach(regularized, {"rules": [{**L2, "via": "decoupled"}]})
    trainer = trained(regularized, tmp_path, gradient_accumulation_steps=accumulation)

    assert trainer.optimizer.optimizer.defaults["fused"]
    assert_equal_weights(decayed, regularized)
    assert attachment.step_count == trainer.state.global_step == {1: 8, 3: 4}[accumulation]
    assert not torch.allclose(bare.rnn.weight_hh_l0, regularized.rnn.weight_hh_l0, atol=1e-4)


@pytest.mark.works_with("Transformers: weights")
@ACCUMULATED
def test_l2_in_the_trainers_default_fused_adamw_equals_adam_with_weight_decay(accumulation, tmp_path):
    decayed, regularized = make_text_model(), make_text_model()
    adam = torch.optim.Adam(decayed_groups(decayed, DECAY), lr=0.05)
    trained(decayed, tmp_path, gradient_accumulation_steps=accumulation, optimizers=(adam, None))
    regkit.attach(regularized, {"rules": [L2]})
    trained(regularized, tmp_path, gradient_accumulation_steps=accumulation)
    assert_equal_weights(decayed, regularized)


@pytest.mark.works_with("Transformers: weights")
@ACCUMULATED
@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.SGD(groups, lr=0.5, momentum=0.9),
        lambda groups: torch.optim.SGD(groups, lr=0.5, fused=True),
        lambda groups: torch.optim.Adam(groups, lr=0.05),
    ],
    ids=["SGD", "SGD fused", "Adam"],
)
def test_l2_equals_weight_decay_in_an_optimizer_that_the_trainer_is_given(make, accumulation, tmp_path):
    decayed, regularized = make_text_model(), make_text_model()
    given = make(decayed_groups(decayed, DECAY))
    trained(decayed, tmp_path, gradient_accumulation_steps=accumulation, optimizers=(given, None))
    regkit.attach(regularized, {"rules": [L2]})
    given = make(decayed_groups(regularized, 0.0))
    trained(regularized, tmp_path, gradient_accumulation_steps=accumulation, optimizers=(given, None))
    assert_equal_weights(decayed, regularized)
    assert given.param_groups[0]["lr"] == 0  # the learning rate was scheduled: from its start to 0


@pytest.mark.works_with("Transformers: weights")
def test_it_does_not_matter_whether_the_trainer_is_made_before_or_after_attach(tmp_path):
    before, after = make_text_model(), make_text_model()
    regkit.attach(before, {"rules": [L2]})
    trained(before, tmp_path)

    class Late(Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            regkit.attach(self.model, {"rules": [L2]})
            return super().train(*args, **kwargs)

    trained(after, tmp_path, Late)
    assert_equal_weights(before, after, 0.0)


def projected(model: TextModel, lr: float) -> None:
    """Max-norm by hand: rows longer than 0.8 are shortened to it."""
    for w in (model.rnn.weight_ih_l0, model.rnn.weight_hh_l0):
        w.mul_((0.8 / w.norm(dim=1, keepdim=True)).clamp(max=1.0))


def shrunk(model: TextModel, lr: float) -> None:
    """The proximal step of 2·Σ|w| by hand: soft thresholding."""
    for w in (model.rnn.weight_ih_l0, model.rnn.weight_hh_l0):
        w.copy_(w.sign() * (w.abs() - lr * 2.0).clamp(min=0))


@pytest.mark.parametrize(
    ("rule", "by_hand"),
    [
        pytest.param(
            {"target": WEIGHTS, "constraint": "max_norm(0.8)"},
            projected,
            marks=pytest.mark.works_with("Transformers: weights"),
        ),
        pytest.param(
            {"target": WEIGHTS, "penalty": "l1(2.0)", "via": "proximal"},
            shrunk,
            marks=pytest.mark.works_with("Transformers: weights"),
        ),
    ],
    ids=["max_norm", "proximal"],
)
@ACCUMULATED
def test_constraints_and_proximal_steps_act_once_after_each_step_as_by_hand(rule, by_hand, accumulation, tmp_path):
    reference, regularized = make_text_model(), make_text_model()
    train_by_hand(reference, own_loss, accumulation, after=by_hand)
    attachment = regkit.attach(regularized, {"rules": [rule]})
    trained(regularized, tmp_path, gradient_accumulation_steps=accumulation)
    assert_equal_weights(reference, regularized)
    if "constraint" in rule:
        assert attachment.violations()["rules/0"] < 1e-12
        norms = regularized.rnn.weight_hh_l0.norm(dim=1)
        assert ((norms - 0.8).abs() < 1e-9).any()  # or the constraint would have done nothing
    else:
        assert (regularized.rnn.weight_hh_l0 == 0).sum() > 5


@pytest.mark.works_with("Transformers: weights")
def test_under_bf16_autocast_l2_equals_weight_decay_and_max_norm_holds(tmp_path):
    decayed, regularized, bounded = (make_text_model().float() for _ in range(3))
    trained(decayed, tmp_path, bf16=True, gradient_accumulation_steps=3, weight_decay=DECAY)
    regkit.attach(regularized, {"rules": [{**L2, "via": "decoupled"}]})
    trainer = trained(regularized, tmp_path, bf16=True, gradient_accumulation_steps=3)
    assert trainer.accelerator.mixed_precision == "bf16"
    assert_equal_weights(decayed, regularized, 1e-6)

    attachment = regkit.attach(bounded, {"rules": [{"target": WEIGHTS, "constraint": "max_norm(0.8)"}]})
    trained(bounded, tmp_path, bf16=True)
    assert attachment.violations()["rules/0"] < 1e-6
    assert (bounded.rnn.weight_hh_l0.norm(dim=1) > 0.8 - 1e-6).any()


@pytest.mark.works_with("Transformers: weights")
def test_a_frozen_embedding_and_an_evaluation_in_the_middle_change_nothing(tmp_path):
    alone, evaluated = make_text_model(), make_text_model()
    rules = {"rules": [L2, {"target": WEIGHTS, "constraint": "max_norm(0.8)"}]}
    regkit.attach(alone, rules)
    trained(alone, tmp_path)
    attachment = regkit.attach(evaluated, rules)
    trained(evaluated, tmp_path, eval_strategy="steps", eval_steps=1, eval_dataset=texts(3))
    assert_equal_weights(alone, evaluated, 0.0)
    assert attachment.step_count == 8
