"""Recurrent modules and loops over them in every form, and the gradients of their activity penalties."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import regkit
from regkit.rules import activity_rule

T = TypeVar("T")

KINDS = ["activity_l1", "activity_l2", {"kind": "activity_l1_l2", "l1": 0.3, "l2": 0.2}, "temporal", "norm_stabilizer"]


def document(kinds: list[Any], reduction: str = "mean", role: str = "output") -> dict[str, Any]:
    rules = []
    for number, kind in enumerate(kinds):
        options = {"kind": kind} if isinstance(kind, str) else kind
        penalty = {**options, "strength": 0.5 + number, "reduction": reduction}
        rules.append({"name": str(number), "target": {"role": role}, "penalty": penalty})
    return {"rules": rules}


Loop = Callable[[nn.Module, regkit.Attachment, Tensor], Tensor]


def whole(model: nn.Module, _: regkit.Attachment, x: Tensor) -> Tensor:
    return model(x)[0].sum()


def padded(model: nn.Module, attachment: regkit.Attachment, x: Tensor) -> Tensor:
    with attachment.lengths([5, 2, 4, 3]):
        return model(x)[0].square().sum()


def with_a_mask(model: nn.Module, attachment: regkit.Attachment, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[2, 1] = mask[3, 3] = mask[0, 0] = False
    with attachment.mask(mask):
        return model(x)[0].square().sum()


def packed(model: nn.Module, _: regkit.Attachment, x: Tensor) -> Tensor:
    lengths = [5, 2, 4, 1]
    return model(pack_padded_sequence(x, lengths, model.batch_first, enforce_sorted=False))[0].data.square().sum()


def unbatched(model: nn.Module, _: regkit.Attachment, x: Tensor) -> Tensor:
    return model(x[0] if model.batch_first else x[:, 0])[0].sum()


def two_calls(model: nn.Module, _: regkit.Attachment, x: Tensor) -> Tensor:
    first, state = model(x[:3])
    return model(x[3:], state)[0].sum() + first.sum()


def cell(model: nn.Module, attachment: regkit.Attachment, x: Tensor) -> Tensor:
    state: Any = None
    with attachment.lengths([5, 2, 4, 3]):
        for step in x:
            state = model(step, state)
    return (state[0] if isinstance(state, tuple) else state).sum()


def cell_of_one_sequence(model: nn.Module, _: regkit.Attachment, x: Tensor) -> Tensor:
    state: Any = None
    for step in x[:, 0]:
        state = model(step, state)
    return (state[0] if isinstance(state, tuple) else state).sum()


def cell_that_branches(model: nn.Module, _: regkit.Attachment, x: Tensor) -> Tensor:
    """Several calls go on from one state, which begins as a function of the input."""
    state = model(x[0], x[0, :, :1].expand(-1, 4) * 2)
    return torch.stack([model(step, state) for step in x[1:]]).sum()


FORMS = [
    *((nn.LSTM, options, loop) for options in ({}, {"bidirectional": True}) for loop in (whole, padded, packed)),
    (nn.GRU, {"bidirectional": True}, with_a_mask),
    (nn.GRU, {"bidirectional": True, "batch_first": True}, padded),
    (nn.RNN, {"bidirectional": True, "batch_first": True}, unbatched),
    (nn.LSTM, {"batch_first": True, "proj_size": 2}, padded),
    (nn.LSTM, {"num_layers": 2, "batch_first": True}, packed),
    (nn.GRU, {}, two_calls),
    *((layer, {}, cell) for layer in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)),
    (nn.LSTMCell, {}, cell_of_one_sequence),
    (nn.GRUCell, {}, cell_that_branches),
]
EVERY_FORM = pytest.mark.parametrize(
    ("layer", "options", "loop"),
    FORMS,
    ids=[f"{layer.__name__}-{'-'.join(options)}-{loop.__name__}" for layer, options, loop in FORMS],
)


def make(layer: type[nn.Module], **options: Any) -> tuple[nn.Module, Tensor]:
    """A module of 3 inputs and 4 units, and 4 sequences of 5 steps for it."""
    torch.manual_seed(1)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    return layer(3, 4, **options).double(), x.transpose(0, 1) if options.get("batch_first") else x


def by_autograd(function: Callable[[], T]) -> T:
    """What a function returns with all penalties left to autograd."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activity_rule, "only_backward", lambda: False)
        return function()


def gradients(model: nn.Module, spec: dict[str, Any], loop: Loop, x: Tensor, twice: bool = False) -> list[Tensor]:
    """Of the loss and the penalty, by the weights and by x; twice: of the norm of those."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    with regkit.attach(model, spec) as attachment:
        loss = 0.1 * loop(model, attachment, x) + 3.0 * attachment.penalty()
    wanted = [x, *model.parameters()]
    found = torch.autograd.grad(loss, wanted, create_graph=twice)
    if twice:
        found = torch.autograd.grad(sum(one.square().sum() for one in found), wanted, allow_unused=True)
    return [torch.zeros(()) if one is None else one for one in found]


def same(ours: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
