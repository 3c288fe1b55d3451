"""The command line, run as a user runs it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import regkit
from regkit import cli
from regkit.cli import main
from regkit.cli.plugin_warnings import plugin_warnings
from regkit.cli.scaffold import TEMPLATES
from regkit.plan.table import table
from regkit.registry import registry
from regkit.registry.entries import CONTRACTS
from regkit.registry.names import FAMILIES
from tests.support.plugins.installing import PLUGIN

GOOD = '{"rules": [{"target": {"role": "recurrent"}, "penalty": "l2(1e-4)"}, {"constraint": "max_norm(3)"}]}'
BAD = '{"rules": [\n  {"penalty": {"kind": "l3", "strength": 1}},\n  {"penalty": {"kind": "l2", "strenght": 1}}\n]}'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "good.json").write_text(GOOD)
    (tmp_path / "bad.json").write_text(BAD)
    return tmp_path


def test_a_reader_that_stops_early_and_a_file_that_cannot_be_written_are_no_tracebacks(tmp_path):
    command = f"{sys.executable} -m regkit kinds | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    command = [sys.executable, "-m", "regkit", "schema", "-o", str(tmp_path / "no" / "such" / "folder")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("regkit: [Errno 2] No such file")
    assert done.stderr.count("\n") == 1


def test_check_tells_valid_and_invalid_documents_apart(folder, capsys):
    assert main(["check", "good.json"]) == 0
    assert capsys.readouterr().out == "good.json: valid, 2 rules\n"
    assert main(["check", "bad.json", "good.json", "missing.json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "good.json: valid, 2 rules\n"
    assert "bad.json is not a valid spec: 3 problems" in captured.err
    assert "line 2, column 24: /rules/0/penalty/kind: unknown penalty 'l3'. Available: " in captured.err
    assert (
        "line 3, column 42: /rules/1/penalty/strenght: unknown key 'strenght'; did you mean 'strength'" in captured.err
    )
    assert "missing.json: " in captured.err or "missing.json is not" in captured.err


def test_plan_prints_what_a_model_of_ones_own_would_get(folder, capsys):
    (folder / "mymodels.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.GRU(3, 4))\nbuilt = make()\n"
    )
    assert main(["plan", "good.json", "--model", "mymodels:make"]) == 0
    printed = capsys.readouterr().out
    assert "weight_hh_l0" in printed
    assert "12 × 4" in printed
    assert "projected after each step" in printed
    assert main(["plan", "good.json", "--model", "mymodels:built"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mymodels", "package.module:name"),
        ("no_such_module:make", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("json:no_such_name", "AttributeError"),
        ("json:dumps", "TypeError"),
        ("builtins:dict", "gives dict, not an nn.Module"),
    ],
)
def test_a_model_that_cannot_be_made_is_one_clear_line(model, message, folder, capsys):
    assert main(["plan", "good.json", "--model", model]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_plan_knows_the_kinds_that_the_models_module_registers(folder, capsys, monkeypatch):
    monkeypatch.setattr(registry, "_default", None)
    code = """
    from typing import Literal
    import regkit, torch

    @regkit.register
    class Mine(regkit.Penalty):
        kind: Literal["my_own"] = "my_own"

        def value(self, w):
            return w.sum()

    def make():
        return torch.nn.GRU(3, 4)
    """
    (folder / "registering.py").write_text(code.replace("\n    ", "\n"))
    (folder / "own.json").write_text('{"rules": [{"penalty": "my_own(1)"}]}')
    assert main(["plan", "own.json", "--model", "registering:make"]) == 0
    assert "my_own" in capsys.readouterr().out
    assert main(["check", "own.json"]) == 1  # which imports no model


def test_a_document_that_does_not_fit_is_told(folder, capsys):
    assert main(["plan", "good.json", "--model", "torch.nn:Identity"]) == 1
    assert "the model has no recurrent module" in capsys.readouterr().err


def test_check_strict_compares_the_versions_that_a_document_was_saved_with(install, folder, capsys):
    install("regkit-nuclear", "1.2", "nuclear_plugin", PLUGIN.format(name="nuclear", title="Nuclear"))
    here = regkit.Registry()
    spec = regkit.load({"rules": [{"penalty": "nuclear(1)"}, {"penalty": "l2(1)"}]}, registry=here)
    (folder / "same.json").write_text(spec.to_json(here))
    (folder / "older.json").write_text(spec.to_json(here).replace('"1.2"', '"1.1"'))
    assert main(["check", "--strict", "same.json"]) == 0
    assert main(["check", "older.json"]) == 0
    assert main(["check", "--strict", "same.json", "older.json"]) == 1
    error = capsys.readouterr().err
    assert "'nuclear' was saved from regkit-nuclear 1.1; installed is regkit-nuclear 1.2" in error
    assert "1 problem" in error


def test_schema_is_printed_or_written(folder, capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == regkit.schema()
    assert main(["schema", "-o", "regkit.schema.json"]) == 0
    assert json.loads((folder / "regkit.schema.json").read_text()) == regkit.schema()


def test_the_installed_command_and_the_module_are_one():
    beside = Path(sys.executable).with_name("regkit")
    for command in ([sys.executable, "-m", "regkit"], [str(beside)]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"regkit {regkit.__version__}\n"


COMMANDS = ("kinds", "check", "plan", "schema", "plugins", "doctor", "new", "conformance")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_each_command(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 6


def test_help_lists_every_command_and_its_examples_are_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    listed, examples = told.split("examples:")
    assert tuple(re.findall(r"^    (\w+)", listed, re.MULTILINE)) == COMMANDS
    assert set(re.findall(r"^  regkit (\w+)", examples, re.MULTILINE)) == set(COMMANDS)


def test_every_family_has_a_contract_and_every_template_a_folder():
    assert tuple(CONTRACTS) == FAMILIES
    assert {folder.name for folder in Path(cli.__file__).with_name("templates").iterdir()} == {*TEMPLATES, "every"}


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["kinds", "--help"], ["new", "--help"], ["nothing"]])
def test_what_needs_no_torch_does_not_wait_for_it(arguments):
    code = (
        "import sys\nfrom regkit.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', [name for name in ('torch', 'pydantic', 'pluggy', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("HEAVY []\n")


def test_a_pipe_without_greek_gets_escapes_and_json_stays_json(monkeypatch):
    def printed(*arguments: str) -> str:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert main(arguments) == 0
        return sys.stdout.buffer.getvalue().decode("ascii")

    assert "Ridge: \\u03a3w" in printed("kinds", "l2")
    assert json.loads(printed("schema")) == regkit.schema(regkit.Registry())
    meanings = [kind["meaning"] for plugin in json.loads(printed("plugins", "--json")) for kind in plugin["kinds"]]
    assert any("Σw²" in meaning for meaning in meanings)


def test_a_broken_plugin_is_one_line_beside_what_was_asked_for(install, folder, capsys):
    install("regkit-broken", "3.1", "broken_plugin", "import a_module_that_is_not_there")
    assert main(["check", "good.json"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "good.json: valid, 2 rules\n"
    (line,) = captured.err.splitlines()
    assert line.startswith("regkit: warning: plugin 'broken_plugin' of regkit-broken 3.1 does not import: ")
    assert line.endswith("; run `regkit plugins --broken`")


def test_a_document_that_needs_a_broken_plugins_kind_says_so(install, folder, capsys):
    code = PLUGIN.format(name="nuclear", title="Nuclear") + "\n@regkit.hookimpl\ndef regkit_schedules():\n    1 / 0\n"
    install("regkit-broken", "3.1", "broken_plugin", code)
    (folder / "nuclear.json").write_text('{"rules": [{"penalty": "nuclear(1)"}]}')
    assert main(["check", "nuclear.json"]) == 1
    error = capsys.readouterr().err
    assert "regkit-broken 3.1 (broken_plugin), which is broken" in error
    assert "ZeroDivisionError" in error


def test_two_plugins_that_clash_are_one_error(install, folder, capsys):
    install("first-one", "1.0", "first_plugin", PLUGIN.format(name="nuclear", title="A"))
    install("second-one", "2.5", "second_plugin", PLUGIN.format(name="nuclear", title="B"))
    for command in (["check", "good.json"], ["kinds"], ["plugins"], ["schema"], ["conformance", "first-one"]):
        assert main(command) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("regkit: two plugins offer the kind 'nuclear': first-one 1.0")
        assert captured.err.count("\n") == 1


def test_only_warnings_of_plugins_become_lines():
    told: list[str] = []

    @plugin_warnings(told.append)
    def warn() -> None:
        for category in (regkit.PluginWarning, regkit.PluginWarning, UserWarning):
            warnings.warn(f"a {category.__name__}", category, stacklevel=1)

    with pytest.warns(UserWarning, match="^a UserWarning$") as caught:
        warn()
    assert told == ["a PluginWarning", "a PluginWarning"]
    assert len(caught) == 1


def test_long_cells_of_a_table_go_on_below():
    rows = [["a", "one two three four five six seven"], ["b", "eight"]]
    whole = table(["", "numbers"], rows)
    assert table(["", "numbers"], rows, wrap=[1], width=100) == whole
    assert table(["", "numbers"], rows, wrap=[1], width=26).splitlines() == [
        "   numbers",
        "─  ───────────────────────",
        "a  one two three four five",
        "   six seven",
        "b  eight",
    ]
    assert table(["", "z"], [["a", "one two three"]], wrap=[1], width=5).splitlines()[2:] == ["a  one two", "   three"]
