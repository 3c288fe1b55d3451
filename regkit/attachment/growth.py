"""The growth of a model: modules that join after `attach`, which a rule is about and nothing regularizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet

from torch import nn

from regkit.errors import ResolveError, StepError
from regkit.plan.plan import Plan, resolve


class Growth:
    """The check that no module is trained that has joined the model since its plan was made.

    plan: in force on the model; one that was unpickled has no spec, by which a new module could be told.
    bound: gives the modules that rules are bound to, by name.
    """

    def __init__(self, model: nn.Module, plan: Plan, bound: Callable[[], Iterable[tuple[str, nn.Module]]]) -> None:
        self._plan, self._bound, self._known = plan, bound, _anatomy(model)

    def verify(self, model: nn.Module, trained: AbstractSet[int]) -> None:
        """Raise StepError where a rule is about a module that is not bound, and that is trained.

        trained: the ids of all parameters that are.
        """
        anatomy = _anatomy(model)
        if self._plan.spec is None or anatomy == self._known:
            return
        if trained.isdisjoint(map(id, model.parameters())):
            return
        try:
            plan = resolve(model, self._plan.spec, registry=self._plan.registry)
        except ResolveError as error:
            raise StepError(f"the model has changed since attach(): {error}. detach(), attach anew") from error
        bound, modules = {id(module) for _, module in self._bound()}, dict(model.named_modules(remove_duplicate=False))
        places = [(binding.key, site) for binding in plan.bindings for site in binding.sites]
        new = [(key, site) for key, site in places if id(modules[site.path]) not in bound]
        for key, site in new:
            if any(id(p) in trained for p in modules[site.path].parameters()):
                raise StepError(
                    f"the module {site.name!r} was added after attach(), and rule {key!r} is about it: detach(), "
                    "attach anew"
                )
        if not new:
            self._known = anatomy


def _anatomy(model: nn.Module) -> int:
    """A number for the names and classes of all modules, and the names of their parameters."""
    return hash(tuple((name, type(module), *module._parameters) for name, module in model.named_modules()))
