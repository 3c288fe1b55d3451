"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import regkit
from regkit.cli import main
from regkit.registry import default

GOOD = '{"rules": [{"target": {"role": "recurrent"}, "penalty": "l2(1e-4)"}, {"constraint": "max_norm(3)"}]}'
BAD = '{"rules": [\n  {"penalty": {"kind": "l3", "strength": 1}},\n  {"penalty": {"kind": "l2", "strenght": 1}}\n]}'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "good.json").write_text(GOOD)
    (tmp_path / "bad.json").write_text(BAD)
    return tmp_path


def test_kinds_lists_every_kind_with_options_meaning_and_origin(capsys):
    assert main(["kinds"]) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = default().entries()
    assert len(lines) == 2 * len(entries)
    for entry, line, meaning in zip(entries, lines[::2], lines[1::2], strict=True):
        assert line.startswith(f"{entry.family}: {entry.name}(")
        assert line.endswith(f"from {entry.origin}")
        assert meaning.strip() == entry.meaning
    assert f"constraint: max_norm(max_value, per=unit)  from regkit {regkit.__version__}" in lines


def test_kinds_of_one_family(capsys):
    assert main(["kinds", "--family", "constraint"]) == 0
    names = [line.split("(")[0] for line in capsys.readouterr().out.splitlines()[::2]]
    assert names == [f"constraint: {name}" for name in ("max_norm", "min_max_norm", "non_negative", "unit_norm")]


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
    assert "line 2, column 24: /rules/0/penalty/kind: unknown penalty 'l3'; did you mean '" in captured.err
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


def test_a_document_that_does_not_fit_is_told(folder, capsys):
    assert main(["plan", "good.json", "--model", "torch.nn:Identity"]) == 1
    assert "the model has no recurrent module" in capsys.readouterr().err


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


def test_help_teaches_each_command(capsys):
    for command in ("kinds", "check", "plan", "schema"):
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0
        assert len(capsys.readouterr().out.splitlines()) > 6
