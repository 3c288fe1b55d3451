"""The whole of a sharded tensor, and the share that a process has of a whole."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from regkit.runtime.sharding import refuse_flattened, sharded, share, whole
from tests.support.distributed.cases import world
from tests.support.distributed.tasks import SHAPES

pytestmark = pytest.mark.slow


def test_a_tensor_that_is_not_sharded_is_its_own_whole_and_its_own_share():
    one, other = torch.zeros(2), torch.ones(2)
    assert not sharded(one)
    assert whole(one) is one
    assert share(other, one) is other


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_share_has_every_placement_without_communication_and_makes_up_the_whole(shape, size):
    for found in world(size).found(f"shares of {shape}"):
        expected = found.pop("expected")
        for placements, one in found.items():
            assert one["sent"] == 0, placements
            torch.testing.assert_close(one["whole"], expected["whole"], msg=placements)
            torch.testing.assert_close(one["sum"], expected["sum"], msg=placements)


def test_autograd_goes_through_the_whole_to_the_shards():
    for gradient in world(2).found("gradient_through_whole"):
        torch.testing.assert_close(gradient, 3 * torch.arange(15.0).reshape(5, 3) ** 2)


def test_a_module_that_fsdp1_never_saw_is_not_flattened():
    refuse_flattened([(torch.nn.LSTM(2, 3), "a weight")])


def test_regkit_does_not_import_what_sharding_takes():
    load = "import regkit.attachment.attaching"
    code = f"import sys, torch; old = set(sys.modules); {load}; print(*sorted(set(sys.modules) - old))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "regkit.runtime.sharding" in done.stdout.split()
    assert "torch.distributed" not in done.stdout
