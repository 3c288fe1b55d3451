"""Activity penalties in real training loops equal losses written by hand; what falls through is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import regkit

AR_TAR = {
    "rules": [
        {"name": "ar", "target": {"role": "output"}, "penalty": {"kind": "activity_l2", "strength": 2.0}},
        {"name": "tar", "target": {"role": "output"}, "penalty": {"kind": "temporal", "strength": 1.0}},
    ]
}
AR = {"rules": AR_TAR["rules"][:1]}


def ar_tar(h: Tensor) -> Tensor:
    """By hand, for h: (time, batch, features)."""
    return 2.0 * h.square().mean() + (h[1:] - h[:-1]).square().mean()


def test_training_with_ar_and_tar_equals_the_loss_written_by_hand(make_model, batches):
    by_hand, regularized = make_model(), make_model()
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.01)
    for x, y in batches:
        h, _ = by_hand.rnn(x)
        optimizer.zero_grad()
        (nn.functional.mse_loss(by_hand.head(h), y) + ar_tar(h)).backward()
        optimizer.step()

    attachment = regkit.attach(regularized, AR_TAR)
    optimizer = torch.optim.Adam(regularized.parameters(), lr=0.01)
    for x, y in batches:
        loss = nn.functional.mse_loss(regularized(x), y) + attachment.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for ours, theirs in zip(regularized.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


Penalize = Callable[[], Tensor]


def accumulate(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list, penalty: Penalize) -> None:
    for pair in (batches[:2], batches[2:]):
        optimizer.zero_grad()
        for x, y in pair:
            ((nn.functional.mse_loss(model(x), y) + penalty()) / 2).backward()
        optimizer.step()


def clip(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list, penalty: Penalize) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        (nn.functional.mse_loss(model(x), y) + penalty()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()


def scale(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list, penalty: Penalize) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for x, y in batches:
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x), y) + penalty()).backward()
        scaler.step(optimizer)
        scaler.update()


def close(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list, penalty: Penalize) -> None:
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y) + penalty()
            loss.backward()
            return loss

        optimizer.step(closure)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize(
    ("name", "loop"),
    [
        (name, loop)
        for name in OPTIMIZERS
        for loop in (accumulate, clip, scale, close)
        if name != "LBFGS" or loop is close
    ],
)
def test_the_penalty_equals_a_hand_written_one_in_every_kind_of_loop(name, loop, make_model, batches):
    by_hand, regularized = make_model(), make_model()
    seen: list[Tensor] = []
    by_hand.rnn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    loop(by_hand, OPTIMIZERS[name](by_hand.parameters()), batches, lambda: ar_tar(seen.pop()))
    attachment = regkit.attach(regularized, AR_TAR)
    loop(regularized, OPTIMIZERS[name](regularized.parameters()), batches, attachment.penalty)
    for ours, theirs in zip(regularized.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


LAYERS = [
    (nn.RNN, {}),
    (nn.GRU, {"num_layers": 2}),
    (nn.LSTM, {"bidirectional": True}),
    (nn.LSTM, {"batch_first": True}),
    (nn.LSTM, {"proj_size": 2, "bidirectional": True, "batch_first": True}),
]


@pytest.mark.parametrize(("layer", "options"), LAYERS)
@pytest.mark.parametrize("reduction", ["mean", "batch", "sum"])
def test_every_layer_and_reduction_equals_a_formula_by_hand(reduction, layer, options):
    model = layer(3, 4, **options).double()
    spec = {"rules": [{"penalty": {**r["penalty"], "reduction": reduction}} for r in AR_TAR["rules"]]}
    attachment = regkit.attach(model, spec)
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    h, _ = model(x)
    time = h.transpose(0, 1) if options.get("batch_first") else h
    divide = {"mean": Tensor.mean, "batch": lambda t: t.sum() / time.size(1), "sum": Tensor.sum}[reduction]
    expected = 2.0 * divide(time.square()) + divide((time[1:] - time[:-1]).square())
    torch.testing.assert_close(attachment.penalty(), expected)


class Growth(regkit.ActivityPenalty):
    """h_t − h_{t−1}: unlike a square, it tells the two apart."""

    kind: Literal["growth"] = "growth"
    sequence: ClassVar[bool] = True

    def value(self, activity: regkit.Activity) -> Tensor:
        return activity.reduce_pairs(lambda h, previous: h - previous, "sum")


class GrowthPlugin:
    @regkit.hookimpl
    def regkit_activity_penalties(self) -> list[type[regkit.ActivityPenalty]]:
        return [Growth]


@pytest.mark.parametrize("packed", [False, True])
def test_the_backward_half_has_its_neighbours_on_the_other_side(packed):
    model = nn.RNN(3, 4, bidirectional=True).double()
    registry = regkit.Registry([GrowthPlugin()])
    attachment = regkit.attach(model, {"rules": [{"penalty": "growth(1)"}]}, registry=registry)
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    h, _ = model(x)
    expected = (h[-1, :, :4] - h[0, :, :4]).sum() + (h[0, :, 4:] - h[-1, :, 4:]).sum()
    if packed:
        attachment.penalty()
        model(pack_padded_sequence(x, torch.full((6,), 5)))
    torch.testing.assert_close(attachment.penalty(), expected)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["activity_l1", "activity_l2", "temporal", "norm_stabilizer"])
def test_packed_equals_padded_with_lengths_equals_each_sequence_alone(kind, bidirectional):
    model = nn.GRU(3, 4, bidirectional=bidirectional).double()
    attachment = regkit.attach(model, {"rules": [{"penalty": {"kind": kind, "strength": 1.0, "reduction": "sum"}}]})
    lengths = [3, 6, 1, 4]
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in lengths]

    model(pack_padded_sequence(pad_sequence(sequences), torch.tensor(lengths), enforce_sorted=False))
    packed = attachment.penalty()
    for sequence in sequences:
        model(sequence)  # unbatched
    alone = attachment.penalty()
    torch.testing.assert_close(packed, alone)

    if not bidirectional:  # a padded batch lets the backward half start in the padding: its outputs differ
        with attachment.lengths(lengths):
            model(pad_sequence(sequences))
        torch.testing.assert_close(attachment.penalty(), packed)
        mask = torch.arange(6)[:, None] < torch.tensor(lengths)
        with attachment.mask(mask):
            model(pad_sequence(sequences))
        torch.testing.assert_close(attachment.penalty(), packed)


def test_mean_counts_valid_elements_only():
    model = nn.LSTM(3, 4, batch_first=True).double()
    attachment = regkit.attach(model, AR_TAR)
    lengths = torch.tensor([5, 2])
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    with attachment.lengths(lengths):
        h, _ = model(x)
    rows = torch.cat([h[0], h[1, :2]])
    pairs = torch.cat([h[0, 1:] - h[0, :-1], h[1, 1:2] - h[1, :1]])
    torch.testing.assert_close(attachment.penalty(), 2.0 * rows.square().mean() + pairs.square().mean())
    packed = pack_padded_sequence(x, lengths, batch_first=True)
    out, _ = model(packed)
    expected = 2.0 * out.data.square().mean() + pairs.square().mean()
    torch.testing.assert_close(attachment.penalty(), expected)
    assert pad_packed_sequence(out)[0].shape == (5, 2, 4)


def run_cell(cell: nn.Module, x: Tensor, state: object = None) -> list[Tensor]:
    outputs = []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return outputs


@pytest.mark.parametrize(("cell_class", "layer"), [(nn.RNNCell, nn.RNN), (nn.LSTMCell, nn.LSTM), (nn.GRUCell, nn.GRU)])
@pytest.mark.parametrize("start", ["none", "zeros", "detached"])
def test_a_cell_in_a_loop_equals_the_layer(start, cell_class, layer):
    cell, sequence = cell_class(3, 4).double(), layer(3, 4).double()
    for ours, theirs in zip(cell.parameters(), sequence.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    attachments = [regkit.attach(model, AR_TAR) for model in (cell, sequence)]
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    zeros = torch.zeros(6, 4, dtype=torch.float64)
    zeros = zeros if start == "zeros" else (zeros * zeros.clone().requires_grad_()).detach()
    state = None if start == "none" else (zeros, zeros) if cell_class is nn.LSTMCell else zeros
    run_cell(cell, x, state)
    sequence(x)
    torch.testing.assert_close(*[attachment.penalty() for attachment in attachments])


def test_lengths_hold_inside_their_context_alone_and_the_inner_one_counts():
    model = nn.GRU(3, 4).double()
    attachment = regkit.attach(model, {"rules": [{"penalty": "activity_l2(1, reduction=sum)"}]})
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    with attachment.lengths([5, 2]):
        with attachment.lengths([1, 1]):
            h, _ = model(x)
        torch.testing.assert_close(attachment.penalty(), h[:1].square().sum())
        h, _ = model(x)
        torch.testing.assert_close(attachment.penalty(), h[:, 0].square().sum() + h[:2, 1].square().sum())
    h, _ = model(x)
    torch.testing.assert_close(attachment.penalty(), h.square().sum())


def test_a_cell_in_a_loop_takes_lengths_around_the_loop_or_a_mask_around_each_call():
    cell = nn.GRUCell(3, 4).double()
    attachment = regkit.attach(cell, AR_TAR)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    with attachment.lengths([5, 2]):
        h = torch.stack(run_cell(cell, x))
    rows = torch.cat([h[:, 0], h[:2, 1]])
    pairs = torch.cat([h[1:, 0] - h[:-1, 0], h[1:2, 1] - h[:1, 1]])
    expected = 2.0 * rows.square().mean() + pairs.square().mean()
    torch.testing.assert_close(attachment.penalty(), expected)

    state = None
    for time, step in enumerate(x):
        with attachment.mask(torch.tensor([True, time < 2])):
            state = cell(step, state)
    torch.testing.assert_close(attachment.penalty(), expected)


def test_states_are_penalized_only_where_a_rule_asks_for_them():
    model = nn.LSTM(3, 4, 2, bidirectional=True).double()
    x = torch.randn(5, 6, 3, dtype=torch.float64)

    def measured(target: dict[str, object], expected: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        rule = {"target": target, "penalty": {"kind": "activity_l2", "strength": 1.0}}
        with regkit.attach(model, {"rules": [rule]}) as attachment:
            out, (h, c) = model(x)
            torch.testing.assert_close(attachment.penalty(), expected(out, h, c))

    measured({}, lambda out, h, c: out.square().mean())
    measured({"role": "state"}, lambda out, h, c: h.square().mean())
    measured({"role": "cell"}, lambda out, h, c: c.square().mean())
    measured({"role": "cell", "layer": 1, "direction": "backward"}, lambda out, h, c: c[3].square().mean())
    measured({"role": "state", "direction": "forward"}, lambda out, h, c: h[[0, 2]].square().mean())
    measured({"role": "output", "direction": "backward"}, lambda out, h, c: out[..., 4:].square().mean())


def test_several_calls_are_pooled_and_accumulation_is_exact(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, AR)
    outputs = [model.rnn(x)[0] for x, _ in batches[:2]]
    torch.testing.assert_close(attachment.penalty(), 2.0 * torch.cat(outputs).square().mean())
    assert attachment.penalty() == 0  # consumed


def test_a_schedule_scales_an_activity_penalty(make_model, batches):
    model = make_model()
    rule = {**AR["rules"][0], "schedule": {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 2}}
    attachment = regkit.attach(model, {"rules": [rule]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    shares = []
    for x, _ in batches:
        whole = 2.0 * model(x).detach().sum() * 0 + 2.0 * model.rnn(x)[0].square().mean()
        attachment.discard()  # the two calls above
        out = model(x)
        penalty = attachment.penalty()
        shares.append((penalty / whole).item())
        optimizer.zero_grad()
        (out.sum() + penalty).backward()
        optimizer.step()
    assert shares == pytest.approx([0.0, 0.5, 1.0, 1.0])


def test_half_precision_outputs_are_reduced_in_float32():
    model = nn.LSTM(3, 4).bfloat16()
    attachment = regkit.attach(model, AR)
    h, _ = model(torch.randn(50, 60, 3, dtype=torch.bfloat16))
    penalty = attachment.penalty()
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, 2.0 * h.float().square().mean())


def test_autocast_does_not_reach_the_penalty():
    model = nn.LSTM(3, 4)
    rule = {"target": {"role": "recurrent"}, "penalty": {"kind": "orthogonal", "strength": 1.0}, "via": "loss"}
    attachment = regkit.attach(model, {"rules": [{**rule, "name": "orthogonal"}]})
    off = model.weight_hh_l0.detach().view(4, 4, 4) @ model.weight_hh_l0.detach().view(4, 4, 4).mT - torch.eye(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model.weight_hh_l0 @ model.weight_hh_l0.T).dtype == torch.bfloat16
        torch.testing.assert_close(attachment.penalty().detach(), off.square().sum())
        torch.testing.assert_close(attachment.values()["orthogonal"], off.square().sum())
