"""NaN and infinity in weights, activations and gradients are told or shown, and regkit never spreads them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import regkit
from tests.support.loops import Batches, assert_equal_weights, loss_of, train

pytestmark = pytest.mark.works_with("NaN and infinite numbers")

RULES = {"rules": [{"name": "l2", "penalty": "l2(0.1)"}, {"name": "ball", "constraint": "max_norm(0.5)"}]}
BAD = [math.nan, math.inf, -math.inf]


def spoil(model: nn.Module, name: str = "weight_hh_l0", value: float = math.nan) -> None:
    with torch.no_grad():
        getattr(model.rnn, name)[1, 2] = value


@pytest.mark.parametrize("value", BAD)
def test_weights_that_are_not_finite_are_refused_at_attach_by_name(value, make_model):
    model = make_model(num_layers=2)
    spoil(model, "weight_hh_l0", value)
    spoil(model, "weight_ih_l1", value)
    with pytest.raises(
        regkit.AttachError, match=r"NaN or infinite numbers in rnn.weight_hh_l0, rnn.weight_ih_l1: init"
    ):
        regkit.attach(model, RULES)
    assert regkit.attachments(model) == ()
    model.load_state_dict(make_model(num_layers=2).state_dict())
    regkit.attach(model, RULES)


def test_weights_that_no_rule_is_on_are_no_concern(make_model):
    model = make_model()
    spoil(model, "weight_ih_l0")
    regkit.attach(model, {"rules": [{**rule, "target": {"role": "recurrent"}} for rule in RULES["rules"]]})


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()


@pytest.mark.parametrize("value", BAD)
def test_weights_that_have_become_so_are_told_at_the_first_step_and_every_64th(value, make_model):
    model = make_model()
    attachment = regkit.attach(model, RULES)
    optimizer = SGD(model.parameters(), lr=0.0)
    healthy = copy.deepcopy(model.state_dict())
    told = []
    for _ in range(130):
        model.load_state_dict(healthy)
        if attachment.step_count % 64 in (0, 1, 63):
            spoil(model, value=value)
        try:
            stepped(model, optimizer)
        except regkit.StepError as error:
            assert f"in rnn.weight_hh_l0 before step {attachment.step_count}" in str(error)  # noqa: PT017  # it counts
            told.append(attachment.step_count)
            attachment.load_state_dict({**attachment.state_dict(), "step_count": attachment.step_count + 1})
    assert told == [0, 64, 128]


def test_it_is_told_at_each_attempt_and_nothing_is_updated(make_model):
    model = make_model()
    attachment = regkit.attach(model, RULES)
    spoil(model)
    before = model.rnn.weight_ih_l0.detach().clone()
    for _ in range(3):
        with pytest.raises(regkit.StepError, match=r"NaN or infinite numbers in rnn.weight_hh_l0 before step 0"):
            stepped(model, SGD(model.parameters(), lr=1.0))
    assert attachment.step_count == 0
    assert torch.equal(model.rnn.weight_ih_l0, before)


@pytest.mark.parametrize(
    "spec", [RULES, {"rules": [{"penalty": "l2(0.1)", "via": "decoupled"}]}], ids=["grad", "decay"]
)
def test_a_weight_that_is_not_finite_spoils_no_other_between_two_looks(spec, make_model, batches):
    sound, model = make_model(), make_model()
    for one in (sound, model):
        regkit.attach(one, spec)
        optimizer = Adam(one.parameters(), lr=0.01)
        stepped(one, optimizer)
        if one is model:
            spoil(one)
        stepped(one, optimizer)
    assert model.rnn.weight_hh_l0.isnan().any()
    for name, p in model.named_parameters():
        if name != "rnn.weight_hh_l0":
            assert torch.equal(p, dict(sound.named_parameters())[name]), name
    rows = model.rnn.weight_hh_l0.isfinite().all(dim=1)
    assert rows.sum() == 15  # the other rows of the same weight, too
    assert torch.equal(model.rnn.weight_hh_l0[rows], sound.rnn.weight_hh_l0[rows])


@pytest.mark.parametrize("value", BAD)
def test_activations_that_are_not_finite_show_in_the_penalty_and_in_the_values(value, make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, {"rules": [{"name": "ar", "penalty": "activity_l2(1)"}]})
    model.rnn.register_forward_pre_hook(lambda module, given: (given[0] * value,))
    model(batches[0][0])
    assert not attachment.values()["ar"].isfinite()
    assert not attachment.penalty().isfinite()
    assert not attachment.values()["ar"].isfinite()


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_overflow_are_skipped_by_the_scaler_and_count_nothing(fused, make_model, batches):
    reference, model = make_model(), make_model()
    regkit.attach(reference, RULES)
    attachment = regkit.attach(model, RULES)
    with_overflows(reference, batches, overflows=False, fused=fused)
    with_overflows(model, batches, overflows=True, fused=fused)
    assert_equal_weights(reference, model)
    assert attachment.step_count == 4


def with_overflows(model: nn.Module, batches: Batches, *, overflows: bool, fused: bool) -> None:
    optimizer = SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for x, y in batches:
        for factor in (math.inf, 1.0) if overflows else (1.0,):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, x, y) * factor).backward()
            scaler.step(optimizer)
            scaler.update()


def test_a_gradient_that_is_not_finite_is_left_as_it_is_where_nobody_skips_it(make_model, batches):
    """regkit hides nothing: the weight that it spoils is told of at the next look."""
    model = make_model()
    attachment = regkit.attach(model, {"rules": RULES["rules"][:1]})
    optimizer = SGD(model.parameters(), lr=0.1)
    loss_of(model, *batches[0]).backward()
    model.rnn.weight_hh_l0.grad[0, 0] = math.nan
    optimizer.step()
    assert model.rnn.weight_hh_l0.isnan().sum() == 1
    assert attachment.values()["l2"].isnan()
    for name, p in model.named_parameters():
        assert name == "rnn.weight_hh_l0" or bool(p.isfinite().all())


def test_a_copy_of_a_model_that_is_not_finite_is_told_when_it_is_trained(make_model, batches):
    model = make_model()
    regkit.attach(model, RULES)
    spoil(model)
    copied = copy.deepcopy(model)
    with pytest.raises(regkit.AttachError, match=r"rnn.weight_hh_l0.*This model is a copy"):
        train(copied, SGD(copied.parameters(), lr=0.1), batches)
