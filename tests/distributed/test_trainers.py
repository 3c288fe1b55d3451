"""Lightning's and Accelerate's strategies in two processes come to the weights of a hand-written loop in one."""

from __future__ import annotations

import pytest

from tests.support.distributed.trainers import ACTIVITY, TASKS, WEIGHTS, trained_by_hand
from tests.support.distributed.workers import World, assert_same, together

pytestmark = pytest.mark.slow

TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def world() -> World:
    return World(2, TASKS)


@pytest.mark.works_with("Lightning: DDP")
def test_attach_alone_is_right_under_the_ddp_of_lightning(world):
    assert_same(together(world.found("lightning_ddp")), trained_by_hand(WEIGHTS), TOLERANCE)


@pytest.mark.works_with("Lightning: DDP")
def test_the_callback_adds_activity_penalties_under_the_ddp_of_lightning(world):
    found = together(world.found("lightning_ddp_with_callback"))
    assert_same(found, trained_by_hand([*WEIGHTS, *ACTIVITY]), TOLERANCE)


@pytest.mark.works_with("Lightning: FSDP2")
def test_attach_alone_is_right_under_the_model_parallel_strategy_of_lightning(world):
    assert_same(together(world.found("lightning_fsdp2")), trained_by_hand(WEIGHTS), TOLERANCE)


@pytest.mark.works_with("Accelerate: DDP")
def test_attach_and_penalty_are_right_in_two_processes_of_accelerate(world):
    assert_same(together(world.found("accelerate_ddp")), trained_by_hand([*WEIGHTS, *ACTIVITY]), TOLERANCE)
