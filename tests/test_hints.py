"""A kind that keeps every law is told how to be faster, and passes all the same."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from installing import Install
from laws import make
from mutants_kinds import Ridge
from torch import Tensor

from regkit import Constraint, Penalty
from regkit.cli import main
from regkit.testing import check_constraint, check_penalty, check_schedule
from regkit.testing.hints import hints


class ClosedForm(Ridge):
    """Σw², of which the gradient is known."""

    def gradient(self, w: Tensor) -> Tensor:
        return 2 * (w if w.itemsize > 2 else w.float())


class ListForm(ClosedForm):
    """The same, for many weights at once."""

    def add_gradients(self, weights: list[Tensor], gradients: list[Tensor], amount: float) -> None:
        wide = [w if w.itemsize > 2 else w.float() for w in weights]
        torch._foreach_add_(gradients, wide, alpha=2 * amount)


class Box(Constraint):
    """−1 ≤ w ≤ 1."""

    kind: Literal["box"] = "box"

    def project(self, w: Tensor) -> Tensor:
        return w.clamp(-1, 1)

    def violation(self, w: Tensor) -> Tensor:
        return (w.abs() - 1).clamp(min=0).amax()


class ListedBox(Box):
    """The same, for many weights at once."""

    def project_(self, weights: list[Tensor]) -> None:
        torch._foreach_clamp_min_(weights, -1)
        torch._foreach_clamp_max_(weights, 1)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Ridge, ["gradient() is called once for each weight", "by autograd", "`add_gradients`", "regkit.kinds"]),
        (ClosedForm, ["gradient() is called once for each weight; `add_gradients`"]),
        (Box, ["project() is called once for each weight; `project_`"]),
    ],
)
def test_a_kind_without_a_list_form_is_told_of_it_and_passes(kind: Any, words: list[str]) -> None:
    report = check_penalty(kind) if issubclass(kind, Penalty) else check_constraint(kind)
    assert report.passed, report
    (hint,) = report.hints
    assert all(word in hint for word in words), hint
    assert f"  hint: {hint}" in str(report).splitlines()


@pytest.mark.parametrize("kind", [ListForm, ListedBox])
def test_a_kind_with_list_forms_is_told_nothing(kind: Any) -> None:
    report = check_penalty(kind) if issubclass(kind, Penalty) else check_constraint(kind)
    assert report.passed, report
    assert report.hints == ()
    assert "hint" not in str(report)


def test_there_is_nothing_to_tell_of_what_is_not_on_weights() -> None:
    assert check_schedule(make("constant", value=0.5)).hints == ()
    assert hints(make("activity_l2", strength=1.0)) == ()


PLUGIN = """
from typing import Literal
import regkit

class Ridge(regkit.Penalty):
    '''Σw².'''

    kind: Literal["my_ridge"] = "my_ridge"

    def value(self, w):
        return (w if w.itemsize > 2 else w.float()).square().sum()

@regkit.hookimpl
def regkit_penalties():
    return [Ridge]
"""


def test_the_command_prints_hints_and_succeeds(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("regkit-ridge", "1.0", "ridge_plugin", PLUGIN)
    assert main(["conformance", "regkit-ridge"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "hint: Ridge: gradient() is called once for each weight" in told
    assert main(["conformance", "regkit-ridge", "--law", "documented"]) == 0
    assert "hint" not in capsys.readouterr().out
