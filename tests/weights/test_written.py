"""Weights that one rule writes and another reads in the same step, where both are of one parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import SGD

import regkit
from tests.support.resting import Times, begun, step


def balls(**bounds: float) -> Any:
    """A rule on the recurrent weight of a module for each, in this order."""
    return {
        "rules": [
            {"target": {"module": name.rstrip("_"), "role": "recurrent"}, "constraint": f"max_norm({bound})"}
            for name, bound in bounds.items()
        ]
    }


class Ones(nn.Module):
    """Two cells of ones, so that the rows of a recurrent weight have the norm 2."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.RNNCell(3, 4), nn.RNNCell(3, 4)
        for parameter in self.parameters():
            nn.init.ones_(parameter)


def three_times() -> Ones:
    """A model in which the recurrent weight of `two` is three times that of `one`."""
    model = Ones()
    parametrize.register_parametrization(model.two, "weight_hh", Times(3.0))
    model.two.parametrizations.weight_hh.original = model.one.weight_hh
    return model


def test_a_weight_that_is_computed_of_one_that_was_projected_just_now_is_read_as_it_is_then():
    """Of norm 6 it would be outside of the last bound; of norm 3 it is within."""
    model = three_times()
    begun(model, balls(two=30, one=1, two_=4))
    torch.testing.assert_close(model.one.weight_hh.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("via", ["decoupled", "proximal"])
def test_a_weight_that_is_computed_of_one_that_has_shrunk_just_now_shrinks_from_there(via: str):
    model = three_times()
    targets = [{"module": name, "role": "recurrent"} for name in ("two", "one", "two")]
    regkit.attach(model, {"rules": [{"target": target, "penalty": "l2(0.5)", "via": via} for target in targets]})
    step(model, SGD(model.parameters(), lr=0.1))
    factor = 0.9 if via == "decoupled" else 1 / 1.1
    torch.testing.assert_close(model.one.weight_hh.detach(), torch.full((4, 4), factor**3))


def test_a_weight_is_computed_anew_where_a_parameter_within_its_parametrization_was_projected():
    """That is no parameter behind the weight, and has a part in it all the same: of norm 8, and of norm 4 then."""
    model = Ones()
    parametrize.register_parametrization(model.two, "weight_hh", Times(model.one.weight_hh))
    raw = model.two.parametrizations.weight_hh.original
    nn.init.constant_(raw, 4)
    begun(model, balls(two=80, one=1, two_=6))
    torch.testing.assert_close(model.one.weight_hh.norm(dim=1), torch.ones(4))
    assert torch.equal(raw, torch.full((4, 4), 4.0))


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this one process."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(("per", "left"), [("cell", 2.0), ("matrix", 1.0)])
def test_a_sharded_weight_under_two_names_is_gathered_anew_where_it_was_written_by_one(
    per: str, left: float, mesh: Any
):
    """Each name has a place of its own. A unit of norm √12 would be outside of the last bound, and is within it then.

    Per cell, the weight is written whole; per matrix, each process writes what it holds.
    """
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.ModuleDict({"one": nn.GRUCell(3, 4), "two": nn.GRUCell(3, 4)})
    bounds = [("two", 50, "cell"), ("one", 2, per), ("two", 3, "cell")]
    targets = [{"module": name, "role": "recurrent"} for name, _, _ in bounds]
    kinds = [{"kind": "max_norm", "max_value": bound, "per": way} for _, bound, way in bounds]
    document = {"rules": [{"target": t, "constraint": k} for t, k in zip(targets, kinds, strict=True)]}
    attachment = regkit.attach(model, document)
    model.one.weight_hh = nn.Parameter(distribute_tensor(torch.ones(12, 4), mesh, [Shard(0)]))
    model.two.weight_hh = model.one.weight_hh
    step(model, SGD(model.parameters(), lr=0.0))
    assert attachment.step_count == 1
    units = model.one.weight_hh.full_tensor().view(3, 4, 4).norm(dim=(0, 2))
    torch.testing.assert_close(units, torch.full((4,), left))


def test_two_weights_of_one_parameter_are_both_as_the_last_rule_left_it():
    """Each is another function of it: what a rule wrote through the second, the next is to read in the first."""
    model = nn.ModuleList([nn.RNNCell(2, 2), nn.RNNCell(2, 2)])
    for cell, times in zip(model, (1.0, 4.0), strict=True):
        parametrize.register_parametrization(cell, "weight_hh", Times(times))
    raw = model[1].parametrizations.weight_hh.original = model[0].parametrizations.weight_hh.original
    recurrent = {"role": "recurrent"}
    ball = {"target": recurrent, "constraint": "max_norm(1)"}
    attachment = regkit.attach(
        model, {"rules": [ball, {"target": {**recurrent, "module": "0"}, "constraint": "non_negative"}]}
    )
    with torch.no_grad():
        raw.copy_(torch.tensor([[3.0, 4.0], [3.0, -4.0]]))
    step(model, SGD(model.parameters(), lr=0.0))
    torch.testing.assert_close(raw.detach(), torch.tensor([[0.15, 0.2], [0.15, 0.0]]))
    assert max(map(float, attachment.violations().values())) < 1e-6
