"""Numbers that the precision of weights cannot hold, and constraints that cannot hold together, told at attach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import regkit

HALVES = [torch.bfloat16, torch.float16]


def attach(model: nn.Module, *rules: dict[str, Any]) -> regkit.Attachment:
    return regkit.attach(model, {"rules": list(rules)})


@pytest.mark.parametrize(
    ("rule", "dtype", "words"),
    [
        ({"penalty": "l2(1e308)"}, torch.float32, r"l2.*strength 1e\+308 is inf in torch.float32"),
        ({"penalty": "l2(1e-60)"}, torch.float32, r"strength 1e-60 is 0 in torch.float32"),
        ({"penalty": "l1_l2(1e-60, 1)"}, torch.float32, r"l1 1e-60 is 0"),
        ({"penalty": "l2(2e38)"}, torch.float32, r"gradient of a weight of 1 is infinite in its torch.float32"),
        ({"penalty": "l2(2e38)", "via": "loss"}, torch.float32, r"gradient of a weight of 1 is infinite"),
        ({"penalty": "l2(1e5)"}, torch.float16, r"is infinite in its torch.float16"),
        ({"constraint": "max_norm(1e-46)"}, torch.float32, r"max_norm.*max_value 1e-46 is 0"),
        ({"constraint": "max_norm(1e39)"}, torch.bfloat16, r"max_value 1e\+39 is inf in torch.float32"),
        ({"penalty": "l1(1e-60)", "via": "proximal"}, torch.float32, r"strength 1e-60 is 0"),
    ],
)
def test_a_number_that_the_weights_precision_cannot_hold_is_an_error(rule, dtype, words):
    model = nn.LSTM(3, 4).to(dtype)
    with pytest.raises(regkit.AttachError, match=words):
        attach(model, rule)
    assert regkit.attachments(model) == ()


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        ({"penalty": "l2(1e-60)"}, torch.float64),
        ({"constraint": "max_norm(1e-46)"}, torch.float64),
        ({"penalty": "l2(1e-9)"}, torch.float16),  # what is read and added is in float32
        ({"penalty": "l2(1e5)"}, torch.bfloat16),
        ({"penalty": "l1_l2(0, 1)"}, torch.float32),
        ({"penalty": "l2(1)", "schedule": "exponential(1, 1e-100, 10)"}, torch.float32),  # it may well end at nothing
    ],
)
def test_a_number_that_can_be_held_is_none(rule, dtype):
    attach(nn.LSTM(3, 4).to(dtype), rule).detach()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("constraint", "axes", "low", "high"),
    [
        ("max_norm(0.3)", (1,), 0.0, 0.3),
        ("max_norm(0.3, per=input)", (0,), 0.0, 0.3),
        ("max_norm(0.7, per=matrix)", (0, 1), 0.0, 0.7),
        ("min_max_norm(2.1, 3.3)", (1,), 2.1, 3.3),
        ("min_max_norm(0.01, 0.25, per=input)", (0,), 0.01, 0.25),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_rows_in_half_precision_end_up_on_the_right_side_of_a_bound(dtype, constraint, axes, low, high, alone):
    torch.manual_seed(0)
    model = nn.RNN(8, 256, bias=False).to(dtype)
    if alone:  # a weight that is written on its own, in no list
        model.weight_hh_l0 = nn.Parameter(model.weight_hh_l0.detach().T.contiguous().T)
    with attach(model, {"constraint": constraint, "target": {"role": "recurrent"}}) as attachment:
        for _ in range(3):
            attachment.apply_constraints()
            norms = model.weight_hh_l0.detach().double().square().sum(axes).sqrt()
            assert norms.max() <= high
            assert norms.min() >= low * (1 - torch.finfo(dtype).eps)
            assert norms.max() > high * (1 - 2 * torch.finfo(dtype).eps) or norms.min() < low * 1.01
            before = model.weight_hh_l0.detach().clone()
        assert torch.equal(model.weight_hh_l0, before)  # and stay there


@pytest.mark.parametrize("dtype", HALVES)
def test_an_epoch_of_training_in_half_precision_never_leaves_the_ball(dtype):
    torch.manual_seed(1)
    model = nn.GRU(4, 32).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with attach(model, {"constraint": "max_norm(0.4)"}):
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(3, 2, 4, dtype=dtype))[0].float().square().sum().backward()
            optimizer.step()
            for name, w in model.named_parameters():
                if "weight" in name:
                    assert w.detach().double().norm(dim=1).max() <= 0.4


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("unit_norm", "max_norm(0.5)", "0.5 off unit_norm"),
        ("max_norm(0.5)", "unit_norm", "off max_norm"),
        ("max_norm(0.5)", "min_max_norm(0.6, 1)", "0.1 off max_norm"),
        ("unit_norm", "unit_norm(per=input)", "off unit_norm"),
        ("unit_norm(per=cell)", "unit_norm", "1 off unit_norm"),
        ("max_norm(1.9, per=cell)", "unit_norm", "0.1 off max_norm"),
    ],
)
def test_constraints_that_cannot_hold_together_are_an_error_that_names_both(first, second, words):
    model = nn.LSTM(3, 4)
    with pytest.raises(regkit.AttachError) as caught:
        attach(model, {"name": "a", "constraint": first}, {"name": "b", "constraint": second})
    assert "rule 'a'" in str(caught.value)
    assert "rule 'b'" in str(caught.value)
    assert "weight_ih_l0" in str(caught.value)
    assert words in str(caught.value)
    assert regkit.attachments(model) == ()


@pytest.mark.parametrize(
    "constraints",
    [
        ["non_negative", "unit_norm"],
        ["unit_norm", "non_negative", "max_norm(1)"],
        ["max_norm(1)", "max_norm(1, per=input)", "max_norm(2, per=matrix)"],
        ["unit_norm", "max_norm(2.5, per=cell)"],  # four gates of norm 1 have one of 2 together
        ["max_norm(2.5, per=cell)", "unit_norm"],
        ["max_norm(9, per=input)", "max_norm(3, per=cell)"],
        [{"kind": "min_max_norm", "min_value": 0.9, "max_value": 1, "rate": 0.001}, "max_norm(1)"],
    ],
)
def test_constraints_that_can_hold_together_attach(constraints):
    attach(nn.LSTM(3, 64), *({"constraint": one} for one in constraints)).detach()


def test_constraints_of_different_weights_do_not_contradict_one_another():
    kernel, recurrent = ({"target": {"role": role}} for role in ("kernel", "recurrent"))
    attach(nn.RNN(3, 4), {"constraint": "unit_norm", **kernel}, {"constraint": "max_norm(0.5)", **recurrent}).detach()


def test_a_weight_that_is_tied_after_two_attachments_is_an_error_at_the_next_step():
    one, other = nn.RNN(4, 4), nn.RNN(4, 4)
    rule = {"penalty": "l2(0.1)", "target": {"role": "recurrent"}}
    first, second = attach(one, {**rule, "name": "a"}), attach(other, {**rule, "name": "b"})
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
    x = torch.ones(2, 1, 4)
    (one(x)[0].sum() + other(x)[0].sum()).backward()
    optimizer.step()

    other.weight_hh_l0 = one.weight_hh_l0
    optimizer = torch.optim.SGD({*one.parameters(), *other.parameters()}, lr=0.1)
    before = one.weight_hh_l0.detach().clone()
    (one(x)[0].sum() + other(x)[0].sum()).backward()
    for _ in range(2):
        with pytest.raises(regkit.AttachError, match=r"acts on weight_hh_l0, where rule .* acts already"):
            optimizer.step()
    assert torch.equal(one.weight_hh_l0, before)
    second.detach()
    optimizer.step()
    first.detach()
