"""Hooks that are inert on a copy of the model: deepcopy and pickle copy a model together with all of its hooks."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from regkit import _pickled


class ModelHook:
    """A hook on a model, of which deepcopy and pickle make an inert one.

    inert: whether the hook is such a copy, which does nothing. handle: torch's, once the hook is on the model.
    """

    word: ClassVar[str]
    """The word that stands for the class in pickles."""

    def __init__(self, inert: bool) -> None:
        self.inert = inert
        self.handle: RemovableHandle | None = None

    def __reduce__(self) -> _pickled.Call:
        return _pickled.call("hook", self.word, -1 if self.handle is None else self.handle.id)

    def remove(self) -> None:
        """Take the hook off the model. May be called again."""
        if self.handle is not None:
            self.handle.remove()


def drop_inert_hooks(model: nn.Module) -> None:
    """Take the inert hooks off a copied model."""
    for module in model.modules():
        tables: tuple[dict[int, Any], ...] = (module._forward_hooks, module._load_state_dict_post_hooks)
        for hooks in tables:
            for number in [number for number, hook in hooks.items() if isinstance(hook, ModelHook) and hook.inert]:
                del hooks[number]
                module._forward_hooks_with_kwargs.pop(number, None)
