"""A small recurrent model, and the ways to spread it over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune

# --- the model -------------------------------------------------------------------------------------------------------


class MatmulCell(nn.LSTMCell):
    """An LSTMCell in matrix products, which torch knows how to shard; of its own cells it does not."""

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = state if state is not None else (x.new_zeros(len(x), self.hidden_size) for _ in range(2))
        x, h, c = map(self._placed, (x, h, c))
        gates = x @ self.weight_ih.T + h @ self.weight_hh.T + self.bias_ih + self.bias_hh
        if isinstance(gates, DTensor):
            gates = gates.redistribute(placements=[Replicate()])
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h.to_local(), c.to_local()) if isinstance(h, DTensor) else (h, c)

    def _placed(self, tensor: Tensor) -> Tensor:
        weight = self.weight_ih
        if isinstance(weight, DTensor):
            return DTensor.from_local(tensor, weight.device_mesh, [Replicate()], run_check=False)
        return tensor


LAYERS: dict[str, type[nn.Module]] = {
    **{layer.__name__: layer for layer in (nn.RNN, nn.GRU, nn.LSTM, nn.GRUCell, nn.LSTMCell)},
    "MatmulCell": MatmulCell,
}


class Net(nn.Module):
    """A recurrent layer, or a cell called in a loop, and a head. A spare layer has no share in the output."""

    def __init__(self, layer: str, hidden: int, spare: bool = False) -> None:
        super().__init__()
        self.rnn = LAYERS[layer](3, hidden)
        self.head = nn.Linear(hidden, 2)
        if spare:
            self.spare = LAYERS[layer](3, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x: (time, batch, 3) -> (time, batch, 2)"""
        if isinstance(self.rnn, nn.RNNBase):
            return self.head(self.rnn(x)[0])
        outputs, state = [], None
        for now in x:
            state = self.rnn(now, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(outputs))


class Scaled(nn.Module):
    """A parametrization of a user's own, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.prod()


COMPUTE: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "scaled": lambda module, name: parametrize.register_parametrization(module, name, Scaled()),
    "pruned": lambda module, name: prune.l1_unstructured(module, name, 0.3),
}
"""The ways in which torch computes a weight from another."""


def make_net(layer: str = "LSTM", hidden: int = 5, spare: bool = False, computed: str = "") -> Net:
    """The same weights at every call, in float64. computed: how those of the recurrent layer are, if they are."""
    torch.manual_seed(1)
    net = Net(layer, hidden, spare).double()
    if computed:
        for name in [name for name in net.rnn._parameters if name.startswith("weight")]:
            COMPUTE[computed](net.rnn, name)
    return net


# --- the ways to spread it -------------------------------------------------------------------------------------------


@dataclass
class Spread:
    """A model spread over processes, and which share of each batch this process trains on."""

    module: nn.Module
    part: int = 0
    parts: int = 1
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD

    def mine(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.parts, 1)[self.part]


def one_process(net: Net) -> Spread:
    return Spread(net)


def by_rank(module: nn.Module, **options: Any) -> Spread:
    return Spread(module, dist.get_rank(), dist.get_world_size(), **options)


def ddp(net: Net) -> Spread:
    return by_rank(DistributedDataParallel(net))


def ddp_static_graph(net: Net) -> Spread:
    return by_rank(DistributedDataParallel(net, static_graph=True))


def ddp_finding_unused(net: Net) -> Spread:
    return by_rank(DistributedDataParallel(net, find_unused_parameters=True))


def ddp_and_zero(net: Net) -> Spread:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # here, for torch warns as it is imported

    def optimizer(parameters: Iterator[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.SGD, **options)

    return by_rank(DistributedDataParallel(net), optimizer=optimizer)


def fsdp(net: Net) -> Spread:
    return by_rank(fully_shard(net))


def fsdp_resharding(net: Net) -> Spread:
    return by_rank(fully_shard(net, reshard_after_forward=True))


def fsdp_not_resharding(net: Net) -> Spread:
    return by_rank(fully_shard(net, reshard_after_forward=False))


def fsdp_left_whole(net: Net) -> Spread:
    module = fully_shard(net)
    module.set_reshard_after_backward(False)
    return by_rank(module)


def fsdp_by_layer(net: Net) -> Spread:
    for layer in (net.rnn, net.head, net):
        fully_shard(layer)
    return by_rank(net)


def fsdp_by_columns(net: Net) -> Spread:
    return by_rank(fully_shard(net, shard_placement_fn=lambda p: Shard(p.dim() - 1) if p.shape[-1] % 4 == 0 else None))


def fsdp_hybrid(net: Net) -> Spread:
    return by_rank(fully_shard(net, mesh=mesh("data", "tensor")))


@cache
def mesh(*names: str) -> DeviceMesh:
    """All processes in a row, or four of them in a square. To make one takes time."""
    shape = (dist.get_world_size(),) if len(names) < 2 else (2, 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=names or None)


def _distribute(module: nn.Module, over: DeviceMesh, dimension: int) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        place: Placement = Shard(dimension) if tensor.dim() > dimension else Replicate()
        spread = distribute_tensor(tensor.detach(), over, [place])
        setattr(module, name, nn.Parameter(spread) if isinstance(tensor, nn.Parameter) else spread)


def tensor_parallel_rows(net: Net) -> Spread:
    _distribute(net.rnn, mesh(), 0)
    return Spread(net)


def tensor_parallel_columns(net: Net) -> Spread:
    _distribute(net.rnn, mesh(), 1)
    return Spread(net)


def _two_dimensional(net: Net, dimension: int) -> Spread:
    square = mesh("data", "tensor")
    _distribute(net.rnn, square["tensor"], dimension)
    for layer in (net.rnn, net.head):
        fully_shard(layer, mesh=square["data"])
    return Spread(net, square["data"].get_local_rank(), 2)


def fsdp_and_rows(net: Net) -> Spread:
    return _two_dimensional(net, 0)


def fsdp_and_columns(net: Net) -> Spread:
    return _two_dimensional(net, 1)
