"""What a document says: rules, shorthand, Keras' seven names."""

import copy
import json
import pickle
import types
from decimal import Decimal
from typing import Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from regkit_standard.activity import ActivityL2, Temporal
from regkit_standard.constraints import MaxNorm, MinMaxNorm, NonNegativity, UnitNorm
from regkit_standard.l1_l2 import L1, L1L2, L2
from regkit_standard.orthogonality import Orthogonal
from regkit_standard.schedules import Constant, Exponential, Linear, Piecewise

import regkit
from regkit import Rule, Spec, Target


def one(**rule):
    """The one rule of a document, after a journey through text."""
    (read,) = regkit.load(json.dumps({"rules": [rule]})).rules
    return read


# Shorthand

PENALTIES = [
    ("l2(1e-4)", L2(strength=1e-4)),
    (" l2 ( 1e-4 ) ", L2(strength=1e-4)),
    ("l2(strength=1e-4)", L2(strength=1e-4)),
    ({"l2": 1e-4}, L2(strength=1e-4)),
    ({"l2": {"strength": 1e-4}}, L2(strength=1e-4)),
    ({"kind": "l2", "strength": 1e-4}, L2(strength=1e-4)),
    ("l1(1)", L1(strength=1.0)),
    ("l1_l2(1e-5, 1e-4)", L1L2(l1=1e-5, l2=1e-4)),
    ("l1_l2(l2=1e-4)", L1L2(l2=1e-4)),
    ("l1_l2(1e-5, strength=2)", L1L2(l1=1e-5, strength=2.0)),
    ({"l1": 1e-5, "l2": 1e-4}, L1L2(l1=1e-5, l2=1e-4)),
    ({"l2": 1e-4, "l1": 0}, L1L2(l1=0.0, l2=1e-4)),
    ({"l1_l2": {"l1": 1e-5}}, L1L2(l1=1e-5)),
    ("orthogonal(0.1, per=matrix)", Orthogonal(strength=0.1, per="matrix")),
    ("activity_l2(2, reduction=batch)", ActivityL2(strength=2.0, reduction="batch")),
    ({"temporal": 3}, Temporal(strength=3.0)),
]
CONSTRAINTS = [
    ("max_norm(3)", MaxNorm(max_value=3.0)),
    ("max_norm(3, per=cell)", MaxNorm(max_value=3.0, per="cell")),
    ("max_norm(per=cell, max_value=3)", MaxNorm(max_value=3.0, per="cell")),
    ({"max_norm": {"max_value": 3}}, MaxNorm(max_value=3.0)),
    ({"max_norm": 3}, MaxNorm(max_value=3.0)),
    ("unit_norm", UnitNorm()),
    ("unit_norm()", UnitNorm()),
    ({"unit_norm": {}}, UnitNorm()),
    ("non_negative", NonNegativity()),
    ("min_max_norm(0.5, 2)", MinMaxNorm(min_value=0.5, max_value=2.0)),
    ({"min_value": 0.5, "max_value": 2}, MinMaxNorm(min_value=0.5, max_value=2.0)),
]


@pytest.mark.parametrize(("short", "kind"), PENALTIES, ids=lambda value: str(value)[:40])
def test_a_short_penalty_stands_for_its_kind(short, kind):
    assert one(penalty=short).penalty == kind


@pytest.mark.parametrize(("short", "kind"), CONSTRAINTS, ids=lambda value: str(value)[:40])
def test_a_short_constraint_stands_for_its_kind(short, kind):
    assert one(constraint=short).constraint == kind


@pytest.mark.parametrize(
    ("short", "kind"),
    [
        ("linear(0, 1, 1000)", Linear(start=0.0, end=1.0, steps=1000)),
        ({"constant": 0.5}, Constant(value=0.5)),
        ("exponential(decay=0.5, steps=10)", Exponential(decay=0.5, steps=10)),
        ({"piecewise": {"boundaries": [5], "values": [0, 1]}}, Piecewise(boundaries=(5,), values=(0.0, 1.0))),
    ],
    ids=str,
)
def test_a_short_schedule_stands_for_its_kind(short, kind):
    assert one(penalty="l2(1)", schedule=short).schedule == kind


def test_options_that_fit_several_kinds_are_not_guessed():
    """start, end and steps are linear's options as much as cosine's."""
    with pytest.raises(regkit.SpecError) as caught:
        one(penalty="l2(1)", schedule={"start": 0, "end": 1, "steps": 100})
    assert "linear" in str(caught.value)
    assert "cosine" in str(caught.value)


# Keras' seven names

SEVEN = {
    "kernel_regularizer": ("l2(1e-4)", "kernel", L2(strength=1e-4)),
    "recurrent_regularizer": ({"l1": 1e-5, "l2": 1e-4}, "recurrent", L1L2(l1=1e-5, l2=1e-4)),
    "bias_regularizer": ("l1(1e-6)", "bias", L1(strength=1e-6)),
    "activity_regularizer": ({"l2": 1e-3}, "output", ActivityL2(strength=1e-3)),
    "kernel_constraint": ("max_norm(3)", "kernel", MaxNorm(max_value=3.0)),
    "recurrent_constraint": ("unit_norm", "recurrent", UnitNorm()),
    "bias_constraint": ("non_negative", "bias", NonNegativity()),
}


def test_the_seven_names_become_seven_rules_named_by_their_places():
    document = {"layers": [{"module": "a"}, {"module": ["b", "c.*"]}], "rules": [{"penalty": "l2(9)"}]}
    for layer in document["layers"]:
        layer.update({name: short for name, (short, _, _) in SEVEN.items()})
    spec = regkit.load(json.dumps(document))
    assert spec.rules[0] == Rule(penalty=L2(strength=9.0))
    assert spec.layers == ()
    expected = [
        (f"layers/{index}/{name}", Target(module=module, role=role), kind)
        for index, module in enumerate([("a",), ("b", "c.*")])
        for name, (_, role, kind) in SEVEN.items()
    ]
    assert [(rule.name, rule.target, rule.kind) for rule in spec.rules[1:]] == expected
    for rule in spec.rules[1:]:
        assert (rule.penalty is None) == rule.name.endswith("_constraint")


def test_a_layer_without_a_module_means_every_module():
    assert regkit.load({"layers": [{"kernel_regularizer": "l2(1)"}]}).rules[0].target.module is None


@pytest.mark.parametrize(
    "short", ["l2(2)", {"l2": 2}, {"kind": "l2", "strength": 2}, "activity_l2(2)", {"activity_l2": 2}]
)
def test_l2_as_an_activity_regularizer_means_activity_l2(short):
    spec = regkit.load({"layers": [{"activity_regularizer": short}]})
    assert spec.rules[0].penalty == ActivityL2(strength=2.0)


def test_two_coefficients_as_an_activity_regularizer_mean_activity_l1_l2():
    spec = regkit.load({"layers": [{"activity_regularizer": {"l1": 1, "l2": 2}}]})
    assert spec.rules[0].penalty.kind == "activity_l1_l2"


def test_layers_ask_the_given_registry_alone(monkeypatch):
    """A plugin that is installed but broken must not stand in the way of a registry that leaves it out."""
    from regkit_standard import l1_l2, torch_adapters

    def broken():
        raise regkit.PluginError("an installed plugin is broken")

    registry = regkit.Registry([l1_l2, torch_adapters], entry_points=False)
    for module in list(vars(regkit).values()):
        if isinstance(module, types.ModuleType) and hasattr(module, "default"):
            monkeypatch.setattr(module, "default", broken)
    document = {"layers": [{"kernel_regularizer": "l2(1)"}], "rules": [{"penalty": "l2(1)", "target": {"gate": "f"}}]}
    assert len(regkit.load(document, registry=registry).rules) == 2


# In Python


def test_a_spec_made_in_python_equals_the_one_in_a_document():
    made = Spec(rules=[Rule(target=Target(role="kernel", gate=["f"]), penalty=L2(strength=1e-4), name="a")])
    text = '{"rules": [{"name": "a", "target": {"role": "kernel", "gate": "forget"}, "penalty": "l2(1e-4)"}]}'
    assert made == regkit.load(text)
    assert made != regkit.load(text.replace("1e-4", "2e-4"))
    assert hash(made.rules[0]) == hash(regkit.load(text).rules[0])
    assert made.to_json() == regkit.load(text).to_json()


def test_a_spec_survives_copy_and_pickle():
    spec = regkit.load(
        {"rules": [{"penalty": "l2(1)", "schedule": "constant(2)"}], "layers": [{"kernel_constraint": "unit_norm"}]}
    )
    for other in (copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert other == spec
        assert other.to_json() == spec.to_json()


def test_specs_rules_targets_and_kinds_are_frozen():
    rule = Rule(target=Target(role="kernel"), penalty=L2(strength=1e-4))
    spec = Spec(rules=[rule])
    for frozen, name in ((spec, "rules"), (rule, "penalty"), (rule.target, "role"), (rule.penalty, "strength")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(frozen, name, getattr(frozen, name))


@pytest.mark.parametrize(
    "strength", [np.float64(1), np.float32(1), np.int64(1), Decimal(1), True, torch.tensor(1.0), "1"]
)
def test_a_strength_is_a_plain_number(strength):
    with pytest.raises(ValidationError, match="plain number"):
        L2(strength=strength)


@pytest.mark.parametrize("make", [L2, lambda **kw: L2(strength=1.0, **kw)])
def test_unknown_options_and_other_kinds_names_are_refused_in_python(make):
    for wrong in ({"strenght": 1.0}, {"kind": "l1", "strength": 1.0}):
        with pytest.raises((ValidationError, TypeError)):
            make(**wrong)


class Falsy(regkit.Penalty):
    """A penalty that Python takes for false, as an empty collection."""

    kind: Literal["falsy"] = "falsy"

    def __len__(self) -> int:
        return 0

    def value(self, w: torch.Tensor) -> torch.Tensor:
        return w.square().sum()


@pytest.mark.parametrize(
    "document", [{"rules": [{"penalty": "falsy(1)"}]}, {"layers": [{"kernel_regularizer": {"falsy": 1}}]}]
)
def test_a_kind_that_python_takes_for_false_is_a_kind(document):
    registry = regkit.Registry([Falsy])
    assert [rule.kind.kind for rule in regkit.load(document, registry=registry).rules] == ["falsy"]
