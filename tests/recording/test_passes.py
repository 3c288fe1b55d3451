"""Rules via inject where backward passes come in another order than forward passes."""

from __future__ import annotations

import torch
from torch import nn

import regkit


def test_a_pass_keeps_its_part_while_a_later_one_is_computed():
    gradients = []
    for late in (False, True):
        torch.manual_seed(0)
        model = nn.RNN(3, 4).double()
        attachment = regkit.attach(model, {"rules": [{"penalty": "activity_l2(1)", "via": "inject"}]}, loss_scale=1.0)
        first, second, third = (torch.full((2, 1, 3), float(n), dtype=torch.float64) for n in range(3))
        one, two = model(first)[0], model(second)[0]
        one.sum().backward()
        if not late:
            two.sum().backward()
        model(third)[0].sum().backward()
        if late:
            two.sum().backward()
        gradients.append(model.weight_ih_l0.grad)
        attachment.detach()
    torch.testing.assert_close(*gradients)
