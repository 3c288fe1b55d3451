"""Orphaned modules, of a model that is gone: an error where a module outlives the model's rules and is trained on.

A model may be no more than what held its modules for a moment: a list made for `attach`, a wrapper, the model that was
pretrained. The model's end takes the rules along. That must not go unnoticed where the modules are trained on.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from regkit.errors import AttachError
from regkit.runtime.optimizer_hooks import Listener, add_listener, remove_listener


class OrphanedModules(Listener):
    """Modules that rules of a model that is gone were bound to. Sees steps until all of these are gone, too.

    modules: with the modules' names in the model.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._modules = {weakref.ref(module, self._gone): name for name, module in modules}
        if self._modules:
            add_listener(self)

    def _gone(self, reference: weakref.ref[nn.Module]) -> None:
        self._modules.pop(reference, None)
        if not self._modules:
            remove_listener(self)

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any, frame: FrameType) -> None:
        """Raise AttachError where the optimizer trains one of the modules."""
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for reference, name in list(self._modules.items()):
            module = reference()
            if module is not None and any(id(p) in stepped for p in module.parameters()):
                raise AttachError(
                    f"the model that rules were attached to is gone, and the rules with it, but its module {name!r} is "
                    "trained on; attach to a model that you keep, or detach() before you let it go"
                )
