"""Laws of an adapter's declarations: well formed, in the common words, and accepted by regkit itself."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from torch import nn

import regkit
from regkit.adapters import OUTPUT_ROLES, WEIGHT_ROLES, Weight
from regkit.plan.declarations import outputs_of, weights_of
from regkit.testing.adapters.case import Case
from regkit.testing.laws import Laws, hold, is_accepted

CONTRACT: Laws[Case] = Laws()

_DIRECTIONS: Final = ("forward", "backward")


@CONTRACT.add()
def modules_name_the_classes(case: Case) -> None:
    """An adapter is found by the class of a module. Give `modules` a tuple of nn.Module classes, or of their names,
    "package.module:Class"; subclasses are included.
    """
    modules: Any = getattr(case.adapter, "modules", None)
    hold(isinstance(modules, tuple) and modules, f"modules is {modules!r}, not a tuple of classes")
    for one in modules:
        known = isinstance(one, str) or (isinstance(one, type) and issubclass(one, nn.Module))
        hold(known, f"modules has {one!r}, which is no class of modules")
    module = case.module()
    ancestors = [f"{cls.__module__}:{cls.__qualname__}" for cls in type(module).__mro__[:-1]]
    found = case.registry.adapter(module) is case.adapter
    hold(found, f"modules is {modules!r}, but the module that was made is of none of them: it is {ancestors[0]}")


@CONTRACT.add()
def weights_are_well_formed(case: Case) -> None:
    """A rule's target chooses weights by role, gate, layer and direction. Give each weight a role of `roles` and gates
    of `gates`, in words that a document can say.
    """
    module = case.module()
    weights = case.weights(module)
    hold(weights, "weights() gives nothing")
    hold(case.weights(module) == weights, "weights() gives something else at its second call")
    is_accepted(weights_of, case.recurrent(module))
    for weight in weights:
        _check_weight(case, weight)


def _check_weight(case: Case, weight: Weight) -> None:
    names, what = weight.parameters, f"the weight {' + '.join(weight.parameters)}"
    hold(len(set(names)) == len(names), f"{what} names one parameter twice")
    _check_role(case, what, weight.role)
    _check_place(what, [weight.layer], [weight.direction])
    hold(len(names) == 2 or not weight.separate, f"{what} is no pair, and has separate {weight.separate}")


def _check_role(case: Case, what: str, role: object) -> None:
    hold(role in case.adapter.roles, f"{what} has the role {role!r}, which `roles` of the adapter does not have")


def _check_place(what: str, layers: Sequence[int], directions: Sequence[str]) -> None:
    for layer in layers:
        hold(layer >= 0, f"{what} has the layer {layer}; layers are counted from 0")
    for direction in directions:
        hold(direction in _DIRECTIONS, f"{what} has the direction {direction!r}, not forward or backward")


@CONTRACT.add()
def outputs_are_well_formed(case: Case) -> None:
    """A rule's target chooses outputs by role, layer and direction. Give each output a role of its own, from `roles`,
    and the layers and directions in it.
    """
    module = case.module()
    outputs = case.outputs(module)
    hold(case.outputs(module) == outputs, "outputs() gives something else at its second call")
    is_accepted(outputs_of, case.recurrent(module))
    for output in outputs:
        what = f"the output {output.role!r}"
        _check_role(case, what, output.role)
        hold(output.layers and output.directions, f"{what} has no layer, or no direction")
        _check_place(what, output.layers, output.directions)
    roles = [output.role for output in outputs]
    hold(len(set(roles)) == len(roles), f"outputs() gives one role twice: {roles}")
    both = {weight.role for weight in case.weights(module)} & {*roles, *OUTPUT_ROLES}
    hold(not both, f"the roles {sorted(both)} are of weights, and of outputs too: no rule could reach both")


@CONTRACT.add()
def roles_are_spelt_as_everywhere(case: Case) -> None:
    """A document that says "recurrent" must find recurrent weights in every model. Use the common roles for all that
    they name; new names are for what has none.
    """
    common = (*WEIGHT_ROLES, *OUTPUT_ROLES)
    for role in case.adapter.roles:
        near = [] if role in common else difflib.get_close_matches(role, common, n=1, cutoff=0.8)
        hold(not near, f"roles has {role!r}; did you mean {near[0] if near else ''!r}?")


@CONTRACT.add()
def regkit_can_bind_every_weight(case: Case) -> None:
    """A parameter that is named must be there, with rows that divide into the gates. Name parameters as the module
    does, and the gates that are stacked in their rows, in their order.
    """
    module = case.module()
    effective = any(len(weight.parameters) == 2 for weight in case.weights(module))
    roles = list(dict.fromkeys(weight.role for weight in case.weights(module)))  # a law of its own finds the others
    rules: list[dict[str, Any]] = [{"target": {"role": roles} if roles else {}, "penalty": "mark(1)"}]
    if effective and not any(weight.separate for weight in case.weights(module)):
        rules.append({"target": {"role": "bias", "bias": "effective"}, "penalty": "mark(1)"})
    is_accepted(partial(regkit.resolve, registry=case.registry), module, {"rules": rules})
    is_accepted(lambda: case.blocks)  # each weight, whole and gate by gate
