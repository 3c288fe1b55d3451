"""Whatever a document holds, it is read, or refused with SpecError; nothing else ever comes out."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import regkit

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)

VALID = {
    "$schema": "s.json",
    "version": 1,
    "provenance": {"l2": {"distribution": "torch-regkit", "version": "0.1.0"}},
    "rules": [
        {"name": "a", "target": {"module": "enc.*", "role": ["kernel"], "layer": 0}, "penalty": "l2(1e-4)"},
        {"constraint": {"max_norm": {"max_value": 3, "per": "cell"}}, "every": 2},
        {"penalty": {"kind": "l1", "strength": 1}, "schedule": {"kind": "linear", "start": 0, "end": 1, "steps": 9}},
    ],
    "layers": [{"module": ["dec"], "bias_regularizer": {"l1": 1, "l2": 2}, "activity_regularizer": "l2(1)"}],
}
NASTY = [
    "\ud800", {"kind": "\ud800"}, {"kind": {}}, {"\ud800": 1}, {"l2": "\ud800"}, {"distribution": "\ud800"}, "nope(1)",
    "l2(" + "[" * 9999 + ")", "l2({)", "l2(" + "9" * 5000 + ")", "l2(=)", "x(" * 99, "{0}", "{message}", {"{0}": "{1}"},
    10**400, 10**5000, -0.0, float("nan"), float("inf"), {"kind": "l2"}, [[]], {"": {}}, True, "", "\0",
]  # fmt: skip


def replaced(value, path, new):
    """A copy of the value with another one at the path."""
    root = copy.deepcopy(value)
    if not path:
        return new
    inner = root
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = new
    return root


def paths(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(inner, (*path, key))


def outcome(document):
    """The spec, or what is wrong with the document, without the places that only a text has."""
    try:
        return regkit.load(document)
    except regkit.SpecError as error:
        return sorted((p.where, p.message) for p in error.problems)


def said_alike(document):
    """Whether the document and its text are read or refused alike."""
    try:
        text = json.dumps(document)
    except ValueError:  # an integer of more digits than Python writes
        return isinstance(outcome(document), list)
    if str(10**400) in text:  # which a text is refused for before it is a document
        return isinstance(outcome(document), list) and isinstance(outcome(text), list)
    return repr(outcome(document)) == repr(outcome(text))  # repr: NaN is unequal to itself


def test_each_nasty_value_anywhere_in_a_document_is_read_or_refused():
    document = copy.deepcopy(VALID)
    document["provenance"]["nope"] = {"distribution": "d", "version": "1"}
    document["rules"].append({"penalty": {"kind": "nope"}})
    failed = {}
    for path in paths(document):
        for new in NASTY if path else ():
            try:
                assert said_alike(replaced(document, path, new))
            except Exception as error:
                failed[path, str(new)[:9] if type(new) is not int else "int"] = repr(error)[:99]
    assert not failed


def test_a_surrogate_in_the_provenance_of_a_missing_kind_is_refused_and_not_a_crash():
    with pytest.raises(regkit.SpecError, match="nope"):
        regkit.load({"provenance": {"nope": {"distribution": "\ud800"}}, "rules": [{"penalty": "nope(1)"}]})


def test_a_shorthand_of_a_thousand_brackets_is_refused_and_not_a_crash():
    with pytest.raises(regkit.SpecError, match="/rules/0/penalty"):
        regkit.load({"rules": [{"penalty": "l2(" + "[" * 100_000 + ")"}]})


@settings(max_examples=200)
@given(path=st.sampled_from([p for p in paths(VALID) if p]), new=values)
def test_whatever_stands_anywhere_in_a_document_is_read_or_refused(path, new):
    assert said_alike(replaced(VALID, path, new))


@settings(max_examples=200)
@given(
    path=st.sampled_from([p for p in paths(VALID) if p and isinstance(p[-1], str)]), key=st.text() | st.just("\ud800")
)
def test_whatever_key_stands_anywhere_in_a_document_is_read_or_refused(path, key):
    assert outcome(replaced(VALID, (*path[:-1], key), 1)) == outcome(json.dumps(replaced(VALID, (*path[:-1], key), 1)))


@given(st.text())
def test_arbitrary_text_is_read_or_refused(text):
    outcome(text)
    outcome("{" + text)


@settings(max_examples=300)
@given(at=st.floats(0, 1), length=st.integers(0, 6), put=st.text(max_size=4) | st.sampled_from('{}[],:"\\'))
def test_a_document_with_a_wound_is_read_or_refused(at, length, put):
    text = json.dumps(VALID, indent=1)
    start = int(at * len(text))
    outcome(text[:start] + put + text[start + length :])
