"""How the adapter of a module's class is found, and which adapters are refused."""

import types

import pytest
import torch
from torch import nn

import regkit
from regkit import Adapter, Output, PluginError, Registry, Weight, hookimpl


def adapter(*classes, role="kernel", gates=()):
    """An adapter for these classes whose one weight is `w`."""

    class Mine(Adapter):
        modules = classes
        roles = (role,)

        def weights(self, module):
            return [Weight(("w",), role, gates=gates)]

        def outputs(self, module):
            return [Output("output")]

        def observe(self, module, args, kwargs, result):
            return {"output": result}

        def segments(self, module, site, observed, valid, step):
            return []

    Mine.gates = gates
    return Mine()


def plugin(*adapters):
    module = types.ModuleType("stranger")
    module.regkit_adapters = hookimpl(lambda: list(adapters))
    return module


class Minimal(nn.Module):
    """A recurrent module of a user's own."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6, 2))


class Sub(Minimal):
    pass


class SubSub(Sub):
    pass


def test_the_adapter_of_the_nearest_ancestor_serves():
    general, special = adapter(Minimal), adapter(Sub)
    registry = Registry([plugin(general, special)], entry_points=False)
    assert registry.adapter(Minimal()) is general
    assert registry.adapter(Sub()) is special
    assert registry.adapter(SubSub()) is special
    assert registry.adapter(nn.LSTM(1, 1)) is None
    assert registry.module_classes == ["Minimal", "Sub"]


def test_an_adapter_may_add_roles_and_gates_to_the_language():
    registry = Registry([plugin(adapter(Minimal, role="memory", gates=("write", "erase", "keep")))])
    target = {"role": "memory", "gate": ["erase", "keep"]}
    plan = regkit.resolve(Sub(), {"rules": [{"target": target, "penalty": "l2(1)"}]}, registry=registry)
    (binding,) = plan.bindings
    # A gate that an adapter calls f is not turned into LSTM's forget gate.
    assert [(w.role, w.gate, w.start, w.rows) for w in binding.weights] == [
        ("memory", "erase", 2, 2),
        ("memory", "keep", 4, 2),
    ]
    with pytest.raises(regkit.SpecError, match="'memory'"):
        regkit.load({"rules": [{"target": {"role": "memory"}, "penalty": "l2(1)"}]})
    with pytest.raises(regkit.SpecError, match="unknown gate 'earse'; did you mean 'erase'"):
        regkit.load({"rules": [{"target": {"gate": "earse"}, "penalty": "l2(1)"}]}, registry=registry)


def test_a_known_class_cannot_get_a_second_adapter():
    with pytest.raises(PluginError, match="LSTM") as caught:
        Registry([plugin(adapter(nn.LSTM))])
    assert f"torch-regkit {regkit.__version__}" in str(caught.value)
    assert "stranger" in str(caught.value)


def test_one_plugin_cannot_offer_two_adapters_for_one_class():
    with pytest.raises(PluginError, match="Minimal"):
        Registry([plugin(adapter(Minimal), adapter(Sub, Minimal))], entry_points=False)


def test_subclasses_of_known_classes_may_have_an_adapter_of_their_own():
    class Mine(nn.LSTM):
        pass

    own = adapter(Mine)
    registry = Registry([plugin(own)])
    assert registry.adapter(Mine(1, 1)) is own
    assert registry.adapter(nn.LSTM(1, 1)) is not own


def test_an_adapter_without_modules_is_refused_with_its_plugin():
    class Homeless(type(adapter(Minimal))):
        pass

    del Homeless.__mro__[1].modules
    with pytest.raises(PluginError, match="stranger"):
        Registry([plugin(Homeless())], entry_points=False)


@pytest.mark.parametrize("modules", [nn.LSTM, ("LSTM",), 3])
def test_an_adapter_whose_modules_are_no_classes_is_refused_with_its_plugin(modules):
    wrong = adapter(Minimal)
    type(wrong).modules = modules
    with pytest.raises(PluginError, match="stranger"):
        Registry([plugin(wrong)], entry_points=False)
