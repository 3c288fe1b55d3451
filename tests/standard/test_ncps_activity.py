"""Activity penalties on CfC and LTC of the ncps package, and on their cells in a loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import regkit
from tests.support.loops import assert_equal_weights

pytest.importorskip("ncps.torch")
# Where the package is absent, there is nothing to import.
from tests.support.ncps_nets import LAYERS, AutoNCP, make, ncps_torch, rule, sequences, train

pytestmark = pytest.mark.works_with("ncps: CfC and LTC")
each_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture
def xs() -> list[Tensor]:
    return sequences()


AR_TAR = {
    "rules": [
        {"name": "ar", "penalty": {"kind": "activity_l2", "strength": 2.0}},
        {"name": "tar", "penalty": {"kind": "temporal", "strength": 1.0}},
    ]
}


def ar_tar(h: Tensor) -> Tensor:
    """By hand, for h: (batch, time, features)."""
    return 2.0 * h.square().mean() + (h[:, 1:] - h[:, :-1]).square().mean()


@each_layer
def test_activity_penalties_are_of_what_the_layer_puts_out_and_count_once(name, xs):
    by_hand, regularized = make(name), make(name)
    attachment = regkit.attach(regularized, AR_TAR)
    seen: list[Tensor] = []
    by_hand.rnn.register_forward_hook(lambda module, args, result: seen.append(result[0]))
    train(by_hand, xs, lambda _: ar_tar(seen.pop()))
    train(regularized, xs, lambda _: attachment.penalty())
    assert_equal_weights(by_hand, regularized)


@pytest.mark.parametrize("name", ["backbone", "wired", "LTC"])
def test_padding_does_not_count_within_lengths(name, xs):
    model = make(name)
    attachment = regkit.attach(model, AR_TAR)
    with attachment.lengths([5, 2, 3, 1]):
        h = model.outputs(xs[0])
    rows = [h[at, :length] for at, length in enumerate([5, 2, 3, 1])]
    values = torch.cat([row.flatten() for row in rows])
    pairs = torch.cat([(row[1:] - row[:-1]).flatten() for row in rows])
    torch.testing.assert_close(attachment.penalty(), 2 * values.square().mean() + pairs.square().mean())


@pytest.mark.parametrize("kind", ["CfC", "LTC"])
def test_outputs_may_be_unbatched_or_time_first(kind, xs):
    torch.manual_seed(1)
    layer = getattr(ncps_torch, kind)(3, 4, batch_first=False).double()
    attachment = regkit.attach(layer, AR_TAR)
    layer(xs[0].transpose(0, 1))
    batched = attachment.penalty()
    layer.batch_first = True
    layer(xs[0])
    torch.testing.assert_close(attachment.penalty(), batched)
    h, _ = layer(xs[0][0])
    torch.testing.assert_close(attachment.penalty(), ar_tar(h[None]))


@each_layer
def test_a_sequence_in_chunks_with_the_state_handed_on_is_one_sequence(name, xs):
    layer, x = make(name).rnn.float(), xs[0].float()  # ncps begins with zeros in float32
    attachment = regkit.attach(layer, AR_TAR)
    x = x if layer.batch_first else x.transpose(0, 1)
    layer(x)
    at_once, state = attachment.penalty(), None
    for chunk in x.split(1, 1 if layer.batch_first else 0):
        _, state = layer(chunk, state)
    torch.testing.assert_close(attachment.penalty(), at_once)


def test_a_layer_that_returns_its_last_output_has_no_neighbours_in_time(xs):
    layer = ncps_torch.CfC(3, 4, return_sequences=False).double()
    with pytest.raises(regkit.ResolveError, match="temporal compares neighbours in time; the role output has none"):
        regkit.attach(layer, AR_TAR)
    attachment = regkit.attach(layer, {"rules": [{"penalty": "activity_l2(2)"}]})
    out, _ = layer(xs[0])
    torch.testing.assert_close(attachment.penalty(), 2 * out.square().mean())
    with attachment.lengths([5, 2, 3, 1]):
        layer(xs[0])
    with pytest.raises(regkit.StepError, match="the output of a padded batch is computed from its padding"):
        attachment.penalty()


def test_states_are_those_of_the_layers_asked_for(xs):
    wired, mixed = make("wired"), make("mixed memory")
    spec = rule(target={"module": "rnn", "role": "state", "layer": [0, 2]}, penalty="activity_l2(1)")
    attachment = regkit.attach(wired, spec)
    _, state = wired.rnn(xs[0])
    first, _, last = state.split(wired.rnn.rnn_cell.layer_sizes, 1)
    torch.testing.assert_close(attachment.penalty(), torch.cat([first, last], 1).square().mean())

    spec = rule(target={"role": ["state", "cell"]}, penalty={"kind": "activity_l2", "strength": 1, "reduction": "sum"})
    attachment = regkit.attach(mixed, spec)
    zeros = torch.zeros(4, 4, dtype=torch.float64)
    _, (h, c) = mixed.rnn(xs[0], (zeros, zeros))
    torch.testing.assert_close(attachment.penalty(), h.square().sum() + c.square().sum())


CELLS: dict[str, Callable[[], nn.Module]] = {
    "CfCCell": lambda: ncps_torch.CfCCell(3, 4, backbone_units=5),
    "WiredCfCCell": lambda: ncps_torch.WiredCfCCell(3, AutoNCP(8, 2)),
    "LTCCell": lambda: ncps_torch.LTCCell(AutoNCP(8, 2), in_features=3),
}


class Looped(nn.Module):
    """A cell of ncps, in a loop."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.rnn = CELLS[name]()

    def forward(self, x: Tensor, by_keyword: bool = False) -> tuple[Tensor, Tensor]:
        units = self.rnn.hidden_size if hasattr(self.rnn, "hidden_size") else self.rnn.state_size
        state = torch.zeros(x.size(0), units, dtype=x.dtype)
        outs, states = [], []
        for step in x.unbind(1):
            keyword = {"states" if "LTC" in type(self.rnn).__name__ else "hx": state}
            out, state = self.rnn(step, **keyword, **times(self.rnn)) if by_keyword else self.rnn(step, state, 1.0)
            outs.append(out)
            states.append(state)
        return torch.stack(outs, 1), torch.stack(states, 1)


def times(cell: nn.Module) -> dict[str, float]:
    return {{"CfCCell": "ts", "WiredCfCCell": "timespans", "LTCCell": "elapsed_time"}[type(cell).__name__]: 1.0}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("by_keyword", [False, True])
def test_cells_in_a_loop_of_the_users_own_are_steps_of_time(name, by_keyword, xs):
    torch.manual_seed(1)
    model = Looped(name).double()
    attachment = regkit.attach(model, AR_TAR)
    outs, _ = model(xs[0], by_keyword)
    torch.testing.assert_close(attachment.penalty(), ar_tar(outs))
    with attachment.lengths([5, 2, 3, 1]):
        outs, _ = model(xs[0], by_keyword)
    rows = [outs[at, :length] for at, length in enumerate([5, 2, 3, 1])]
    values = torch.cat([row.flatten() for row in rows])
    pairs = torch.cat([(row[1:] - row[:-1]).flatten() for row in rows])
    torch.testing.assert_close(attachment.penalty(), 2 * values.square().mean() + pairs.square().mean())
    attachment.detach()

    states = {"rules": [{**one, "target": {"role": "state"}} for one in AR_TAR["rules"]]}
    attachment = regkit.attach(model, states)
    _, states = model(xs[0], by_keyword)
    torch.testing.assert_close(attachment.penalty(), ar_tar(states))
