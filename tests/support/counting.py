"""What cannot be noisy: the operations that run, the bytes of the tensors that they make anew, the functions called."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import regkit_standard
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import regkit


class Counted(TorchDispatchMode):
    """Inside, every operation that is dispatched is counted, those of backward passes too.

    allocated: the bytes of all tensors with memory of their own that operations returned; largest: of the largest one.
    A list operation counts once, as what it does inside does not come by here; nor does what it holds meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.allocated = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        known = {_memory(one) for one in tensors((args, kwargs))}
        for one in tensors(result):
            if _memory(one) not in known:
                known.add(_memory(one))
                size = one.untyped_storage().nbytes()
                self.allocated += size
                self.largest = max(self.largest, size)
        return result


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple, dict)):
        for one in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(one)


OURS = ("<string>", *(str(Path(str(package.__file__)).parent) + os.sep for package in (regkit, regkit_standard)))


def calls(run: Callable[[], Any], files: tuple[str, ...] = OURS) -> int:
    """How many functions of regkit and its standard kinds are called, those of dataclasses and tuples included.

    files: how the names of the files begin in which they are.
    """
    found = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(files)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def prepared(model: nn.Module) -> Optimizer:
    """An optimizer of a model whose gradients are there."""
    optimizer = SGD(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return optimizer


def operations_of_a_step(model: nn.Module) -> int:
    """How many operations a steady step of its optimizer has."""
    optimizer = prepared(model)
    optimizer.step()  # which looks whether the weights are finite
    with Counted() as seen:
        optimizer.step()
    return seen.operations
