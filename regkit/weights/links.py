"""Weak views of a living model: links between its modules, and its parameters at each reading."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

from torch import nn

from regkit.errors import AttachError


class Link:
    """A link from a parent to its module of a name, held weakly, to see whether the module is replaced."""

    def __init__(self, parent: nn.Module, leaf: str, path: str) -> None:
        self.name = path
        self._parent, self._leaf = weakref.ref(parent), leaf
        self._module = weakref.ref(parent.get_submodule(leaf))

    def intact(self) -> bool:
        """Whether the module is still where the link was taken."""
        parent, module = self._parent(), self._module()
        return parent is not None and module is not None and parent._modules.get(self._leaf) is module


def links(model: nn.Module, paths: Iterable[str]) -> list[Link]:
    """Every link from the model down to the modules at these paths, each once."""
    found: dict[str, Link] = {}
    for path in paths:
        parent, above = model, ""
        for leaf in path.split(".") if path else ():
            here = f"{above}.{leaf}".lstrip(".")
            if here not in found:
                found[here] = Link(parent, leaf, here)
            parent, above = parent.get_submodule(leaf), here
    return list(found.values())


def replaced(name: str) -> AttachError:
    """The error that a module is no more in its place in the model."""
    return AttachError(f"the module {name!r} was replaced or removed after attach(); detach(), attach anew")


class Parameters:
    """The parameters of a module and its submodules, read anew at each iteration, without a walk by name.

    The modules are listed once, and held weakly; what parametrizes one may join later.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = [weakref.ref(one) for one in module.modules() if one._parameters]

    def __iter__(self) -> Iterator[nn.Parameter]:
        for reference in self._modules:
            module = reference()
            if module is not None:
                yield from (p for p in module._parameters.values() if p is not None)
                if parametrizations := module._modules.get("parametrizations"):
                    yield from parametrizations.parameters()
