"""The laws of penalties on weights and of all kinds: the built-in ones keep each, and each catches a wrong one."""

from __future__ import annotations

import math
import random
import time
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from regkit import Penalty, PluginError
from regkit.activity import at_least_float32
from regkit.kinds import Separable
from regkit.registry.registry import default
from regkit.testing.kinds.penalties import LAWS, check_penalty
from tests.mutants import gradients, kinds, parts, penalties
from tests.mutants import prox as mutants_prox
from tests.mutants.mutant import Mutant
from tests.support.laws import PENS, Case, each, make
from tests.support.versions import torch_before

MUTANTS = [
    *kinds.MUTANTS,
    *penalties.MUTANTS,
    *gradients.MUTANTS,
    *mutants_prox.MUTANTS,
    *parts.PENALTIES,
]


# --- what is right keeps every law -----------------------------------------------------------------------------------


class NuclearNorm(Penalty):
    """Σ of singular values, whose decomposition raises an error where there is a NaN."""

    kind: Literal["nuclear"] = "nuclear"
    ranks: ClassVar[tuple[int, ...]] = (2,)

    def value(self, w: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(at_least_float32(w), ord="nuc")

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(at_least_float32(w), full_matrices=False)
        return ((u * (s - step).clamp(min=0).unsqueeze(-2)) @ vh).to(w.dtype)


class NegativeEntropy(Penalty):
    """Σ p·log p of softmax(w), which is negative by intent."""

    kind: Literal["negative_entropy"] = "negative_entropy"
    signed: ClassVar[bool] = True

    def value(self, w: Tensor) -> Tensor:
        p = at_least_float32(w).flatten().log_softmax(dim=0)
        return (p.exp() * p).sum()


class Skewness(Penalty):
    """‖W + Wᵀ‖², of square weights alone."""

    kind: Literal["skew"] = "skew"
    ranks: ClassVar[tuple[int, ...]] = (2,)

    def value(self, w: Tensor) -> Tensor:
        if w.size(0) != w.size(1):
            raise PluginError(f"skew is for square weights, not {tuple(w.shape)}")
        return (at_least_float32(w) + at_least_float32(w).T).square().sum()


class Welsch(Penalty):
    """Σ(1 − exp(−w²)): bounded, not convex, almost flat at a distance."""

    kind: Literal["welsch"] = "welsch"

    @property
    def separable(self) -> Separable:
        return "elements"

    def value(self, w: Tensor) -> Tensor:
        return -torch.expm1(-at_least_float32(w).square()).sum()


class Hinge(Penalty):
    """Σ(‖row‖ − 1)₊², with a kink, and without effect within the ball."""

    kind: Literal["hinge"] = "hinge"

    @property
    def separable(self) -> Separable:
        return "rows"

    def value(self, w: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(at_least_float32(w).reshape(w.size(0), -1), dim=1)
        return (norms - 1).clamp(min=0).square().sum()


class Cells(Penalty):
    """Σ over hidden units of the largest |weight| of all their gates."""

    kind: Literal["cells"] = "cells"

    @property
    def layout(self) -> Literal["cell"]:
        return "cell"

    def value(self, w: Tensor) -> Tensor:
        return at_least_float32(w).abs().amax(dim=0).sum()


STRANGERS = [NuclearNorm, NegativeEntropy, Skewness, Welsch, Hinge, Cells]
RIGHT = [kinds.Ridge, penalties.GroupLasso, penalties.Skew, mutants_prox.Lasso, mutants_prox.ProximalGroups]


@pytest.mark.parametrize("kind", [*STRANGERS, *RIGHT], ids=lambda kind: kind.__name__)
def test_a_right_penalty_of_a_stranger_keeps_every_law(kind: type[Penalty]) -> None:
    report = check_penalty(kind)
    assert report.passed, report


@pytest.mark.parametrize("name", [entry.name for entry in default().entries("penalty")])
def test_every_example_of_a_built_in_penalty_keeps_every_law(name: str) -> None:
    kind: Any = default().kind(name)
    report = check_penalty(kind)
    assert report.passed, report
    assert len(list(report)) == 1 + sum(len(LAWS.applying_to(example)) for example in kind.examples())


@each(PENS)
def test_every_penalty_of_the_table_keeps_every_law(case: Case) -> None:
    report = check_penalty(case.kind)
    assert report.passed, report


# --- what is wrong is caught -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.kind.__name__)
def test_a_wrong_penalty_is_caught_by_the_law_that_tells_its_mistake(mutant: Mutant) -> None:
    mutant.expect(check_penalty(mutant.kind))


def test_each_law_catches_a_mutant() -> None:
    assert {"examples", *(law.name for law in LAWS)} == {mutant.law for mutant in MUTANTS}


def test_a_law_says_why_it_matters_and_what_to_do() -> None:
    for law in LAWS:
        assert len(law.why.split(". ")) >= 2, law.name
        assert law.why.endswith((".", ")")), law.name


def test_what_is_no_penalty_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a Penalty, or a subclass of it, got UnitNorm\("):
        check_penalty(make("unit_norm"))
    with pytest.raises(TypeError, match="expected a Penalty"):
        check_penalty(default().kind("constant"))


# --- to try the laws leaves no trace ---------------------------------------------------------------------------------


def state() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_to_try_the_laws_changes_nothing_of_the_process(mode: type[Any]) -> None:
    with mode():
        before = state()
        report = check_penalty(make("l1_l2", l1=0.1, l2=0.2))
        assert state() == before
    assert report.passed, report


def test_the_laws_hold_whatever_the_default_dtype_is() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        report = check_penalty(make("orthogonal", strength=1.0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert report.passed, report


def test_what_was_compiled_before_is_not_compiled_anew() -> None:
    compiled_for = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        compiled_for.append(graph)
        return graph.forward

    function = torch.compile(lambda w: w.sin().sum(), backend=backend)
    w = torch.ones(3)
    function(w)
    (law,) = (law for law in LAWS if law.name == "compiles_whole")
    for n in range(10):  # more often than torch.compile compiles one function anew
        assert law.tried(make("l1_l2", l1=0.1 * n, l2=1.0), "").passed
    function(w)
    assert len(compiled_for) == 1


def test_all_the_laws_of_a_penalty_take_no_longer_than_a_look() -> None:
    kind = make("l1", strength=1.0)
    check_penalty(kind)  # with the imports of what compiles
    took = math.inf
    for _ in range(3):
        start = time.process_time()
        check_penalty(kind)
        took = min(took, time.process_time() - start)
    assert took < 1.0


# --- what is told first ----------------------------------------------------------------------------------------------


class ReadBack(kinds.Ridge):
    """A number in the place of a tensor, which is the root of all else."""

    def value(self, w: Tensor) -> Tensor:
        return super().value(w).item()  # type: ignore[return-value]  # the mistake


class WithoutGradient(kinds.Ridge):
    """A value that no gradient reaches."""

    def value(self, w: Tensor) -> Tensor:
        return super().value(w.detach())


@pytest.mark.parametrize(
    ("kind", "root", "also"),
    [
        # An older compiler stops at item().
        (ReadBack, "value_is_a_scalar", {"compiles_whole"} if torch_before("2.13") else set()),
        (WithoutGradient, "value_keeps_the_graph", {"list_forms_agree"}),
    ],
)
def test_the_root_of_many_failures_is_told_first_and_the_rest_was_not_tried(kind, root, also):
    report = check_penalty(kind(strength=1.0))
    assert report.failures[0].law == root
    assert {failure.law for failure in report.failures[1:]} == also
    left = {result.law for result in report if result.untried}
    assert left >= {"gradient_is_that_of_autograd", "gradient_is_finite_at_zero"}
    assert not left & {"named", "documented", "described", "survives_json", "frozen"}
    assert not report.passed
    (line,) = (line for line in str(report).splitlines() if line.startswith("  not tried"))
    assert line.startswith(f"  not tried, as {root} does not hold: ")
    assert all(law in line for law in left)


def test_a_law_that_tells_something_of_its_own_is_tried_beside_a_root_that_does_not_hold():
    class OfHalves(kinds.Ridge):
        def value(self, w: Tensor) -> Tensor:
            return w.square().sum()  # in half precision: a scalar, of another dtype

    report = check_penalty(OfHalves(strength=1.0))
    assert {failure.law for failure in report.failures} >= {"value_is_a_scalar", "halves_accumulate_in_float32"}
    assert sum(result.passed for result in report) > 20


def test_a_constant_that_is_kept_is_no_wait_for_the_device():
    kept: dict[torch.device, Tensor] = {}

    class Keeps(kinds.Ridge):
        def value(self, w: Tensor) -> Tensor:
            if w.device.type != "cpu":
                return super().value(w)
            two = kept.setdefault(w.device, torch.tensor(2.0))
            return (at_least_float32(w) * two).square().sum()

    results = {result.law: result for result in check_penalty(Keeps(strength=1.0))}
    assert results["never_waits_for_the_device"].passed, results["never_waits_for_the_device"]
