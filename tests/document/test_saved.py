"""The one canonical form that a document is saved in, whatever it was written in."""

import json
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import regkit
from regkit.fields import NonNegative


def saved(document):
    """A document as it is saved, without its provenance."""
    spec = regkit.load(document)
    text = spec.to_json()
    again = regkit.load(text)
    assert again == spec
    assert again.to_json() == text
    body = json.loads(text)
    assert list(body) == [key for key in ("$schema", "version", "provenance", "rules") if key in body]
    del body["provenance"]
    return body


def test_gates_and_directions_are_saved_under_their_own_names():
    targets = [
        {"gate": ["i", "f", "g", "o"], "direction": "reverse"},
        {"gate": ["c", "g", "cell"], "direction": ["reverse", "backward", "forward"]},
        {"gate": ["r", "z", "n", "h"]},
        {"gate": "z", "layer": [0, 0, 1], "role": ["kernel"], "module": ["a", "a"], "bias": "effective"},
    ]
    rules = saved({"rules": [{"target": target, "penalty": "l2(1)"} for target in targets]})["rules"]
    assert [rule["target"] for rule in rules] == [
        {"direction": "backward", "gate": ["input", "forget", "cell", "output"]},
        {"direction": ["backward", "forward"], "gate": "cell"},
        {"gate": ["reset", "update", "new"]},
        {"module": "a", "role": "kernel", "layer": [0, 1], "gate": "update", "bias": "effective"},
    ]


def test_shorthand_and_layers_are_saved_as_rules_with_kinds():
    document = {
        "$schema": "s.json",
        "rules": [{"penalty": {"l2": 1}, "schedule": "constant(2)", "every": 1, "optional": False, "target": {}}],
        "layers": [{"module": "a", "kernel_constraint": "max_norm(3)"}],
    }
    assert saved(document) == {
        "$schema": "s.json",
        "version": 1,
        "rules": [
            {"penalty": {"kind": "l2", "strength": 1.0}, "schedule": {"kind": "constant", "value": 2.0}},
            {
                "name": "layers/0/kernel_constraint",
                "target": {"module": "a", "role": "kernel"},
                "constraint": {"kind": "max_norm", "per": "unit", "max_value": 3.0},
            },
        ],
    }


def test_names_keep_their_letters_and_braces():
    for name in ("décroissance", "{0}", "{message}", "%s {", "⟨σ⟩", "a/b~c", '"', "\\"):
        assert saved({"rules": [{"name": name, "penalty": "l2(1)"}]})["rules"][0]["name"] == name


def test_a_saved_file_is_read_back(tmp_path):
    spec = regkit.load({"rules": [{"name": "é", "penalty": "l2(1)"}]})
    spec.save(tmp_path / "spec.json")
    assert regkit.load(tmp_path / "spec.json") == spec
    assert (tmp_path / "spec.json").read_bytes() == spec.to_json().encode()


def test_an_option_set_to_null_is_saved_as_null_where_that_is_not_its_default():
    class Capped(regkit.Penalty):
        """A penalty."""

        kind: Literal["capped"] = "capped"
        cap: NonNegative | None = 1.0

        def value(self, w):
            return w.sum()

    class Plugin:
        @regkit.hookimpl
        def regkit_penalties(self):
            return [Capped]

    registry = regkit.Registry([Plugin()])
    spec = regkit.load({"rules": [{"penalty": {"kind": "capped", "strength": 1, "cap": None}}]}, registry=registry)
    assert regkit.load(spec.to_json(registry), registry=registry) == spec


def test_the_provenance_of_every_kind_is_written_and_of_no_other():
    spec = regkit.load({"rules": [{"penalty": "l2(1)", "schedule": "constant(1)"}, {"constraint": "unit_norm"}]})
    provenance = json.loads(spec.to_json())["provenance"]
    assert list(provenance) == ["constant", "l2", "unit_norm"]
    own = {"distribution": "torch-regkit", "version": regkit.__version__}
    assert list(provenance.values()) == [own, own, own]


def test_provenance_that_is_read_does_not_outlive_its_kinds():
    document = {"provenance": {"gone": {"distribution": "d", "version": None}}, "rules": [{"penalty": "l2(1)"}]}
    assert "gone" not in regkit.load(document).to_json()
    assert regkit.load(document) == regkit.load({"rules": [{"penalty": "l2(1)"}]})


positive = st.floats(1e-9, 1e9) | st.integers(1, 10**6)
names = st.text(st.characters(blacklist_categories=("C", "Z")) | st.just(" "), min_size=1, max_size=30)
patterns = st.lists(st.sampled_from(["a", "*", "**", "b?c", "_x*"]), min_size=1, max_size=4).map(".".join)


def any_of(items):
    return items | st.lists(items, min_size=1, max_size=3)


targets = st.fixed_dictionaries(
    {},
    optional={
        "module": any_of(patterns),
        "role": any_of(st.sampled_from(["kernel", "recurrent", "bias", "projection", "output", "state", "cell"])),
        "layer": any_of(st.integers(0, 9)),
        "direction": any_of(st.sampled_from(["forward", "backward", "reverse"])),
        "gate": any_of(st.sampled_from([*"ifgocrznh", "input", "forget", "cell", "output", "reset", "update", "new"])),
        "bias": st.sampled_from(["each", "effective"]),
    },
)
weight_penalties = st.one_of(
    positive.map(lambda x: f"l2({x})"),
    positive.map(lambda x: {"l1": x}),
    st.fixed_dictionaries({"l1": positive, "l2": positive}),
    st.fixed_dictionaries(
        {"kind": st.just("orthogonal"), "strength": positive, "per": st.sampled_from(["gate", "matrix"])}
    ),
)
constraints = st.one_of(
    positive.map(lambda x: f"max_norm({x}, per=cell)"),
    positive.map(lambda x: {"max_norm": {"max_value": x}}),
    positive.map(lambda x: {"kind": "min_max_norm", "min_value": x, "max_value": 2 * x, "rate": 0.5}),
)
schedules = st.one_of(
    positive.map(lambda x: f"constant({x})"),
    st.fixed_dictionaries(
        {"kind": st.just("cosine"), "start": positive, "end": positive, "steps": st.integers(1, 2**53)}
    ),
)
common = {"target": targets, "schedule": schedules, "optional": st.booleans()}
rules = st.fixed_dictionaries(
    {"penalty": weight_penalties}, optional={**common, "via": st.sampled_from(["gradient", "loss", "decoupled"])}
) | st.fixed_dictionaries({"constraint": constraints}, optional={**common, "every": st.integers(1, 2**53)})
layers = st.fixed_dictionaries(
    {"kernel_regularizer": weight_penalties},
    optional={
        "module": any_of(patterns),
        "bias_constraint": constraints,
        "activity_regularizer": positive.map("l2({})".format),
    },
)


@given(st.data())
def test_any_valid_document_is_saved_stably_and_means_the_same(data):
    drawn = data.draw(st.lists(rules, min_size=1, max_size=4))
    for rule, name in zip(drawn, data.draw(st.lists(names, max_size=4, unique=True)), strict=False):
        rule["name"] = f"n {name}"
    saved(json.dumps({"rules": drawn, "layers": data.draw(st.lists(layers, max_size=2))}))


def test_a_kind_that_is_not_registered_can_be_used_but_not_saved():
    class Local(regkit.Penalty):
        """A penalty of this test."""

        kind: Literal["local"] = "local"

        def value(self, w):
            return w.sum()

    spec = regkit.Spec(rules=[regkit.Rule(penalty=Local(strength=1.0))])
    with pytest.raises(regkit.PluginError, match="'local' is not in the registry"):
        spec.to_json()
