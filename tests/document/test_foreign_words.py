"""Words, forms and habits of other libraries and languages, each with the sentence that leads to the right one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import regkit
from regkit import vocabulary
from regkit.registry.registry import default


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4)
        self.encoder = nn.Sequential(nn.LSTM(3, 4))
        self.head = nn.Linear(4, 1)


def told(document: Any, model: nn.Module | None = None) -> str:
    """The one problem of a document, read alone or for a model."""
    with pytest.raises((regkit.SpecError, regkit.ResolveError)) as caught:
        regkit.load(document) if model is None else regkit.resolve(model, document)
    (problem,) = caught.value.problems
    return problem.message


def rule(**rule: Any) -> dict[str, Any]:
    return {"rules": [rule]}


def on(**target: Any) -> dict[str, Any]:
    return rule(penalty="l2(1)", target=target)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("weight_decay(1e-4)", ["l2(c/2)"]),
        ("WeightDecay(1e-4)", ["l2(c/2)"]),
        ("ar(1)", ["activity_l2", "Merity"]),
        ("tar(1)", ["is temporal"]),
        ("lasso(1)", ["is l1"]),
        ("ridge(1)", ["is l2"]),
        ("elastic_net(1)", ["l1_l2"]),
        ("dropout(0.5)", ["no penalty", "nn.LSTM(dropout=0.5)"]),
        ("zoneout(0.5)", ["no penalty"]),
        ("orthogonal_regularizer(0.1)", ["cosine_orthogonal", "another formula"]),
        ("OrthogonalRegularizer(0.1)", ["cosine_orthogonal", "another formula"]),
        ("clip_grad_norm_(1)", ["torch.nn.utils.clip_grad_norm_", "max_norm"]),
    ],
)
def test_a_penalty_of_another_name_is_told_by_its_name_here(given, words):
    sentence = told(rule(penalty=given))
    assert all(word in sentence for word in words), sentence
    assert "did you mean" not in sentence


def test_every_kind_that_the_vocabulary_leads_to_exists():
    kinds = {entry.name for entry in default().entries()}
    for sentence in vocabulary._KINDS.values():
        named = {word.strip("(),.") for word in sentence.replace("(", " (").split()}
        assert named & kinds or sentence is vocabulary._NOISE, sentence
    for name, (kind, options) in vocabulary._KERAS.items():
        assert kind in kinds
        assert {option for option, _ in options.values()} <= set(default().kind(kind).model_fields), name


def test_no_word_of_the_vocabulary_hides_a_name_that_exists():
    registry = default()
    for place, names in [
        ("penalty", [entry.name for entry in registry.entries()]),
        ("role", registry.roles),
        ("gate", registry.gates),
        ("direction", ["forward", "backward"]),
        ("key", [*regkit.Rule.model_fields, *regkit.Target.model_fields, "layers", "rules"]),
    ]:
        assert {name: said for name in names if (said := vocabulary.in_these_words(place, name))} == {}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (rule(penalty="l2(1)", module="rnn"), "'module' here: it belongs into `target`"),
        (rule(penalty="l2(1)", role="recurrent"), "'role' here: it belongs into `target`"),
        (rule(penalty="l2(1)", strength=2), "'strength' here: it belongs into `penalty`"),
        (rule(constraint="max_norm(1)", per="unit"), "'per' here: it belongs into `constraint`"),
        (rule(penalty="l2(1)", schedule="linear(0, 1, 5)", steps=5), "'steps' here: it belongs into `schedule`"),
        (rule(penalty={"kind": "l2", "strength": 1, "role": "kernel"}), "it belongs into the rule's `target`"),
        (rule(penalty={"kind": "l2", "strength": 1, "via": "loss"}), "it belongs into the rule, beside `penalty`"),
        (rule(penalty="l2(1)", target={"via": "loss"}), "it belongs into the rule, beside `target`"),
        ({**rule(penalty="l2(1)"), "penalty": "l2(1)"}, "it belongs into a rule, in the list `rules`"),
        ({**rule(penalty="l2(1)"), "kernel_regularizer": "l2(1)"}, "into a layer, in the list `layers`"),
        (rule(penalty="l2(1)", kernel_regularizer="l2(1)"), "into a layer, in the list `layers`"),
        ({"layers": [{"kernel_regularizer": "l2(1)", "via": "loss"}]}, "into a rule, in the list `rules`"),
        (rule(penalty="l2(1)", provenance={}), "at the top of the document"),
        (rule(penalty="l2(1)", target={"strength": 1}), "unknown key 'strength'. Available"),
        ({**rule(penalty="l2(1)"), "strength": 1}, "unknown key 'strength'. Available"),
    ],
)
def test_a_key_that_is_right_elsewhere_is_told_where(document, words):
    assert words in told(document)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"layers": [{"kernel_regularizer": "l2(1)", "W_regularizer": "l2(1)"}]}, "kernel_regularizer"),
        ({"layers": [{"kernel_regularizer": "l2(1)", "U_regularizer": "l2(1)"}]}, "recurrent_regularizer"),
        ({"layers": [{"kernel_regularizer": "l2(1)", "b_constraint": "l2(1)"}]}, "bias_constraint"),
        (rule(constraint={"kind": "max_norm", "max_value": 1, "axis": 0}), 'axis=0 is per="unit"'),
        (rule(constraint={"kind": "unit_norm", "axis": 0}), 'axis=0 is per="unit"'),
        (rule(penalty={"kind": "l2", "strength": 1, "lambda": 1}), "`strength`"),
        (rule(penalty="l2(1)", weight_decay=0.1), "l2(c/2)"),
        (rule(penalty="l2(1)", weight_hh_l0=1), "role recurrent, layer 0"),
        (on(weight="kernel"), "named by `role`"),
        (rule(penalty={"kind": "l2", "strength": 1, "weight": 1}), "`strength`"),
        (rule(constraint={"kind": "max_norm", "max_value": 1, "c": 1}), "`max_value`"),
    ],
)
def test_a_key_of_another_library_is_told_by_its_word_here(document, words):
    assert words in told(document)


@pytest.mark.parametrize("key", ["axis", "c", "max", "roles", "parameter"])
def test_a_key_of_another_library_leads_to_none_that_may_not_stand_there(key):
    sentence = told(rule(penalty={"kind": "l2", "strength": 1, key: 1}))
    assert sentence == f"unknown key {key!r}. Available: kind, strength"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"class_name": "L2", "config": {"l2": 0.01}}, {"kind": "l2", "strength": 0.01}),
        ({"class_name": "L1L2", "config": {"l1": 1.0, "l2": 2.0}}, {"kind": "l1_l2", "l1": 1.0, "l2": 2.0}),
        (
            {"class_name": "OrthogonalRegularizer", "config": {"factor": 0.1, "mode": "rows"}},
            {"kind": "cosine_orthogonal", "strength": 0.1, "mode": "columns"},
        ),
        (
            {"module": "keras.constraints", "class_name": "MaxNorm", "config": {"max_value": 2, "axis": 0}},
            {"kind": "max_norm", "max_value": 2, "per": "unit"},
        ),
        ({"class_name": "UnitNorm", "config": {"axis": -1}}, {"kind": "unit_norm", "per": "input"}),
        ({"class_name": "UnitNorm", "config": {"axis": [0, 1]}}, {"kind": "unit_norm", "per": "matrix"}),
        ({"class_name": "UnitNorm", "config": {"axis": [0]}}, {"kind": "unit_norm", "per": "unit"}),
        ({"class_name": "UnitNorm", "config": {"axis": None}}, {"kind": "unit_norm", "per": "matrix"}),
        ({"class_name": "NonNeg", "config": {}}, {"kind": "non_negative"}),
        ({"class_name": "l2"}, {"kind": "l2", "strength": 0.01}),
        (
            {"class_name": "orthogonal_regularizer", "config": {}},
            {"kind": "cosine_orthogonal", "strength": 0.01, "mode": "columns"},
        ),
        ({"class_name": "MaxNorm"}, {"kind": "max_norm", "max_value": 2, "per": "unit"}),
        (
            {"class_name": "MinMaxNorm", "config": {"min_value": 0.1, "max_value": 1, "rate": 0.5, "axis": 0}},
            {"kind": "min_max_norm", "min_value": 0.1, "max_value": 1, "rate": 0.5, "per": "unit"},
        ),
    ],
)
def test_a_kind_as_keras_saves_it_is_told_as_a_document_says_it(given, wanted):
    field = "constraint" if "Norm" in given["class_name"] or given["class_name"] == "NonNeg" else "penalty"
    sentence = told(rule(**{field: given}))
    of_bias = '; of a bias, which is a vector, axis=0 is "per": "matrix"' if wanted.get("per") == "unit" else ""
    assert sentence == f"this is how Keras saves {given['class_name']}; write {json.dumps(wanted)}{of_bias}"
    regkit.load(rule(**{field: wanted}))  # and that is right


def test_an_activity_regularizer_of_keras_is_told_with_its_reduction():
    sentence = told({"layers": [{"activity_regularizer": {"class_name": "L2", "config": {"l2": 0.01}}}]})
    assert '{"kind": "activity_l2", "strength": 0.01, "reduction": "batch"}' in sentence


@pytest.mark.parametrize(
    ("axis", "per", "norms_along"), [(0, "unit", 0), (-1, "input", 1), ([0, 1], "matrix", (0, 1)), ([-2], "unit", 0)]
)
def test_a_translated_constraint_is_as_keras_computes_it_on_the_transposed_kernel(axis, per, norms_along):
    kernel = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(3, 4)  # of 3 inputs and 4 units, as Keras keeps it
    norms = kernel.square().sum(norms_along, keepdim=True).sqrt()
    made = vocabulary.from_keras("MaxNorm", {"max_value": 2, "axis": axis})
    assert made == {"kind": "max_norm", "max_value": 2, "per": per}
    projected = default().kind("max_norm")(max_value=2, per=per).project(kernel.T.contiguous())
    torch.testing.assert_close(projected.T, kernel * norms.clamp(max=2) / norms)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (rule(penalty={"class_name": "MaxNorm"}), "'max_norm' is a kind of constraint"),
        (rule(constraint={"class_name": "L2"}), "'l2' is a kind of penalty"),
        ({"layers": [{"activity_regularizer": {"class_name": "OrthogonalRegularizer"}}]}, "no kind stands for"),
        (rule(constraint={"class_name": "MaxNorm", "config": {"axis": 2}}), "no kind stands for 'MaxNorm' with such"),
        (rule(constraint={"class_name": "MaxNorm", "config": {"axis": []}}), "no kind stands for 'MaxNorm' with such"),
        (rule(penalty={"class_name": "L2", "config": {"l3": 1}}), "no kind stands for 'L2' with such"),
    ],
)
def test_no_translation_is_told_that_would_be_refused(document, words):
    assert words in told(document)


@pytest.mark.parametrize("name", ["Dense", 3, None])
def test_another_class_of_keras_is_said_to_be_none_of_a_kind(name):
    assert "no kind stands for" in told(rule(penalty={"class_name": name, "config": {}}))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"role": "weight_hh_l0"}, "torch's weight_hh_l0 is role recurrent, layer 0"),
        ({"role": "weight_ih_l1_reverse"}, "is role kernel, layer 1, direction backward"),
        ({"role": "bias_hh"}, "is role bias"),
        ({"role": "weight_hr_l0"}, "is role projection"),
        ({"role": "recurrent_kernel"}, "Keras' recurrent_kernel is the role recurrent"),
        ({"role": "hidden"}, "the role recurrent"),
        ({"role": "all"}, "without `role`"),
        ({"gate": "candidate"}, "gate cell of an LSTM, and new of a GRU"),
        ({"direction": "both"}, "without `direction` both are meant"),
        ({"direction": "fw"}, "left to right is forward"),
    ],
)
def test_a_word_in_a_target_is_told_by_its_word_here(target, words):
    assert words in told(on(**target))


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


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words", "column"),
    [
        ('{"rules": [{"penalty": "l2(1)",}]}', "no comma before the closing }", None),
        ('{"rules": [{"penalty": "l2(1)"},]}', "no comma before the closing ]", None),
        ("{'rules': []}", "strings stand in double quotes", 2),
        ('{"rules": [{"penalty": \'l2(1)\'}]}', "strings stand in double quotes", 24),
        ('{"rules": [{"optional": True}]}', "True of Python is true in JSON", 25),
        ('{"rules": [{"name": None}]}', "None of Python is null in JSON", 21),
        ("{rules: []}", 'keys stand in double quotes: "rules"', 2),
        ('{"rules": [ // these\n]}', "no comments in JSON", 13),
        ('{"rules": [] # these\n}', "no comments in JSON", 14),
        ('{"rules": /* these */ []}', "no comments in JSON", 11),
        ('{"rules": [{"penalty": l2}]}', "Expecting value", 24),
    ],
)
def test_what_is_no_json_is_told_for_what_it_is(text, words, column):
    with pytest.raises(regkit.SpecError) as caught:
        regkit.load(text)
    (problem,) = caught.value.problems
    assert words in problem.message
    assert problem.line == 1
    assert column in (None, problem.column)


def test_yaml_is_told_to_be_no_json(tmp_path: Path):
    text = "rules:\n  - penalty: l2(1)\n"
    path = tmp_path / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    for given in (path, text, "rules: [{penalty: l2(1)}]"):
        with pytest.raises(regkit.SpecError, match="YAML"):
            regkit.load(given)


@pytest.mark.parametrize("comment", ["// ours", "# ours", "/* ours */"])
def test_a_text_that_begins_with_a_comment_is_told_so(comment):
    with pytest.raises(regkit.SpecError, match="no comment goes before"):
        regkit.load(comment + '\n{"rules": [{"penalty": "l2(1)"}]}')


# --- the place of what does not fit ----------------------------------------------------------------------------------

TEXT = """{
  "rules": [
    {"penalty": "l2(1)"},
    {"name": "gone",
     "penalty": "l2(1)", "target": {"module": "nowhere"}}
  ],
  "layers": [
    {"module": "rnn", "kernel_regularizer": "l2(1)"},
    {"module": "elsewhere",
     "recurrent_regularizer": "l2(1)"}
  ]
}"""


@pytest.mark.parametrize("of", ["text", "file", "spec"])
def test_a_rule_that_does_not_fit_is_told_with_its_line_and_column(of, tmp_path: Path):
    path = tmp_path / "spec.json"
    path.write_text(TEXT, encoding="utf-8")
    given: Any = {"text": TEXT, "file": path, "spec": regkit.load(TEXT)}[of]
    with pytest.raises(regkit.ResolveError) as caught:
        regkit.resolve(Net(), given)
    first, second = caught.value.problems
    assert (first.where, first.line, first.column) == ("gone", 4, 5)
    assert (second.where, second.line, second.column) == ("layers/1/recurrent_regularizer", 10, 31)
    assert str(first).startswith("line 4, column 5: gone: ")


def test_the_places_are_no_part_of_a_documents_value():
    of_text, of_values = regkit.load(TEXT), regkit.load(json.loads(TEXT))
    assert of_text == of_values
    assert hash(of_text) == hash(of_values)
    assert of_text.to_json() == of_values.to_json()
    with pytest.raises(regkit.ResolveError) as caught:
        regkit.resolve(Net(), of_values)
    assert all(problem.line is None for problem in caught.value.problems)


def test_a_rule_put_into_a_copy_has_no_place_in_the_text():
    spec = regkit.load(TEXT)
    other = spec.model_copy(update={"rules": (spec.rules[1].model_copy(update={"name": None}), *spec.rules[2:])})
    with pytest.raises(regkit.ResolveError) as caught:
        regkit.resolve(Net(), other)
    first, second = caught.value.problems
    assert (first.where, first.line) == ("rules/0", None)
    assert (second.where, second.line) == ("layers/1/recurrent_regularizer", 10)
