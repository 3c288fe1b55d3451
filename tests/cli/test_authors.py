"""`regkit new` and `regkit conformance`: for those who write plugins."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from regkit.cli import main
from regkit.cli.scaffold import TEMPLATES
from regkit.registry import registry
from tests.support.plugins.installing import PLUGIN

GOOD = '''
from typing import Literal
import torch
import regkit

class Cubes(regkit.Penalty):
    """Σ|w|³."""
    kind: Literal["cubes"] = "cubes"

    def value(self, w):
        return w.abs().to(torch.promote_types(w.dtype, torch.float32)).pow(3).sum()

class Late(regkit.Schedule):
    """0 for ten steps, then 1."""
    kind: Literal["late"] = "late"

    def factor(self, step):
        return float(step >= 10)

@regkit.hookimpl
def regkit_penalties():
    return [Cubes]

@regkit.hookimpl
def regkit_schedules():
    return [Late]
'''

SCHEDULE = '''
from typing import Literal
import regkit

class Falling(regkit.Schedule):
    """1 − step/10, and never an end."""
    kind: Literal["falling"] = "falling"

    def factor(self, step):
        return 1 - step / 10

    @classmethod
    def examples(cls):
        {examples}

@regkit.hookimpl
def regkit_schedules():
    return [Falling]
'''

ADAPTER = """
import regkit
from torch import nn
from regkit_standard.torch_adapters import CellAdapter

class Cell(nn.RNNCell): ...

class MyAdapter(CellAdapter):
    modules = ({known},)
    {examples}

@regkit.hookimpl
def regkit_adapters(): return [MyAdapter()]
"""


def conformance(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["conformance", *arguments])
    captured = capsys.readouterr()
    assert captured.err == ""
    return status, captured.out


def test_a_plugin_that_keeps_every_law_is_told_so_for_each_of_its_kinds(install, capsys):
    install("regkit-cubes", "1.0", "cubes_plugin", GOOD)
    status, told = conformance(capsys, "regkit-cubes")
    cubes, late, *hint, end = told.splitlines()
    assert " ".join(hint).startswith("hint: Cubes: gradient() is called once for each weight")
    counts = [re.fullmatch(r"(\S+): (\d+) of \2 laws hold", line) for line in (cubes, late)]
    assert all(counts)
    assert [count[1] for count in counts] == ["cubes(strength=1.0)", "late()"]
    assert end == f"all {sum(int(count[2]) for count in counts)} laws hold"
    assert int(counts[0][2]) > 20
    assert status == 0


def test_what_fails_is_told_with_what_was_seen_and_why_it_matters(install, capsys):
    install("regkit-falling", "1.0", "falling_plugin", SCHEDULE.format(examples="return [cls()]"))
    status, told = conformance(capsys, "regkit-falling")
    assert status == 1
    head, *failures, end = told.splitlines()
    held, tried = map(int, re.fullmatch(r"falling\(\): (\d+) of (\d+) laws hold", head).groups())
    assert held < tried
    assert end == f"{tried - held} of {tried} laws do not hold"
    words = " ".join(" ".join(failures).split())
    assert "FAILED factor_is_finite_and_not_negative: factor(11) is -0.1" in words
    assert "A negative factor turns a penalty into a reward" in words
    assert all(len(line) <= 100 for line in told.splitlines())


def test_one_law_can_be_asked_for_and_is_alone_tried(install, capsys):
    install("regkit-falling", "1.0", "falling_plugin", SCHEDULE.format(examples="return [cls()]"))
    assert conformance(capsys, "falling_plugin", "--law", "documented") == (
        0,
        "falling(): 1 of 1 law holds\nall 1 laws hold\n",
    )
    status, told = conformance(capsys, "falling_plugin", "--law", "factor_is_finite_and_not_negative")
    assert status == 1
    assert told.startswith("falling(): 0 of 1 law holds\n  FAILED factor_is_finite_and_not_negative")


def test_an_unknown_law_is_told_with_the_nearest(install, capsys):
    install("regkit-falling", "1.0", "falling_plugin", SCHEDULE.format(examples="return [cls()]"))
    assert main(["conformance", "regkit-falling", "--law", "dokumented"]) == 1
    assert "unknown law 'dokumented'; did you mean 'documented'?" in capsys.readouterr().err


def test_results_as_json_hold_every_law(install, capsys):
    install("regkit-falling", "1.0", "falling_plugin", SCHEDULE.format(examples="return [cls()]"))
    status, told = conformance(capsys, "Regkit_Falling", "--json")
    assert status == 1
    results = json.loads(told)
    assert all(list(result) == ["subject", "law", "passed", "seen", "why", "untried"] for result in results)
    assert len({result["law"] for result in results}) == len(results) > 10
    failed = {result["law"]: result["seen"] for result in results if not result["passed"]}
    assert failed["factor_is_finite_and_not_negative"] == "factor(11) is -0.10000000000000009"


@pytest.mark.parametrize(
    ("examples", "seen"),
    [("return []", "examples() is empty"), ("return 1 / 0", "ZeroDivisionError: division by zero")],
)
def test_a_kind_without_examples_has_not_proven_anything(install, capsys, examples, seen):
    install("regkit-falling", "1.0", "falling_plugin", SCHEDULE.format(examples=examples))
    for law in ([], ["--law", "documented"]):
        status, told = conformance(capsys, "regkit-falling", *law)
        assert status == 1
        assert "Falling: 0 of 1 law holds\n  FAILED examples: " in told
        assert seen in told
        assert "Write a classmethod `examples` of the kind" in " ".join(told.split())


def test_an_adapter_is_tried_on_its_examples_and_fails_without_any(install, capsys):
    bare = ADAPTER.format(known="Cell", examples="def examples(self): return []")
    install("regkit-bare", "1.0", "bare_plugin", bare)
    status, told = conformance(capsys, "regkit-bare")
    assert status == 1
    assert "MyAdapter: 0 of 1 law holds\n  FAILED examples: ValueError: examples() is empty" in told
    assert "a `regkit.Example(make, features)` for each class that it knows" in " ".join(told.split())

    example = "def examples(self): return [regkit.Example(lambda: Cell(3, 4), 3)]"
    install("regkit-cells", "1.0", "cells_plugin", ADAPTER.format(known="Cell", examples=example))
    status, told = conformance(capsys, "regkit-cells")
    (count,) = re.findall(r"^MyAdapter on Cell\(3, 4\): (\d+) of \1 laws hold$", told, re.MULTILINE)
    assert (int(count) > 10, status) == (True, 0)


def test_an_adapter_of_a_module_that_cannot_be_made_is_a_failure(install, capsys):
    example = "def examples(self): return [regkit.Example(lambda: Cell(-3, 4), 3)]"
    install("regkit-cells", "1.0", "cells_plugin", ADAPTER.format(known="Cell", examples=example))
    status, told = conformance(capsys, "regkit-cells")
    assert status == 1
    assert "MyAdapter" in told
    assert "negative dimension" in told


def test_an_adapter_of_a_package_that_is_not_there_is_no_failure_and_no_success(install, capsys):
    code = ADAPTER.format(known='"not_installed.cells:Cell"', examples="def examples(self): return []")
    install("regkit-absent", "1.0", "absent_plugin", code)
    status, told = conformance(capsys, "regkit-absent")
    assert told == "not tried: MyAdapter, since not_installed cannot be found\nnothing was tried\n"
    assert status == 1


def test_a_broken_plugin_fails_and_a_blocked_one_is_not_imported(install, capsys, monkeypatch):
    install("regkit-both", "1.0", "cubes_plugin", GOOD, {"cubes": "cubes_plugin", "trap": "no_such_module"})
    assert main(["conformance", "regkit-both", "--law", "documented"]) == 1
    told = capsys.readouterr().out
    assert "cubes(strength=1.0): 1 of 1 law holds" in told
    assert "not tried: plugin 'trap' of regkit-both 1.0 does not import" in told
    monkeypatch.setenv("REGKIT_DISABLE_PLUGINS", "trap")
    status, told = conformance(capsys, "regkit-both", "--law", "documented")
    assert "not tried: regkit-both 1.0 (trap) is blocked: REGKIT_DISABLE_PLUGINS names it" in told
    assert status == 0


def test_an_unknown_distribution_is_told_with_the_nearest(install, capsys):
    install("regkit-nuclear", "1.2", "nuclear_plugin", PLUGIN.format(name="nuclear", title="Nuclear"))
    assert main(["conformance", "regkit-nuclaer"]) == 1
    error = capsys.readouterr().err
    assert "unknown distribution or entry point 'regkit-nuclaer'; did you mean 'regkit-nuclear'?" in error


def test_regkits_own_schedules_keep_every_law(capsys):
    status, told = conformance(capsys, "torch-regkit:schedules")
    assert status == 0
    assert {line.split("(")[0] for line in told.splitlines()[:-1]} == {
        *("constant", "linear", "cosine", "exponential", "piecewise")
    }


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to write into; the default registry is made anew, for `regkit new` asks it for names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_default", None)
    return tmp_path


@pytest.mark.parametrize("family", [None, *TEMPLATES])
def test_new_writes_a_distribution_and_says_how_to_go_on(elsewhere, capsys, family):
    assert main(["new", "regkit-mine", *([f"--{family}"] if family else [])]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    wrote, now = captured.out.split("\n\n")
    files = sorted(path for path in Path("regkit-mine").rglob("*") if path.is_file())
    assert wrote.splitlines() == ["wrote", *sorted(f"  {path}" for path in files)]
    assert now.splitlines() == [
        "now",
        "  cd regkit-mine",
        '  python -m pip install -e ".[test]"',
        "  python -m pytest",
    ]
    assert (elsewhere / "regkit-mine/pyproject.toml").read_text().count('name = "regkit-mine"') == 1
    code = (elsewhere / "regkit-mine/src/regkit_mine/__init__.py").read_text()
    hooks = {
        "activity": "regkit_activity_penalties",
        "constraint": "regkit_constraints",
        "schedule": "regkit_schedules",
        "adapter": "regkit_adapters",
    }
    assert f"def {hooks.get(family, 'regkit_penalties')}()" in code


def test_what_new_has_written_keeps_every_law_at_once(elsewhere, install, capsys):
    """The command after next: here its module is put where an installer would put it."""
    assert main(["new", "regkit-mine", "--schedule", "--folder", "there"]) == 0
    code = (elsewhere / "there/src/regkit_mine/__init__.py").read_text()
    install("regkit-mine", "0.1.0", "regkit_mine", code)
    capsys.readouterr()
    status, told = conformance(capsys, "regkit-mine")
    assert told.startswith("mine(")
    assert status == 0


def test_new_quotes_a_folder_with_a_space_and_refuses_one_that_is_in_use(elsewhere, capsys):
    assert main(["new", "regkit-mine", "--folder", "my plugin"]) == 0
    assert "  cd 'my plugin'\n" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    assert main(["new", "regkit-mine", "--folder", "my plugin", "--schedule"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "regkit: the folder my plugin is not empty; choose another one\n"
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Regkit Mine", "regkit: a distribution is named in lower-case words"),
        ("regkit-l2", "regkit: 'regkit-l2' would name its kind 'l2', which torch-regkit"),
        ("regkit", "regkit: 'regkit' would need a package 'regkit', which Python has already"),
        ("torch-regkit", "regkit: a distribution 'torch-regkit' is installed already"),
    ],
)
def test_new_refuses_a_name_in_one_clear_line_and_writes_nothing(elsewhere, capsys, name, sentence):
    assert main(["new", name]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(sentence)
    assert captured.err.count("\n") == 1
    assert list(elsewhere.iterdir()) == []


def test_new_writes_one_family_at_a_time(elsewhere, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["new", "regkit-mine", "--penalty", "--schedule"])
    assert caught.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []
