"""The laws as a plugin's author meets them: as results, and as one test for each law."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import regkit
from regkit.registry.registry import default
from regkit.testing import (
    ConformanceError,
    check_activity_penalty,
    check_adapter,
    check_constraint,
    check_penalty,
    check_schedule,
    checks,
    parametrize_conformance,
)

L2 = default().kind("l2")
LSTM = default().adapter(nn.LSTM(1, 1))


class Doubled(regkit.Penalty):
    """Σw², with a gradient that is half of what it should be."""

    kind: Literal["doubled"] = "doubled"

    def value(self, w: Tensor) -> Tensor:
        return w.float().square().sum() if w.dtype.itemsize < 4 else w.square().sum()

    def gradient(self, w: Tensor) -> Tensor:
        return w.float() if w.dtype.itemsize < 4 else w.clone()


def params(decorator: pytest.MarkDecorator) -> list[object]:
    return list(decorator.args[1])


@parametrize_conformance([L2(strength=0.5), default().kind("constant"), (LSTM, LSTM.examples()[0])])
def test_a_test_of_each_law(check):
    check()


def test_results_say_which_law_failed_what_was_seen_and_why_it_matters():
    report = check_penalty(Doubled(strength=1.0))
    assert not report.passed
    failed = {failure.law: failure for failure in report.failures}
    assert len(report.results) > len(failed) > 0
    for failure in failed.values():
        assert failure.seen
        assert failure.why
        assert failure.subject == "doubled(strength=1.0)"
        assert failure.law in str(report)
        assert failure.why in str(report)
    assert any("gradient" in law for law in failed)
    good = check_penalty(L2)
    assert good.passed
    assert all(result.passed and not result.seen for result in good)


@pytest.mark.parametrize("check", [check_penalty, check_activity_penalty, check_constraint, check_schedule])
def test_what_is_not_of_the_family_is_a_mistake_of_the_caller(check):
    for wrong in (LSTM, nn.LSTM, 3, default().kind("l2" if check is not check_penalty else "max_norm")):
        with pytest.raises(TypeError):
            check(wrong)


def test_adapters_are_checked_with_a_module_to_try_them_on():
    example = LSTM.examples()[0]
    report = check_adapter(LSTM, example.make, equations=example.equations, state=example.state)
    assert report.passed, str(report)


def test_each_law_is_one_test_with_a_telling_name():
    found = params(parametrize_conformance([L2, Doubled]))
    names = [one.id for one in found]
    assert len(set(names)) == len(names) > 40
    assert all(name.startswith(("l2(strength=1.0)-", "doubled(strength=1.0)-")) for name in names)
    assert {type(one.values[0]).__name__ for one in found} == {"Check"}


def test_a_law_that_does_not_hold_raises_with_what_was_seen():
    (check,) = [one for one in checks(Doubled) if one.law.name == "gradient_is_that_of_autograd"]
    with pytest.raises(ConformanceError, match=r"(?s)doubled.*gradient"):
        check()


def test_expected_failures_are_strict():
    failing = {failure.law: "half, on purpose" for failure in check_penalty(Doubled).failures}
    found = params(parametrize_conformance([Doubled], failing))
    marks = {one.values[0].law.name: list(one.marks) for one in found}
    assert {law for law, given in marks.items() if given} == set(failing)
    for law in failing:
        (mark,) = marks[law]
        assert (mark.name, mark.kwargs["strict"], mark.kwargs["reason"]) == ("xfail", True, "half, on purpose")
        assert mark.kwargs["raises"] is ConformanceError

    def only(subject: object) -> Mapping[str, str]:
        return failing if subject is Doubled else {}

    assert sum(bool(one.marks) for one in params(parametrize_conformance([L2, Doubled], only))) == len(failing)


def test_an_excuse_for_a_law_that_is_not_tried_is_an_error():
    with pytest.raises(ValueError, match=r"unknown law '.*'; did you mean"):
        parametrize_conformance([L2], {"gradient_is_the_derivativ": "a typo"})


@pytest.mark.parametrize("wrong", [3, nn.LSTM, "l2", (LSTM, nn.LSTM)])
def test_what_no_laws_are_about_is_refused(wrong):
    with pytest.raises(TypeError, match="laws are about"):
        parametrize_conformance([wrong])


def test_an_adapter_without_examples_is_refused_and_told_what_to_give():
    class Bare(type(LSTM)):
        def examples(self):
            return []

    with pytest.raises(ValueError, match=r"Bare\.examples\(\) is empty"):
        parametrize_conformance([Bare()])


WRONG = '''
from typing import Literal
import regkit

class Wrong(regkit.Penalty):
    """Half a ridge."""

    kind: Literal["wrong"] = "wrong"

    def value(self, w):
        return w.sum()
'''
SUITE = """
from regkit.testing import parametrize_conformance
from wrong_kind import Wrong

@parametrize_conformance([Wrong], expected_failures={excuses})
def test_conformance(check):
    check()
"""


@pytest.mark.slow
def test_in_a_strangers_suite_failures_and_unexpected_passes_are_told(tmp_path: Path, monkeypatch):
    (tmp_path / "wrong_kind.py").write_text(WRONG)
    monkeypatch.syspath_prepend(str(tmp_path))
    failing = {failure.law: "a sum" for failure in check_penalty(import_module("wrong_kind").Wrong).failures}
    monkeypatch.delitem(sys.modules, "wrong_kind")
    excuses = {"none": {}, "all": failing, "more": {**failing, "survives_json": "?"}, "unknown": {"shape": "?"}}
    for name, given in excuses.items():
        (tmp_path / f"test_{name}.py").write_text(SUITE.replace("{excuses}", repr(given)))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert done.returncode == 1
    failed = re.findall(r"^FAILED (test_\w+)\.py::test_conformance\[wrong\(strength=1\.0\)-(\w+)\]", done.stdout, re.M)
    assert set(failed) == {*(("test_none", law) for law in failing), ("test_more", "survives_json")}
    assert re.findall(r"^ERROR (test_\w+)", done.stdout, re.M) == ["test_unknown"]
    assert "unknown law 'shape'" in done.stdout
    assert "XPASS(strict)" in done.stdout


def test_trying_the_laws_leaves_the_program_as_it_was():
    torch.manual_seed(3)
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()
    check_penalty(L2)
    after = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_the_laws_need_no_pytest():
    code = "import sys, regkit.testing; print('pytest' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"
