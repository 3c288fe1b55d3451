"""Live against Keras 3: what its regularizers and constraints do to its layers, regkit does to the same in torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import regkit
from regkit.registry.registry import default

os.environ["KERAS_BACKEND"] = "torch"
os.environ["KERAS_TORCH_DEVICE"] = "cpu"

import keras  # it reads its backend once, as it is imported

pytestmark = pytest.mark.filterwarnings(  # Keras' own, with numpy 2
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)

INPUT, HIDDEN, TIME, BATCH = 5, 4, 6, 3
LAYERS = {"lstm": keras.layers.LSTM, "gru": keras.layers.GRU, "rnn": keras.layers.SimpleRNN}
MODULES: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
ORDER = {"lstm": (0, 1, 2, 3), "gru": (1, 0, 2), "rnn": (0,)}
"""torch's gates, by their place in Keras: LSTM i, f, c, o is i, f, g, o; GRU z, r, h becomes r, z, n."""

each_cell = pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
each_axis = pytest.mark.parametrize(("axis", "per"), [(0, "unit"), (1, "input")])


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def keras_layer(cell: str, two: bool = False, activity_regularizer: Any = None, **options: Any) -> Any:
    """A Keras layer in float64, of one direction or two, with random weights, biases included."""
    layer = LAYERS[cell](HIDDEN, return_sequences=True, dtype="float64", **options)
    layer = keras.layers.Bidirectional(layer, dtype="float64") if two else layer
    for half in (layer.forward_layer, layer.backward_layer) if two else (layer,):
        half.activity_regularizer = activity_regularizer  # SimpleRNN 3.15 takes it as an argument and drops it
    layer.build((BATCH, TIME, INPUT))
    layer.set_weights([random(*w.shape, seed=i) for i, w in enumerate(layer.get_weights())])
    return layer


def torch_rows(cell: str, stacked: np.ndarray) -> torch.Tensor:
    """A Keras weight (..., gates · hidden) as torch has it: (gates · hidden, ...), with the gates in torch's order."""
    gates = np.split(stacked, len(ORDER[cell]), axis=-1)
    return torch.from_numpy(np.concatenate([gates[i] for i in ORDER[cell]], axis=-1).T.copy())


def torch_weights(cell: str, weights: list[np.ndarray], suffix: str = "_l0") -> dict[str, torch.Tensor]:
    """Keras' weights under torch's names. One Keras bias is split into two at random: it is their sum that acts."""
    state = {f"weight_ih{suffix}": torch_rows(cell, weights[0]), f"weight_hh{suffix}": torch_rows(cell, weights[1])}
    if len(weights) == 3:
        bias = torch_rows(cell, weights[2])
        share = torch.from_numpy(random(len(bias), seed=9)) if bias.dim() == 1 else bias[:, 1]
        state[f"bias_ih{suffix}"], state[f"bias_hh{suffix}"] = (bias if bias.dim() == 1 else bias.sum(1)) - share, share
    return state


def torch_module(cell: str, layer: Any) -> nn.RNNBase:
    halves = [layer.forward_layer, layer.backward_layer] if isinstance(layer, keras.layers.Bidirectional) else [layer]
    bias, two = len(halves[0].get_weights()) == 3, len(halves) == 2
    module = MODULES[cell](INPUT, HIDDEN, batch_first=True, bias=bias, bidirectional=two).double()
    state = {}
    for half, suffix in zip(halves, ("_l0", "_l0_reverse"), strict=False):
        state.update(torch_weights(cell, half.get_weights(), suffix))
    module.load_state_dict(state)
    return module


def total_of(layer: Any, x: np.ndarray) -> float:
    """The sum of the losses that Keras collects in one call."""
    layer(torch.from_numpy(x))
    assert layer.losses
    return float(sum(layer.losses).detach())


def close(ours: Any, wanted: Any, rtol: float = 1e-6) -> None:
    """Equal as far as Keras goes: on torch its matmul, maximum and division by the batch compute in float32."""
    arrays = [np.asarray(keras.ops.convert_to_numpy(x), np.float64) for x in (ours, wanted)]
    np.testing.assert_allclose(*arrays, rtol=rtol, atol=rtol)


@pytest.fixture(autouse=True)
def everything_in_float64() -> Iterator[None]:
    """Keras' functions go by `floatx` where they meet a Python number, whatever the dtype of the layer."""
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx(before)


@pytest.fixture
def no_epsilon() -> Iterator[None]:
    """Keras without its epsilon, which shrinks constrained weights."""
    before = keras.config.epsilon()
    keras.config.set_epsilon(1e-15)
    yield
    keras.config.set_epsilon(before)


# --- the order of the gates ------------------------------------------------------------------------------------------


@each_cell
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("two", [False, True])
def test_the_converted_module_gives_the_same_outputs(cell: str, use_bias: bool, two: bool) -> None:
    layer = keras_layer(cell, two, use_bias=use_bias)
    x = torch.from_numpy(random(BATCH, TIME, INPUT))
    close(torch_module(cell, layer)(x)[0].detach(), layer(x).detach(), 1e-5 if cell == "rnn" else 1e-12)


# --- regularizers ----------------------------------------------------------------------------------------------------

REGULARIZERS = [
    (keras.regularizers.L1(0.25), {"kind": "l1", "strength": 0.25}),
    (keras.regularizers.L2(0.125), {"kind": "l2", "strength": 0.125}),
    (keras.regularizers.L1L2(l1=0.25, l2=0.125), {"kind": "l1_l2", "l1": 0.25, "l2": 0.125}),
]
each_regularizer = pytest.mark.parametrize(("theirs", "ours"), REGULARIZERS, ids=["l1", "l2", "l1_l2"])


@each_cell
@each_regularizer
@pytest.mark.parametrize("role", ["kernel", "recurrent", "bias"])
def test_a_weight_regularizer_has_the_value_of_the_same_rule(cell: str, theirs: Any, ours: Any, role: str) -> None:
    layer = keras_layer(cell, **{f"{role}_regularizer": theirs})
    target = {"role": role, "bias": "effective"} if role == "bias" and cell != "gru" else {"role": role}
    module = torch_module(cell, layer)
    with regkit.attach(module, {"rules": [{"name": "it", "target": target, "penalty": ours}]}) as attachment:
        close(attachment.values()["it"], total_of(layer, random(BATCH, TIME, INPUT)), 1e-10)


@each_cell
def test_the_layers_section_means_what_its_names_mean_in_keras(cell: str) -> None:
    theirs = {"kernel_regularizer": {"l1": 0.5, "l2": 0.25}, "recurrent_regularizer": "l2(0.125)"}
    layer = keras_layer(
        cell, kernel_regularizer=keras.regularizers.L1L2(0.5, 0.25), recurrent_regularizer=keras.regularizers.L2(0.125)
    )
    module = nn.ModuleDict({"encoder": torch_module(cell, layer)})
    with regkit.attach(module, {"layers": [{"module": "encoder", **theirs}]}) as attachment:
        close(sum(attachment.values().values()), total_of(layer, random(BATCH, TIME, INPUT)))


@each_cell
@pytest.mark.parametrize(("theirs", "ours"), [("rows", "columns"), ("columns", "rows")])
@pytest.mark.parametrize("role", ["kernel", "recurrent"])
def test_keras_orthogonal_rows_are_the_columns_of_a_torch_weight(cell: str, theirs: str, ours: str, role: str) -> None:
    layer = keras_layer(cell, **{f"{role}_regularizer": keras.regularizers.OrthogonalRegularizer(0.5, theirs)})
    module = torch_module(cell, layer)
    penalty = {"kind": "cosine_orthogonal", "strength": 0.5, "mode": ours}
    with regkit.attach(module, {"rules": [{"target": {"role": role}, "penalty": penalty}]}) as attachment:
        close(attachment.values()["rules/0"], total_of(layer, random(BATCH, TIME, INPUT)))


@each_cell
@each_regularizer
@pytest.mark.parametrize("two", [False, True])
def test_an_activity_regularizer_is_the_activity_penalty_with_reduction_batch(
    cell: str, theirs: Any, ours: Any, two: bool
) -> None:
    layer = keras_layer(cell, two, activity_regularizer=theirs)
    module, x = torch_module(cell, layer), random(BATCH, TIME, INPUT)
    wanted = total_of(layer, x)
    penalty = {**ours, "kind": f"activity_{ours['kind']}", "reduction": "batch"}
    with regkit.attach(module, {"rules": [{"target": {"role": "output"}, "penalty": penalty}]}) as attachment:
        module(torch.from_numpy(x))
        close(attachment.penalty().detach(), wanted)


def test_a_bidirectional_layers_regularizers_act_on_both_directions() -> None:
    layer = keras_layer("lstm", True, recurrent_regularizer=keras.regularizers.L2(0.125))
    module = torch_module("lstm", layer)
    rules = {
        way: {"target": {"role": "recurrent", **({} if way == "both" else {"direction": way})}}
        for way in ("both", "forward", "backward")
    }
    spec = {"rules": [{"name": n, **rule, "penalty": "l2(0.125)"} for n, rule in rules.items()]}
    with regkit.attach(module, spec) as attachment:
        values = attachment.values()
    layer(torch.from_numpy(random(BATCH, TIME, INPUT)))
    close(values["both"], sum(layer.losses))
    close(values["forward"], sum(layer.forward_layer.losses))
    close(values["backward"], sum(layer.backward_layer.losses))


# --- constraints -----------------------------------------------------------------------------------------------------

CONSTRAINTS = {
    "max_norm": (keras.constraints.MaxNorm, {"max_value": 0.75}),
    "unit_norm": (keras.constraints.UnitNorm, {}),
    "min_max_norm": (keras.constraints.MinMaxNorm, {"min_value": 3.25, "max_value": 3.75}),
    "min_max_norm at a rate": (keras.constraints.MinMaxNorm, {"min_value": 3.25, "max_value": 3.75, "rate": 0.25}),
}


@each_cell
@each_axis
@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("role", ["kernel", "recurrent"])
def test_a_norm_constraint_gives_the_same_weights(cell: str, axis: int, per: str, name: str, role: str) -> None:
    theirs, options = CONSTRAINTS[name]
    layer = keras_layer(cell)
    weight, (index, parameter) = layer.get_weights(), {"kernel": (0, "ih"), "recurrent": (1, "hh")}[role]
    module = torch_module(cell, layer)
    before = getattr(module, f"weight_{parameter}_l0").detach().clone()
    constraint = {"kind": name.partition(" ")[0], **options, "per": per}
    with regkit.attach(module, {"rules": [{"target": {"role": role}, "constraint": constraint}]}) as attachment:
        attachment.apply_constraints()
    wanted = keras.ops.convert_to_numpy(theirs(**options, axis=axis)(torch.from_numpy(weight[index])))
    after = getattr(module, f"weight_{parameter}_l0").detach()
    close(after, torch_rows(cell, wanted))
    assert not torch.allclose(after, before, rtol=0, atol=1e-2)


@each_cell
@pytest.mark.parametrize(("role", "parameters"), [("kernel", ["weight_ih_l0"]), ("bias", ["bias_ih_l0", "bias_hh_l0"])])
def test_non_negative_gives_the_same_weights(cell: str, role: str, parameters: list[str]) -> None:
    layer = keras_layer(cell)
    module = torch_module(cell, layer)
    one_bias = role == "bias" and cell != "gru"
    target = {"role": role, "bias": "effective"} if one_bias else {"role": role}
    with regkit.attach(module, {"rules": [{"target": target, "constraint": "non_negative"}]}) as attachment:
        attachment.apply_constraints()
    weight = torch.from_numpy(layer.get_weights()[2 if role == "bias" else 0])
    clipped = keras.ops.convert_to_numpy(keras.constraints.NonNeg()(weight))
    acting = [getattr(module, name).detach() for name in parameters]
    wanted = torch_rows(cell, clipped)
    close(sum(acting) if one_bias else torch.stack(acting, -1).squeeze(-1), wanted)


@each_axis
def test_keras_epsilon_shrinks_weights_inside_the_ball_and_regkit_leaves_them_bit_for_bit(axis: int, per: str) -> None:
    """The one deliberate difference: Keras multiplies by ‖w‖/(ε + ‖w‖): allowed weights decay at each step."""
    kernel = torch.from_numpy(0.05 * random(INPUT, 4 * HIDDEN))
    theirs = keras.constraints.MaxNorm(3.0, axis=axis)(kernel)
    ours = default().kind("max_norm", "constraint")(max_value=3.0, per=per)
    assert torch.equal(ours.project(kernel.T), kernel.T)
    assert (theirs.abs() < kernel.abs()).all()
    norms = torch.linalg.vector_norm(kernel, dim=axis, keepdim=True)
    close(theirs, kernel * norms / (norms + keras.config.epsilon()), 1e-12)


# --- schedules -------------------------------------------------------------------------------------------------------

SCHEDULES = [
    (keras.optimizers.schedules.ExponentialDecay(0.75, 10, 0.5), {"kind": "exponential", "start": 0.75, "decay": 0.5}),
    (keras.optimizers.schedules.CosineDecay(0.75, 10, alpha=0.5), {"kind": "cosine", "start": 0.75, "end": 0.375}),
    (keras.optimizers.schedules.PolynomialDecay(0.75, 10, 0.25), {"kind": "linear", "start": 0.75, "end": 0.25}),
]


@pytest.mark.parametrize(("theirs", "ours"), SCHEDULES, ids=["exponential", "cosine", "linear"])
def test_a_schedule_has_the_factors_of_keras_learning_rate(theirs: Any, ours: dict[str, Any]) -> None:
    schedule: Any = default().kind(ours["kind"], "schedule")(**ours, steps=10)
    close([schedule.factor(step) for step in range(15)], [float(theirs(step)) for step in range(15)])


# --- whole training runs ---------------------------------------------------------------------------------------------


def train_keras(layer: Any, x: np.ndarray, y: np.ndarray, epochs: int) -> None:
    model = keras.Sequential([keras.Input((TIME, INPUT), dtype="float64"), layer])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.5), loss="mse", run_eagerly=True)
    model.fit(x, y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0)


def train_torch(module: nn.RNNBase, spec: dict[str, Any], x: np.ndarray, y: np.ndarray, epochs: int) -> None:
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1, momentum=0.5)
    with regkit.attach(module, spec) as attachment:
        for _ in range(epochs):
            for first in range(0, len(x), BATCH):
                batch, wanted = (torch.from_numpy(a[first : first + BATCH]) for a in (x, y))
                loss = nn.functional.mse_loss(module(batch)[0], wanted) + attachment.penalty()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kernel and recurrent penalties": (
        {"kernel_regularizer": keras.regularizers.L1L2(0.0625, 0.125),
         "recurrent_regularizer": keras.regularizers.L2(0.25)},
        {"kernel_regularizer": {"l1": 0.0625, "l2": 0.125}, "recurrent_regularizer": "l2(0.25)"},
    ),
    "an orthogonal penalty under max norm": (
        {"kernel_regularizer": keras.regularizers.OrthogonalRegularizer(0.5, "columns"),
         "kernel_constraint": keras.constraints.MaxNorm(1.5), "recurrent_constraint": keras.constraints.UnitNorm()},
        {"kernel_regularizer": {"kind": "cosine_orthogonal", "strength": 0.5},
         "kernel_constraint": "max_norm(1.5)", "recurrent_constraint": "unit_norm"},
    ),
    "an activity penalty": (
        {"activity_regularizer": keras.regularizers.L2(0.125),
         "recurrent_constraint": keras.constraints.MaxNorm(1.0, axis=1)},
        {"activity_regularizer": {"kind": "activity_l2", "strength": 0.125, "reduction": "batch"},
         "recurrent_constraint": {"kind": "max_norm", "max_value": 1.0, "per": "input"}},
    ),
    "bias rules": (
        {"bias_regularizer": keras.regularizers.L2(0.5), "bias_constraint": keras.constraints.NonNeg()},
        {"bias_regularizer": "l2(0.5)", "bias_constraint": "non_negative"},
    ),
}  # fmt: skip


@each_cell
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.usefixtures("no_epsilon")
def test_a_whole_training_run_ends_at_the_same_weights(cell: str, run: str) -> None:
    theirs, ours = RUNS[run]
    layer = keras_layer(cell, use_bias="bias" in run, **theirs)
    module = torch_module(cell, layer)
    spec: dict[str, Any] = {"layers": [{"module": "**", **ours}]}
    if "bias" in run and cell != "gru":
        # Keras has one bias. With two, SGD would move the sum twice as far: one of them stands still, at any value.
        module.bias_hh_l0.requires_grad_(False)
        spec = {"rules": [
            {"target": {"role": "bias", "bias": "effective"}, "penalty": ours["bias_regularizer"]},
            {"target": {"role": "bias", "bias": "effective"}, "constraint": ours["bias_constraint"]},
        ]}  # fmt: skip
    x, y = random(4 * BATCH, TIME, INPUT, seed=5), random(4 * BATCH, TIME, HIDDEN, seed=6)
    start = torch_module(cell, layer)
    train_keras(layer, x, y, epochs=3)
    train_torch(module, spec, x, y, epochs=3)
    wanted = torch_module(cell, layer)
    for name, weight in module.state_dict().items():
        if name != "bias_hh_l0" or cell == "gru":
            assert not torch.allclose(weight, start.state_dict()[name], rtol=0, atol=1e-2)
        close(weight, wanted.state_dict()[name])
    if "constraint" in "".join(theirs):
        plain = torch_module(cell, layer)
        with regkit.attach(plain, spec) as attachment:
            assert all(v < 1e-6 for v in attachment.violations().values())
