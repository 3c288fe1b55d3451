"""The laws of constraints hold for every built-in one, and catch each of the wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regkit import Constraint
from regkit.registry.registry import default
from regkit.testing.kinds.common import KIND_LAWS
from regkit.testing.kinds.constraints import LAWS, check_constraint
from regkit.testing.laws import Law
from tests.mutants.constraints import MUTANTS as OF_SETS
from tests.mutants.constraints import KerasEpsilon, Mutant, Right, Sphere, Symmetric
from tests.mutants.mutant import Mutant as MutantOfAll
from tests.mutants.parts import CONSTRAINTS as OF_PARTS
from tests.mutants.parts import RIGHT as RIGHT_POOLS
from tests.mutants.projections import MUTANTS as OF_TENSORS
from tests.mutants.right_constraints import RIGHT
from tests.support.laws import CONS, Case, each, make

MUTANTS = [*OF_SETS, *OF_TENSORS, *OF_PARTS]
BUILT_IN = [entry.name for entry in default().entries("constraint")]


def law_named(name: str) -> Law[Any]:
    (law,) = [law for law in LAWS if law.name == name]
    return law


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_example_of_a_built_in_constraint_keeps_every_law(name: str) -> None:
    report = check_constraint(default().kind(name))
    assert report.passed, str(report)


@each([case for case in CONS if case.kind not in type(case.kind).examples()])
def test_every_constraint_of_the_table_keeps_every_law(case: Case) -> None:
    report = check_constraint(case.kind)
    assert report.passed, str(report)


@pytest.mark.parametrize("kind", [Right, Sphere, Symmetric, *RIGHT, *RIGHT_POOLS])
def test_a_right_constraint_of_a_strangers_own_keeps_every_law(kind: type[Constraint]) -> None:
    report = check_constraint(kind)
    assert report.passed, str(report)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{mutant.kind.__name__}-{mutant.law}" for mutant in MUTANTS])
def test_a_wrong_constraint_is_caught_by_the_law_that_tells_its_mistake(mutant: Mutant) -> None:
    result = law_named(mutant.law).tried(mutant.kind(), mutant.kind.__name__)
    assert not result.passed
    assert result.why
    for word in mutant.words:
        assert word in result.seen


@pytest.mark.parametrize("mutant", OF_PARTS, ids=lambda mutant: mutant.kind.__name__)
def test_what_is_said_wrongly_of_parts_is_caught_by_no_law_but_those_of_parts(mutant: MutantOfAll) -> None:
    mutant.expect(check_constraint(mutant.kind))


def test_a_report_says_of_each_law_that_fails_what_was_seen_and_what_to_do() -> None:
    text = str(check_constraint(KerasEpsilon()))
    assert "right(largest=1.5): " in text
    assert "FAILED  projects_once: a torch.float64 weight (3, 5), projected again, moves by another" in text
    assert "an epsilon in a denominator" in text


def test_each_law_of_constraints_catches_a_mutant() -> None:
    own = {law.name for law in LAWS} - {law.name for law in KIND_LAWS}
    assert own <= {mutant.law for mutant in MUTANTS}
    assert len({mutant.kind for mutant in MUTANTS}) >= 25


def test_going_only_a_part_of_the_way_is_told_as_what_it_is() -> None:
    report = check_constraint(make("min_max_norm", min_value=0.5, rate=0.5))
    assert {failure.law for failure in report.failures} == {"lands_in_the_set", "projects_once"}


def test_trying_a_constraint_changes_no_global_state() -> None:
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    check_constraint(make("max_norm", max_value=1.5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert torch.is_grad_enabled()


def test_the_laws_hold_whatever_the_default_dtype_is() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        report = check_constraint(make("max_norm", max_value=1.5))
    finally:
        torch.set_default_dtype(torch.float32)
    assert report.passed, str(report)


def test_only_a_constraint_is_taken() -> None:
    with pytest.raises(TypeError, match="Constraint"):
        check_constraint(make("l2", strength=1.0))
