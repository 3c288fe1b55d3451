"""Rules that do not fit a model: each is told with its line and column, if the document came as a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import regkit
from tests.support.telling import Net

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


def test_the_places_of_thousands_of_rules_cost_no_look_at_all_rules_for_each(monkeypatch):
    looks: list[int] = []
    keyed_rules = regkit.Spec.keyed_rules
    text = json.dumps({"rules": [{"penalty": "l2(1)", "target": {"module": "nowhere"}}] * 500}, indent=1)
    spec = regkit.load(text)
    monkeypatch.setattr(regkit.Spec, "keyed_rules", lambda self: looks.append(1) or keyed_rules(self))
    with pytest.raises(regkit.ResolveError) as caught:
        regkit.resolve(Net(), spec)
    assert len({problem.line for problem in caught.value.problems}) == 500
    assert len(looks) == 1
