"""An adapter that breaks its contract is one error that says whose it is, of which module, and what was wrong."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import regkit
from regkit import Adapter, Output, Weight


class Cell(nn.Module):
    """A stranger's module."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6, 5))
        self.b = nn.Parameter(torch.zeros(6))
        self.long = nn.Parameter(torch.zeros(7))
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.count = nn.Parameter(torch.zeros(6, dtype=torch.int64), requires_grad=False)
        self.inner = nn.Linear(3, 4, bias=False)
        self.register_buffer("mask", torch.ones(6, 5))
        self.register_buffer("halves", torch.full((6, 5), 0.5))
        self.nothing = None


def fail() -> None:
    raise ZeroDivisionError("a stranger's mistake")


def registry_of(weights: Callable[[nn.Module], Any], outputs: Callable[[nn.Module], Any]) -> regkit.Registry:
    class Mine(Adapter):
        modules = (Cell,)
        gates = GATES
        roles = ("kernel", "memory")

        def weights(self, module):
            return weights(module)

        def outputs(self, module):
            return outputs(module)

        def observe(self, module, args, kwargs, result):
            return {"output": result}

        def segments(self, module, site, observed, valid, step):
            return []

    plugin = types.ModuleType("stranger")
    plugin.regkit_adapters = regkit.hookimpl(lambda: [Mine()])
    return regkit.Registry([plugin])


WHOSE = rf"the adapter {__name__}\.registry_of\.<locals>\.Mine of plugin stranger, for cell \(Cell\), "
GATES = ("write", "erase")


def weight(*names: str, role: str = "kernel", **options: Any) -> Weight:
    return Weight(names, role, **options)


MISSING = "tells of what is not there: "
WRONG = {
    "no rows": (weight("empty"), "is wrong: empty has 0 rows"),
    "no parameter": (weight("v"), MISSING + "v is missing"),
    "no submodule": (weight("outer.w"), MISSING + "outer.w is missing: Cell has no module 'outer'"),
    "no bias of a submodule": (weight("inner.bias"), MISSING + "inner.bias is missing"),
    "no mask": (weight("w", mask="holes"), MISSING + "the mask holes is missing"),
    "a mask of None": (weight("w", mask="nothing"), MISSING + "the mask nothing is missing"),
    "a mask that is no tensor": (weight("w", mask="inner"), MISSING + "the mask inner is Linear("),
    "a mask of another shape": (weight("b", mask="mask"), "masks (6,) by mask, which is (6, 5)"),
    "a mask of halves": (weight("w", mask="halves"), "masks a weight by halves, which holds more than 0 and 1"),
    "no function": (weight("w", through="squash"), MISSING + "the module squash is missing"),
    "columns out of range": (weight("w", columns=(3, 6)), "reads w columns (3, 6), which (6, 5) has not"),
    "one column out of range": (weight("w", columns=5), "reads w columns 5, which (6, 5) has not"),
    "columns of a vector": (weight("b", columns=(0, 2)), "reads b columns (0, 2), which (6,) has not"),
    "columns from the end": (weight("w", columns=(-2, 0)), "reads w columns (-2, 0), which (6, 5) has not"),
    "one column from the end": (weight("w", columns=-1), "reads w columns -1, which (6, 5) has not"),
    "columns in a list": (weight("w", columns=[0, 3]), "gives the weight 'w' the columns [0, 3]: input should be a"),
    "gates in a list": (weight("w", gates=["write"]), "gives the weight 'w' the gates ['write']: input should be a"),
    "a gate twice": (weight("w", gates=("write", "write")), "gives the weight 'w' a gate twice: write"),
    "no role": (weight("w", role=None), "gives the weight 'w' the role None: input should be a valid string"),
    "a layer by name": (weight("w", layer="first"), "gives the weight 'w' the layer 'first': input should be a valid"),
    "turned or not": (weight("w", transposed="no"), "gives the weight 'w' the transposed 'no': input should be"),
    "a mask that is no name": (weight("w", mask=3), "gives the weight 'w' the mask 3: input should be a valid string"),
    "a function that is no name": (weight("w", through=nn.Tanh()), "gives the weight 'w' the through Tanh(): input"),
    "a turned vector": (weight("b", transposed=True), "reads b transposed, which (6,) has not"),
    "columns the wrong way": (weight("w", columns=(3, 1)), "reads w columns (3, 1), which (6, 5) has not"),
    "an unknown role": (
        weight("w", role="memry"),
        "gives the weight 'w' the unknown role 'memry'; did you mean 'memory'",
    ),
    "an unknown gate": (weight("w", gates=("write", "earse")), "unknown gate 'earse'; did you mean 'erase'"),
    "a separate gate that it has not": (
        weight("b", "b", gates=("write",), separate=("erase",)),
        "gives the weight 'b + b' separate gates that it does not have: erase",
    ),
    "rows that do not divide": (
        weight("long", gates=GATES),
        "is wrong: long has 7 rows, which do not divide into 2 gates: write, erase",
    ),
    "a sum of two shapes": (weight("b", "long", role="bias"), "adds b + long, of shapes (6,), (7,)"),
    "a mask of a sum": (
        weight("b", "b", role="bias", mask="mask"),
        "gives the weight 'b + b' the mask mask, which goes",
    ),
    "no columns": (weight("w", columns=(3, 3)), "reads w columns (3, 3), which (6, 5) has not"),
    "a function that learns": (weight("w", through="inner"), "has w go through inner, which has parameters of its own"),
    "no name": (weight(), "gives a weight the parameters (), not a tuple of one name or two"),
    "a name alone": (Weight("w", "kernel"), "gives a weight the parameters 'w', not a tuple of one name or two"),
    "no weight": ("w", "gives 'w' in weights(), which is no Weight"),
}


def resolve(registry: regkit.Registry, rule: dict[str, Any]) -> None:
    regkit.resolve(nn.ModuleDict({"cell": Cell()}), {"rules": [rule]}, registry=registry)


@pytest.mark.parametrize("case", WRONG)
def test_a_weight_that_is_not_as_it_is_told_is_the_adapters_fault(case):
    given, message = WRONG[case]
    target = {"role": "bias", "bias": "effective"} if "sum" in case else {}
    registry = registry_of(lambda module: [given], lambda module: [Output("output")])
    with pytest.raises(regkit.PluginError, match=WHOSE + ".*" + re.escape(message)):
        resolve(registry, {"target": target, "penalty": "l2(1)"})


def test_an_output_of_a_role_that_no_target_can_name_is_the_adapters_fault():
    registry = registry_of(lambda module: [weight("w")], lambda module: [Output("ouput")])
    with pytest.raises(
        regkit.PluginError, match=WHOSE + "gives an output the unknown role 'ouput'; did you mean 'outp"
    ):
        resolve(registry, {"penalty": "activity_l2(1)"})


def test_an_output_of_another_type_is_the_adapters_fault():
    registry = registry_of(lambda module: [weight("w")], lambda module: [Output("output", layers=[0])])
    with pytest.raises(regkit.PluginError, match=WHOSE + r"gives an output the layers \[0\]: input should be a valid"):
        resolve(registry, {"penalty": "activity_l2(1)"})


@pytest.mark.parametrize("method", ["weights", "outputs"])
@pytest.mark.parametrize("lazily", [False, True])
def test_an_exception_in_an_adapter_is_told_with_its_plugin(method, lazily):
    def failing(module: nn.Module) -> Any:
        return (fail() for _ in range(1)) if lazily else fail()

    given = {"weights": lambda module: [weight("w")], "outputs": lambda module: [Output("output")]}
    registry = registry_of(**{**given, method: failing})
    with pytest.raises(
        regkit.PluginError, match=WHOSE + rf"fails in {method}\(\): ZeroDivisionError\(.a strang"
    ) as got:
        resolve(registry, {"penalty": "l2(1)" if method == "weights" else "activity_l2(1)"})
    assert isinstance(got.value.__cause__, ZeroDivisionError)


def test_a_rule_about_another_module_does_not_ask_a_broken_adapter():
    registry = registry_of(lambda module: fail(), lambda module: fail())
    model = nn.ModuleDict({"cell": Cell(), "rnn": nn.RNN(3, 4)})
    rule = {"target": {"module": "rnn"}, "penalty": "l2(1)"}
    assert len(regkit.resolve(model, {"rules": [rule]}, registry=registry).bindings[0].weights) == 4


def test_numbers_that_are_no_weights_are_the_models_affair_and_not_the_adapters():
    registry = registry_of(lambda module: [weight("count")], lambda module: [])
    with pytest.raises(
        regkit.ResolveError, match=r"cell \(Cell\): count holds torch.int64, not floating-point numbers"
    ):
        resolve(registry, {"target": {"role": "kernel"}, "penalty": "l2(1)"})
