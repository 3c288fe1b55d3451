"""The law that kinds and adapters remember nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from regkit.testing.laws import hold


def remembers_nothing(subject: object, contract: type, use: Callable[[], object]) -> None:
    """Raise Broken where using a subject changes an attribute of the subject or of its classes below the contract."""
    before = _memory(subject, contract)
    use()
    after = _memory(subject, contract)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    hold(not changed, f"its functions changed {', '.join(changed)}")


def _memory(subject: object, contract: type) -> dict[str, object]:
    """The attributes of a subject and of its classes below the contract, in a form that can be compared."""
    private: dict[str, Any] = getattr(subject, "__pydantic_private__", None) or {}
    held = {f"self.{name}": _state(value) for name, value in {**vars(subject), **private}.items()}
    for cls in type(subject).__mro__[: type(subject).__mro__.index(contract)]:
        held |= {
            f"{cls.__name__}.{name}": _state(value)
            for name, value in vars(cls).items()
            if not name.startswith(("__", "_abc_"))
        }
    return held


def _state(value: object) -> object:
    info = getattr(value, "cache_info", None)  # of functools.cache, which would also keep every weight alive
    if callable(info):
        return info()
    if isinstance(value, torch.Tensor):
        return (id(value), value._version)
    return (id(value), repr(value))
