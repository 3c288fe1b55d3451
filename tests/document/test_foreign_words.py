"""Words, forms and habits of other libraries, each with the sentence that leads to the right one."""

from __future__ import annotations

import json

import pytest
import torch

import regkit
from regkit import vocabulary
from regkit.registry.registry import default
from tests.support.telling import on, rule, told


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
