"""The ways in which models are copied."""

from __future__ import annotations

import copy
import pickle

from torch import nn
from torch.optim import SGD


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def in_a_list(model: nn.Module) -> nn.Module:
    return copy.deepcopy([nn.Linear(1, 1), model])[1]


def with_an_optimizer(model: nn.Module) -> nn.Module:
    return copy.deepcopy((model, SGD(model.parameters(), lr=0.1)))[0]


def of_a_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(pickled(copy.deepcopy(model)))


WAYS = [copy.deepcopy, pickled, in_a_list, with_an_optimizer, of_a_copy]


def inert_hooks(model: nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._load_state_dict_post_hooks) for one in model.modules())
