"""Activity penalties go back through the graph in closed form: autograd's gradients, of kinds of any origin."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import regkit
from regkit import Activity, ActivityPenalty
from regkit.activity import Sequenced
from tests.support.activity_forms import (
    EVERY_FORM,
    KINDS,
    by_autograd,
    cell,
    document,
    gradients,
    make,
    packed,
    padded,
    same,
    whole,
)
from tests.support.laws import REDUCTIONS


@EVERY_FORM
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_gradients_are_those_of_autograd(layer, options, loop, reduction):
    model, x = make(layer, **options)
    spec = document(KINDS, reduction)
    ours = gradients(model, spec, loop, x)
    same(ours, by_autograd(lambda: gradients(model, spec, loop, x)))
    assert not torch.allclose(ours[0], gradients(model, document(KINDS[:1], reduction), loop, x)[0])


@EVERY_FORM
def test_so_are_gradients_of_gradients(layer, options, loop):
    model, x = make(layer, **options)
    ours = gradients(model, document(KINDS), loop, x, twice=True)
    same(ours, by_autograd(lambda: gradients(model, document(KINDS), loop, x, twice=True)))


@pytest.mark.parametrize(("role", "options"), [("state", {"num_layers": 2}), ("cell", {"bidirectional": True})])
@pytest.mark.parametrize("layers", [None, [0]])
def test_final_states_have_it_too_and_so_have_some_of_their_layers(role, options, layers):
    model, x = make(nn.LSTM, **options)
    spec = document(["activity_l1", "activity_l2"], role=role)
    if layers is not None and "num_layers" in options:
        for rule in spec["rules"]:
            rule["target"]["layer"] = layers
    same(gradients(model, spec, whole, x), by_autograd(lambda: gradients(model, spec, whole, x)))


@pytest.mark.parametrize("loop", [whole, padded, packed])
def test_large_outputs_go_through_in_pieces_and_small_ones_together_to_the_same_end(loop, monkeypatch):
    model, x = make(nn.LSTM, bidirectional=True)
    expected = by_autograd(lambda: gradients(model, document(KINDS), loop, x))
    for size in (1, 200, 400):
        monkeypatch.setattr("regkit.activity.reduction.ROOM", {True: size})
        same(gradients(model, document(KINDS), loop, x), expected)
    model, x = make(nn.GRUCell)
    expected = by_autograd(lambda: gradients(model, document(KINDS), cell, x))
    for size in (1, 200, 400):
        monkeypatch.setattr("regkit.activity.reduction.ROOM", {True: size})
        same(gradients(model, document(KINDS), cell, x), expected)


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [False, True])
def test_tar_alone_on_a_layer_of_one_direction_without_padding_equals_the_loss_written_by_hand(layer, batch_first):
    model, x = make(layer, batch_first=batch_first)
    attachment = regkit.attach(model, document(["temporal"]))
    weights = list(model.parameters())
    h, _ = model(x)
    time = h.transpose(0, 1) if batch_first else h
    by_hand = 0.5 * (time[1:] - time[:-1]).square().mean()
    ours = attachment.penalty()
    torch.testing.assert_close(ours, by_hand, rtol=1e-12, atol=0)
    for twice in (True, False):
        found, wanted = (
            torch.autograd.grad(one, weights, create_graph=twice, retain_graph=True) for one in (ours, by_hand)
        )
        same(list(found), list(wanted))
        if twice:
            norms = (torch.stack([g.square().sum() for g in some]).sum() for some in (found, wanted))
            again = [list(torch.autograd.grad(norm, weights, retain_graph=True)) for norm in norms]
            same(*again)
    assert all(g.any() for g in found)


def test_values_are_the_same_with_autograd_and_without():
    model, x = make(nn.LSTM, bidirectional=True)
    attachment = regkit.attach(model, document(KINDS))
    padded(model, attachment, x)
    looked_at = attachment.values()
    total = attachment.penalty()
    taken = attachment.values()
    padded(model, attachment, x)
    other = by_autograd(attachment.penalty)
    torch.testing.assert_close(total, other, rtol=1e-12, atol=0)
    for known in (looked_at, attachment.values()):
        torch.testing.assert_close(taken, known, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(taken.values()), total.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_as_it_is_added(dtype):
    model, x = make(nn.GRU)
    model, x = model.to(dtype), x.to(dtype)
    attachment = regkit.attach(model, {"rules": [{"penalty": "activity_l2(1, reduction=sum)"}]})
    h, _ = model(x)
    total = attachment.penalty() * 1024.0
    (gradient,) = torch.autograd.grad(total, h)
    assert total.dtype is torch.float32
    torch.testing.assert_close(gradient, (2048.0 * h.float()).to(dtype), rtol=0, atol=0)


# --- strangers -------------------------------------------------------------------------------------------------------


class Cube(ActivityPenalty):
    """|h|³, left to autograd."""

    kind: Literal["cube"] = "cube"

    def value(self, activity: Activity) -> Tensor:
        return activity.reduce(lambda h: h.abs() ** 3, self.reduction)


class Fails(Cube):
    kind: Literal["fails"] = "fails"

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        raise ZeroDivisionError("so it is")


class Doubles(Cube):
    kind: Literal["doubles"] = "doubles"

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        activity.add_slopes(gradients, lambda h: h * h.abs(), amount, self.reduction, times=6)


class WrongShape(Cube):
    kind: Literal["wrong_shape"] = "wrong_shape"

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        activity.add_slopes(gradients, lambda h: h.sum(-1, keepdim=True), amount)


@pytest.fixture
def strangers() -> Any:
    registry = regkit.Registry()
    for kind in (Cube, Doubles, Fails, WrongShape):
        registry.register(kind)
    return registry


def test_a_kind_without_closed_form_goes_beside_those_that_have_one(strangers):
    model, x = make(nn.LSTM)
    attachment = regkit.attach(model, document(["cube", "activity_l2"]), registry=strangers)
    h, _ = model(x)
    (ours,) = torch.autograd.grad(attachment.penalty(), h)
    torch.testing.assert_close(ours, (0.5 * 3 * h * h.abs() + 1.5 * 2 * h) / h.numel(), rtol=1e-12, atol=1e-12)


def test_a_closed_form_that_is_not_the_gradient_of_the_value_is_refused_as_it_is_attached(strangers):
    model, _ = make(nn.LSTM)
    for kind, words in (
        ("doubles", "add_gradients of .*Doubles does not add the gradient of its value"),
        ("fails", "ZeroDivisionError"),
        ("wrong_shape", r"a slope at \(5, 6\) has the shape|a slope at .* has the shape"),
    ):
        with pytest.raises(regkit.PluginError, match=words):
            regkit.attach(model, document([kind]), registry=strangers)
    assert not model._forward_hooks


def test_what_fails_in_the_backward_pass_says_whose_it_is(monkeypatch):
    model, x = make(nn.LSTM)
    attachment = regkit.attach(model, document(["activity_l2"]))

    def fails(*_: Any) -> None:
        raise ZeroDivisionError("so it is")

    model(x)
    total = attachment.penalty()
    monkeypatch.setattr(type(attachment._rules.activities[0].binding.kind), "add_gradients", fails)
    with pytest.raises(regkit.StepError, match=r"rule '0': .*activity_l2.* on the model: ZeroDivisionError"):
        total.backward()


@pytest.mark.parametrize("ask", ["values", "penalty"])
def test_what_fails_for_the_first_of_two_modules_is_not_said_of_the_second(ask, monkeypatch):
    model = nn.ModuleDict({"first": nn.LSTM(3, 4), "second": nn.LSTM(3, 4)})
    attachment = regkit.attach(model, document(["activity_l2"]))
    model["first"](torch.full((5, 2, 3), 9.0))
    model["second"](torch.zeros(5, 2, 3))
    kind = type(attachment._rules.activities[0].binding.kind)
    own, failing = kind.value, [True]

    def value(self: Any, activity: Activity) -> Tensor:
        if failing:
            failing.clear()
            raise ZeroDivisionError("so it is")
        return own(self, activity)

    monkeypatch.setattr(kind, "value", value)
    with pytest.raises(regkit.StepError, match="on first: ZeroDivisionError"):
        getattr(attachment, ask)()


class Foreign(Sequenced):
    """A segment whose class does not say how it is made of other tensors."""

    def at(self, place: Callable[[Tensor], Any]) -> None:
        return None


def test_segments_of_a_strangers_own_are_left_to_autograd(monkeypatch):
    model, x = make(nn.LSTM)
    expected = gradients(model, document(["activity_l2", "temporal"]), whole, x)
    attachment = regkit.attach(model, document(["activity_l2", "temporal"]))
    recorder = attachment._rules.recorders[0]
    own = recorder._adapter.segments
    monkeypatch.setattr(recorder, "_adapter", copy.copy(recorder._adapter))
    monkeypatch.setattr(
        recorder._adapter, "segments", lambda *args: [Foreign(one.h) for one in own(*args)], raising=False
    )
    loss = 0.1 * whole(model, attachment, x) + 3.0 * attachment.penalty()
    same(list(torch.autograd.grad(loss, list(model.parameters()))), expected[1:])
