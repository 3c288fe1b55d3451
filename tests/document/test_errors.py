"""How mistakes in a document are told: all at once, in order, in the words of JSON, whatever was given."""

import json
import time

import pytest

import regkit
from tests.support.documents import L2, marked, on, penalty, problems, rule


def test_a_misspelt_kind_key_is_named():
    (problem,) = problems(penalty('"knid": "l2", "strength": 1'))
    assert "'knid'" in problem.message


@pytest.mark.parametrize(
    "text",
    [
        rule('{"constraint": {"max_norm": {"max_value": 1, "per": ¶"row"}}}'),
        rule('{"penalty": {"l2": ¶"x"}}'),
        rule('{"penalty": {"l2": {"strength": 1, "stregth": ¶2}}}'),
        rule('{"penalty": {"l2": ¶-1}}'),
    ],
)
def test_a_mistake_within_single_key_shorthand_is_placed_at_the_value(text):
    text, line, column = marked(text)
    (problem,) = problems(text)
    assert (problem.line, problem.column) == (line, column)
    value = json.loads(text)
    for part in problem.where.split("/")[1:]:
        value = value[int(part) if isinstance(value, list) else part]  # the pointer points at something that exists


@pytest.mark.parametrize(
    "document",
    [
        '{"rules": 1}', '{"rules": {}}', '{"rules": [3]}', '{"layers": ["l2"]}',
        '{"provenance": {"l2": 3}, "rules": []}',
        on('"layer": 1.0'), on('"role": {}'), on('"gate": 3'), rule('{"target": [], "penalty": "l2(1)"}'),
        rule("{" + L2 + ', "name": "' + "x" * 201 + '"}'), rule("{" + L2 + r', "name": "a\nb"}'),
        rule("{" + L2 + ', "name": ""}'),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_the_words_of_json(document):
    for problem in problems(document):
        for word in ("tuple", "dictionary", "instance", "Input", "String", "pattern", "validation", "None", "True"):
            assert word not in problem.message.partition(", got")[0]


@pytest.mark.parametrize("letter", ["\n", "\0", "\x1b", "\x7f", "\x85", "\x9b", "\u2028"])
def test_letters_that_would_garble_a_table_are_refused_in_names(letter):
    for document in (
        {"rules": [{"name": f"a{letter}b", "penalty": "l2(1)"}]},
        {"rules": [{"target": {"module": f"a{letter}b"}, "penalty": "l2(1)"}]},
    ):
        for problem in problems(document):
            assert letter not in problem.message


@pytest.mark.parametrize("text", ["{0}", "{message}", "{", "%s", "{x!r:>{y}}"])
def test_braces_in_what_was_given_are_told_as_they_are(text):
    for document in (
        {"rules": [{"penalty": {"kind": text}}]},
        {"rules": [{"penalty": "l2(1)", "via": text}]},
        {"rules": [{"penalty": "l2(1)", "target": {"role": text}}]},
        {"rules": [{"penalty": "l2(1)", text: 1}]},
        {"rules": [{"penalty": "l2(1)", "name": text}, {"penalty": "l2(1)", "name": text}]},
        {"version": text},
    ):
        (problem,) = problems(document)
        assert repr(text) in problem.message


def test_every_mistake_is_told_in_the_order_of_the_text():
    text = """{"vers": 1,
     "rules": [
       {"penalty": {"kind": "l3"}, "target": {"role": "kernal", "layer": [-1, true]}},
       {"penalty": "l2(1)", "every": 2},
       {"constraint": {"kind": "max_norm", "max_value": "3", "axis": 0}, "naem": 1}],
     "layers": [{"kernel_regularizer": "l2(0)"}, {}]}"""
    found = problems(text)
    assert {p.where for p in found} == {
        "/vers", "/rules/0/penalty/kind", "/rules/0/target/role", "/rules/0/target/layer/0",
        "/rules/0/target/layer/1", "/rules/1/every", "/rules/2/constraint/max_value", "/rules/2/constraint/axis",
        "/rules/2/naem", "/layers/0/kernel_regularizer", "/layers/1",
    }  # fmt: skip
    assert [(p.line, p.column) for p in found] == sorted((p.line, p.column) for p in found)
    with pytest.raises(regkit.SpecError, match=f"{len(found)} problems"):
        regkit.load(text)


def test_every_contradiction_of_one_rule_is_told():
    found = problems({"rules": [{"penalty": "l2(0)", "every": 3, "schedule": "constant(0)"}]})
    told = {problem.where: problem.message for problem in found}
    assert "strength is 0" in told["/rules/0/penalty"]
    assert "`every`" in told["/rules/0/every"]
    assert "value is 0" in told["/rules/0/schedule"]
    assert len(told) == 3


def test_a_file_is_named_before_its_mistakes(tmp_path):
    text, line, column = marked(rule("{" + L2 + ',\n "nmae": ¶1}'))
    path = tmp_path / "my spec.json"
    path.write_text(text)
    with pytest.raises(regkit.SpecError) as caught:
        regkit.load(path)
    first, second = str(caught.value).splitlines()
    assert first == f"{path} is not a valid spec: 1 problem"
    assert second.startswith(f"  line {line}, column {column}: /rules/0/nmae: unknown key 'nmae'")


def test_two_rules_of_one_name_are_refused_with_that_name_alone():
    def named(*names):
        rules = [{"penalty": "l2(1)"} | ({} if name is None else {"name": name}) for name in names]
        (problem,) = problems({"rules": rules})
        return problem.message

    message = named("a", "b", "a", "c")
    assert "'a'" in message
    assert "'b'" not in message
    message = named("rules/1", None, "other")
    assert "'rules/1'" in message
    assert "'other'" not in message


def test_a_rule_may_not_take_the_name_that_a_layer_gets():
    document = {
        "rules": [{"name": "layers/0/kernel_constraint", "penalty": "l2(1)"}],
        "layers": [{"kernel_constraint": "unit_norm"}],
    }
    (problem,) = problems(document)
    assert "'layers/0/kernel_constraint'" in problem.message


def test_too_many_rules_are_refused_with_the_limit():
    document = {"rules": [{"penalty": "l2(1)"}] * 20_001}
    (problem,) = problems(document)
    assert problem.where == "/rules"
    assert "20000" in problem.message


@pytest.mark.parametrize("value", [{"kind": "nuclear", "strength": 1}, "nuclear(1)", {"nuclear": 1}])
def test_a_missing_kind_is_told_with_the_distribution_and_version_it_was_saved_from(value):
    provenance = {"nuclear": {"distribution": "regkit-nuclear", "version": "1.2"}}
    (problem,) = problems({"provenance": provenance, "rules": [{"penalty": value}]})
    assert "'nuclear'" in problem.message
    assert "regkit-nuclear 1.2" in problem.message
    (problem,) = problems({"provenance": {"nuclear": {"distribution": "inhouse"}}, "rules": [{"penalty": value}]})
    assert problem.message.endswith("inhouse")
    (problem,) = problems({"rules": [{"penalty": value}]})
    assert "saved" not in problem.message


def test_ten_thousand_mistakes_are_found_in_seconds_and_told_in_a_page():
    text = '{"rules": [\n' + ",\n".join(['{"penalty": {"kind": "l2", "strength": -1}}'] * 10_000) + "\n]}"
    start = time.process_time()
    with pytest.raises(regkit.SpecError, match="10000 problems") as caught:
        regkit.load(text)
    assert time.process_time() - start < 6
    assert len(caught.value.problems) == 10_000
    assert caught.value.problems[-1].line == 10_001
    assert str(caught.value).endswith("and 9900 more (all are in .problems)")
