"""Both, installed, used as their users will: from a document, over training steps."""

import copy
from pathlib import Path

import regkit
import torch
from torch import Tensor, nn
from torch.optim import SGD

from regkit_nuclear import MinimalGatedCell, NuclearNorm

SPEC = Path(__file__).parents[1] / "spec.json"
GATES = {"cell.u": 2, "lstm.weight_hh_l0": 4}


class Tagger(nn.Module):
    """A minimal gated cell over time, an LSTM above it, and a head. It knows nothing of regkit."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = MinimalGatedCell(3, 6)
        self.lstm = nn.LSTM(6, 6)
        self.head = nn.Linear(6, 2)

    def states(self, x: Tensor) -> Tensor:
        """x: (time, batch, 3) -> (time, batch, 6)."""
        h, hs = None, []
        for step in x:
            h = self.cell(step, h)
            hs.append(h)
        return torch.stack(hs)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.lstm(self.states(x))[0])
        return found


def ranks(model: nn.Module) -> dict[str, list[int]]:
    """The rank of each gate's recurrent block."""
    blocks = {name: dict(model.named_parameters())[name].detach().chunk(gates) for name, gates in GATES.items()}
    return {name: [int(torch.linalg.matrix_rank(one)) for one in found] for name, found in blocks.items()}


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 16, 3, dtype=torch.float64)
    return x, torch.stack([x[..., 0].cumsum(0).tanh(), x[..., 1]], dim=-1)


def step(model: nn.Module, loss: Tensor) -> None:
    """A step of plain gradient descent."""
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    SGD(model.parameters(), lr=0.1).step()


def test_a_document_halves_the_rank_of_both_layers_and_the_model_learns_as_well() -> None:
    torch.manual_seed(0)
    bare = Tagger().double()
    model = copy.deepcopy(bare)
    x, y = data()
    first = nn.functional.mse_loss(bare(x), y).item()
    with regkit.attach(model, SPEC) as attachment:
        for _ in range(60):
            step(bare, nn.functional.mse_loss(bare(x), y))
            step(model, nn.functional.mse_loss(model(x), y) + attachment.penalty())
        assert set(attachment.values()) == {"low rank", "forget gate", "slow cell"}
        assert all(value > 0 for value in attachment.values().values())
    low, full = nn.functional.mse_loss(model(x), y).item(), nn.functional.mse_loss(bare(x), y).item()
    assert low < 0.9 * first
    assert low < 1.02 * full
    assert all(rank == 6 for found in ranks(bare).values() for rank in found)
    assert all(1 <= rank <= 3 for found in ranks(model).values() for rank in found)


def test_one_step_is_that_of_a_loop_by_hand() -> None:
    torch.manual_seed(0)
    bare = Tagger().double()
    model = copy.deepcopy(bare)
    x, y = data()
    h = bare.states(x)
    loss = nn.functional.mse_loss(bare(x), y) + 0.1 * (h[1:] - h[:-1]).square().mean()
    step(bare, loss + 1e-2 * bare.cell.w[:6].square().sum())
    parameters = dict(bare.named_parameters())
    with torch.no_grad():
        for name, gates in GATES.items():
            for block in parameters[name].chunk(gates):
                u, s, vh = torch.linalg.svd(block)
                block.copy_(u @ torch.diag((s - 0.1 * 0.1).clamp(min=0)) @ vh)
    with regkit.attach(model, SPEC) as attachment:
        step(model, nn.functional.mse_loss(model(x), y) + attachment.penalty())
    torch.testing.assert_close(dict(model.named_parameters()), parameters)


def test_a_saved_document_says_whose_kind_it_needs() -> None:
    assert '"regkit-nuclear"' in regkit.load(SPEC).to_json()
    (rule, *_) = regkit.load(SPEC).rules
    assert rule.penalty == NuclearNorm(strength=0.1, per="gate")
