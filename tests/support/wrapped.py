"""Weights that are computed from others, as people compute them: parametrizations, and wrappers that drop weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

Reparametrize = Callable[[nn.Module, str], Any]


class Sinh(nn.Module):
    """A smooth map of the line onto itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sinh()

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.asinh()


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2

    def right_inverse(self, w: Tensor) -> Tensor:
        return w * 2


class Symmetric(nn.Module):
    """The example of torch's own tutorial."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.triu()


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.abs().log()  # abs: registering takes it of weights that are not positive yet


class Product(nn.Module):
    """W = U · V, two tensors of other shapes than W's: `unsafe`."""

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        return u @ v

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([w, torch.ones_like(w)], 1), torch.cat(
            [torch.eye(w.size(1)), torch.zeros(w.size(1), w.size(1))]
        ).to(w)


class Tanh(nn.Module):
    """Without a right_inverse: torch takes the weight for the original."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


class Dropped(nn.Module):
    """Dropout of weights as a parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Counted(nn.Module):
    """Counts how often it is computed."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * x


def with_(*steps: type[nn.Module], unsafe: bool = False) -> Reparametrize:
    def register(module: nn.Module, name: str) -> None:
        for step in steps:
            register_parametrization(module, name, step(), unsafe=unsafe)

    return register


HOW: dict[str, Reparametrize] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of the matrix": lambda module, name: parametrizations.weight_norm(module, name, dim=None),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "orthogonal cayley": lambda module, name: parametrizations.orthogonal(module, name, "cayley"),
    "a user's own": with_(Sinh),
    "a user's own without right_inverse": with_(Tanh),
    "chained": with_(Sinh, Halved),
    "unsafe": with_(Product, unsafe=True),
    "dropout": with_(Dropped),
}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The parametrizations of a module in evaluation mode."""
    module.parametrizations.eval()
    yield
    module.parametrizations.train()


def effective(module: nn.Module, name: str) -> Tensor:
    """The weight that acts in evaluation. Autograd may follow."""
    with evaluating(module):
        return getattr(module, name)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, and the state of the random numbers."""
    return {**copy.deepcopy(model.state_dict()), "random": torch.get_rng_state()}


def assert_bitwise_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class Spoken(nn.Module):
    """A cell called in a loop, and a head."""

    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.rnn = cell(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, hidden = [], None
        for step in x:
            hidden = self.rnn(step, hidden)
            states.append(hidden[0] if isinstance(hidden, tuple) else hidden)
        return self.head(torch.stack(states))


# --- wrappers that drop weights, as they are found in the wild -------------------------------------------------------


class WeightDropout(nn.Module):
    """fastai's (fastai/text/models/awdlstm.py): the raw weight is the wrapper's."""

    def __init__(self, module: nn.Module, weight_p: float, layer_names: tuple[str, ...] = ("weight_hh_l0",)) -> None:
        super().__init__()
        self.module, self.weight_p, self.layer_names = module, weight_p, layer_names
        for layer in self.layer_names:
            w = getattr(self.module, layer)
            delattr(self.module, layer)
            self.register_parameter(f"{layer}_raw", nn.Parameter(w.data))
            setattr(self.module, layer, w.clone())
            if isinstance(self.module, nn.RNNBase):
                self.module.flatten_parameters = self._do_nothing

    def _setweights(self) -> None:
        for layer in self.layer_names:
            raw_w = getattr(self, f"{layer}_raw")
            w = F.dropout(raw_w, p=self.weight_p) if self.training else raw_w.clone()
            setattr(self.module, layer, w)

    def forward(self, *args: Tensor) -> Any:
        self._setweights()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.module(*args)

    def _do_nothing(self) -> None:
        pass


class WeightDrop(nn.Module):
    """Salesforce's (salesforce/awd-lstm-lm, weight_drop.py): the raw weight is the inner module's."""

    def __init__(self, module: nn.Module, weights: list[str], dropout: float = 0, variational: bool = False) -> None:
        super().__init__()
        self.module, self.weights, self.dropout, self.variational = module, weights, dropout, variational
        if issubclass(type(self.module), nn.RNNBase):
            self.module.flatten_parameters = self.widget_demagnetizer_y2k_edition
        for name_w in self.weights:
            w = getattr(self.module, name_w)
            del self.module._parameters[name_w]
            self.module.register_parameter(name_w + "_raw", nn.Parameter(w.data))

    def widget_demagnetizer_y2k_edition(self, *args: object, **kwargs: object) -> None:
        return

    def _setweights(self) -> None:
        for name_w in self.weights:
            raw_w = getattr(self.module, name_w + "_raw")
            if self.variational:
                mask = F.dropout(torch.ones(raw_w.size(0), 1, dtype=raw_w.dtype), p=self.dropout, training=True)
                w = nn.Parameter(mask.expand_as(raw_w) * raw_w)
            else:
                w = F.dropout(raw_w, p=self.dropout, training=self.training)
            setattr(self.module, name_w, w)

    def forward(self, *args: Tensor) -> Any:
        self._setweights()
        return self.module.forward(*args)
