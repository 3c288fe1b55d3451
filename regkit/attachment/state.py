"""The state of an attachment, which a resumed run needs besides the model.

step_count: the number of steps.
stepped: the names of the parameters that optimizers have stepped in the last step, which other optimizers may still
    join.
due: by rule, the weights that wait for a constraint with `every`, since no step has trained them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import nn

from regkit.errors import listing
from regkit.plan.modules import named_modules
from regkit.rules.rule_set import RuleSet
from regkit.runtime.step import StepCount

_VERSION: Final = 2


def read(count: StepCount, rules: RuleSet, model: nn.Module | None) -> dict[str, Any]:
    """The state of an attachment, in values that JSON can hold."""
    stepped = [name for name, parameter in _named(model) if id(parameter) in count.stepped] if count.stepped else []
    due = {rule.binding.key: sorted(block.name for block in rule.due) for rule in rules.constraints if rule.due}
    return {"version": _VERSION, "step_count": count.count, "stepped": stepped, "due": due}


def restore(saved: Mapping[str, Any], count: StepCount, rules: RuleSet, model: nn.Module | None) -> None:
    """Go on from a saved state. Raises ValueError, and changes nothing, for no state or that of another model."""
    if not isinstance(saved, Mapping) or "version" not in saved:
        raise ValueError(f"not a state of an attachment: {saved!r}")
    if saved["version"] != _VERSION:
        raise ValueError(f"state version {saved['version']!r} is unknown; this regkit reads {_VERSION}")
    steps: Any = saved.get("step_count")
    stepped: Any = saved.get("stepped")
    due: Any = saved.get("due")
    fits = type(steps) is int and steps >= 0 and isinstance(stepped, list) and isinstance(due, Mapping)
    if not fits or len(saved) != 4:
        raise ValueError(f"not a state of an attachment: {dict(saved)!r}")
    ids = {name: id(parameter) for name, parameter in _named(model)} if stepped else {}
    blocks = {rule.binding.key: {block.name for block in rule.blocks} for rule in rules.constraints}
    missing = [name for name in stepped if name not in ids]
    missing += [name for key, names in due.items() for name in names if name not in blocks.get(key, ())]
    if missing:
        raise ValueError(f"the state is of another model or document: it is about {listing(missing)}")
    count.restore(steps, (ids[name] for name in stepped))
    for rule in rules.constraints:
        rule.restore(steps, due.get(rule.binding.key, ()))


def _named(model: nn.Module | None) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's parameters, by names that do not change as the model is wrapped."""
    for _, name, module in () if model is None else named_modules(model):
        for own, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{name}.{own}".lstrip("."), parameter
