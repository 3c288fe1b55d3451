"""Weights of CfC and LTC of the ncps package, against their own equations and torch's own weight decay."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import regkit
from tests.support.loops import assert_equal_weights

pytest.importorskip("ncps.torch")
# Where the package is absent, there is nothing to import.
from regkit_standard.ncps_adapters import regkit_adapters

from regkit.testing.adapters.laws import check_example
from tests.support.ncps_nets import LAYERS, AutoNCP, Net, make, ncps_torch, rule, sequences, train

pytestmark = pytest.mark.works_with("ncps: CfC and LTC")
each_layer = pytest.mark.parametrize("name", LAYERS)

STRENGTH = 0.05
Pick = Callable[[nn.Module], list[Tensor]]


@pytest.fixture
def xs() -> list[Tensor]:
    return sequences()


def of_linears(linears: list[nn.Linear], columns: slice, masks: list[Tensor | float]) -> list[Tensor]:
    return [(one.weight * mask)[:, columns] for one, mask in zip(linears, masks, strict=True)]


def wired_cells(model: Net) -> list[tuple[nn.Module, int]]:
    """Each layer's cell, and how many inputs it has."""
    cell = model.rnn.rnn_cell
    cells = [cell.layer_0, cell.layer_1, cell.layer_2]
    return list(zip(cells, [3, *cell.layer_sizes], strict=False))


def heads(cell: nn.Module) -> list[nn.Linear]:
    return [cell.ff1, cell.ff2, cell.time_a, cell.time_b]


def masks(cell: nn.Module) -> list[Tensor | float]:
    return [cell.sparsity_mask, cell.sparsity_mask, 1.0, 1.0]


KERNEL: dict[str, Pick] = {
    "backbone": lambda m: [m.rnn.rnn_cell.backbone[0].weight[:, :3]],
    "no backbone": lambda m: of_linears(heads(m.rnn.rnn_cell), slice(3), [1.0] * 4),
    "pure": lambda m: [m.rnn.rnn_cell.backbone[0].weight[:, :3]],
    "no gate": lambda m: of_linears(heads(m.rnn.rnn_cell), slice(3), [1.0] * 4),
    "wired": lambda m: [w for cell, n in wired_cells(m) for w in of_linears(heads(cell), slice(n), masks(cell))],
    "mixed memory": lambda m: [m.rnn.lstm.input_map.weight, m.rnn.rnn_cell.backbone[0].weight[:, :3]],
    "LTC": lambda m: [(softplus(m.rnn.rnn_cell.sensory_w) * m.rnn.rnn_cell.sensory_sparsity_mask).T],
    "LTC explicit": lambda m: [m.rnn.lstm.input_map.weight, m.rnn.rnn_cell.sensory_w.T],
}
RECURRENT: dict[str, Pick] = {
    "backbone": lambda m: [m.rnn.rnn_cell.backbone[0].weight[:, 3:]],
    "no backbone": lambda m: of_linears(heads(m.rnn.rnn_cell), slice(3, None), [1.0] * 4),
    "pure": lambda m: [m.rnn.rnn_cell.backbone[0].weight[:, 3:]],
    "no gate": lambda m: of_linears(heads(m.rnn.rnn_cell), slice(3, None), [1.0] * 4),
    "wired": lambda m: [w for cell, n in wired_cells(m) for w in of_linears(heads(cell), slice(n, None), masks(cell))],
    "mixed memory": lambda m: [m.rnn.lstm.recurrent_map.weight, m.rnn.rnn_cell.backbone[0].weight[:, 3:]],
    "LTC": lambda m: [(softplus(m.rnn.rnn_cell.w) * m.rnn.rnn_cell.sparsity_mask).T],
    "LTC explicit": lambda m: [m.rnn.lstm.recurrent_map.weight, m.rnn.rnn_cell.w.T],
}
ROLES = {"kernel": KERNEL, "recurrent": RECURRENT}


def squares(weights: list[Tensor]) -> Tensor:
    return STRENGTH * sum(w.square().sum() for w in weights)


@each_layer
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("via", ["gradient", "loss"])
def test_l2_of_a_role_is_its_hand_written_loss(name, role, via, xs):
    bare, by_hand, regularized = make(name), make(name), make(name)
    pick = ROLES[role][name]
    spec = rule(target={"role": role}, penalty={"kind": "l2", "strength": STRENGTH}, via=via)
    attachment = regkit.attach(regularized, spec)
    train(bare, xs)
    train(by_hand, xs, lambda model: squares(pick(model)))
    train(regularized, xs, lambda _: attachment.penalty())
    assert_equal_weights(by_hand, regularized)
    torch.testing.assert_close(attachment.values()["it"], squares(pick(by_hand)).detach())
    assert any(not torch.allclose(one, other, atol=1e-4) for one, other in zip(pick(bare), pick(by_hand), strict=True))


@each_layer
def test_l2_of_everything_is_torchs_weight_decay_of_all_that_acts(name, xs):
    """Where a mask takes a weight out, torch decays what does nothing; through a softplus, it decays something else."""
    by_torch, regularized = make(name), make(name)
    regkit.attach(regularized, rule(target={"module": "rnn"}, penalty={"kind": "l2", "strength": STRENGTH}))
    if name == "LTC":
        cell = by_torch.rnn.rnn_cell
        train(by_torch, xs, lambda model: squares(ltc_as_it_acts(cell)))
        train(regularized, xs)
        assert_equal_weights(by_torch, regularized)
        return
    mine = [p for p in by_torch.rnn.parameters() if p.requires_grad]
    groups = [{"params": mine, "weight_decay": 2 * STRENGTH}, {"params": list(by_torch.head.parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.2)
    for x in xs:
        optimizer.zero_grad()
        (by_torch(x) - x.sum(-1, keepdim=True)).square().mean().backward()
        optimizer.step()
    train(regularized, xs)
    start = dict(make(name).named_parameters())
    for (at, theirs), ours in zip(by_torch.named_parameters(), regularized.parameters(), strict=True):
        acts = torch.ones_like(theirs)
        if name == "wired" and at.endswith(("ff1.weight", "ff2.weight")):
            acts = by_torch.get_parameter(at.rpartition("ff")[0] + "sparsity_mask")
            assert bool((acts == 0).any())
        torch.testing.assert_close(ours * acts, theirs * acts)
        assert torch.equal(ours[acts == 0], start[at][acts == 0])


def ltc_as_it_acts(cell: nn.Module) -> list[Tensor]:
    inner, outer = cell.sparsity_mask, cell.sensory_sparsity_mask
    synapses = [softplus(cell.w) * inner, cell.mu * inner, cell.sigma * inner, cell.erev * inner]
    synapses += [softplus(cell.sensory_w) * outer, cell.sensory_mu * outer]
    synapses += [cell.sensory_sigma * outer, cell.sensory_erev * outer]
    neurons = [softplus(cell.gleak), cell.vleak, softplus(cell.cm)]
    return [*synapses, *neurons, cell.input_w, cell.input_b, cell.output_w, cell.output_b]


def held(w: Tensor, bound: float) -> Tensor:
    return w * (bound / w.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)


@pytest.mark.parametrize("name", ["backbone", "no backbone", "pure"])
def test_max_norm_of_the_recurrent_columns_leaves_the_others_alone(name, xs):
    by_hand, regularized = make(name), make(name)
    attachment = regkit.attach(regularized, rule(target={"role": "recurrent"}, constraint="max_norm(0.3)"))

    def project(model: nn.Module) -> None:
        cell = model.rnn.rnn_cell
        for linear in heads(cell) if name == "no backbone" else [cell.backbone[0]]:
            linear.weight[:, 3:].copy_(held(linear.weight[:, 3:], 0.3))

    train(by_hand, xs, after=project)
    train(regularized, xs)
    assert_equal_weights(by_hand, regularized)
    assert attachment.violations()["it"] < 1e-9


def test_max_norm_of_a_wired_layer_counts_what_is_wired(xs):
    by_hand, regularized = make("wired"), make("wired")
    target = {"role": "kernel", "layer": 1, "gate": "ff2"}
    attachment = regkit.attach(regularized, rule(target=target, constraint="max_norm(0.1)"))

    def project(model: nn.Module) -> None:
        cell, n = wired_cells(model)[1]
        wired = cell.sparsity_mask[:, :n]
        kept = cell.ff2.weight[:, :n]
        kept.copy_(torch.where(wired.bool(), held(kept * wired, 0.1), kept))

    train(by_hand, xs, after=project)
    train(regularized, xs)
    assert_equal_weights(by_hand, regularized)
    assert attachment.violations()["it"] < 1e-9
    before, after = (wired_cells(model)[1][0].ff2.weight for model in (make("wired"), regularized))
    out = wired_cells(regularized)[1][0].sparsity_mask == 0
    assert torch.equal(before[out], after[out])


def test_max_norm_of_the_synapses_of_an_ltc_holds_for_the_incoming_weights_of_each_neuron(xs):
    by_hand, regularized = make("LTC"), make("LTC")
    attachment = regkit.attach(regularized, rule(target={"role": "recurrent"}, constraint="max_norm(0.9)"))

    def project(model: nn.Module) -> None:
        cell = model.rnn.rnn_cell
        acting = (softplus(cell.w) * cell.sparsity_mask).T
        point = held(acting, 0.9).T
        moved = (point != acting.T) & cell.sparsity_mask.bool()
        cell.w.copy_(torch.where(moved, torch.log(torch.expm1(point)), cell.w))

    train(by_hand, xs, after=project)
    train(regularized, xs)
    assert_equal_weights(by_hand, regularized)
    assert attachment.violations()["it"] < 1e-9
    assert not torch.equal(by_hand.rnn.rnn_cell.w, make("LTC").rnn.rnn_cell.w)


def test_non_negative_does_what_an_ltc_asks_of_its_loop(xs):
    """Without implicit constraints, a loop has to call `apply_weight_constraints()` after each step."""
    by_hand, regularized = make("LTC explicit"), make("LTC explicit")
    target = {"role": ["kernel", "recurrent", "cm", "gleak"], "module": "rnn"}
    spec = rule(target=target, constraint="non_negative")
    with torch.no_grad():  # the memory cell's weights have these roles too
        for model in (by_hand, regularized):
            for weight in (model.rnn.lstm.input_map.weight, model.rnn.lstm.recurrent_map.weight):
                weight.abs_().requires_grad_(False)
    attachment = regkit.attach(regularized, spec)
    train(by_hand, xs, after=lambda model: model.rnn.rnn_cell.apply_weight_constraints(), lr=2.0)
    train(regularized, xs, lr=2.0)
    assert_equal_weights(by_hand, regularized)
    assert attachment.violations()["it"] == 0
    assert bool((by_hand.rnn.rnn_cell.w == 0).any())


def test_keras_words_reach_one_layer_of_a_model(xs):
    by_hand, regularized = make("backbone"), make("backbone")
    layers = {
        "layers": [
            {
                "module": "rnn",
                "kernel_regularizer": "l2(0.05)",
                "recurrent_constraint": "max_norm(0.3)",
                "activity_regularizer": {"l2": 0.5},
            }
        ]
    }
    attachment = regkit.attach(regularized, layers)

    def project(model: Net) -> None:
        kept = model.rnn.rnn_cell.backbone[0].weight[:, 3:]
        kept.copy_(held(kept, 0.3))

    activity: list[Tensor] = []
    by_hand.rnn.register_forward_hook(lambda module, args, result: activity.append(result[0]))
    train(by_hand, xs, lambda m: squares(KERNEL["backbone"](m)) + 0.5 * activity.pop().square().mean(), project)
    train(regularized, xs, lambda _: attachment.penalty())
    assert_equal_weights(by_hand, regularized)


def test_what_is_inside_a_layer_is_no_place_of_its_own():
    """Its cells are run through their forward(), where no hook hears of them: their outputs would be missed."""
    for name in LAYERS:
        plan = regkit.resolve(make(name), {"rules": [{"penalty": "activity_l2(1)"}, {"penalty": "l2(1)"}]})
        assert {site.name for binding in plan.bindings for site in binding.sites} == {"rnn"}
        with pytest.raises(
            regkit.ResolveError, match=r"'rnn.rnn_cell' is a .*Cell, and a part of rnn.*Available: rnn \("
        ):
            regkit.resolve(make(name), rule(target={"module": "rnn.rnn_cell"}, penalty="l2(1)"))


@pytest.mark.parametrize("name", ["CfCCell", "WiredCfCCell", "LTCCell"])
def test_a_cells_weights_are_those_of_the_layer_around_it(name):
    layer = {
        "CfCCell": lambda: ncps_torch.CfC(3, 4, backbone_units=5),
        "WiredCfCCell": lambda: ncps_torch.CfC(3, AutoNCP(8, 2)),
        "LTCCell": lambda: ncps_torch.LTC(3, AutoNCP(8, 2)),
    }[name]()
    (inside,) = regkit.resolve(layer, {"rules": [{"penalty": "l2(1)"}]}).bindings
    (alone,) = regkit.resolve(layer.rnn_cell, {"rules": [{"penalty": "l2(1)"}]}).bindings
    described = [(s.parameter.replace("rnn_cell.", ""), s.role, s.layer, s.shape) for s in inside.weights]
    assert described == [(s.parameter, s.role, s.layer, s.shape) for s in alone.weights]


@each_layer
def test_a_copy_of_the_model_is_regularized_too(name, xs):
    by_hand, original = make(name), make(name)
    regkit.attach(original, rule(target={"role": "kernel"}, penalty={"kind": "l2", "strength": STRENGTH}))
    copied = copy.deepcopy(original)
    train(by_hand, xs, lambda model: squares(KERNEL[name](model)))
    train(copied, xs)
    assert_equal_weights(by_hand, copied)


def test_gates_in_weights_of_their_own_cannot_be_taken_together():
    with pytest.raises(regkit.ResolveError, match="keeps ff1, ff2 of the kernel in weights of their own"):
        regkit.resolve(make("no backbone"), rule(target={"role": "kernel"}, constraint="max_norm(3, per=cell)"))


EXAMPLES = [(adapter, example) for adapter in regkit_adapters() for example in adapter.examples()]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_adapters_keep_the_laws(number):
    report = check_example(*EXAMPLES[number])
    assert report.passed, report
    assert len(report.results) > 20
