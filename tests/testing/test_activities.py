"""The laws of activity penalties hold for every built-in one, and catch each of the wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regkit import ActivityPenalty
from regkit.registry.registry import default
from regkit.testing.activities.laws import LAWS, check_activity_penalty
from regkit.testing.kinds.common import KIND_LAWS
from regkit.testing.laws import Law
from tests.mutants.activities import MUTANTS as OF_OUTPUTS
from tests.mutants.activities import Mutant, Right, RightChange, RootAtZero
from tests.mutants.mutant import Mutant as MutantOfAll
from tests.mutants.parts import ACTIVITIES as OF_PARTS
from tests.mutants.right_activities import RIGHT
from tests.support.laws import ACTS, Case, each, make

MUTANTS = [*OF_OUTPUTS, *OF_PARTS]
BUILT_IN = [entry.name for entry in default().entries("activity penalty")]


def law_named(name: str) -> Law[Any]:
    (law,) = [law for law in LAWS if law.name == name]
    return law


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_example_of_a_built_in_activity_penalty_keeps_every_law(name: str) -> None:
    report = check_activity_penalty(default().kind(name))
    assert report.passed, str(report)


@each([case for case in ACTS if case.kind not in type(case.kind).examples()])
def test_every_activity_penalty_of_the_table_keeps_every_law(case: Case) -> None:
    report = check_activity_penalty(case.kind)
    assert report.passed, str(report)


@pytest.mark.parametrize("kind", [Right, RightChange, *RIGHT])
def test_a_right_activity_penalty_of_a_strangers_own_keeps_every_law(kind: type[ActivityPenalty]) -> None:
    report = check_activity_penalty(kind)
    assert report.passed, str(report)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{mutant.kind.__name__}-{mutant.law}" for mutant in MUTANTS])
def test_a_wrong_activity_penalty_is_caught_by_the_law_that_tells_its_mistake(mutant: Mutant) -> None:
    result = law_named(mutant.law).tried(mutant.kind(strength=1.0), mutant.kind.__name__)
    assert not result.passed
    assert result.why
    for word in mutant.words:
        assert word in result.seen


@pytest.mark.parametrize("mutant", OF_PARTS, ids=lambda mutant: mutant.kind.__name__)
def test_a_penalty_that_is_no_sum_over_outputs_is_caught_by_no_other_law(mutant: MutantOfAll) -> None:
    mutant.expect(check_activity_penalty(mutant.kind))


def test_a_report_says_of_each_law_that_fails_what_was_seen_and_what_to_do() -> None:
    text = str(check_activity_penalty(RootAtZero(strength=1.0)))
    assert "right(strength=1.0, reduction=mean): " in text
    assert "FAILED  gradient_is_finite: the gradient by mean of zeros has [nan] in it: not finite" in text
    assert "`torch.linalg.vector_norm` does" in text


def test_each_law_of_activity_penalties_catches_a_mutant() -> None:
    own = {law.name for law in LAWS} - {law.name for law in KIND_LAWS}
    assert own <= {mutant.law for mutant in MUTANTS}
    assert len({mutant.kind for mutant in MUTANTS}) >= 25


def test_trying_an_activity_penalty_changes_no_global_state() -> None:
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    check_activity_penalty(make("temporal", strength=1.0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert torch.is_grad_enabled()


def test_the_laws_hold_whatever_the_default_dtype_is() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        report = check_activity_penalty(make("temporal", strength=1.0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert report.passed, str(report)


def test_only_an_activity_penalty_is_taken() -> None:
    with pytest.raises(TypeError, match="ActivityPenalty"):
        check_activity_penalty(make("l2", strength=1.0))
