"""The recurrent modules of a model, under the names that the model's author gave."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from regkit.adapters import Adapter
from regkit.registry.registry import Registry

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


@dataclass(frozen=True)
class RecurrentModule:
    """A recurrent module, under one of its names.

    path: the dotted path in the model. name: the path without wrappers' prefixes; '' is the model itself.
    module_class: the name of the class. parent: the module that holds this one under the first of its names.
    adapter, origin: the adapter of the class, and the plugin that offers the adapter.
    """

    path: str
    name: str
    module: nn.Module
    module_class: str
    adapter: Adapter
    parent: nn.Module | None
    origin: str

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'} ({self.module_class})"


def class_name(module: nn.Module) -> str:
    """The name of the module's class, without the classes of parametrizing and sharding."""
    made = (parametrize.type_before_parametrizations(module), *type(module).__mro__)
    sharding = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if sharding is not None and isinstance(module, sharding):
        made = tuple(cls for cls in made if not issubclass(cls, sharding))
    return made[0].__name__


def named_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Every path, name and module, a shared module under each of its names.

    The parts `_orig_mod` (torch.compile) and `module` (under DistributedDataParallel and DataParallel alone: a model
    may have a child of that name) are left out of names.
    """
    yield from _walk("", "", model, ())


def _walk(
    path: str, name: str, module: nn.Module, above: tuple[nn.Module, ...]
) -> Iterator[tuple[str, str, nn.Module]]:
    yield path, name, module
    for child_name, child in module._modules.items():  # named_children() would give a shared child one name only
        if child is None or any(child is one for one in above):  # a module that contains itself would never end
            continue
        wrapped = child_name == "_orig_mod" or (child_name == "module" and isinstance(module, _WRAPPERS))
        inner = name if wrapped else f"{name}.{child_name}".lstrip(".")
        yield from _walk(f"{path}.{child_name}".lstrip("."), inner, child, (*above, module))


def recurrent_modules(model: nn.Module, registry: Registry) -> list[RecurrentModule]:
    """Every module that an adapter knows and none encloses, under all its names, in the model's order."""
    places: dict[int, list[tuple[str, str]]] = {}
    modules: dict[int, nn.Module] = {}
    by_path: dict[str, nn.Module] = {}
    for path, name, module in named_modules(model):
        places.setdefault(id(module), []).append((path, name))
        modules[id(module)] = by_path[path] = module
    known = {key: adapter for key, module in modules.items() if (adapter := registry.adapter(module)) is not None}
    enclosing = {path for key, adapter in known.items() if adapter.encloses for path, _ in places[key]}
    found: list[RecurrentModule] = []
    for key, adapter in known.items():
        at = [(path, name) for path, name in places[key] if not (enclosing and _inside(path, enclosing))]
        if at:
            first, module = at[0][0], modules[key]
            parent = by_path[first.rpartition(".")[0]] if first else None
            origin, of_class = str(registry.adapter_origin(module)), class_name(module)
            found += [RecurrentModule(path, name, module, of_class, adapter, parent, origin) for path, name in at]
    return found


def _inside(path: str, outer: Collection[str]) -> bool:
    """Whether a dotted path lies within any of the others."""
    while path:
        path = path.rpartition(".")[0]
        if path in outer:
            return True
    return False
