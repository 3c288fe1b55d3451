"""Rules that do not fit a model: the nearest thing that exists is named; and the table of those that do."""

import pytest
import torch
from torch import nn

import regkit


def model():
    return nn.ModuleDict(
        {
            "encoder": nn.LSTM(3, 4, 2, proj_size=2),
            "decoder": nn.GRU(3, 4),
            "plain": nn.RNN(3, 4, bias=False),
            "cell": nn.LSTMCell(3, 4),
            "head": nn.Linear(4, 2),
        }
    )


FITS = {"target": {"module": "absent"}, "penalty": "l2(1)", "optional": True}


def refused(target, on=None, *, optional=False, **kind):
    """The one reason for which a rule does not fit the model."""
    rule = {"target": target, **(kind or {"penalty": "l2(1)"}), "optional": optional}
    with pytest.raises(regkit.ResolveError) as caught:
        regkit.resolve(on or model(), {"rules": [FITS, rule]})
    (problem,) = caught.value.problems
    assert problem.where == "rules/1"
    return problem.message


def bound(target, on=None, **rule):
    rule = {"target": target, "penalty": "l2(1)", **rule}
    if "constraint" in rule:
        del rule["penalty"]
    (binding,) = regkit.resolve(on or model(), {"rules": [rule]}).bindings
    return binding.weights + binding.outputs


MISSING = [
    ({"module": "encodr"}, ["'encodr'", "did you mean 'encoder'?", "encoder (LSTM), decoder (GRU)"]),
    ({"module": "head"}, ["'head'", "decoder (GRU)"]),
    ({"module": ["encoder", "decodr"]}, ["'decodr'", "did you mean 'decoder'?"]),
    ({"module": "decoder", "role": "projection"}, ["role 'projection'", "decoder (GRU)", "kernel, recurrent, bias"]),
    ({"module": "plain", "role": "bias"}, ["role 'bias'", "plain (RNN)", "kernel, recurrent"]),
    ({"module": "plain", "role": ["kernel", "bias"]}, ["role 'bias'", "plain (RNN)", "kernel, recurrent"]),
    ({"module": "encoder", "layer": 2}, ["layer 2", "encoder (LSTM)", "0, 1"]),
    ({"module": "encoder", "layer": [0, 7]}, ["layer 7", "encoder (LSTM)", "0, 1"]),
    ({"direction": "backward"}, ["direction 'backward'", "encoder (LSTM)", "forward"]),
    ({"module": "decoder", "gate": "forget"}, ["gate 'forget'", "decoder (GRU)", "reset, update, new"]),
    (
        {"module": "encoder", "gate": ["input", "reset"]},
        ["gate 'reset'", "encoder (LSTM)", "input, forget, cell, output"],
    ),
    ({"module": "plain", "gate": "input"}, ["gate 'input'", "plain (RNN)", "none"]),
    ({"module": "encoder", "role": "projection", "gate": "input"}, ["gate 'input'", "encoder (LSTM)"]),
]


@pytest.mark.parametrize(("target", "words"), MISSING, ids=str)
def test_what_the_model_does_not_have_is_told_with_what_it_has(target, words):
    message = refused(target)
    for word in words:
        assert word in message


def lists(target):
    """The target, with each value in a list of its own."""
    return {key: value if isinstance(value, list) else [value] for key, value in target.items()}


@pytest.mark.parametrize(("target", "words"), MISSING, ids=str)
def test_an_optional_rule_binds_what_is_there_and_the_plan_names_what_is_not(target, words):
    """No other part of a target may be dropped along with the one that the model has not."""
    plan = regkit.resolve(model(), {"rules": [{"target": target, "penalty": "l2(1)", "optional": True}]})
    (binding,) = plan.bindings
    lacking = words[0] if words[0].split()[0] in target else f"module {words[0]}"
    assert lacking in binding.absent
    assert f"(no {lacking}: optional)" in str(plan)
    field, _, value = lacking.partition(" ")
    there = lists(target)
    there[field] = [one for one in there[field] if repr(one) != value]
    assert binding.sites == (bound(there) if there[field] else ())


@pytest.mark.parametrize(
    ("role", "there"),
    [
        (["kernel", "recurrent", "projection"], {"kernel", "recurrent"}),
        (["projection", "bias"], {"bias"}),
        (["projection"], set()),
    ],
)
def test_a_list_of_roles_of_which_one_is_missing_binds_the_others_and_constrains_them(role, there):
    lstm = nn.LSTM(3, 4)
    rule = {"target": {"role": role}, "constraint": "max_norm(0.01)", "optional": True}
    attachment = regkit.attach(lstm, {"rules": [rule]})
    assert {site.role for site in attachment.plan.bindings[0].sites} == there
    assert bool(attachment.violations()["rules/0"] > 0) == bool(there)


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ({"module": ["encoder", "decoder"], "gate": "forget"}, "decoder"),
        ({"module": ["encoder", "plain"], "role": "bias"}, "plain"),
        ({"module": ["encoder", "cell"], "layer": 1}, "cell"),
        ({"role": ["kernel", "projection"], "gate": "input"}, "projection"),
        ({"gate": ["forget", "reset"], "layer": 1}, "reset"),
    ],
)
def test_each_item_of_a_list_must_bind_something_together_with_the_rest_of_the_target(target, word):
    """An item that another field rules out would silently regularize nothing."""
    assert word in refused(target)


def test_a_layer_index_that_another_module_has_does_not_bind_it_here():
    assert {site.name for site in bound({"layer": 1})} == {"encoder"}


NEVER = [
    ({"role": "output"}, {"penalty": "l2(1)"}, ["l2", "output"]),
    ({"role": ["kernel", "state"]}, {"constraint": "unit_norm"}, ["unit_norm", "state"]),
    ({"role": "kernel"}, {"penalty": "activity_l2(1)"}, ["activity_l2", "kernel", "output, state, cell"]),
    ({"gate": "forget"}, {"penalty": "activity_l2(1)"}, ["activity_l2", "gate"]),
    ({"bias": "effective"}, {"penalty": "activity_l2(1)"}, ["activity_l2", "bias"]),
    ({"role": "state"}, {"penalty": "temporal(1)"}, ["temporal", "time", "state"]),
    ({"role": ["output", "state"]}, {"penalty": "norm_stabilizer(1)"}, ["norm_stabilizer", "time", "state"]),
    ({"role": "bias"}, {"penalty": "orthogonal(1)"}, ["orthogonal", "bias", "matrices"]),
    ({"role": ["kernel", "bias"]}, {"penalty": "orthogonal(1)"}, ["orthogonal", "bias", "matrices"]),
    ({"gate": "input"}, {"constraint": "max_norm(1, per=cell)"}, ["max_norm", "per cell", "gate"]),
    ({"role": "kernel", "bias": "effective"}, {"penalty": "l2(1)"}, ["effective", "role bias"]),
    ({"role": "bias", "bias": "effective"}, {"penalty": "l2(1)"}, ["decoder (GRU)", "reset, update"]),
    ({"role": "bias", "bias": "effective", "gate": "n"}, {"penalty": "l2(1)"}, ["new", "reset, update"]),
]  # fmt: skip


@pytest.mark.parametrize(("target", "kind", "words"), NEVER, ids=str)
@pytest.mark.parametrize("optional", [False, True])
def test_what_can_never_be_is_an_error_even_of_an_optional_rule(target, kind, words, optional):
    message = refused(target, optional=optional, **kind)
    for word in words:
        assert word in message


def test_the_output_of_a_layer_below_the_top_cannot_be_seen():
    message = refused({"module": "encoder", "layer": 0}, penalty="activity_l2(1)")
    for word in ("encoder (LSTM)", "1"):
        assert word in message
    assert "no visible layer 0" in message
    assert len(bound({"module": "encoder", "layer": 1}, penalty="activity_l2(1)")) == 1


def test_a_role_that_no_module_puts_out_is_told_with_those_that_are():
    message = refused({"module": "decoder", "role": "cell"}, penalty="activity_l2(1)")
    assert "role 'cell'" in message
    assert "output, state" in message


def test_the_biases_of_an_lstm_have_an_effective_sum_in_every_gate():
    assert len(bound({"module": "cell", "role": "bias", "bias": "effective", "gate": ["i", "f", "g", "o"]})) == 4


def test_a_weight_that_is_computed_from_another_unseen_is_refused_and_the_others_are_not():
    module = nn.LSTM(2, 2)
    del module.weight_hh_l0
    module.weight_hh_l0 = torch.zeros(8, 2)
    wrapped = nn.ModuleDict({"enc": module})
    message = refused({"module": "enc", "role": "recurrent"}, wrapped)
    assert "enc (LSTM): weight_hh_l0 is computed from another" in message
    assert "weight_hh_l0_raw" in message
    assert [site.parameters for site in bound({"role": "kernel"}, wrapped)] == [("weight_ih_l0",)]


def test_a_weight_of_integers_is_refused():
    module = nn.RNN(2, 2)
    module.weight_ih_l0 = nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), requires_grad=False)
    assert "int64" in refused({"role": "kernel"}, module)


def test_a_model_without_a_recurrent_module_is_told_what_it_has_and_what_is_known():
    with pytest.raises(regkit.ResolveError) as caught:
        regkit.resolve(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), {"rules": [{"penalty": "l2(1)"}]})
    for word in ("no recurrent module", "Linear", "ReLU", "GRU", "LSTMCell"):
        assert word in str(caught.value)


def test_every_rule_that_does_not_fit_is_told_by_its_name():
    document = {
        "rules": [
            {"name": "wrong gate {0}", "target": {"module": "decoder", "gate": "f"}, "penalty": "l2(1)"},
            {"target": {"role": "kernel"}, "penalty": "l2(1)"},
            {"target": {"layer": 9}, "penalty": "l2(1)"},
        ],
        "layers": [{"module": "{message}", "kernel_regularizer": "l2(1)"}],
    }
    with pytest.raises(regkit.ResolveError, match="3 problems") as caught:
        regkit.resolve(model(), document)
    assert [p.where for p in caught.value.problems] == ["wrong gate {0}", "rules/2", "layers/0/kernel_regularizer"]
    for word in ("wrong gate {0}: there is no gate 'forget'", "rules/2: ", "'{message}'"):
        assert word in str(caught.value)


def test_a_bad_document_is_refused_before_the_model_is_looked_at():
    with pytest.raises(regkit.SpecError):
        regkit.resolve(nn.Linear(2, 2), {"rules": [{"penalty": "l3(1)"}]})


# The table


def cells(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_the_table_has_a_row_for_each_site():
    document = {
        "rules": [
            {"name": "decay", "target": {"module": "decoder", "role": "kernel", "gate": ["z"]}, "penalty": "l2(0.5)"},
            {"target": {"module": "encoder", "role": "projection"}, "constraint": "max_norm(3)", "every": 2},
            {"target": {"module": "cell", "role": "bias", "bias": "effective"}, "penalty": "l1(1)", "via": "proximal"},
            {"target": {"module": "decoder", "role": "state"}, "penalty": "activity_l1(1)", "schedule": "constant(2)"},
            {"target": {"module": "absent"}, "penalty": "l2(1)", "optional": True},
        ]
    }
    plan = regkit.resolve(model(), document)
    header, rule, *lines = str(plan).splitlines()
    assert cells(header)[:9] == ["rule", "kind", "module", "parameter", "role", "layer", "direction", "gate", "shape"]
    assert set(rule) == {"─", " "}
    assert [cells(line) for line in lines[:4]] == [
        ["decay", "l2(strength=0.5)", "decoder", "weight_ih_l0", "kernel", "0", "forward", "update", "4 × 3",
         "added to the gradient at each step"],
        ["rules/1", "max_norm(per=unit, max_value=3.0)", "encoder", "weight_hr_l0", "projection", "0", "forward", "all",
         "2 × 4", "projected after every 2 steps"],
        ["rules/1", "max_norm(per=unit, max_value=3.0)", "encoder", "weight_hr_l1", "projection", "1", "forward", "all",
         "2 × 4", "projected after every 2 steps"],
        ["rules/2", "l1(strength=1.0)", "cell", "bias_ih + bias_hh", "bias", "0", "forward", "all", "16",
         "proximal operator after each step"],
    ]  # fmt: skip
    assert "activity_l1(strength=1.0, reduction=mean) × constant(value=2.0)" in lines[4]
    assert "(no module 'absent': optional)" in lines[5]
    assert cells(lines[4])[2:4] == ["decoder", "state"]
    assert "penalty()" in lines[4]
    assert len(lines) == 6 == len(plan.rows())
    starts = [
        line.index(word) for line, word in zip((header, *lines[:2]), ("module", "decoder", "encoder"), strict=True)
    ]
    assert len(set(starts)) == 1  # columns are aligned


def test_the_table_names_the_model_itself_and_the_layer_whose_output_is_seen():
    plan = regkit.resolve(nn.LSTM(2, 2, 3), {"rules": [{"penalty": "activity_l2(1)"}]})
    (row,) = plan.rows()
    assert row[2] == "(model)"
    assert row[5] == "2"  # not "all": the layers below are not regularized
