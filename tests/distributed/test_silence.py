"""What cannot be right is an error in every process, and none waits for another; the watchdog sends nothing."""

from __future__ import annotations

import pytest

import regkit
from tests.support.distributed.cases import world
from tests.support.distributed.silence import FSDP1_CASES, MAX_NORM, UNHEARD, WATCHED
from tests.support.distributed.spreads import make_net
from tests.support.distributed.tasks import L2

pytestmark = pytest.mark.slow


@pytest.mark.works_with("FSDP1 is refused")
@pytest.mark.parametrize("case", FSDP1_CASES, ids=str)
def test_a_model_that_fsdp1_flattens_is_refused_with_the_cure_at_attach_or_at_every_step(case):
    _, attach_first, _, _ = case
    for errors in world(2).found(f"FSDP1: {case}"):
        assert len(errors) == (2 if attach_first else 1)
        for error in errors:
            assert "a flat parameter of FSDP1" in error
            assert "torch.distributed.fsdp.fully_shard" in error


@pytest.mark.works_with("FSDP2")
def test_a_forgotten_penalty_is_an_error_in_every_process_and_none_waits():
    for error in world(2).found("forgotten_penalty"):
        assert "add attachment.penalty() to the loss" in error


@pytest.mark.works_with("FSDP2")
def test_one_process_may_resolve_a_plan_alone_and_it_is_that_of_the_whole_model():
    assert world(2).found("plan_of_the_first") == [str(regkit.resolve(make_net(), {"rules": L2})), ""]


@pytest.mark.works_with("FSDP2 of computed weights")
def test_a_constraint_that_a_parametrization_cannot_follow_is_refused_as_in_one_process():
    with pytest.raises(regkit.AttachError, match="_SpectralNorm makes of") as alone:
        regkit.attach(make_net(computed="spectral_norm"), {"rules": MAX_NORM})
    assert world(2).found("refused_constraint") == [str(alone.value)] * 2


watched = pytest.mark.works_with("Updates without a torch optimizer")


@watched
@pytest.mark.parametrize("spread", WATCHED)
def test_the_watchdog_is_quiet_over_many_backward_passes_and_evaluations_to_a_step(spread):
    assert world(2).found(f"watched quietly: {spread}") == [2, 2]


@watched
@pytest.mark.parametrize("update", ["in_place", "through_data"])
@pytest.mark.parametrize("spread", UNHEARD)
def test_an_update_that_no_optimizer_makes_is_an_error_in_the_same_iteration_of_every_process(spread, update):
    (iteration, error), other = world(2).found(f"unheard: {spread}, {update}")
    assert iteration > 1
    assert "no torch optimizer that owns it was heard to step" in error
    assert other == (iteration, error)


@watched
@pytest.mark.parametrize("spread", WATCHED)
def test_the_watchdog_sends_nothing(spread):
    for watched, bare in world(2).found(f"sent by backward passes: {spread}"):
        assert watched == bare > 0
