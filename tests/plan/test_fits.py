"""Kinds that are for weights of some shapes alone: the plan asks, and tells."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

import regkit
from regkit import Constraint, Penalty


class Skew(Penalty):
    """‖w + wᵀ‖², for square matrices."""

    kind: Literal["test_skew"] = "test_skew"
    ranks: ClassVar[tuple[int, ...]] = (2,)
    asked: ClassVar[list[tuple[int, ...]]] = []

    def fits(self, shape: tuple[int, ...]) -> str | None:
        self.asked.append(shape)
        return None if shape[0] == shape[1] else "only a square matrix has a transpose of its shape"

    def value(self, w: Tensor) -> Tensor:
        return (w + w.mT).square().sum()


class SkewGates(Skew):
    """The same of each gate."""

    kind: Literal["test_skew_gates"] = "test_skew_gates"

    @property
    def layout(self) -> Literal["gate"]:
        return "gate"


class EvenCells(Constraint):
    """For hidden units in pairs, all gates of each together."""

    kind: Literal["test_even"] = "test_even"
    asked: ClassVar[list[tuple[int, ...]]] = []

    @property
    def layout(self) -> Literal["cell"]:
        return "cell"

    def fits(self, shape: tuple[int, ...]) -> str | None:
        self.asked.append(shape)
        return "an even number of hidden units" if shape[1] % 2 else None

    def project(self, w: Tensor) -> Tensor:
        return w

    def violation(self, w: Tensor) -> Tensor:
        return w.new_zeros(())


class Fails(Penalty):
    kind: Literal["test_fails"] = "test_fails"

    def fits(self, shape: tuple[int, ...]) -> str | None:
        raise ZeroDivisionError("by 0")

    def value(self, w: Tensor) -> Tensor:
        return w.sum()


@pytest.fixture
def registry() -> regkit.Registry:
    registry = regkit.Registry()
    for cls in (Skew, SkewGates, EvenCells, Fails):
        registry.register(cls)
    Skew.asked.clear()
    EvenCells.asked.clear()
    return registry


def rules(**rule: object) -> dict[str, list[dict[str, object]]]:
    return {"rules": [rule]}


@pytest.mark.parametrize("target", [{}, {"role": "kernel"}, {"role": ["kernel", "recurrent"]}])
def test_a_weight_of_another_shape_is_an_error_that_names_it_and_the_reason(target, registry):
    with pytest.raises(regkit.ResolveError) as caught:
        regkit.resolve(nn.RNN(3, 4), rules(penalty="test_skew(1)", target=target), registry=registry)
    assert (
        "test_skew is not for weight_ih_l0, 4 × 3: only a square matrix has a transpose of its shape"
        in caught.value.problems[0].message
    )


def test_an_optional_rule_leaves_out_what_does_not_fit_and_the_plan_says_so(registry):
    document = rules(penalty="test_skew(1)", optional=True)
    plan = regkit.resolve(nn.Sequential(nn.RNN(3, 4)), document, registry=registry)
    assert [site.parameter for site in plan.bindings[0].weights] == ["weight_hh_l0"]
    assert "0.weight_ih_l0, 4 × 3: only a square matrix" in str(plan)


def test_each_weight_is_asked_about_once_in_the_form_that_the_kind_sees(registry):
    model = nn.LSTM(4, 4, num_layers=2)
    regkit.resolve(model, rules(penalty="test_skew_gates(1)"), registry=registry)
    assert Skew.asked == [(4, 4)] * 16  # 2 layers, kernel and recurrent, 4 gates
    regkit.resolve(model, rules(constraint="test_even", target={"role": "recurrent"}), registry=registry)
    assert EvenCells.asked == [(4, 4, 4)] * 2


def test_the_shape_of_a_cell_is_that_of_its_gates(registry):
    document = rules(constraint="test_even", target={"role": ["recurrent", "bias"]})
    with pytest.raises(regkit.ResolveError, match="weight_hh_l0, 15 × 5: an even number"):
        regkit.resolve(nn.GRU(3, 5), document, registry=registry)
    EvenCells.asked.clear()
    regkit.resolve(nn.GRU(3, 6), document, registry=registry)
    assert EvenCells.asked == [(3, 6, 6), (3, 6), (3, 6)]


def test_a_kind_that_cannot_tell_is_a_plugin_error_that_names_it(registry):
    with pytest.raises(regkit.PluginError, match=r"test_fails\(strength=1.0\) cannot tell .* \(4, 3\): ZeroDivision"):
        regkit.resolve(nn.RNN(3, 4), rules(penalty="test_fails(1)"), registry=registry)


def test_what_fits_is_optimized(registry):
    model = nn.LSTM(4, 4).double()
    document = rules(penalty="test_skew_gates(0.5)", target={"role": "recurrent"})
    with regkit.attach(model, document, registry=registry) as attachment:
        gates = model.weight_hh_l0.detach().chunk(4)
        expected = 0.5 * sum((one + one.mT).square().sum() for one in gates)
        torch.testing.assert_close(attachment.values()["rules/0"], expected)
