"""Rules that act alike act together, and come to what they come to apart."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import regkit
from regkit import Penalty, Schedule
from tests.support.counting import operations_of_a_step
from tests.support.loops import Batches, assert_equal_weights, train
from tests.support.models import MakeModel

KERNEL, RECURRENT = {"target": {"role": "kernel"}}, {"target": {"role": "recurrent"}}
HALF = {"schedule": {"kind": "constant", "value": 0.5}}
WARM = {"schedule": {"kind": "linear", "start": 0, "end": 1, "steps": 3}}
TOGETHER: dict[str, tuple[list[dict[str, Any]], int]] = {
    "equal kinds on different weights": ([{**KERNEL, "penalty": "l2(0.1)"}, {**RECURRENT, "penalty": "l2(0.1)"}], 1),
    "equal schedules": ([{**KERNEL, "penalty": "l2(0.1)", **WARM}, {**RECURRENT, "penalty": "l2(0.1)", **WARM}], 1),
    "l1 and l2 on the same weights": ([{"penalty": "l1(0.1)"}, {"penalty": "l2(0.1)"}], 1),
    "l1, l2 and elastic net": ([{"penalty": "l1(0.1)"}, {"penalty": "l2(0.1)"}, {"penalty": "l1_l2(0.1, 0.1)"}], 1),
    "sums on different weights": (
        [{**on, "penalty": kind} for on in (KERNEL, RECURRENT) for kind in ("l1(0.1)", "l2(0.1)")],
        1,
    ),
}
APART: dict[str, tuple[list[dict[str, Any]], int]] = {
    "other strengths": ([{**KERNEL, "penalty": "l2(0.1)"}, {**RECURRENT, "penalty": "l2(0.2)"}], 2),
    "other schedules": ([{**KERNEL, "penalty": "l2(0.1)", **HALF}, {**RECURRENT, "penalty": "l2(0.1)"}], 2),
    "l1 and l2 at other schedules": ([{"penalty": "l1(0.1)"}, {"penalty": "l2(0.1)", **WARM}], 2),
    "l1 and l2 on other weights": ([{**KERNEL, "penalty": "l1(0.1)"}, {"penalty": "l2(0.1)"}], 2),
    "gates and the whole": (
        [
            {**RECURRENT, "penalty": "l1(0.1)"},
            {"target": {"role": "recurrent", "gate": ["cell"]}, "penalty": "l1(0.1)"},
        ],
        2,
    ),
    "kinds without a sum": ([{**RECURRENT, "penalty": "l2(0.1)"}, {**RECURRENT, "penalty": "orthogonal(0.1)"}], 2),
}


def acting(attachment: regkit.Attachment) -> int:
    """How many rules act on gradients."""
    return len(attachment._rules.by_gradient)


@pytest.mark.parametrize("case", [*TOGETHER, *APART])
def test_training_ends_where_it_ends_with_an_attachment_for_each_rule(
    case: str, make_model: MakeModel, batches: Batches
):
    rules, wanted = {**TOGETHER, **APART}[case]
    ours, apart = make_model(num_layers=2), make_model(num_layers=2)
    attachment = regkit.attach(ours, {"rules": rules})
    assert acting(attachment) == wanted
    others = [regkit.attach(apart, {"rules": [rule]}) for rule in rules]
    for model in (ours, apart):
        train(model, SGD(model.parameters(), lr=0.05), batches)
    assert_equal_weights(ours, apart, 1e-14)
    ours_now = list(attachment.values().values())
    torch.testing.assert_close(ours_now, [value for one in others for value in one.values().values()])
    assert len(ours_now) == len(rules)


def operations(rules: list[dict[str, Any]]) -> int:
    """How many operations a step has more with these rules."""
    model = nn.LSTM(3, 4)
    bare = operations_of_a_step(model)
    with regkit.attach(model, {"rules": rules}):
        return operations_of_a_step(model) - bare


def test_seven_rules_are_as_few_operations_as_one():
    each = [{"target": {"role": role}, "penalty": "l2(0.1)"} for role in ("kernel", "recurrent", "bias")]
    assert operations(each) == operations([{"penalty": "l2(0.1)"}]) == 1
    elastic = operations([{"penalty": "l1_l2(0.1, 0.1)"}])
    assert operations([{"penalty": "l1(0.1)"}, {"penalty": "l2(0.1)"}]) == elastic


def test_weights_tied_after_attach_count_once_for_each_rule_as_they_do_apart(batches: Batches):
    def run(strengths: tuple[float, float]) -> Tensor:
        torch.manual_seed(0)
        model = nn.ModuleDict({"one": nn.RNNCell(3, 4), "two": nn.RNNCell(3, 4)}).double()
        rules = [
            {"target": {"module": name, "role": "recurrent"}, "penalty": f"l2({strength})"}
            for name, strength in zip(model, strengths, strict=True)
        ]
        attachment = regkit.attach(model, {"rules": rules})
        assert acting(attachment) == 1 + (strengths[0] != strengths[1])
        model["two"].weight_hh = model["one"].weight_hh
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        SGD(model.parameters(), lr=1.0).step()
        return model["one"].weight_hh.detach()

    torch.testing.assert_close(run((0.1, 0.1)), run((0.05, 0.15)), rtol=1e-12, atol=0)


class Tilt(Penalty):
    """Σ w, which takes any other for a sum with itself: the sum of what it cannot add."""

    kind: Literal["tilt"] = "tilt"

    def value(self, w: Tensor) -> Tensor:
        return w.sum()

    def plus(self, other: Penalty) -> Penalty | None:
        return self


class Fails(Tilt):
    """It fails from the second step on."""

    kind: Literal["fails"] = "fails"
    at: float = 1.0

    def gradient(self, w: Tensor) -> Tensor:
        if float(w.flatten()[0]) == 7:
            raise ArithmeticError("seven")
        return torch.ones_like(w)

    def plus(self, other: Penalty) -> Penalty | None:
        return None


def test_a_sum_that_is_none_is_a_plugin_error_that_leaves_the_model_untouched(make_model: MakeModel):
    registry = regkit.Registry()
    registry.register(Tilt)
    model = make_model()
    rules = [{"name": "tilt", "penalty": "tilt(0.1)"}, {"name": "small", "penalty": "l2(0.1)"}]
    with pytest.raises(
        regkit.PluginError,
        match=r"rule 'tilt, small': tilt\(strength=0.1\), which `plus` gives for the sum of tilt\(strength=0.1\), "
        r"l2\(strength=0.1\), has another gradient",
    ):
        regkit.attach(model, {"rules": rules}, registry=registry)
    assert regkit.attachments(model) == ()


class Reserved(Penalty):
    """power · Σw², of which `repr` says nothing."""

    kind: Literal["reserved"] = "reserved"
    power: float

    def value(self, w: Tensor) -> Tensor:
        return self.power * (w**2).sum()

    def __repr__(self) -> str:
        return "a penalty"


class Steady(Schedule):
    """A constant, of which `repr` says nothing."""

    kind: Literal["steady"] = "steady"
    at: float

    def factor(self, step: int) -> float:
        return self.at

    def __repr__(self) -> str:
        return "a schedule"


@pytest.mark.parametrize(
    "other",
    [
        {"penalty": {"kind": "reserved", "strength": 0.1, "power": 2.0}},
        {"penalty": {"kind": "reserved", "strength": 0.1, "power": 1.0}, "schedule": {"kind": "steady", "at": 2.0}},
    ],
)
def test_kinds_and_schedules_are_told_apart_by_their_options_and_not_by_what_they_say_of_themselves(
    other: dict[str, Any], make_model: MakeModel
):
    registry = regkit.Registry()
    registry.register(Reserved)
    registry.register(Steady)
    one = {
        "penalty": {"kind": "reserved", "strength": 0.1, "power": 1.0},
        "schedule": {"kind": "steady", "at": 1.0},
    }
    model = make_model()
    rnn = model.rnn
    regkit.attach(model, {"rules": [{**KERNEL, **one}, {**RECURRENT, **one, **other}]}, registry=registry)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    SGD(model.parameters(), lr=0.1).step()
    torch.testing.assert_close(rnn.weight_ih_l0.grad, 0.2 * rnn.weight_ih_l0.detach() / 0.98)
    torch.testing.assert_close(rnn.weight_hh_l0.grad, 0.4 * rnn.weight_hh_l0.detach() / 0.96)


class Nearly(Tilt):
    """Σw², the sum of which with an l1 is right for ones and zeros alone."""

    kind: Literal["nearly"] = "nearly"

    def value(self, w: Tensor) -> Tensor:
        return (w**2).sum()

    def plus(self, other: Penalty) -> Penalty | None:
        return other.model_copy(update={"strength": other.strength + 2 * self.strength})


class Breaks(Tilt):
    """Its sum cannot be worked out."""

    kind: Literal["breaks"] = "breaks"

    def plus(self, other: Penalty) -> Penalty | None:
        raise ArithmeticError("no sums today")


class Odd(Tilt):
    """Its sum is a number."""

    kind: Literal["odd"] = "odd"

    def plus(self, other: Penalty) -> Any:
        return 3.0


WRONG: list[tuple[type[Penalty], str]] = [
    (Nearly, r"'n, l': l1\(.*\), which `plus` gives for the sum of nearly\(strength=0.1\), l1\(.*has another gradient"),
    (Breaks, rf"'n': plus of {__name__}\.Breaks for l1\(strength=0.1\) fails: ArithmeticError\('no sums today'\)"),
    (Odd, rf"'n': plus of {__name__}\.Odd for l1\(strength=0.1\) is 3.0, not a penalty or None"),
]


@pytest.mark.parametrize(("kind", "told"), WRONG, ids=lambda case: getattr(case, "__name__", ""))
def test_a_plus_that_is_wrong_anywhere_or_fails_is_a_plugin_error(
    kind: type[Penalty], told: str, make_model: MakeModel
):
    registry = regkit.Registry()
    registry.register(kind)
    model = make_model()
    rules = [{"name": "n", "penalty": f"{kind.kind_name()}(0.1)"}, {"name": "l", "penalty": "l1(0.1)"}]
    with pytest.raises(regkit.PluginError, match=told):
        regkit.attach(model, {"rules": rules}, registry=registry)
    assert regkit.attachments(model) == ()


class Matrix(Tilt):
    """Σw², of weights as they are kept."""

    kind: Literal["matrix"] = "matrix"

    def value(self, w: Tensor) -> Tensor:
        return (w**2).sum()

    def plus(self, other: Penalty) -> Penalty | None:
        return other if isinstance(other, Cell) else None


class Cell(Tilt):
    """The squared sums over the gates of a cell."""

    kind: Literal["cell"] = "cell"

    @property
    def layout(self) -> Literal["cell"]:
        return "cell"

    def value(self, w: Tensor) -> Tensor:
        return w.sum(0).square().sum()

    def plus(self, other: Penalty) -> Penalty | None:
        return None


def test_kinds_that_see_weights_differently_are_never_made_one(make_model: MakeModel):
    registry = regkit.Registry()
    registry.register(Matrix)
    registry.register(Cell)
    rules = [{**RECURRENT, "penalty": "matrix(0.1)"}, {**RECURRENT, "penalty": "cell(0.1)"}]
    assert acting(regkit.attach(make_model(), {"rules": rules}, registry=registry)) == 2


def test_an_error_at_a_step_names_every_rule_that_acted_there(make_model: MakeModel, batches: Batches):
    registry = regkit.Registry()
    registry.register(Fails)
    model = make_model()
    rules = [{"name": "k", **KERNEL, "penalty": "fails(0.1)"}, {"name": "r", **RECURRENT, "penalty": "fails(0.1)"}]
    regkit.attach(model, {"rules": rules}, registry=registry)
    with torch.no_grad():
        model.rnn.weight_hh_l0[0, 0] = 7
    with pytest.raises(
        regkit.StepError, match=r"rule 'k, r': .*failed on rnn.weight_hh_l0: ArithmeticError\('seven'\)"
    ):
        train(model, SGD(model.parameters(), lr=0.1), batches[:1])
