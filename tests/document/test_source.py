"""Reading a document: from where, within which limits, and where each of its values stands."""

import json
import time
from collections import OrderedDict
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import regkit
from regkit.document import json_text
from regkit.document.json_text import DEEPEST, LARGEST_TEXT

TEXT = '{"rules": [{"penalty": {"kind": "l2", "strength": 0.5}}]}'


def refused(document):
    """The problems for which a document is refused."""
    with pytest.raises(regkit.SpecError) as caught:
        regkit.load(document)
    return caught.value.problems


def only(document):
    (problem,) = refused(document)
    return problem


# Where from


def test_a_path_a_string_path_a_text_and_a_dict_say_the_same(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(TEXT)
    loaded = [regkit.load(one) for one in (path, str(path), TEXT, f"\n\t {TEXT}", json.loads(TEXT))]
    assert all(spec == loaded[0] for spec in loaded)
    assert loaded[0].rules[0].kind.strength == 0.5


def test_a_spec_is_taken_as_it_is():
    spec = regkit.load(TEXT)
    assert regkit.load(spec) is spec


def test_tuples_in_a_dict_are_lists():
    assert regkit.load({"rules": ({"penalty": "l2(0.5)"},)}) == regkit.load(TEXT)


@pytest.mark.parametrize("document", [None, 3, TEXT.encode(), [TEXT], torch.zeros(())])
def test_anything_else_is_a_type_error_that_names_the_type(document):
    with pytest.raises(TypeError, match=f"not {type(document).__name__}$"):
        regkit.load(document)


def test_a_byte_order_mark_in_a_file_does_not_matter(tmp_path):
    path = tmp_path / "spec.json"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert regkit.load(path) == regkit.load(TEXT)


def test_a_byte_order_mark_in_a_text_does_not_make_it_a_path():
    """Text read from such a file with plain utf-8 begins with the mark."""
    assert regkit.load("\ufeff" + TEXT) == regkit.load(TEXT)


def test_a_file_that_is_not_utf8_is_refused_with_the_byte(tmp_path):
    path = tmp_path / "spec.json"
    path.write_bytes(b'{"rules": "\xff"}')
    assert "UTF-8" in only(path).message
    assert "byte 11" in only(path).message


def test_utf16_is_refused(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(TEXT, encoding="utf-16")
    assert "UTF-8" in only(path).message


@pytest.mark.parametrize("suffix", ["", ".json"])
@pytest.mark.parametrize("as_type", [str, lambda path: path])
def test_a_missing_file_is_named(tmp_path, as_type, suffix):
    path = as_type(tmp_path / f"absent{suffix}")
    with pytest.raises(regkit.SpecError, match="No such file") as caught:
        regkit.load(path)
    assert caught.value.origin == str(path)
    assert ("begins with {" in str(caught.value)) == (suffix == "")  # only then it may have been meant as a text


def test_a_directory_is_no_document(tmp_path):
    assert "directory" in only(tmp_path).message


@pytest.mark.parametrize("text", ["", "nul\0l", "x" * 10_000, "~/absent\udcff", "null", '"rules"'])
def test_a_string_that_is_neither_text_nor_path_is_refused_shortly(text):
    with pytest.raises(regkit.SpecError, match="cannot read") as caught:
        regkit.load(text)
    assert len(str(caught.value)) < 1000


# What is no JSON


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("{", 1, 2),
        ("{\n  'rules': []}", 2, 3),
        ('{"rules": [\n  1,\n  nul]}', 3, 3),
        ('{"rules": []}\n]', 2, 1),
        ('{"rules": [1 2]}', 1, 14),
        ('{"rules": "a\nb"}', 1, 13),
        ('{"rules": [01]}', 1, 13),
        ("[" + '"' * 3 + "]", 1, 4),
        ('{"rules" []}', 1, 10),
        ('{"rules": 1} // ok', 1, 14),
    ],
)
def test_a_syntax_error_has_its_line_and_column(text, line, column):
    problem = only(text)
    assert problem.message.startswith("not JSON: ")
    assert (problem.line, problem.column) == (line, column)


def test_a_syntax_error_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text("{\n}}")
    with pytest.raises(regkit.SpecError, match=r"spec\.json is not a valid spec: 1 problem\n +line 2, column 2"):
        regkit.load(path)


@pytest.mark.parametrize("text", ["[]", "[1]", "[{}]"])
def test_a_document_that_is_no_object_is_refused(text):
    assert "object" in only(text).message


def test_every_key_given_twice_is_told_with_its_place():
    text = '{"version": 1,\n "rules": [{"a": {"b/c": 1, "d": 2,\n  "b/c": 3}, "a": {}}],\n "version": 1, "version": 1}'
    places = [(p.where, p.line, p.column) for p in refused(text)]
    assert places == [("/rules/0/a/b~1c", 3, 10), ("/rules/0/a", 3, 19), ("/version", 4, 13), ("/version", 4, 27)]
    assert all("twice" in p.message for p in refused(text))


def test_a_key_is_given_twice_however_it_is_spelt():
    assert only(r'{"rules": [], "\u0072ules": []}').where == "/rules"


def test_equal_keys_of_different_objects_are_no_duplicates():
    assert len(regkit.load('{"rules": [{"penalty": {"l2": 1}}, {"penalty": {"l2": 1}}]}').rules) == 2


# Limits


def test_a_text_that_is_too_large_is_refused_with_the_limit(tmp_path):
    text = TEXT + " " * (LARGEST_TEXT - len(TEXT) + 1)
    path = tmp_path / "spec.json"
    path.write_text(text)
    for document in (text, path):
        assert str(LARGEST_TEXT) in only(document).message
    assert regkit.load(text[:-1])


def nested(depth, opening="[", closing="]"):
    return '{"rules": ' + opening * (depth - 1) + closing * (depth - 1) + "}"


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":[', "]}")])
def test_a_text_nested_too_deeply_is_refused_where_it_becomes_so(opening, closing):
    problem = only(nested(100, opening, closing))
    assert f"deeper than {DEEPEST}" in problem.message
    text = nested(100, opening, closing)[: problem.column]
    assert problem.line == 1
    assert text[-1] in "[{"
    assert text.count("[") + text.count("{") == DEEPEST + 1


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":[', "]}"), ("[", "")])
def test_a_text_nested_endlessly_is_refused_and_not_a_crash(opening, closing):
    assert "deeper" in only(nested(100_000, opening, closing)).message


def test_the_deepest_level_allowed_is_read_and_brackets_in_strings_do_not_count():
    assert json_text.read(nested(DEEPEST)).value
    assert "deeper" in only(nested(DEEPEST + 1)).message
    assert json_text.read(json.dumps({"[" * 99: r"\"[{" * 99})).value


def test_a_dict_nested_too_deeply_and_one_that_holds_itself_are_refused():
    deep = []
    for _ in range(DEEPEST):
        deep = [deep]
    assert "deeper" in only({"rules": deep}).message
    endless = {}
    endless["rules"] = [endless, endless]
    assert "deeper" in only(endless).message


def test_a_dict_of_shared_lists_is_read_in_the_time_that_its_lists_take():
    shared = []
    for _ in range(20):
        shared = [shared, shared]
    start = time.process_time()
    refused({"rules": [shared]})
    assert time.process_time() - start < 0.5


def test_a_string_that_never_ends_is_refused_in_linear_time():
    start = time.process_time()
    assert "Unterminated" in only('{"' + r"\"" * 12_000).message
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    "place", ['{"version": %s}', '{"rules": [{"every": %s}]}', '{"rules": [{"penalty": {"l2": %s}}]}']
)
def test_an_integer_of_thousands_of_digits_in_a_text_is_refused(place):
    problem = only(place % ("9" * 5000))
    assert "digits" in problem.message
    assert (problem.line, problem.column) == (1, place.index("%") + 1)
    assert len(str(problem)) < 200
    assert refused(place % ("9" * 4000))


def test_digits_in_a_name_are_not_taken_for_the_number_that_is_too_long():
    digits = "9" * 400
    text = '{"rules": [{"name": "%s",\n "every": %s}]}' % (digits, digits)  # noqa: UP031  # JSON has braces
    assert (only(text).line, only(text).column) == (2, 11)


@pytest.mark.parametrize(
    "document",
    [
        {"version": 10**5000},
        {"rules": [{"constraint": "unit_norm", "every": 10**5000}]},
        {"rules": [{"penalty": {"kind": "l2", "strength": 10**5000}}]},
        {"rules": [{"penalty": "l2(1)", "target": {"layer": 10**5000}}]},
        {"rules": 10**5000},
    ],
)
def test_an_integer_of_thousands_of_digits_in_a_dict_is_refused_at_its_place(document):
    assert only(document).where not in ("", "/rules/0")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_not_finite_are_refused_where_they_stand(number):
    problem = only('{"rules": [{"penalty": {"kind": "l2", "strength":\n %s}}]}' % number)  # noqa: UP031  # JSON has braces
    assert (problem.where, problem.line, problem.column) == ("/rules/0/penalty/strength", 2, 2)


# Values that no text could hold


class Text(str):
    """A string that is no plain one."""

    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.float64(1), "numpy.float64"),
        (np.int64(1), "numpy.int64"),
        (np.ones(2), "numpy.ndarray"),
        (np.bool_(True), "numpy.bool"),
        (Decimal(1), "decimal.Decimal"),
        (torch.tensor(1.0), "torch.Tensor"),
        ({1, 2}, "set"),
        (b"l2", "bytes"),
        (Text("l2(1)"), "Text"),
        (OrderedDict(a=1), "collections.OrderedDict"),
        (object(), "object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_foreign_value_in_a_dict_is_named_with_its_type_and_place(value, name):
    problem = only({"rules": [{"penalty": value}]})
    assert problem.where == "/rules/0/penalty"
    assert name in problem.message
    assert "JSON" in problem.message


def test_every_foreign_value_and_key_is_told():
    found = refused({"rules": [{"penalty": {1}}, {"schedule": b"x", 7: 1}], None: 2})
    assert sorted((p.where, p.message.split()[0], p.line) for p in found) == [
        ("", "key", None),
        ("/rules/0/penalty", "set", None),
        ("/rules/1", "key", None),
        ("/rules/1/schedule", "bytes", None),
    ]


# Pointers


def test_slashes_and_tildes_in_keys_are_escaped_in_pointers():
    text = '{"a/b": {"c~d": [0, {"~1": 1}]}, "": 2}'
    offsets = json_text.read(text).offsets
    assert {text[offsets[p]] for p in ("/a~1b/c~0d/1/~01",)} == {"1"}
    assert text[offsets["/"]] == "2"
    assert only('{"rules": [{"penalty": "l2(1)", "a/b~c": 1}]}').where == "/rules/0/a~1b~0c"


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
containers = st.lists(values) | st.dictionaries(st.text() | st.sampled_from(["", "a/b", "~", "~1", "0"]), values)


def pointed(value, pointer=""):
    """Every pointer into a value and what it points at, by the letter of RFC 6901."""
    yield pointer, value
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from pointed(inner, pointer + "/" + str(key).replace("~", "~0").replace("/", "~1"))


@given(
    value=containers,
    indent=st.sampled_from([None, 0, 1, 4, "\t"]),
    separators=st.sampled_from([(",", ":"), (" , ", " :\n ")]),
    ascii_only=st.booleans(),
)
def test_every_offset_points_at_the_text_of_its_value(value, indent, separators, ascii_only):
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=ascii_only)
    read = json_text.read(text)
    decode = json.JSONDecoder().raw_decode
    assert {pointer: decode(text, offset)[0] for pointer, offset in read.offsets.items()} == dict(pointed(value))
    for pointer, offset in read.offsets.items():
        problem = read.problem(pointer, "")
        lines = text.split("\n")
        assert sum(map(len, lines[: problem.line - 1])) + problem.line - 1 + problem.column - 1 == offset


def test_a_device_that_never_ends_is_no_document():
    assert "neither a file nor a folder" in only("/dev/zero").message
