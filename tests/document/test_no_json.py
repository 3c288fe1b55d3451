"""Texts that are no JSON, by a habit from another language: each is told for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

import regkit


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
