"""Documents from strangers: every refusal is linear in the document, short, and in lines that are regkit's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import regkit
from regkit import errors
from regkit.cli import main
from regkit.errors import few_hints, nearest, printable
from regkit.plan.candidates import ModuleCandidate
from regkit.plan.table import table

HUGE = "x" * (2**22 - 2000)
FORGED = "a\n\x1b[2Kall is well\r\u2028\u202egood\u200b\x9b\x7f"
"""A line end, an escape that clears the line, other line ends, bidi override, zero width, an 8-bit control, DEL."""


def refusal(call: Callable[[], object]) -> regkit.RegkitError:
    with pytest.raises(regkit.RegkitError) as caught:
        call()
    return caught.value


def with_target(**target: Any) -> dict[str, Any]:
    return {"rules": [{"penalty": "l2(1)", "target": target}]}


def everywhere(name: str) -> list[Any]:
    """Documents with a name in every place that can hold one."""
    rule = {"penalty": "l2(1)"}
    return [
        {"rules": [rule], name: 1},
        {"rules": [{**rule, name: 1}]},
        {"rules": [{"penalty": name}]},
        {"rules": [{"penalty": {"kind": name}}]},
        {"rules": [{"penalty": {name: 1}}]},
        {"rules": [{"penalty": {"kind": "l2", "strength": name}}]},
        {"rules": [{"penalty": {"kind": "l2", "strength": 1, name: 2}}]},
        {"rules": [{"penalty": f"l2({name})"}]},
        {"rules": [{"penalty": f"l2(1, {name}=1)"}]},
        {"rules": [{"constraint": {"kind": "max_norm", "max_value": 1, "per": name}}]},
        {"rules": [{**rule, "schedule": name}]},
        {"rules": [{**rule, "via": name}]},
        {"rules": [{**rule, "every": name}]},
        {"rules": [{"penalty": "l9(1)"}], "provenance": {"l9": {"distribution": name, "version": name}}},
        {"rules": [rule], "provenance": {name: {"distribution": "x", "odd": name}}},
        {"rules": [rule, {**rule, "name": name}, {**rule, "name": name}]},
        {"version": name, "rules": [rule]},
        {"rules": [rule], "$schema": [name]},
        {"layers": [{name: "l2(1)"}]},
        {"layers": [{"module": name, "kernel_regularizer": "l9(1)"}]},
        *(with_target(**{key: name}) for key in ("role", "layer", "direction", "gate", "bias", "odd")),
        name,
        "{" + name,
    ]


@pytest.mark.parametrize("number", range(len(everywhere(""))))
def test_a_name_of_four_megabytes_makes_a_short_error(number):
    error = refusal(lambda: regkit.load(everywhere(HUGE)[number]))
    assert len(str(error)) < 5000


@pytest.mark.parametrize("number", range(len(everywhere(""))))
def test_no_name_in_a_document_writes_on_the_terminal(number):
    error = refusal(lambda: regkit.load(everywhere(FORGED)[number]))
    assert all(line.isprintable() for line in str(error).split("\n"))
    assert all(str(problem).isprintable() for problem in error.problems)  # type: ignore[attr-defined]
    assert not any(line.strip().startswith("all is well") for line in str(error).splitlines())


@pytest.mark.parametrize("target", [{"module": FORGED.replace("\n", "")}, {"ignore": [FORGED]}, {"layer": 7}])
def test_no_name_in_a_model_writes_on_the_terminal(target):
    class Own(nn.GRU):
        pass

    model = nn.Module()
    gru = Own(2, 3)
    gru.register_parameter(FORGED.replace(".", ""), nn.Parameter(nn.init.zeros_(gru.bias_hh_l0.detach().clone())))
    model.add_module(FORGED, gru)
    for document in (with_target(), with_target(role="recurrent", **target), with_target(role="projection")):
        try:
            shown = str(regkit.resolve(model, document))
        except regkit.RegkitError as error:
            shown = str(error)
        assert all(line.isprintable() for line in shown.split("\n"))
    plan = regkit.resolve(model, with_target(role="recurrent"))
    assert "\\x1b[2K" in str(plan)
    assert len(str(plan).splitlines()) == len(plan.rows()) + 2


def test_letters_of_any_language_are_shown_as_they_are():
    for name in ("größe", "重み", "вес", "وزن", "é", "e\u0301", "l\u2082", "🙂", "C:\\weights", "it's"):
        assert printable(name) == name
        assert name in str(refusal(lambda: regkit.load({"rules": [{"penalty": "l2(1)", name: 1}]})))  # noqa: B023


def test_the_parts_of_an_error_are_lines_and_none_has_lines_in_it():
    assert str(regkit.PluginError("one", "", "two\nthree")) == "one\n\ntwo\\nthree"
    assert str(regkit.RegkitWarning("\x1b[0m")) == "\\x1b[0m"
    assert table(["a"], [["b\nc"]]).splitlines() == ["a", "────", "b\\nc"]


@pytest.mark.parametrize("arguments", [["check"], ["plan", "--model", "torch.nn:Identity"]])
@pytest.mark.skipif(sys.platform == "win32", reason="no file can have such a name there")
def test_no_name_of_a_file_writes_on_the_terminal(arguments, tmp_path, capsys):
    for content in ("{", '{"rules": [{"penalty": "l2(1)"}]}'):
        path = tmp_path / FORGED
        path.write_text(content, encoding="utf-8")
        main([*arguments, str(path)])
        told = capsys.readouterr()
        assert all(line.isprintable() for line in (told.out + told.err).split("\n"))
        assert "\\x1b[2K" in told.out + told.err or "no recurrent module" in told.err


def test_json_on_a_terminal_has_escapes_for_what_would_not_be_shown(capsys, monkeypatch):
    class Odd(regkit.Schedule):
        __doc__ = FORGED
        kind: str = "odd"

    from regkit.cli.layout import as_json

    assert json.loads(as_json({"a": FORGED})) == {"a": FORGED}
    assert all(line.isprintable() for line in as_json({"a": FORGED, "b": ["größe"]}).split("\n"))
    assert "größe" in as_json(["größe"]) or (sys.stdout.encoding or "utf-8").lower() != "utf-8"


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def looked_for(monkeypatch) -> list[str]:
    """The names for which the nearest was looked for."""
    found: list[str] = []
    closest = errors.difflib.get_close_matches

    def counting(word: str, *args: Any, **kwargs: Any) -> list[str]:
        found.append(word)
        return closest(word, *args, **kwargs)

    monkeypatch.setattr(errors.difflib, "get_close_matches", counting)
    return found


@pytest.mark.parametrize(
    "document",
    [
        {"rules": [{"penalty": "l2(1)"}], **{f"rule{number}": 1 for number in range(3000)}},
        {"rules": [{"penalty": f"l2{number}(1)"} for number in range(3000)]},
        {"rules": [{"penalty": f"l2{number}(1"} for number in range(3000)]},
        {"rules": [{"penalty": {"kinde": 1, f"a{number}": 2}} for number in range(3000)]},
        {"rules": [{"penalty": "l2(1)", "schedule": f"line{number}"} for number in range(3000)]},
        *(
            {"rules": [{"penalty": "l2(1)", "target": {key: [f"{name}{number}" for number in range(30)]}}] * 100}
            for key, name in [("role", "kernel"), ("gate", "forget"), ("direction", "forward")]
        ),
    ],
)
def test_of_thousands_of_mistakes_a_hundred_have_the_nearest_name(document, looked_for):
    error = refusal(lambda: regkit.load(document))
    assert len(error.problems) >= 3000  # type: ignore[attr-defined]  # all are there
    assert 50 <= len(looked_for) <= 200


@pytest.mark.parametrize(
    "target",
    [
        *({"module": name} for name in ("cell.{}", "cell*.{}", "GRUCell", "0.weight_hh_l{}", "x.7", "head")),
        {"gate": "forget"},
        {"gate": "input"},
        {"layer": 3},
        {"role": "projection"},
    ],
)
def test_of_thousands_of_rules_that_do_not_fit_a_hundred_are_told_at_length(target, looked_for):
    model = nn.ModuleList([nn.GRUCell(1, 1) for _ in range(50)])
    model.add_module("head", nn.Linear(1, 1))
    model.add_module("block", nn.ModuleDict({"7": nn.GRUCell(1, 1)}))
    rules = [
        {"penalty": "l2(1)", "target": {key: one.format(number) if isinstance(one, str) else one}}
        for number in range(1000)
        for key, one in target.items()
    ]
    error = refusal(lambda: regkit.resolve(model, {"rules": rules}))
    problems = error.problems  # type: ignore[attr-defined]
    assert len(problems) == 1000
    assert sum("Available" in problem.message for problem in problems) == 100
    assert len(looked_for) <= 100
    assert "there is no" in problems[-1].message


def test_the_words_of_a_model_are_found_out_once_however_many_are_wrong(monkeypatch):
    asked: list[object] = []
    outputs = ModuleCandidate.outputs
    monkeypatch.setattr(ModuleCandidate, "outputs", property(lambda self: asked.append(self) or outputs.func(self)))
    roles = [f"kern{number}" for number in range(900)]
    error = refusal(lambda: regkit.resolve(nn.GRU(1, 1), with_target(role=roles, gate=roles, direction=roles)))
    assert len(error.problems) == 2700  # type: ignore[attr-defined]
    assert len(asked) == 1


def test_the_bound_on_hints_is_of_one_document():
    for _ in range(3):
        with few_hints():
            assert [nearest("kernal", ["kernel"]) for _ in range(101)].count("kernel") == 100
    assert [nearest("kernal", ["kernel"]) for _ in range(300)].count("kernel") == 300


def test_a_model_without_a_recurrent_module_is_one_problem_however_many_rules_there_are():
    error = refusal(lambda: regkit.resolve(nn.Linear(2, 2), {"rules": [{"penalty": "l2(1)"}] * 50}))
    (problem,) = error.problems  # type: ignore[attr-defined]
    assert problem.message.startswith("the model has no recurrent module")


def test_a_hostile_document_is_refused_from_a_file_as_from_memory(tmp_path: Path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"rules": [{"penalty": HUGE[: 2**20]}]}), encoding="utf-8")
    assert len(str(refusal(lambda: regkit.load(path)))) < 2000
