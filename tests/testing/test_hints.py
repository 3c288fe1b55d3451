"""A kind or an adapter that keeps every law is told how to be faster, and passes all the same."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from regkit import Activity, Constraint, Penalty
from regkit.cli import main
from regkit.kinds import Separable
from regkit.testing import check_activity_penalty, check_constraint, check_penalty, check_schedule
from regkit.testing.hints import hints
from tests.mutants.activities import Right as RightActivity
from tests.mutants.kinds import Ridge
from tests.mutants.parts import Disc, MeanSaidToBeSeparable, RightPool
from tests.mutants.penalties import GroupLasso
from tests.mutants.right_constraints import Orthogonal, SpectralBall
from tests.support.laws import make
from tests.support.plugins.installing import Install


class ClosedForm(Ridge):
    """Σw², of which the gradient is known."""

    def gradient(self, w: Tensor) -> Tensor:
        return 2 * (w if w.itemsize > 2 else w.float())


class ListForm(ClosedForm):
    """The same, for many weights at once, and for shards."""

    @property
    def separable(self) -> Separable:
        return "elements"

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
    """The same, for many weights at once, and for shards."""

    @property
    def separable(self) -> Separable:
        return "elements"

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
    hint, _ = report.hints
    assert all(word in hint for word in words), hint
    assert f"  hint: {hint}" in str(report).splitlines()


@pytest.mark.parametrize("kind", [ListForm, ListedBox])
def test_a_kind_with_list_forms_is_told_nothing(kind: Any) -> None:
    report = check_penalty(kind) if issubclass(kind, Penalty) else check_constraint(kind)
    assert report.passed, report
    assert report.hints == ()
    assert "hint" not in str(report)


@pytest.mark.parametrize(
    ("kind", "parts"), [(Ridge, "elements"), (Box, "elements"), (GroupLasso, "rows"), (RightPool, "rows")]
)
def test_a_kind_that_could_act_on_shards_is_told_what_to_declare(kind: Any, parts: str) -> None:
    words = f'its {parts} count one by one: declare separable = "{parts}", and no process need gather the weight'
    for subject in (kind, kind.examples()[0]):
        assert [words in hint for hint in hints(subject)] == [False, True]


@pytest.mark.parametrize("kind", [SpectralBall, Disc, Orthogonal, MeanSaidToBeSeparable])
def test_a_kind_that_has_to_see_the_whole_is_told_nothing_of_shards(kind: Any) -> None:
    assert [hint for hint in hints(kind) if "separable" in hint] == []


class Squares(RightActivity):
    """h², with its gradient in closed form."""

    def add_gradients(self, activity: Activity, gradients: Activity, amount: Tensor) -> None:
        activity.add_slopes(gradients, lambda h: h, amount, self.reduction, times=2)


class Declared(Squares):
    """The same, which says that it is a sum over outputs."""

    separable: ClassVar[bool] = True


def test_an_activity_penalty_in_closed_form_that_is_a_sum_over_outputs_is_told_to_say_so() -> None:
    report = check_activity_penalty(Squares)
    assert report.passed, report
    (hint,) = report.hints
    assert "its outputs count one by one: declare separable = True, and many are reduced at once" in hint
    assert check_activity_penalty(Declared).hints == ()
    assert check_activity_penalty(RightActivity).hints == ()  # without a closed form that would be of no use


def test_there_is_nothing_to_tell_of_a_schedule_and_of_what_says_all() -> None:
    assert check_schedule(make("constant", value=0.5)).hints == ()
    for kind in (make("activity_l2", strength=1.0), make("l1", strength=1.0), make("max_norm", max_value=1.0)):
        assert hints(kind) == ()


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
    assert 'hint: Ridge: its elements count one by one: declare separable = "elements"' in told
    assert main(["conformance", "regkit-ridge", "--law", "documented"]) == 0
    assert "hint" not in capsys.readouterr().out
