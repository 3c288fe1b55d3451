"""`regkit kinds`: what documents may name, and the manual of each kind, held to what documents really may say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import ValidationError

import regkit
from regkit import Registry, Spec, SpecError
from regkit.cli import main
from regkit.cli.manual import document, type_of, vias_of
from regkit.kinds import Kind, Via
from regkit.registry.entries import Entry
from tests.support.commands import no_policy, out
from tests.support.plugins.installing import PLUGIN

ENTRIES = Registry().entries()
"""Of what is really installed."""

plain = pytest.fixture(no_policy, autouse=True)


def test_kinds_are_a_table_for_each_family(capsys):
    told = out(capsys, "kinds")
    families = [block.splitlines() for block in told.split("\n\n")]
    titles = [lines[0].split("  ")[0] for lines in families]
    assert titles == ["penalty", "activity penalty", "constraint", "schedule"]
    for family, lines in zip(titles, families, strict=True):
        assert re.split(r" {2,}", lines[0]) == [family, "options", "meaning", "from"]
        wanted = {entry.name: entry for entry in ENTRIES if entry.family == family}
        rows = [line for line in lines[2:] if not line.startswith(" ")]
        assert [row.split(" ")[0] for row in rows] == list(wanted)
        assert all(str(wanted[row.split(" ")[0]].origin) in row for row in rows)
    words = set(re.sub(r"[,()]", " ", told).split())
    assert {"max_value", "per=unit", "limit=null", "reduction=mean", "strength=1.0"} <= words
    assert out(capsys, "kinds", "--family", "constraint") == "\n".join(families[2]) + "\n"


def test_where_no_kind_is_loaded_that_is_said(capsys, monkeypatch):
    monkeypatch.setenv("REGKIT_DISABLE_PLUGINS", "torch-regkit")
    assert out(capsys, "kinds") == "none is loaded; see `regkit plugins`\n"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_manual_of_a_kind_says_what_it_is_and_where_it_stands(entry: Entry, capsys):
    told = out(capsys, "kinds", entry.name)
    words = " ".join(told.split())
    head = f"{entry.name}: a kind of {entry.family}, from torch-regkit {regkit.__version__} "
    assert words.startswith(head + " ".join(entry.meaning.split()))
    assert " ".join((entry.kind.__doc__ or "").split()) in words  # all of it
    for name, field in entry.kind.model_fields.items():
        if name != "kind":
            assert re.search(rf"^  {name} ", told, re.MULTILINE)
            assert (field.description or "").split()[0] in words
    (place,) = re.findall(r"^  file +(.*):(\d+)$", told, re.MULTILINE)
    lines = Path(place[0]).read_text(encoding="utf-8").splitlines()
    assert f"class {entry.kind.__name__}" in " ".join(lines[int(place[1]) - 1 : int(place[1]) + 1])
    assert f"{entry.kind.__module__}.{entry.kind.__qualname__}" in told


def _key(entry: Entry) -> str:
    return entry.family.rpartition(" ")[2]


def _host(entry: Entry) -> dict[str, str]:
    """What a rule needs beside a schedule."""
    return {"penalty": "l2(1)"} if entry.family == "schedule" else {}


def _of(spec: Spec, entry: Entry) -> Kind | None:
    """The kind of this family in a document's one rule."""
    (rule,) = spec.rules
    return rule.schedule if entry.family == "schedule" else rule.kind


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_example_in_a_manual_can_be_pasted_into_a_document(entry: Entry, capsys):
    told = out(capsys, "kinds", entry.name)
    (block,) = re.findall(r"^in a document\n(.*?)\n\n", told, re.MULTILINE | re.DOTALL)
    text, _, short = block.partition("  in short: ")
    example = entry.kind.examples()[0]
    assert _of(regkit.load(text.strip()), entry) == example
    if not short.startswith("no string"):
        string = json.loads(short.partition(";")[0])
        assert _of(regkit.load({"rules": [{**_host(entry), _key(entry): string}]}), entry) == example
    else:
        assert any(isinstance(value, tuple) for value in example.model_dump().values())


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.family != "schedule"], ids=lambda entry: entry.name)
def test_the_ways_that_a_manual_names_are_those_that_a_document_may_go(entry: Entry, capsys):
    rule = json.loads(document(entry, entry.kind.examples()[0]))["rules"][0]
    ways = [via for via in get_args(Via) if _goes({**rule, "via": via})]
    assert set(ways) == set(vias_of(entry.kind))
    told = re.findall(r"^  via +(\w+) \(the default\)(.*)$", out(capsys, "kinds", entry.name), re.MULTILINE)
    assert bool(told) == bool(ways)
    for default, others in told:
        (binding,) = regkit.resolve(torch.nn.LSTM(3, 4), {"rules": [rule]}).bindings
        assert binding.via == default
        assert {default, *others.split(", ")[1:]} == set(ways)


def _goes(rule: dict[str, object]) -> bool:
    try:
        regkit.load({"rules": [rule]})
    except SpecError:
        return False
    return True


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.family == "constraint"], ids=lambda entry: entry.name)
def test_what_a_manual_says_of_schedules_is_what_a_document_may_have(entry: Entry, capsys):
    told = out(capsys, "kinds", entry.name)
    rule = {**json.loads(document(entry, entry.kind.examples()[0]))["rules"][0], "schedule": "linear(0.5, 1, 10)"}
    if "there is no bound to multiply" in told:
        with pytest.raises(SpecError, match="no bound"):
            regkit.load({"rules": [rule]})
    else:
        assert f"multiplies {' and '.join(entry.kind.bounds)}" in told
        regkit.load({"rules": [rule]})


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_ranges_in_a_manual_are_those_that_are_enforced(entry: Entry):
    """Just outside of each bound there is an error, and it is about that option."""
    schema = entry.kind.model_json_schema()
    example = entry.kind.examples()[0].model_dump()
    for name, option in schema["properties"].items():
        words = type_of(option, schema.get("$defs", {}))
        for sign, bound in re.findall(r"(?<!list of number )([≥>≤<]) (\S+)", words):
            beyond = {"≥": -1, ">": 0, "≤": 1, "<": 0}[sign] + float(bound)
            value = beyond if "whole" not in words else int(beyond)
            given = (value,) * 2 if words.startswith("list") else value
            with pytest.raises(ValidationError) as caught:
                entry.kind.model_validate({**example, name: given})
            assert any(error["loc"][0] == name for error in caught.value.errors())


def test_the_manual_of_a_strangers_kind_has_types_and_ranges_in_words(install, capsys):
    code = '''
    from typing import Annotated, Literal
    from pydantic import Field
    import regkit
    from regkit.fields import Count, Fraction, Positive, Real

    class Many(regkit.Penalty):
        """Many options: Σ.

        A line that is longer than what a terminal shows has to be broken somewhere, and then goes on from there with
        what follows it in the source, where it was broken, too.
        w: (rows, columns) -> ().
        """
        kind: Literal["many.of_them"] = "many.of_them"
        ranks = (2,)

        a: Fraction = 0.5
        """A fraction."""
        b: Positive | None = None
        c: Literal["rows", "columns"]
        d: bool = False
        e: tuple[Count, ...] = Field(default=(1, 2), strict=False)
        f: Real
        g: Literal["one"] = "one"
        h: Annotated[str, Field(max_length=3)] = "abc"

        def value(self, w):
            return w.sum()

        @classmethod
        def examples(cls):
            return [cls(strength=1e-5, c="rows", f=-2.0, b=0.25)]

    @regkit.hookimpl
    def regkit_penalties():
        return [Many]
    '''
    install("many", "1.0", "many_plugin", code)
    told = out(capsys, "kinds", "many.of_them")
    rows = {row[0]: row[1:] for line in told.splitlines() if len(row := re.split(r" {2,}", line.strip())) >= 3}
    assert rows["a"] == ["number ≥ 0 ≤ 1", "0.5", "A fraction."]
    assert rows["b"] == ["number > 0 or null", "null"]
    assert rows["c"] == ["rows or columns", "required"]
    assert rows["d"] == ["true or false", "false"]
    assert rows["e"] == ["list of whole number ≥ 1", "[1, 2]"]
    assert rows["f"] == ["number", "required"]
    assert rows["g"] == ["one", "one"]
    assert rows["h"] == ["string", "abc"]
    assert "acts on     matrices\n" in told
    assert "gradient    by autograd\n" in told
    assert "via         gradient (the default), loss, decoupled\n" in told
    assert 'in short: "many.of_them(1e-05, b=0.25, c=rows, f=-2.0)"; without a name, in this order: strength' in told
    assert "goes on from\nthere with what follows it in the source, where it was broken, too.\nw: (rows" in told
    assert "distribution  many 1.0, entry point many_plugin" in told
    assert all(len(line) <= 100 for line in told.splitlines() if not line.startswith("  file"))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("option: Literal['x']", "no example: PluginError: "),
        (
            "@classmethod\n    def examples(cls):\n        return 1 / 0",
            "no example: ZeroDivisionError: division by zero",
        ),
        ("@classmethod\n    def examples(cls):\n        return []", "no example: IndexError: "),
    ],
)
def test_a_manual_without_an_example_says_why(install, capsys, body, sentence):
    code = PLUGIN.format(name="nuclear", title="Nuclear").replace("    def value", f"    {body}\n\n    def value")
    install("regkit-nuclear", "1.2", "nuclear_plugin", code)
    told = out(capsys, "kinds", "nuclear")
    assert f"in a document\n  {sentence}" in told
    assert "nuclear_plugin.Nuclear" in told


def test_a_kind_without_a_schema_is_one_clear_line(install, capsys):
    options = "model_config = {'arbitrary_types_allowed': True}\n    option: regkit.Registry | None = None"
    code = PLUGIN.format(name="nuclear", title="Nuclear").replace("    def value", f"    {options}\n\n    def value")
    install("regkit-nuclear", "1.2", "nuclear_plugin", code)
    assert main(["kinds", "nuclear"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("regkit: nuclear, of plugin regkit-nuclear 1.2, has no JSON Schema: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["max_nrom"], ["unknown kind 'max_nrom'; did you mean 'max_norm'?"]),
        (["l2", "--family", "constraint"], ["unknown constraint 'l2'", "unit_norm"]),
        (["nuclear"], ["unknown kind 'nuclear'", "regkit-broken 3.1 (broken_plugin), which is broken"]),
    ],
)
def test_an_unknown_kind_is_told_with_the_nearest(arguments, words, install, capsys):
    broken = PLUGIN.format(name="nuclear", title="N") + "\n@regkit.hookimpl\ndef regkit_schedules(): return [3]\n"
    install("regkit-broken", "3.1", "broken_plugin", broken)
    assert main(["kinds", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(word in captured.err for word in words)


def test_a_kind_of_a_family_can_be_asked_for(capsys):
    assert out(capsys, "kinds", "l2", "--family", "penalty") == out(capsys, "kinds", "l2")
