"""A kind whose results are not what its contract says is refused before any hook is on the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import regkit


def penalty(**methods: Callable[..., Any]) -> type[regkit.Penalty]:
    right = {"value": lambda self, w: w.square().sum(), "gradient": lambda self, w: 2 * w}
    return made(regkit.Penalty, {**right, "prox": lambda self, w, t: w / (1 + 2 * t), **methods})


def constraint(**methods: Callable[..., Any]) -> type[regkit.Constraint]:
    right = {"project": lambda self, w: w.clamp(min=0), "violation": lambda self, w: (-w).clamp(min=0).amax()}
    return made(regkit.Constraint, {**right, **methods})


def made(contract: type, methods: dict[str, Callable[..., Any]]) -> Any:
    fields = {"__module__": __name__, "__doc__": "A kind.", "__annotations__": {"kind": Literal["odd"]}, "kind": "odd"}
    return type("Odd", (contract,), {**fields, **methods})


def nan_at(number: float) -> Callable[[Any, Tensor], Tensor]:
    return lambda self, w: torch.where(w == number, torch.nan, w)


NAN = "returns NaN or infinity for a weight of ones or zeros"
WRONG = {
    "value of a shape": (penalty(value=lambda self, w: w.square().sum(1)), "gradient", r"value of .* returns .*\(4,\)"),
    "value of integers": (
        penalty(value=lambda self, w: torch.tensor(3)),
        "gradient",
        "value of .* returns torch.int64",
    ),
    "gradient": (penalty(gradient=nan_at(1)), "gradient", f"gradient of .* {NAN}"),
    "gradient at zero": (penalty(gradient=nan_at(0)), "gradient", f"gradient of .* {NAN}"),
    "prox": (penalty(prox=lambda self, w, t: w.sum()), "proximal", r"prox of .* returns torch.float32 \(\), not"),
    "project": (constraint(project=lambda self, w: w[:1]), None, r"project of .* returns torch.float32 \(1, 3\), not"),
    "violation": (constraint(violation=lambda self, w: 0.0), None, "violation of .* returns float, not"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_result_that_breaks_the_contract_is_told_by_its_method(wrong):
    kind, via, said = WRONG[wrong]
    rule = {"constraint": "odd"} if via is None else {"penalty": "odd(1)", "via": via}
    model = nn.RNN(3, 4)
    document = {"rules": [{**rule, "target": {"role": "kernel"}}]}
    with pytest.raises(regkit.PluginError, match=said):
        regkit.attach(model, document, registry=regkit.Registry([kind]))
    assert regkit.attachments(model) == ()


@pytest.mark.parametrize("kind", [penalty(), constraint()])
def test_a_right_kind_is_attached(kind):
    rule = {"constraint": "odd"} if issubclass(kind, regkit.Constraint) else {"penalty": "odd(1)", "via": "proximal"}
    regkit.attach(nn.RNN(3, 4), {"rules": [rule]}, registry=regkit.Registry([kind])).detach()
