"""Recurrent modules as they are found in the wild: known by name, parametrized, with weights that are dropped."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import regkit
from regkit import Adapter, Output, Weight
from regkit.activity import of_step
from tests.support.loops import Batches, assert_equal_weights, loss_of
from tests.support.wrapped import HOW, Sinh, effective, with_

# --- adapters by name ------------------------------------------------------------------------------------------------


class Rnn(nn.Module):
    """A cell of somebody's, in a package that its adapter does not import."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Linear(7, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.maps(torch.cat([x, h], 1))) * self.scale


class ByName(Adapter):
    modules: ClassVar[tuple[str, ...]] = (f"{__name__}:Rnn", "a_package_that_is_not_there.cells:Cell")
    roles: ClassVar[tuple[str, ...]] = ("kernel", "recurrent", "bias", "scale", "output")
    steps: ClassVar[bool] = True

    def weights(self, module: nn.Module) -> Iterator[Weight]:
        yield Weight(("maps.weight",), "kernel", columns=(0, 3))
        yield Weight(("maps.weight",), "recurrent", columns=(3, 7))
        yield Weight(("maps.bias",), "bias")
        yield Weight(("scale",), "scale")

    def outputs(self, module: nn.Module) -> Sequence[Output]:
        return [Output("output", sequence=True)]

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Mapping[str, Any]:
        return {"output": result, "before": args[1]}

    def segments(self, module: Any, site: Any, observed: Mapping[str, Any], valid: Any, step: int) -> Sequence[Any]:
        return [of_step(observed["output"], observed["before"], valid, step)]


def plugin() -> types.ModuleType:
    found = types.ModuleType("stranger")
    found.regkit_adapters = regkit.hookimpl(lambda: [ByName()])
    return found


class Looped(nn.Module):
    """The cell in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = Rnn()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, hs = torch.zeros(x.size(1), 4, dtype=x.dtype), []
        for step in x:
            h = self.rnn(step, h)
            hs.append(h)
        return self.head(torch.stack(hs))


def make(model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return model().double()


def train(model: nn.Module, batches: Batches, penalty: Callable[[], Tensor] | None = None, after=None) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        (loss if penalty is None else loss + penalty()).backward()
        optimizer.step()
        if after is not None:
            with torch.no_grad():
                after()


def rule(**rule: Any) -> dict[str, Any]:
    return {"rules": [{"name": "it", **rule}]}


PARAMETRIZED = {
    "what is in it": lambda model: with_(Sinh)(model.rnn.maps, "weight"),
    "itself": lambda model: with_(Sinh)(model.rnn, "scale"),
    "weight_norm": lambda model: parametrizations.weight_norm(model.rnn.maps),
    "orthogonal": lambda model: parametrizations.orthogonal(model.rnn.maps),
    "spectral_norm": lambda model: parametrizations.spectral_norm(model.rnn.maps),
}


@pytest.mark.works_with("Parametrized weights")
@pytest.mark.parametrize("what", PARAMETRIZED)
def test_an_adapter_by_name_knows_a_parametrized_module(what, batches):
    """Parametrizing makes a new class; the one that was named is among its ancestors."""
    bare, by_hand, regularized = (make(Looped) for _ in range(3))
    for model in (bare, by_hand, regularized):
        torch.manual_seed(3)
        PARAMETRIZED[what](model)
    registry = regkit.Registry([plugin()])
    attachment = regkit.attach(
        regularized, rule(target={"role": ["recurrent", "scale"]}, penalty="l2(0.1)"), registry=registry
    )

    def squares(model: nn.Module) -> Tensor:
        maps = (
            effective(model.rnn.maps, "weight")
            if hasattr(model.rnn.maps, "parametrizations")
            else model.rnn.maps.weight
        )
        return 0.1 * (maps[:, 3:].square().sum() + model.rnn.scale.square().sum())

    train(bare, batches)
    train(by_hand, batches, lambda: squares(by_hand))
    train(regularized, batches)
    assert_equal_weights(by_hand, regularized)
    torch.testing.assert_close(attachment.values()["it"], squares(by_hand).detach())
    assert not torch.allclose(bare.rnn.scale, by_hand.rnn.scale, atol=1e-4)


def test_an_adapter_by_name_knows_subclasses_and_copies_of_the_class(batches):
    class Own(Rnn):
        """A user's own."""

    registry = regkit.Registry([plugin()])
    assert isinstance(registry.adapter(Own()), ByName)
    assert registry.adapter(nn.Linear(3, 4)) is None
    model = nn.ModuleDict({"rnn": Own()})
    plan = regkit.resolve(model, rule(target={"role": "kernel"}, penalty="l2(1)"), registry=registry)
    assert plan.rows()[0][2:6] == ("rnn", "maps.weight[:, 0:3]", "kernel", "0")
    assert isinstance(registry.adapter(copy.deepcopy(model).rnn), ByName)


def test_the_adapters_of_ncps_do_not_import_it():
    code = (
        "import sys, torch, regkit; lstm = torch.nn.LSTM(2, 3); regkit.attach(lstm, {'rules': [{'penalty': 'l2(1)'}]});"
        "import regkit_standard.ncps_adapters as cells; assert cells.regkit_adapters();"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'ncps'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- parametrized torch modules --------------------------------------------------------------------------------------

MODULES = {
    "LSTM": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "GRU": lambda: nn.GRU(3, 4),
    "RNN": lambda: nn.RNN(3, 4),
    "LSTMCell": lambda: nn.LSTMCell(3, 4),
    "GRUCell": lambda: nn.GRUCell(3, 4),
    "RNNCell": lambda: nn.RNNCell(3, 4),
}


@pytest.mark.works_with("Parametrized weights")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODULES)
def test_a_class_that_parametrizing_has_made_finds_its_adapter(how, name):
    module, plain = MODULES[name](), MODULES[name]()
    for weight in [at for at, p in plain.named_parameters() if p.dim() == 2]:
        HOW[how](module, weight)
    assert type(module).__name__ == f"Parametrized{name}"
    spec = rule(penalty="l2(1)")
    described = [
        [(s.parameters, s.role, s.layer, s.direction, s.shape, s.module_class) for s in plan.bindings[0].weights]
        for plan in (regkit.resolve(module, spec), regkit.resolve(plain, spec))
    ]
    assert described[0] == described[1]


# --- weight drop -----------------------------------------------------------------------------------------------------


def drop_within(module: nn.Module, names: list[str], p: float) -> nn.Module:
    """As torchnlp does it (torchnlp/nn/weight_drop.py): no wrapper, but a forward() of the instance's own."""
    for name in names:
        weight = getattr(module, name)
        del module._parameters[name]
        module.register_parameter(f"{name}_raw", nn.Parameter(weight))
    forward = module.forward

    def dropping(*args: Any, **kwargs: Any) -> Any:
        for name in names:
            setattr(module, name, F.dropout(getattr(module, f"{name}_raw"), p, module.training))
        return forward(*args, **kwargs)

    module.forward = dropping
    return module


def of_torchnlp(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        room = pytest.importorskip("torchnlp.nn", reason="pytorch-nlp is not installed")
        return getattr(room, f"WeightDrop{name}")(3, 4, num_layers=2, weight_dropout=0.5)

    return make


RAW = ["weight_hh_l0", "weight_hh_l1"]
DROPPING: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: drop_within(nn.LSTM(3, 4, 2), RAW, 0.5),
    "GRU": lambda: drop_within(nn.GRU(3, 4, 2), RAW, 0.5),
    "torchnlp's LSTM": of_torchnlp("LSTM"),
    "torchnlp's GRU": of_torchnlp("GRU"),
}


class Dropping(nn.Module):
    """A layer that drops weights, and a head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rnn = layer
        self.head = nn.Linear(4, 2)

    @property
    def raw(self) -> list[nn.Parameter]:
        return [self.rnn.get_parameter(f"{name}_raw") for name in RAW]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.works_with("Weight-drop wrappers")
@pytest.mark.parametrize("which", DROPPING)
def test_layers_that_drop_their_weights_are_regularized_where_these_are_kept(which, batches):
    bare, by_hand, regularized = (make(lambda: Dropping(DROPPING[which]())) for _ in range(3))
    recurrent = {"target": {"role": "recurrent"}}
    rules = [
        {"name": "l2", **recurrent, "penalty": "l2(0.1)"},
        {"name": "ball", **recurrent, "constraint": "max_norm(0.4)"},
    ]
    plan = regkit.resolve(regularized, {"rules": rules})
    assert [site.parameters for site in plan.bindings[0].weights] == [(name,) for name in RAW]
    attachment = regkit.attach(regularized, plan)

    def project() -> None:
        for raw in by_hand.raw:
            raw.copy_(raw * (0.4 / raw.norm(dim=1, keepdim=True)).clamp(max=1))

    train(bare, batches)
    train(by_hand, batches, lambda: 0.1 * sum(raw.square().sum() for raw in by_hand.raw), project)
    train(regularized, batches)
    assert_equal_weights(by_hand, regularized)
    assert attachment.violations()["ball"] < 1e-9
    assert not torch.allclose(bare.raw[0], by_hand.raw[0], atol=1e-3)


@pytest.mark.works_with("Weight-drop wrappers")
@pytest.mark.parametrize("which", DROPPING)
def test_activity_of_a_layer_that_drops_its_weights_is_recorded_once(which, batches):
    model = make(lambda: Dropping(DROPPING[which]()))
    attachment = regkit.attach(model, {"rules": [{"penalty": "activity_l2(2)"}]})
    h, _ = model.rnn(batches[0][0])
    torch.testing.assert_close(attachment.penalty(), 2 * h.square().mean())


@pytest.mark.works_with("Weight-drop wrappers")
def test_a_wrapper_that_runs_the_layer_through_its_forward_records_nothing_and_that_is_an_error(batches):
    """Salesforce's `WeightDrop` does: hooks are heard of only where a module is called."""

    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.LSTM(3, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.module.forward(x)[0])

    model = make(Through)
    attachment = regkit.attach(model, {"rules": [{"penalty": "activity_l2(2)"}]})
    with pytest.raises(
        regkit.StepError, match=r"on module recorded nothing .*was the module run through its forward\(\)"
    ):
        train(model, batches, attachment.penalty)


@pytest.mark.works_with("Weight-drop wrappers")
def test_torchnlps_wrapper_that_hides_the_layer_is_an_error():
    """`torchnlp.nn.WeightDrop(module)` keeps the module's forward() alone: no parameter of it is the wrapper's."""
    room = pytest.importorskip("torchnlp.nn", reason="pytorch-nlp is not installed")
    wrapper = room.WeightDrop(nn.LSTM(3, 4), ["weight_hh_l0"], 0.5)
    assert not list(wrapper.parameters())
    with pytest.raises(regkit.ResolveError, match=r"the model has no recurrent module\. It has: WeightDrop"):
        regkit.resolve(wrapper, rule(penalty="l2(1)"))
