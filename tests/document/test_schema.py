"""The JSON Schema of the document: what an editor accepts, refuses and explains."""

import copy
import json
from pathlib import Path
from typing import Literal

import jsonschema
import pytest

import regkit
from regkit.fields import NonNegative, Positive

EXAMPLES = Path(__file__).parents[2] / "examples" / "specs"


@pytest.fixture(scope="module")
def validator():
    schema = regkit.schema()
    return jsonschema.Draft202012Validator(schema)


def rule(**parts):
    return {"rules": [parts]}


L2 = {"kind": "l2", "strength": 1e-4}

VALID = [
    rule(penalty=L2),
    rule(penalty="l2(1e-4)"),
    rule(penalty=" l2 ( 1e-4 ) "),
    rule(penalty={"l2": 1e-4}),
    rule(penalty={"l2": {"strength": 1e-4}}),
    rule(penalty={"l1": 1e-5, "l2": 1e-4}),
    rule(penalty={"l1_l2": {"l1": 1}}),
    rule(penalty="activity_l2(1)"),
    rule(penalty={"kind": "temporal", "strength": 1, "reduction": "batch"}),
    rule(constraint="unit_norm"),
    rule(constraint={"unit_norm": {}}),
    rule(constraint="max_norm(3, per=cell)", every=5),
    rule(constraint={"max_norm": {"max_value": 3}}),
    rule(constraint={"kind": "max_norm", "max_value": 3, "per": "cell"}),
    rule(constraint={"min_value": 1, "max_value": 2}),
    rule(penalty=L2, schedule={"kind": "linear", "start": 0, "end": 1, "steps": 10}),
    rule(penalty=L2, schedule="linear(0, 1, 10)"),
    rule(penalty=L2, schedule={"kind": "piecewise", "boundaries": [3], "values": [0, 1]}),
    rule(penalty=L2, schedule={"kind": "exponential", "decay": 0.5, "steps": 3, "limit": None}),
    rule(penalty=L2, name="a", via="proximal", optional=True),
    rule(penalty=L2, target={}),
    rule(penalty=L2, target={"module": "a.*", "role": "kernel", "layer": 0, "direction": "forward", "gate": "f"}),
    rule(penalty=L2, target={"module": ["a", "b"], "role": ["kernel"], "layer": [0, 1], "gate": ["i", "cell"]}),
    rule(penalty=L2, target={"direction": "reverse"}),
    rule(penalty=L2, target={"direction": ["forward", "reverse"], "bias": "effective"}),
    {"$schema": "regkit.schema.json", "version": 1} | rule(penalty=L2),
    {"provenance": {"l2": {"distribution": "torch-regkit", "version": "0.1.0"}}} | rule(penalty=L2),
    {"provenance": {"l2": {"distribution": "torch-regkit", "version": None}}} | rule(penalty=L2),
    {"layers": [{"module": "a", "kernel_regularizer": "l2(1)", "bias_constraint": "non_negative"}]},
    {"layers": [{"activity_regularizer": "l2(1)"}]},
    {"layers": [{"activity_regularizer": {"l2": 1}}]},
    {"layers": [{"activity_regularizer": {"kind": "l2", "strength": 1}}]},
    {"layers": [{"activity_regularizer": {"l1": 1, "l2": 1}}]},
]
INVALID = [
    {},
    [],
    {"version": 1},
    {"version": 2} | rule(penalty=L2),
    {"version": "1"} | rule(penalty=L2),
    {"rule": []} | rule(penalty=L2),
    {"rules": {}},
    rule(penalty=L2, nmae="a"),
    rule(penalty=L2, name=""),
    rule(penalty=L2, name=3),
    rule(penalty=L2, every=0),
    rule(penalty=L2, every=1.5),
    rule(penalty=L2, optional=1),
    rule(penalty=L2, via="gradiant"),
    rule(penalty={"kind": "l3", "strength": 1}),
    rule(penalty="l3(1)"),
    rule(penalty="l2(1"),
    rule(penalty={"l3": 1}),
    rule(penalty={"l2": "1"}),
    rule(penalty={"kind": "l2"}),
    rule(penalty={"strength": 1}),
    rule(penalty={"kind": "l2", "strength": "1e-4"}),
    rule(penalty={"kind": "l2", "strength": True}),
    rule(penalty={"kind": "l2", "strength": -1}),
    rule(penalty={"kind": "l2", "strength": 1, "stregth": 1}),
    rule(penalty={"kind": "max_norm", "max_value": 1}),
    rule(penalty="max_norm(1)"),
    rule(penalty=3),
    rule(constraint=L2),
    rule(constraint={"kind": "max_norm"}),
    rule(constraint={"kind": "max_norm", "max_value": 0}),
    rule(constraint={"kind": "max_norm", "max_value": 1, "per": "row"}),
    rule(constraint={"kind": "min_max_norm", "rate": 2}),
    rule(penalty=L2, schedule={"kind": "linear", "start": 0, "end": 1}),
    rule(penalty=L2, schedule={"kind": "linear", "start": 0, "end": 1, "steps": 0}),
    rule(penalty=L2, schedule="unit_norm"),
    rule(penalty=L2, target={"rol": "kernel"}),
    rule(penalty=L2, target={"layer": -1}),
    rule(penalty=L2, target={"layer": "0"}),
    rule(penalty=L2, target={"direction": "sideways"}),
    rule(penalty=L2, target={"bias": "both"}),
    rule(penalty=L2, target=[]),
    {"layers": [{"kernel_regulariser": "l2(1)"}]},
    {"layers": [{"kernel_regularizer": "activity_l2(1)"}]},
    {"layers": [{"activity_regularizer": "orthogonal(1)"}]},
    {"layers": [{"activity_regularizer": {"kind": "orthogonal", "strength": 1}}]},
    {"provenance": {"l2": 3}} | rule(penalty=L2),
    {"provenance": {"l2": {"distribution": "d", "verson": "1"}}} | rule(penalty=L2),
]


def short(document):
    return json.dumps(document)[:70]


def test_it_is_a_schema_of_draft_2020_12_in_plain_json():
    schema = regkit.schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema


@pytest.mark.parametrize("document", VALID, ids=short)
def test_what_is_loaded_is_accepted_and_so_is_what_is_saved_of_it(document, validator):
    saved = json.loads(regkit.load(document).to_json())
    for accepted in (document, saved):
        assert [error.message for error in validator.iter_errors(accepted)] == []


@pytest.mark.parametrize("document", INVALID, ids=short)
def test_what_is_refused_when_loaded_is_refused_by_the_schema(document, validator):
    with pytest.raises((regkit.SpecError, TypeError)):
        regkit.load(document)
    assert not validator.is_valid(document)


def resolved(schema, node):
    """A node of the schema, its references followed."""
    while "$ref" in node:
        name = node["$ref"].removeprefix("#/$defs/").replace("%20", " ")
        node = schema["$defs"][name]
    return node


def test_every_reference_leads_somewhere():
    schema = regkit.schema()
    pending = [schema]
    count = 0
    while pending:
        node = pending.pop()
        if isinstance(node, dict) and "$ref" in node:
            assert resolved(schema, {"$ref": node["$ref"]})
            count += 1
        pending += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    assert count > 20
    assert "x-open-union" not in json.dumps(schema)


def definitions(schema):
    """The definition of each kind, by the kind's name."""
    found = {}
    for definition in schema["$defs"].values():
        name = definition.get("properties", {}).get("kind", {}).get("const")
        if name is not None:
            found[name] = definition
    return found


def test_every_installed_kind_is_there_with_a_description_of_itself_and_of_each_option():
    found = definitions(regkit.schema())
    entries = regkit.Registry().entries()
    assert set(found) == {entry.name for entry in entries}
    assert len(found) > 10
    for entry in entries:
        definition = found[entry.name]
        assert definition["description"].startswith(entry.meaning)
        assert "kind" in definition["required"]
        assert definition["additionalProperties"] is False
        assert set(definition["properties"]) == set(entry.kind.model_fields)
        missing = [
            key for key, option in definition["properties"].items() if key != "kind" and not option.get("description")
        ]
        assert missing == [], entry.name


def test_every_key_of_the_document_has_a_description():
    schema = regkit.schema()
    shapes = [schema, *(schema["$defs"][name] for name in ("Rule", "Target", "Layer"))]
    for shape in shapes:
        assert [key for key, option in shape["properties"].items() if not option.get("description")] == []


def test_a_kind_of_a_given_registry_is_in_its_schema_alone():
    class Nuclear(regkit.Penalty):
        """Sum of singular values."""

        kind: Literal["nuclear"] = "nuclear"
        rank: Positive = 1.0
        """How many of them."""
        floor: NonNegative

        def value(self, w):
            return w.sum()

    class Plugin:
        @regkit.hookimpl
        def regkit_penalties(self):
            return [Nuclear]

    registry = regkit.Registry([Plugin()])
    validator = jsonschema.Draft202012Validator(regkit.schema(registry))
    good = rule(penalty={"kind": "nuclear", "strength": 1, "floor": 0})
    assert validator.is_valid(good)
    assert regkit.load(good, registry=registry)
    for path, value in (("rank", 0), ("floor", "0"), ("rnak", 1)):
        bad = copy.deepcopy(good)
        bad["rules"][0]["penalty"][path] = value
        assert not validator.is_valid(bad)
    assert not validator.is_valid(rule(penalty={"kind": "nuclear", "strength": 1}))
    assert not jsonschema.Draft202012Validator(regkit.schema()).is_valid(good)
    definition = definitions(regkit.schema(registry))["nuclear"]
    assert definition["properties"]["rank"]["description"] == "How many of them."


def test_a_registry_without_kinds_still_has_a_schema():
    schema = regkit.schema(regkit.Registry(entry_points=False))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert not jsonschema.Draft202012Validator(schema).is_valid(rule(penalty=L2))


def test_every_example_is_valid(validator):
    paths = sorted(EXAMPLES.glob("*.json"))
    assert paths
    for path in paths:
        document = json.loads(path.read_text(encoding="utf-8"))
        assert [error.message for error in validator.iter_errors(document)] == [], path.name
        assert regkit.load(path).rules


def test_what_is_said_of_a_strength_is_what_the_schema_allows_and_what_loading_refuses():
    options = {
        name: definition["properties"]["strength"]
        for name, definition in definitions(regkit.schema()).items()
        if "strength" in definition.get("properties", {})
    }
    assert {"l2", "activity_l1_l2", "temporal"} <= options.keys()
    for name, option in options.items():
        assert option["minimum"] == 0, name
        assert option["description"].endswith("Range: ≥ 0; a rule with 0 is refused."), name
    with pytest.raises(regkit.SpecError, match="l2 has no effect: its strength is 0"):
        regkit.load(rule(penalty={"kind": "l2", "strength": 0}))
