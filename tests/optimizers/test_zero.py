"""torch's ZeroRedundancyOptimizer, in a group of one process: an optimizer around the optimizer of a shard."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Adam, AdamW

import regkit
from tests.support.decay import BOUND, L2_AND_BALL, assert_equals_weight_decay, largest_row
from tests.support.loops import RULE, assert_equal_weights, rnn_groups, train, train_with_closure

with warnings.catch_warnings():
    # torch scripts its functional optimizers while this is imported, and warns that scripting is deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

pytestmark = pytest.mark.works_with("ZeroRedundancyOptimizer")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("loop", [train, train_with_closure])
def test_zero_around_adam_equals_weight_decay(loop, make_model, batches):
    def train_with(model: nn.Module, decay: float) -> None:
        loop(model, ZeroRedundancyOptimizer(rnn_groups(model, decay), Adam, lr=0.05), batches)

    assert assert_equals_weight_decay(make_model, train_with).step_count == 4


@pytest.mark.usefixtures("one_process")
def test_zero_with_a_scheduler_gives_a_decoupled_rule_its_learning_rate(make_model, batches):
    def train_with(model: nn.Module, decay: float) -> None:
        optimizer = ZeroRedundancyOptimizer(rnn_groups(model, decay), AdamW, lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for batch in batches:
            train(model, optimizer, [batch])
            scheduler.step()

    assert_equals_weight_decay(make_model, train_with, spec={"rules": [{**RULE["rules"][0], "via": "decoupled"}]})


@pytest.mark.usefixtures("one_process")
def test_zero_resumed_from_its_consolidated_state_goes_on_bitwise(make_model, batches):
    def zero_over(model: nn.Module) -> ZeroRedundancyOptimizer:
        return ZeroRedundancyOptimizer(rnn_groups(model, 0.0), Adam, lr=0.05)

    whole, resumed = make_model(), make_model()
    attachment, optimizer = regkit.attach(whole, L2_AND_BALL), zero_over(whole)
    train(whole, optimizer, batches[:2])
    optimizer.consolidate_state_dict()
    resumed.load_state_dict(whole.state_dict())
    other = regkit.attach(resumed, L2_AND_BALL)
    other.load_state_dict(attachment.state_dict())
    second = zero_over(resumed)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # ZeRO's shares its tensors with what it came from
    train(whole, optimizer, batches[2:])
    train(resumed, second, batches[2:])
    assert_equal_weights(whole, resumed, 0)
    assert attachment.step_count == other.step_count == 4
    assert BOUND / 2 < largest_row(resumed) <= BOUND + 1e-9
