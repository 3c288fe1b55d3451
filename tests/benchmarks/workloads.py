"""What is trained: recurrent layers of the sizes where a regularizer may cost much or little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Net(nn.Module):
    """Recurrent layers side by side, which all read the same input."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Every layer's output."""
        found = (layer(x) for layer in self.layers)
        return [one if isinstance(one, Tensor) else one[0] for one in found]


class Calls(nn.Module):
    """A cell that is called once for each time, as a layer; the parametrized weights of one are computed once."""

    def __init__(self, cell: nn.LSTMCell | nn.GRUCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, found = None, []
        with parametrize.cached():
            for now in x:
                state = self.cell(now, state)
                found.append(state if isinstance(state, Tensor) else state[0])
        return torch.stack(found)


@dataclass(frozen=True)
class Workload:
    """A net, the shape of its input, and the seconds of an ordinary run that it is given.

    steps: how many consecutive ones make a block; fewer where one takes long, which are cold whatever came before.
    cells: whether its layers are cells, whose outputs are no sequences; loops: whether they are called in a loop.
    """

    name: str
    title: str
    make: Callable[[], Sequence[nn.Module]]
    shape: tuple[int, ...]
    seconds: float
    steps: int
    cells: bool = False
    loops: bool = False

    def build(self) -> tuple[Net, Tensor]:
        """The net and its input, the same at every call."""
        torch.manual_seed(0)
        return Net(self.make()), torch.randn(self.shape)


def workloads(tiny: bool, shorter: int = 1) -> list[Workload]:
    """Those of the tables. tiny: in sizes that only show whether everything runs; shorter: by this, blocks are so."""

    def steps(number: int) -> int:
        return 2 if tiny else max(1, number // shorter)

    few = (lambda n: max(2, min(4, n // 8))) if tiny else (lambda n: n)
    b8, b32, t8, t32, t64 = few(8), few(32), few(8), few(32), few(64)
    return [
        Workload(
            "a", f"LSTM {few(64)} to {few(128)}, batch {b32}, time {t32}",
            lambda: [nn.LSTM(few(64), few(128))], (t32, b32, few(64)), 70, steps(16),
        ),
        Workload(
            "b", f"2-layer bidirectional LSTM {few(512)}, batch {b32}, time {t64}",
            lambda: [nn.LSTM(few(512), few(512), num_layers=2, bidirectional=True)], (t64, b32, few(512)),
            260, steps(2),
        ),
        Workload(
            "c", f"3-layer LSTM {few(1024)}, batch {b8}, time {t8}",
            lambda: [nn.LSTM(few(1024), few(1024), num_layers=3)], (t8, b8, few(1024)), 130, steps(3),
        ),
        Workload(
            "d1", f"{few(64)} GRUs of {few(32)}, batch {b8}, time {t8}",
            lambda: [nn.GRU(few(32), few(32)) for _ in range(few(64))], (t8, b8, few(32)), 60, steps(12),
        ),
        Workload(
            "d2", f"{few(1000)} GRU cells of {few(16)}, batch {b8}",
            lambda: [nn.GRUCell(few(16), few(16)) for _ in range(few(1000))], (b8, few(16)), 80, steps(4), cells=True,
        ),
        Workload(
            "e", f"LSTM cell {few(64)} to {few(128)} in a loop, batch {b32}, time {t32}",
            lambda: [Calls(nn.LSTMCell(few(64), few(128)))], (t32, b32, few(64)), 40, steps(16), cells=True, loops=True,
        ),
        Workload(
            "f", f"GRU cell of {few(32)} in a loop, batch {b8}, time {t32}",
            lambda: [Calls(nn.GRUCell(few(32), few(32)))], (t32, b8, few(32)), 40, steps(16), cells=True, loops=True,
        ),
    ]  # fmt: skip


def growing_layers(tiny: bool) -> dict[int, Workload]:
    """GRU cells of 16, more and more of them."""
    counts = (1, 3) if tiny else (1, 3, 10, 30, 100, 300, 1000)
    return {n: _cells(n) for n in counts}


def _cells(n: int) -> Workload:
    return Workload(
        f"{n} cells", f"{n} GRU cells of 16", lambda: [nn.GRUCell(16, 16) for _ in range(n)], (8, 16), 6, 4, cells=True
    )


def growing_sizes(tiny: bool) -> dict[int, Workload]:
    """One LSTM, larger and larger."""
    sizes = (16, 32) if tiny else (16, 32, 64, 128, 256, 512, 1024, 2048)
    return {h: _lstm(h) for h in sizes}


def _lstm(h: int) -> Workload:
    return Workload(f"LSTM {h}", f"LSTM of {h}, batch 8, time 8", lambda: [nn.LSTM(h, h)], (8, 8, h), 6, 4)
