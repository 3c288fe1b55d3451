"""The laws of schedules: the built-in ones keep each, and each catches a wrong one."""

from __future__ import annotations

from typing import Any

import pytest

from regkit.registry.registry import default
from regkit.testing.kinds.common import KIND_LAWS
from regkit.testing.kinds.schedules import LAWS, check_schedule
from tests.mutants.mutant import Mutant
from tests.mutants.schedules import MUTANTS, Decay
from tests.support.laws import SCHEDS, Case, each, make


@pytest.mark.parametrize("name", [entry.name for entry in default().entries("schedule")])
def test_every_example_of_a_built_in_schedule_keeps_every_law(name: str) -> None:
    kind: Any = default().kind(name)
    report = check_schedule(kind)
    assert report.passed, report
    assert len(list(report)) == 1 + len(list(LAWS)) * len(kind.examples())


@each(SCHEDS)
def test_every_schedule_of_the_table_keeps_every_law(case: Case) -> None:
    report = check_schedule(case.kind)
    assert report.passed, report


def test_what_the_mutants_wanted_to_be_keeps_every_law() -> None:
    assert check_schedule(Decay).passed


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.kind.__name__)
def test_a_wrong_schedule_is_caught_by_the_law_that_tells_its_mistake(mutant: Mutant) -> None:
    mutant.expect(check_schedule(mutant.kind))


def test_each_law_of_schedules_catches_a_mutant() -> None:
    assert {law.name for law in LAWS} - {law.name for law in KIND_LAWS} == {mutant.law for mutant in MUTANTS}


def test_a_schedule_of_zeros_that_says_so_keeps_every_law() -> None:
    assert make("constant", value=0).inert() is not None
    report = check_schedule(make("constant", value=0))
    assert report.passed, report
