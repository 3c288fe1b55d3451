"""What people write where they have no regkit: terms in the loss, and loops over the weights after the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

Term = Callable[[nn.Module, Sequence[Tensor]], Tensor]
"""What is added to the loss, from the model and the outputs of its layers."""

Loop = Callable[[Sequence[nn.Parameter]], None]
"""What is done to weights after the optimizer's step, without autograd."""

Parametrize = Callable[[nn.Module], None]
"""What makes a cell's recurrent weight a function of another, before training."""

SMALL = 1e-3
"""The strength of every penalty on weights, and the `weight_decay` of optimizers."""

BOUND = 0.05
"""A max-norm that every row violates at the weights that torch starts with."""

# --- terms in the loss -----------------------------------------------------------------------------------------------


def l2_term(model: nn.Module, outputs: Sequence[Tensor]) -> Tensor:
    return SMALL * sum((p.pow(2).sum() for _, p in model.named_parameters()), torch.zeros(()))


def l1_term(model: nn.Module, outputs: Sequence[Tensor]) -> Tensor:
    return SMALL * sum((p.abs().sum() for _, p in model.named_parameters()), torch.zeros(()))


def elastic_term(model: nn.Module, outputs: Sequence[Tensor]) -> Tensor:
    return l1_term(model, outputs) + l2_term(model, outputs)


class _SumOfSquares(torch.autograd.Function):
    """Σw² of all weights as one node of the graph: the best that a term in the loss can be."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return torch.stack(torch._foreach_norm(weights)).square().sum()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, ...]:
        return torch._foreach_mul(ctx.saved_tensors, 2 * slopes[0])


def l2_function(model: nn.Module, outputs: Sequence[Tensor]) -> Tensor:
    value: Tensor = _SumOfSquares.apply(*model.parameters())
    return SMALL * value


def orthogonal_term(model: nn.Module, outputs: Sequence[Tensor]) -> Tensor:
    """Of each gate, over the smaller Gram matrix: what regkit's `orthogonal` optimizes, by autograd."""
    total = torch.zeros(())
    for module in model.modules():
        for p in (one for one in module.parameters(recurse=False) if one.dim() == 2):
            for w in p.split(module.hidden_size):
                gram = w @ w.T if w.size(0) <= w.size(1) else w.T @ w
                total = total + (gram - torch.eye(len(gram))).square().sum()
    return SMALL * total


def ar_term(model: nn.Module, outputs: Sequence[Tensor]) -> Tensor:
    """Activation regularization as in fastai's RNNRegularizer."""
    return 2 * sum((h.float().pow(2).mean() for h in outputs), torch.zeros(()))


def tar_term(model: nn.Module, outputs: Sequence[Tensor]) -> Tensor:
    """Temporal activation regularization, likewise; time comes first here."""
    return sum(((h[1:] - h[:-1]).float().pow(2).mean() for h in outputs), torch.zeros(()))


def ar_tar_term(model: nn.Module, outputs: Sequence[Tensor]) -> Tensor:
    return ar_term(model, outputs) + tar_term(model, outputs)


# --- loops after the step --------------------------------------------------------------------------------------------


def one_addition(weights: Sequence[nn.Parameter]) -> None:
    """L2 in the one operation that regkit makes of it, with nothing around it."""
    gradients = [w.grad for w in weights if w.grad is not None]
    torch._foreach_add_(gradients, weights, alpha=2 * SMALL)


def renorm_loop(weights: Sequence[nn.Parameter]) -> None:
    for w in weights:
        w.renorm_(2, 0, BOUND)


def max_norm_loop(weights: Sequence[nn.Parameter]) -> None:
    for w in weights:
        w.mul_((BOUND / w.norm(dim=1, keepdim=True)).clamp(max=1))


def max_norm_of_keras(weights: Sequence[nn.Parameter]) -> None:
    """The formula of keras.constraints.MaxNorm."""
    for w in weights:
        norms = w.square().sum(dim=1, keepdim=True).sqrt()
        w.copy_(w * (norms.clamp(0, BOUND) / (1e-7 + norms)))


def unit_norm_loop(weights: Sequence[nn.Parameter]) -> None:
    for w in weights:
        w.div_(w.norm(dim=1, keepdim=True))


def non_negative_of_keras(weights: Sequence[nn.Parameter]) -> None:
    """The formula of keras.constraints.NonNeg: a mask, then a product."""
    for w in weights:
        w.copy_(w * (w >= 0).to(w.dtype))


# --- constraints that are parametrizations ---------------------------------------------------------------------------


class _MaxNorm(nn.Module):
    """Rows within the ball, whatever the weight that is trained."""

    def forward(self, w: Tensor) -> Tensor:
        return w * (BOUND / w.norm(dim=1, keepdim=True)).clamp(max=1)


def _cells(net: nn.Module) -> list[nn.RNNCellBase]:
    return [one for one in net.modules() if isinstance(one, nn.RNNCellBase)]


def max_norm_parametrized(net: nn.Module) -> None:
    for cell in _cells(net):
        parametrize.register_parametrization(cell, "weight_hh", _MaxNorm())


def orthogonal_parametrized(net: nn.Module) -> None:
    for cell in _cells(net):
        parametrizations.orthogonal(cell, "weight_hh")


def orthogonal_by_geotorch(net: nn.Module) -> None:
    """Raises ImportError where it is not installed."""
    import geotorch

    for cell in _cells(net):
        geotorch.orthogonal(cell, "weight_hh")
