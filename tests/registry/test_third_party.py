"""A stranger's cell and kinds, from adapter to training; and what happens where they break their contracts."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import regkit
from tests.support.plugins.minimal_gated import MinimalGatedAdapter, MinimalGatedCell


class Power(regkit.Penalty):
    """Σ|w|^p: an option of a plain Python type."""

    kind: Literal["power"] = "power"

    p: float = 4.0
    """The exponent."""

    def value(self, w: Tensor) -> Tensor:
        return w.abs().pow(self.p).sum()


class Erratic(regkit.Schedule):
    """A factor that goes wrong at its third step."""

    kind: Literal["erratic"] = "erratic"

    bad: float | None
    """What it gives then."""

    def factor(self, step: int) -> float:
        return 1.0 if step < 2 else self.bad


class Stranger:
    @regkit.hookimpl
    def regkit_adapters(self) -> list[regkit.Adapter]:
        return [MinimalGatedAdapter()]

    @regkit.hookimpl
    def regkit_penalties(self) -> list[type[regkit.Penalty]]:
        return [Power]

    @regkit.hookimpl
    def regkit_schedules(self) -> list[type[regkit.Schedule]]:
        return [Erratic]


@pytest.fixture
def registry() -> regkit.Registry:
    return regkit.Registry([Stranger()])


def test_a_strangers_cell_is_regularized_by_a_document(registry):
    cell = MinimalGatedCell(3, 4)
    spec = {
        "rules": [
            {"target": {"gate": "new"}, "penalty": {"kind": "power", "strength": 0.1}},
            {"target": {"role": "recurrent"}, "constraint": "max_norm(0.5, per=cell)"},
            {"name": "tar", "target": {"role": "memory"}, "penalty": "temporal(1)"},
        ]
    }
    attachment = regkit.attach(cell, spec, registry=registry)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.0)
    h, hs = torch.zeros(2, 4), []
    for x in torch.randn(5, 2, 3):
        h = cell(x, h)
        hs.append(h)
    penalty = attachment.penalty()
    torch.testing.assert_close(penalty, (torch.stack(hs[1:]) - torch.stack(hs[:-1])).square().mean())
    (h.sum() + penalty).backward()
    before = cell.w.grad.clone()
    optimizer.step()
    torch.testing.assert_close(cell.w.grad[:4], before[:4])
    torch.testing.assert_close(cell.w.grad[4:], before[4:] + 0.4 * cell.w.detach()[4:].pow(3))
    assert attachment.violations()["rules/1"] < 1e-6


def test_a_plan_keeps_the_registry_that_it_was_made_with(registry):
    cell = MinimalGatedCell(3, 4)
    plan = regkit.resolve(
        cell, {"rules": [{"target": {"role": "memory"}, "penalty": "activity_l2(1)"}]}, registry=registry
    )
    attachment = regkit.attach(cell, plan)
    h = cell(torch.randn(2, 3), torch.zeros(2, 4))
    torch.testing.assert_close(attachment.penalty(), h.square().mean())


def test_the_one_bias_of_a_cell_is_its_effective_bias(registry):
    model = nn.ModuleDict({"cell": MinimalGatedCell(3, 4), "lstm": nn.LSTM(3, 4)})
    spec = {"rules": [{"target": {"role": "bias", "bias": "effective"}, "penalty": "l2(1)"}]}
    (binding,) = regkit.resolve(model, spec, registry=registry).bindings
    assert [site.parameters for site in binding.weights] == [("b",), ("bias_ih_l0", "bias_hh_l0")]


def test_rows_that_the_gates_do_not_divide_are_refused(registry):
    cell = MinimalGatedCell(3, 3)
    cell.w = nn.Parameter(torch.randn(7, 3))
    spec = {"rules": [{"target": {"role": "kernel", "gate": "new"}, "penalty": "l2(1)"}]}
    with pytest.raises(regkit.PluginError, match="w has 7 rows, which do not divide into 2 gates: forget, new"):
        regkit.resolve(cell, spec, registry=registry)


@pytest.mark.parametrize("given", ["3", True, None])
def test_an_option_of_a_plain_type_is_strict_too(given, registry):
    with pytest.raises(regkit.SpecError, match="/rules/0/penalty/p: "):
        regkit.load({"rules": [{"penalty": {"kind": "power", "strength": 1, "p": given}}]}, registry=registry)


@pytest.mark.parametrize("bad", [-1.0, None])
def test_a_factor_that_is_no_factor_stops_the_step(bad, registry):
    model = nn.LSTM(3, 4)
    schedule = Erratic.model_construct(kind="erratic", bad=bad)
    attachment = regkit.attach(model, regkit.Spec(rules=[regkit.Rule(penalty=Power(strength=0.1), schedule=schedule)]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        model(torch.randn(2, 1, 3))[0].sum().backward()
        optimizer.step()
    with pytest.raises(regkit.StepError, match=rf"erratic\(.*\) gives {bad} at step 2"):
        optimizer.step()
    assert attachment.step_count == 2


def test_layers_may_read_biases_as_keras_does():
    model = nn.LSTM(3, 4)
    document = {"layers": [{"bias": "effective", "bias_regularizer": "l2(1)", "kernel_regularizer": "l1(1)"}]}
    spec = regkit.load(document)
    assert regkit.load(spec.to_json()) == spec
    kernel, bias = regkit.resolve(model, spec).bindings
    assert [site.parameters for site in kernel.weights] == [("weight_ih_l0",)]
    assert [site.parameters for site in bias.weights] == [("bias_ih_l0", "bias_hh_l0")]


def test_a_function_that_drops_the_features_is_refused():
    model = nn.GRU(3, 4)
    attachment = regkit.attach(model, {"rules": [{"penalty": "activity_l2(1)"}]})
    model(torch.randn(2, 2, 3))
    (recorder,) = attachment._rules.recorders
    (rule,) = attachment._rules.activities
    activity = regkit.Activity(tuple(recorder.segments(rule.places[0][0])))
    with pytest.raises(regkit.PluginError, match=r"\(2, 2, 4\) that returns \(2, 2\)"):
        activity.reduce(lambda h: h.norm(dim=-1))
