"""What would wait for a device, seen on devices that hold no numbers.

On the meta device whatever asks for a number fails, and so does a copy to the CPU. What is copied the other way, and
waited for, is seen by a mode. Weights on another device than the CPU take the ways that those on a GPU take.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

# --- copies to a device ----------------------------------------------------------------------------------------------

_MAKERS = ((torch, "tensor"), (torch, "as_tensor"), (torch, "asarray"), (Tensor, "new_tensor"))


@contextmanager
def _made(seen: list[str]) -> Iterator[None]:
    """Inside, tensors made of numbers on another device join the list: torch hides that from dispatch modes."""

    def noting(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = make(*args, **kwargs)
            if result.device.type != "cpu" and not isinstance(args[0], Tensor):
                seen.append(make.__name__)
            return result

        return made

    with ExitStack() as stack:
        for owner, name in _MAKERS:
            stack.enter_context(patch.object(owner, name, noting(getattr(owner, name))))
        yield


class _Copied(TorchDispatchMode):
    """Copies from one device to another that are waited for."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            waits = not ((kwargs or {}).get("non_blocking") or args[2:3] == (True,))
            if source.device != result.device and waits:
                self.seen.append(f"{name} from {source.device.type} to {result.device.type}")
        return result


@contextmanager
def copies() -> Iterator[list[str]]:
    """Inside, the copies between devices that are waited for join the list."""
    seen: list[str] = []
    with _made(seen), _Copied(seen):
        yield seen


# --- weights that are nowhere ----------------------------------------------------------------------------------------


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Give the model fake parameters in the place of its own, on a device that is neither the CPU nor meta."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                bare = torch.empty_like(parameter, device="meta", requires_grad=False)
                setattr(module, name, nn.Parameter(FakeTensor(mode, bare, torch.device("lazy"))))


@contextmanager
def answers() -> Iterator[Callable[[], list[str]]]:
    """Inside, whoever asks for numbers is told that all is well; returns which rooms have asked since the last time."""
    asked: list[str] = []

    def ask(*given: Any) -> bool:
        asked.append(sys._getframe(1).f_globals["__name__"].removeprefix("regkit."))
        # These ask whether infinity was found, whether rates differ.
        return asked[-1] not in ("engine.tracker", "rules.penalty_rule")

    def taken() -> list[str]:
        found = list(asked)
        asked.clear()
        return found

    with patch.object(torch, "equal", ask), patch.object(Tensor, "__bool__", ask):
        yield taken
