"""The state handed in is the neighbour of the first output exactly where a gradient can reach the state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import regkit

TAR = {"rules": [{"name": "tar", "penalty": "temporal(1)"}]}
ONE_DNN = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def double(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tar(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The mean over all pairs, (..., features) each, by hand."""
    return torch.cat([(now - before).square().flatten() for now, before in pairs]).mean()


def assert_same(ours: Tensor, wanted: Tensor, leaves: Sequence[Tensor]) -> None:
    """Both have one value, and one gradient for each leaf."""
    torch.testing.assert_close(ours, wanted)
    found, right = (torch.autograd.grad(one, leaves, allow_unused=True, retain_graph=True) for one in (ours, wanted))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "RNN": lambda: nn.RNN(3, 4, batch_first=True),
    "LSTM": lambda: nn.LSTM(3, 4, num_layers=2),
    "GRU": lambda: nn.GRU(3, 4),
    "projected": lambda: nn.LSTM(3, 4, proj_size=2),
}


@ONE_DNN
@pytest.mark.parametrize("via", ["loss", "inject"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_called_in_chunks_with_its_state_handed_on_is_one_sequence(name, size, via):
    layer, x = double(LAYERS[name]), normal(6, 2, 3)
    time = 1 if layer.batch_first else 0
    x = x.transpose(0, 1) if layer.batch_first else x
    h, _ = layer(x)
    weights = list(layer.parameters())
    by_hand = tar((h.narrow(time, 1, 5), h.narrow(time, 0, 5)))
    wanted = torch.autograd.grad(by_hand + h.sum(), weights)
    scale = {"loss_scale": 1.0} if via == "inject" else {}
    attachment = regkit.attach(layer, {"rules": [{"penalty": "temporal(1)", "via": via}]}, **scale)
    state, sums = None, []
    for chunk in x.split(size, time):
        h, state = layer(chunk, hx=state)
        sums.append(h.sum())
    ours = attachment.penalty()
    if via == "loss":
        torch.testing.assert_close(ours, by_hand)
    (ours + torch.stack(sums).sum()).backward()
    for weight, gradient in zip(weights, wanted, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


@pytest.mark.parametrize("make", [lambda: nn.LSTMCell(3, 4), lambda: nn.GRU(3, 4)], ids=["cell", "layer"])
def test_reductions_of_a_loop_are_those_of_the_sequence(make):
    module = double(make)
    kinds = [{"kind": "temporal", "strength": 1.0, "reduction": reduction} for reduction in ("mean", "sum", "batch")]
    attachment = regkit.attach(module, {"rules": [{"name": k["reduction"], "penalty": k} for k in kinds]})
    found, state = [], None
    for x in normal(5, 2, 3):
        h, state = module(x[None], state) if isinstance(module, nn.GRU) else (module(x, state),) * 2
        found.append(h[0])
    h = torch.stack(found).view(5, 2, 4)
    difference = (h[1:] - h[:-1]).square()
    values = attachment.values()
    torch.testing.assert_close(values["mean"], difference.mean().detach())
    torch.testing.assert_close(values["sum"], difference.sum().detach())
    torch.testing.assert_close(values["batch"], difference.sum().detach() / 2)


SPREADS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda h: h,
    "expanded": lambda h: h.expand(1, -1),
    "copied": lambda h: h * 1.0,
    "through tanh": torch.tanh,
}


@pytest.mark.parametrize("spread", SPREADS)
def test_a_learned_initial_state_counts_however_it_is_spread_and_wherever(spread):
    cell, layer = double(lambda: nn.GRUCell(3, 4)), double(lambda: nn.GRU(3, 4))
    first, x = nn.Parameter(normal(1, 4)), normal(3, 1, 3)
    start = SPREADS[spread](first)
    of_cell, of_layer = regkit.attach(cell, TAR), regkit.attach(layer, TAR)
    steps, h = [], start
    for now in x:
        h = cell(now, h)
        steps.append(h)
    whole = torch.stack([start, *steps])
    assert_same(of_cell.penalty(), tar((whole[1:], whole[:-1])), [first, *cell.parameters()])
    whole = torch.cat([start[None], layer(x, start[None])[0]])
    assert_same(of_layer.penalty(), tar((whole[1:], whole[:-1])), [first, *layer.parameters()])


@pytest.mark.parametrize("start", [None, torch.zeros(1, 2, 4), torch.ones(1, 2, 4)], ids=["none", "zeros", "data"])
def test_a_state_that_no_gradient_reaches_is_data(start):
    layer = double(lambda: nn.GRU(3, 4))
    attachment = regkit.attach(layer, TAR)
    h, _ = layer(normal(3, 2, 3), None if start is None else start.double())
    assert_same(attachment.penalty(), tar((h[1:], h[:-1])), list(layer.parameters()))


def test_truncated_backpropagation_with_a_detached_state_counts_the_pairs_within_chunks():
    layer = double(lambda: nn.GRU(3, 4))
    attachment = regkit.attach(layer, TAR)
    state, outs = None, []
    for chunk in normal(6, 2, 3).split(3):
        h, state = layer(chunk, state)
        state = state.detach()
        outs.append(h)
    assert_same(attachment.penalty(), tar(*((h[1:], h[:-1]) for h in outs)), list(layer.parameters()))


def test_an_encoders_state_is_the_neighbour_of_a_decoders_first_output():
    model = nn.ModuleDict({"encoder": double(lambda: nn.LSTM(3, 4)), "decoder": double(lambda: nn.LSTM(3, 4))})
    attachment = regkit.attach(model, {"rules": [{"target": {"module": "decoder"}, "penalty": "temporal(1)"}]})
    _, state = model["encoder"](normal(5, 2, 3))
    before, pairs = state, []
    for x in normal(3, 1, 2, 3):
        h, after = model["decoder"](x, before)
        pairs.append((h[0], before[0][0]))
        before = after
    assert_same(attachment.penalty(), tar(*pairs), list(model.parameters()))


def test_each_direction_has_its_own_state_and_the_backward_one_begins_at_the_end():
    layer = double(lambda: nn.GRU(3, 4, num_layers=2, bidirectional=True))
    start = normal(4, 2, 4).requires_grad_()
    attachment = regkit.attach(layer, TAR)
    forward, backward = layer(normal(5, 2, 3), start)[0].chunk(2, -1)
    pairs = [
        (forward[0], start[2]),
        (forward[1:], forward[:-1]),
        (backward[-1], start[3]),
        (backward[:-1], backward[1:]),
    ]
    assert_same(attachment.penalty(), tar(*pairs), [start, *layer.parameters()])


@pytest.mark.parametrize("twice", [False, True], ids=["once", "gradients of gradients"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both ways"])
def test_packed_sequences_take_their_states_in_the_callers_order(bidirectional, twice):
    layer = double(lambda: nn.GRU(3, 4, bidirectional=bidirectional))
    start, lengths = normal(1 + bidirectional, 4, 4).requires_grad_(), [2, 5, 1, 5]
    attachment = regkit.attach(layer, TAR)
    out, _ = layer(pack_padded_sequence(normal(5, 4, 3), lengths, enforce_sorted=False), start)
    padded, _ = pad_packed_sequence(out)
    pairs = []
    for at, length in enumerate(lengths):
        h = padded[:length, at, :4]
        pairs += [(h[0], start[0, at]), (h[1:], h[:-1])]
        if bidirectional:
            h = padded[:length, at, 4:]
            pairs += [(h[-1], start[1, at]), (h[:-1], h[1:])]
    ours, wanted, leaves = attachment.penalty(), tar(*pairs), [start, *layer.parameters()]
    assert_same(ours, wanted, leaves)
    if twice:
        norms = []
        for value in (ours, wanted):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            norms.append(torch.stack([one.square().sum() for one in gradients]).sum())
        assert_same(*norms, leaves)


@pytest.mark.parametrize("how", ["lengths", "mask"])
def test_the_pair_counts_where_the_first_output_is_data(how):
    layer = double(lambda: nn.GRU(3, 4))
    start = normal(1, 3, 4).requires_grad_()
    attachment = regkit.attach(layer, TAR)
    lengths = [2, 0, 4]
    valid = torch.arange(4)[:, None] < torch.tensor(lengths)
    with attachment.lengths(lengths) if how == "lengths" else attachment.mask(valid):
        h, _ = layer(normal(4, 3, 3), start)
    pairs = []
    for at, length in enumerate(lengths):
        whole = torch.cat([start[0, at][None], h[:length, at]])
        pairs.append((whole[1:], whole[:-1]))
    assert_same(attachment.penalty(), tar(*pairs), [start, *layer.parameters()])


def test_unbatched_sequences_take_unbatched_states():
    layer = double(lambda: nn.LSTM(3, 4))
    start = normal(1, 4).requires_grad_()
    attachment = regkit.attach(layer, TAR)
    h, _ = layer(normal(3, 3), (start, torch.zeros_like(start)))
    whole = torch.cat([start, h])
    assert_same(attachment.penalty(), tar((whole[1:], whole[:-1])), [start, *layer.parameters()])


def test_a_checkpointed_layer_is_compared_with_the_state_it_was_handed():
    layer = double(lambda: nn.GRU(3, 4))
    start = normal(1, 2, 4).requires_grad_()
    attachment = regkit.attach(layer, TAR)
    h = checkpoint(lambda x, h: layer(x, h)[0], normal(3, 2, 3), start, use_reentrant=False)
    whole = torch.cat([start, h])
    assert_same(attachment.penalty(), tar((whole[1:], whole[:-1])), [start])


@pytest.mark.parametrize("make", [lambda: nn.GRU(3, 4), lambda: nn.GRUCell(3, 4)], ids=["layer", "cell"])
def test_an_evaluation_that_begins_with_a_learned_state_is_not_recorded(make):
    module = double(make)
    first = nn.Parameter(normal(2, 4))
    attachment = regkit.attach(module, TAR)
    optimizer = torch.optim.SGD([first, *module.parameters()], lr=0.1)

    def run() -> Tensor:
        if isinstance(module, nn.GRU):
            return module(normal(3, 2, 3), first[None])[0].sum()
        return module(normal(2, 3), first).sum()

    (run() + attachment.penalty()).backward()
    with torch.no_grad():
        run()
    optimizer.step()
    assert attachment.step_count == 1


@pytest.mark.parametrize(
    "mix", [lambda new, old: 0.9 * new + 0.1 * old, lambda new, old: new * 0.0], ids=["zoneout", "reset"]
)
def test_a_state_that_is_changed_between_calls_is_compared_as_handed_in_and_told_once(mix):
    cell = double(lambda: nn.LSTMCell(3, 4))
    attachment = regkit.attach(cell, TAR)

    def loop() -> Tensor:
        h = c = torch.zeros(2, 4, dtype=torch.float64)
        pairs = []
        for x in normal(3, 2, 3):
            new, c = cell(x, (h, c))
            pairs.append((new, h))
            h = mix(new, h)
        return tar(*pairs[1:])

    wanted = loop()
    with pytest.warns(regkit.RegkitWarning, match="the state handed to the model is none that its calls put out"):
        ours = attachment.penalty()
    assert_same(ours, wanted, list(cell.parameters()))
    wanted = loop()
    assert_same(attachment.penalty(), wanted, list(cell.parameters()))


@pytest.mark.parametrize("way", ["learned", "computed", "unbatched", "masked", "lengths"])
def test_a_changed_state_is_told_in_whatever_way_a_cell_is_run(way):
    cell, x = double(lambda: nn.GRUCell(3, 4)), normal(3, 2, 3)
    h = normal(2, 4).requires_grad_()
    h = torch.tanh(h) if way == "computed" else h
    x, h = (x[:, 0], h[0]) if way == "unbatched" else (x, h)
    attachment = regkit.attach(cell, TAR)

    def loop(h: Tensor) -> None:
        for now in x:
            with attachment.mask(torch.tensor([True, False])) if way == "masked" else nullcontext():
                h = 0.5 * cell(now, h)

    with attachment.lengths([3, 2]) if way == "lengths" else nullcontext():
        loop(h)
    with pytest.warns(regkit.RegkitWarning, match="is none that its calls put out"):
        attachment.penalty()


def test_states_that_go_several_ways_and_sequences_that_begin_alike_are_not_told():
    cell, first = double(lambda: nn.GRUCell(3, 4)), nn.Parameter(normal(2, 4))
    attachment = regkit.attach(cell, TAR)
    for _ in range(2):
        h = cell(normal(2, 3), first)
        cell(normal(2, 3), h)
        cell(normal(2, 3), h)
    attachment.penalty()  # warnings are errors here


# --- no neighbours at all --------------------------------------------------------------------------------------------

ALONE: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "a layer, step by step, detached": (
        lambda: nn.GRU(3, 4),
        lambda m: [m(normal(1, 2, 3), normal(1, 2, 4)) for _ in range(3)],
    ),
    "a cell without its state": (lambda: nn.LSTMCell(3, 4), lambda m: [m(normal(2, 3)) for _ in range(3)]),
    "packed, of one step": (
        lambda: nn.RNN(3, 4),
        lambda m: m(pack_padded_sequence(normal(1, 2, 3), torch.tensor([1, 1]))),
    ),
    "both ways": (lambda: nn.GRU(3, 4, bidirectional=True, batch_first=True), lambda m: m(normal(2, 1, 3))),
}


@pytest.mark.parametrize("name", ALONE)
def test_outputs_without_any_neighbours_are_an_error(name):
    make, run = ALONE[name]
    module = double(make)
    attachment = regkit.attach(module, TAR)
    run(module)
    with pytest.raises(regkit.StepError, match=r"rule 'tar' .*found no two neighbours in time: each call was a single"):
        attachment.penalty()


@pytest.mark.parametrize("name", ALONE)
def test_an_optional_rule_may_find_none(name):
    make, run = ALONE[name]
    module = double(make)
    attachment = regkit.attach(module, {"rules": [{"penalty": "temporal(1)", "optional": True}]})
    run(module)
    assert float(attachment.penalty().detach()) == 0.0


def test_neighbours_that_are_all_padding_are_no_error():
    layer = double(lambda: nn.GRU(3, 4))
    attachment = regkit.attach(layer, TAR)
    with attachment.lengths([1, 1]):
        layer(normal(3, 2, 3))
    assert float(attachment.penalty().detach()) == 0.0
