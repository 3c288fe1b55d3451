"""Targets that name what a model has not: what has that name, what there is instead, and names with prefixes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import regkit
from tests.support.telling import Net, on, rule, told


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"module": "head"}, "'head' is a Linear, and no recurrent module"),
        ({"module": "encoder"}, "'encoder' is a Sequential"),
        ({"module": "LSTM"}, "'LSTM' is a class, and modules are chosen by name: encoder.0."),
        ({"module": "nn.LSTM"}, "'nn.LSTM' is a class, and modules are chosen by name: encoder.0."),
        ({"module": "torch.nn.GRU"}, "is a class, and modules are chosen by name: rnn."),
        ({"module": "Linear"}, "'Linear' is a class, and of no module that an adapter knows."),
        ({"module": "_orig_mod.encodr.0"}, "did you mean 'encoder.0'?"),
        ({"module": "rnn.weight_hh_l0"}, "module rnn, role recurrent, layer 0"),
        ({"module": "weight_ih_l0"}, "role kernel, layer 0"),
        ({"module": "0"}, "did you mean 'encoder.0'?"),
        ({"module": "rn"}, "did you mean 'rnn'?"),
        ({"module": "rnn", "gate": "forget"}, "a GRU has no forget gate: its update gate z"),
        ({"module": "encoder.0", "gate": "update"}, "its input and forget gates"),
        ({"module": "encoder.0", "gate": "new"}, "its gate cell"),
        ({"role": "kernal"}, "Available: kernel, recurrent, bias"),
        ({"gate": "forgett"}, "Available: reset, update, new, input, forget, cell, output"),
    ],
)
def test_what_is_not_there_is_told_with_what_this_model_has(target, words):
    sentence = told(on(**target), Net())
    assert words in sentence
    assert "Available" in sentence


@pytest.mark.parametrize(
    ("kind", "available"),
    [
        ({"constraint": "max_norm(1)"}, "kernel, recurrent, bias"),
        ({"penalty": "l2(1)"}, "kernel, recurrent, bias"),
        ({"penalty": {"l1_l2": {"l1": 1, "l2": 1}}}, "kernel, recurrent, bias"),
        ({"penalty": "activity_l2(1)"}, "kernel, recurrent, bias, output, state, cell"),
        ({"penalty": "unheard_of(1)"}, "kernel, recurrent, bias, output, state, cell"),
    ],
)
def test_the_roles_that_are_told_are_those_that_the_rule_could_have(kind, available):
    with pytest.raises(regkit.SpecError) as caught:
        regkit.resolve(Net(), rule(**kind, target={"role": ["bias", "outpux"]}))
    (message,) = (one.message for one in caught.value.problems if one.where == "/rules/0/target/role/1")
    assert message.endswith(f"Available: {available}")
    assert ("did you mean 'output'" in message) == ("output" in available)
    with pytest.raises(ValueError, match=r"unknown role 'outpux'.*Available: kernel"):
        regkit.Target(role="outpux")  # as of Python code


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_names_are_taken_with_the_prefixes_that_named_modules_gives(prefix, wrapped):
    model = torch.compile(Net(), backend="eager") if wrapped else Net()
    for pattern, name in [("rnn", "rnn"), ("encoder.*", "encoder.0"), ("encoder._orig_mod.0", "encoder.0")]:
        plan = regkit.resolve(model, on(module=prefix + pattern))
        assert {site.name for site in plan.bindings[0].weights} == {name}


def test_every_name_that_named_modules_gives_within_a_model_is_taken():
    class Within(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parallel = nn.DataParallel(nn.LSTM(3, 4))
            self.compiled = torch.compile(nn.Sequential(nn.GRU(3, 4)), backend="eager")

    model = Within()
    recurrent = {name: module for name, module in model.named_modules() if isinstance(module, (nn.LSTM, nn.GRU))}
    assert set(recurrent) == {"parallel.module", "compiled._orig_mod.0"}
    for name in recurrent:
        assert {site.path for site in regkit.resolve(model, on(module=name)).bindings[0].weights} == {name}


def test_a_module_named_as_a_class_is_told_for_what_the_module_is():
    model = nn.Sequential()
    model.add_module("LSTM", nn.Sequential(nn.LSTM(3, 4)))
    assert "'LSTM' is a Sequential" in told(on(module="LSTM"), model)


def test_a_child_of_that_name_goes_before_a_prefix():
    model = nn.Sequential()
    model.add_module("module", Net())
    model.add_module("rnn", nn.GRU(3, 4))
    plan = regkit.resolve(model, on(module="module.rnn"))
    assert {site.name for site in plan.bindings[0].weights} == {"module.rnn"}
