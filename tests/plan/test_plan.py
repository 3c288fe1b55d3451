"""The sites of a plan are the blocks that torch computes with: shown by computing with them."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import regkit
from regkit import Registry

LSTM = ("input", "forget", "cell", "output")
GRU = ("reset", "update", "new")


def bound(model, target, penalty="l2(1)", **options):
    """The sites of a one-rule document."""
    (binding,) = regkit.resolve(model, {"rules": [{"target": target, "penalty": penalty, **options}]}).bindings
    return binding.weights + binding.outputs


def block(model, site):
    """The rows of a weight site, as numpy."""
    (name,) = site.parameters
    parameter = model.get_submodule(site.path).get_parameter(name)
    rows = parameter[site.start : site.start + site.rows]
    assert tuple(rows.shape) == site.shape
    return rows.detach().numpy()


def named_blocks(model, gates):
    """Every block that the plan tells apart, by layer, direction and role, then gate; biases by their own names."""
    found = {}
    target = {"gate": list(gates)} if gates else {}
    for site in bound(model, target):
        role = site.parameters[0].split("_l")[0] if site.role == "bias" else site.role
        key = (site.layer, site.direction, role, site.gate)
        assert key not in found
        found[key] = block(model, site)
    if getattr(model, "proj_size", 0) and gates:
        for site in bound(model, {"role": "projection"}):
            found[site.layer, site.direction, "projection", None] = block(model, site)
    return found


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def steps(module, blocks, layer, direction, xs):
    """One direction of one layer, by the textbook, from named blocks."""
    gates = sorted({gate for *_, gate in blocks}, key=str)
    get = {key[2:]: value for key, value in blocks.items() if key[:2] == (layer, direction)}
    hidden = module.hidden_size
    h = np.zeros(getattr(module, "proj_size", 0) or hidden)
    c = np.zeros(hidden)
    out = []
    for x in xs if direction == "forward" else xs[::-1]:
        kernel = {g: get["kernel", g] @ x + get.get(("bias_ih", g), 0) for g in gates if ("kernel", g) in get}
        recurrent = {g: get["recurrent", g] @ h + get.get(("bias_hh", g), 0) for g in kernel}
        if "forget" in kernel:
            a = {g: kernel[g] + recurrent[g] for g in kernel}
            c = sigmoid(a["forget"]) * c + sigmoid(a["input"]) * np.tanh(a["cell"])
            h = sigmoid(a["output"]) * np.tanh(c)
            h = get["projection", None] @ h if ("projection", None) in get else h
        elif "new" in kernel:
            z = sigmoid(kernel["update"] + recurrent["update"])
            new = np.tanh(kernel["new"] + sigmoid(kernel["reset"] + recurrent["reset"]) * recurrent["new"])
            h = (1 - z) * new + z * h
        else:
            h = np.tanh(kernel[None] + recurrent[None])
        out.append(h)
    return np.stack(out if direction == "forward" else out[::-1])


def forward(module, blocks, xs):
    for layer in range(getattr(module, "num_layers", 1)):
        directions = ("forward", "backward")[: 1 + getattr(module, "bidirectional", False)]
        xs = np.concatenate([steps(module, blocks, layer, direction, xs) for direction in directions], axis=1)
    return xs


MODULES = [
    (nn.LSTM(3, 4), LSTM),
    (nn.LSTM(3, 4, 2, bidirectional=True), LSTM),
    (nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2, bias=False), LSTM),
    (nn.LSTM(3, 4, 3, proj_size=3), LSTM),
    (nn.GRU(3, 4, 2, bidirectional=True), GRU),
    (nn.GRU(3, 4, bias=False), GRU),
    (nn.RNN(3, 4, 2, bidirectional=True), ()),
    (nn.RNN(3, 4, bias=False), ()),
    (nn.LSTMCell(3, 4), LSTM),
    (nn.LSTMCell(3, 4, bias=False), LSTM),
    (nn.GRUCell(3, 4), GRU),
    (nn.RNNCell(3, 4), ()),
]


@pytest.mark.parametrize(("module", "gates"), MODULES, ids=lambda value: str(value).partition(")")[0])
def test_textbook_formulas_over_the_named_blocks_give_what_torch_computes(module, gates):
    torch.manual_seed(0)
    module = module.double()
    xs = torch.randn(5, 3, dtype=torch.double)
    blocks = named_blocks(module, gates)
    if isinstance(module, nn.RNNBase):
        expected = module(xs)[0]
    else:
        state, outputs = None, []
        for x in xs:
            state = module(x, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        expected = torch.stack(outputs)
    np.testing.assert_allclose(forward(module, blocks, xs.numpy()), expected.detach().numpy(), rtol=0, atol=1e-12)
    assert sum(value.size for value in blocks.values()) == sum(p.numel() for p in module.parameters())


def pre_activations(module, x, h):
    """Each gate's pre-activation (GRU: both halves of it), with the order of torch's documentation."""
    p = {name: value.detach().numpy() for name, value in module.named_parameters()}
    order = {nn.LSTM: "ifgo", nn.LSTMCell: "ifgo", nn.GRU: "rzn", nn.GRUCell: "rzn"}[type(module)]
    suffix = "" if isinstance(module, nn.RNNCellBase) else "_l0"
    halves = (p[f"weight_ih{suffix}"] @ x + p[f"bias_ih{suffix}"], p[f"weight_hh{suffix}"] @ h + p[f"bias_hh{suffix}"])
    return {
        letter: np.stack(rows) for letter, *rows in zip(order, *(np.split(a, len(order)) for a in halves), strict=True)
    }


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("role", ["kernel", "recurrent", "bias"])
def test_changing_the_rows_of_a_gate_changes_the_pre_activation_of_that_gate_alone(make, role):
    x, h = np.array([1.0, -2.0, 3.0]), np.array([0.5, -1.0, 1.5, 2.0])
    names = dict(zip("ifgo", LSTM, strict=True)) if "LSTM" in make.__name__ else dict(zip("rzn", GRU, strict=True))
    for letter, gate in names.items():
        module = make(3, 4).double()
        before = pre_activations(module, x, h)
        sites = bound(module, {"role": role, "gate": letter})
        assert {site.gate for site in sites} == {gate}
        for site in sites:
            with torch.no_grad():
                module.get_parameter(site.parameters[0])[site.start : site.start + site.rows] += 1
        after = pre_activations(module, x, h)
        changed = {one for one in names if not np.array_equal(before[one], after[one])}
        assert changed == {letter}
        assert (before[letter] != after[letter]).any(axis=0).all()  # every unit of the gate


def test_a_role_selects_the_parameters_of_that_role_in_torchs_order():
    module = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    suffixes = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    for role, stems in {
        "kernel": ["weight_ih"],
        "recurrent": ["weight_hh"],
        "projection": ["weight_hr"],
        "bias": ["bias_ih", "bias_hh"],
    }.items():
        names = [site.parameters for site in bound(module, {"role": role})]
        assert names == [(stem + suffix,) for suffix in suffixes for stem in stems]


def test_layers_and_directions_select_theirs():
    module = nn.GRU(3, 4, 3, bidirectional=True)
    for target, names in [
        ({"layer": 1}, ["weight_hh_l1", "weight_hh_l1_reverse"]),
        ({"layer": [0, 2], "direction": "reverse"}, ["weight_hh_l0_reverse", "weight_hh_l2_reverse"]),
        ({"direction": "forward"}, ["weight_hh_l0", "weight_hh_l1", "weight_hh_l2"]),
    ]:
        sites = bound(module, {"role": "recurrent", **target})
        assert [site.parameters[0] for site in sites] == names
        for site in sites:
            assert f"_l{site.layer}" in site.parameters[0]
            assert ("reverse" in site.parameters[0]) == (site.direction == "backward")


def test_a_role_left_open_binds_every_weight_once_and_whole():
    module = nn.LSTM(3, 4, proj_size=2)
    sites = bound(module, {})
    assert [site.parameters[0] for site in sites] == [name for name, _ in module.named_parameters()]
    assert {site.gate for site in sites} == {None}
    assert [site.gates for site in sites] == [4, 4, 4, 4, 1]


def test_a_subclass_is_bound_as_its_ancestor_and_named_by_itself():
    class Mine(nn.GRU):
        pass

    (site,) = bound(Mine(2, 3), {"role": "kernel", "gate": "new"})
    assert (site.module_class, site.start, site.rows, site.shape) == ("Mine", 6, 3, (3, 2))


def test_a_shared_module_is_bound_once_under_its_first_name_and_found_under_each():
    shared = nn.GRU(2, 2)
    model = nn.ModuleDict({"a": nn.ModuleDict({"one": shared}), "b": nn.ModuleDict({"two": shared})})
    assert [site.name for site in bound(model, {"role": "kernel"})] == ["a.one"]
    assert [site.name for site in bound(model, {"role": "kernel", "module": "b.*"})] == ["b.two"]
    assert [site.name for site in bound(model, {"role": "kernel", "module": ["b.two", "a.one"]})] == ["a.one"]


def test_a_module_shared_by_siblings_is_found_under_each_name():
    model = nn.Module()
    model.first = model.second = nn.GRU(2, 2)
    assert [site.name for site in bound(model, {"role": "kernel", "module": "second"})] == ["second"]


def test_sites_are_in_the_order_of_the_model_where_a_module_comes_twice():
    shared = nn.GRU(2, 2)
    model = nn.Sequential(nn.Sequential(shared), nn.LSTM(2, 2), nn.Sequential(shared))
    assert [site.name for site in bound(model, {"role": "kernel"})] == ["0.0", "1"]


def test_a_tied_weight_is_bound_once_but_its_own_in_each_place_otherwise():
    model = nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    places = [(site.name, site.parameters[0]) for site in bound(model, {"role": ["kernel", "recurrent"]})]
    assert places == [("0", "weight_ih_l0"), ("0", "weight_hh_l0"), ("1", "weight_ih_l0")]
    assert len(bound(model, {"role": "recurrent", "gate": ["f", "i"]})) == 2
    assert [site.name for site in bound(model, {"role": "recurrent", "module": "1"})] == ["1"]


def test_a_weight_tied_within_one_module_is_bound_once():
    module = nn.RNN(4, 4)
    module.weight_hh_l0 = module.weight_ih_l0
    assert [site.parameters for site in bound(module, {"role": ["kernel", "recurrent"]})] == [("weight_ih_l0",)]


def test_the_effective_bias_is_the_pair_where_the_sum_acts():
    (site,) = bound(nn.LSTM(3, 4), {"role": "bias", "bias": "effective"})
    assert (site.parameters, site.gate, site.shape) == (("bias_ih_l0", "bias_hh_l0"), None, (16,))
    sites = bound(nn.GRUCell(3, 4), {"role": "bias", "bias": "effective", "gate": ["r", "z"]})
    assert [(s.parameters, s.gate, s.start, s.rows) for s in sites] == [
        (("bias_ih", "bias_hh"), "reset", 0, 4),
        (("bias_ih", "bias_hh"), "update", 4, 4),
    ]
    assert len(bound(nn.RNN(3, 4), {"role": "bias", "bias": "effective"})) == 1


def test_a_kind_for_matrices_binds_matrices_alone_where_the_role_is_open():
    sites = bound(nn.GRU(3, 4), {}, "orthogonal(1)")
    assert {site.parameters[0] for site in sites} == {"weight_ih_l0", "weight_hh_l0"}
    assert [site.gate for site in sites] == [*GRU, *GRU]  # each gate apart, as the kind asks for
    assert [site.gate for site in bound(nn.GRU(3, 4), {}, "orthogonal(1, per=matrix)")] == [None, None]


def test_outputs_have_the_layers_and_directions_that_can_be_seen():
    module = nn.LSTM(3, 4, 2, bidirectional=True)

    def seen(**target):
        return [(site.role, site.layers, site.directions) for site in bound(module, target, "activity_l2(1)")]

    both = ("forward", "backward")
    assert seen() == [("output", (1,), both)]  # not the layer below, whose sequence stays inside
    assert seen(layer=1, direction="backward") == [("output", (1,), ("backward",))]
    assert seen(role="state", layer=0, direction="forward") == [("state", (0,), ("forward",))]
    assert seen(role=["state", "cell"]) == [("state", (0, 1), both), ("cell", (0, 1), both)]
    assert [s.role for s in bound(nn.LSTMCell(2, 2), {"role": ["output", "cell"]}, "temporal(1)")] == ["output", "cell"]


def test_a_rule_keeps_its_way_and_rhythm():
    model = nn.LSTM(3, 4)
    document = {
        "rules": [
            {"name": "a", "penalty": "l1(1)", "via": "proximal", "schedule": "constant(2)"},
            {"constraint": "unit_norm", "every": 5},
            {"penalty": "activity_l2(1)"},
            {"penalty": "l2(1)"},
        ]
    }
    plan = regkit.resolve(model, document)
    assert [(b.key, b.via, b.every) for b in plan.bindings if b.key != "rules/1"] == [
        ("a", "proximal", 1),
        ("rules/2", "loss", 1),
        ("rules/3", "gradient", 1),
    ]
    assert plan.bindings[1].every == 5
    assert plan.bindings[0].schedule.factor(0) == 2


def test_equal_documents_on_equal_models_give_equal_plans():
    rules = [{"target": {"gate": "f"}, "penalty": "l2(1)"}]
    document = {"rules": rules, "layers": [{"kernel_constraint": "max_norm(1)"}]}
    plan = regkit.resolve(nn.LSTM(3, 4), document)
    assert plan == regkit.resolve(nn.LSTM(3, 4), json.dumps(document))
    assert plan == regkit.resolve(nn.LSTM(3, 4), regkit.load(document))
    assert plan == regkit.resolve(nn.LSTM(3, 4), document, registry=Registry())
    assert plan != regkit.resolve(nn.LSTM(3, 5), document)
    assert plan != regkit.resolve(nn.LSTM(3, 4), {"rules": rules})
