"""Attaching: a spec's rules put in force on a model, all or none, and on copies of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from regkit.attachment.attachment import Attachment, _attached
from regkit.attachment.copies import companions, compiled_from
from regkit.document.spec import Spec
from regkit.engine import watchdog
from regkit.errors import AttachError, listing
from regkit.plan.plan import Plan, resolve
from regkit.recording.injector import Scale
from regkit.recording.recorder import drop_copied_hooks
from regkit.registry.registry import Registry
from regkit.rules.rule_set import RuleSet
from regkit.runtime.optimizer_hooks import Listener, keep_clear
from regkit.runtime.sharding import reshard


def attach(
    model: nn.Module,
    spec: str | Path | dict[str, Any] | Spec | Plan,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    registry: Registry | None = None,
    loss_scale: Scale | None = None,
) -> Attachment:
    """Put a spec's rules in force on a model: all of them, or, where one fails, none.

    spec: a path, a JSON text, a dict, a Spec, or a Plan that was resolved for this model.
    optimizer: act at the steps of these optimizers alone; left out, of every one that owns the weights.
    loss_scale: for rules via inject, what the loop multiplies its loss by: a number, or a function that is asked.

    Raises SpecError for a bad document, ResolveError where a rule does not fit the model, AttachError where a plan was
    made for another model, a kind acts on the same places already, or a rule acts on no weight of `optimizer`;
    PluginError where a kind returns something else than its contract says.
    """
    plan = spec if isinstance(spec, Plan) else resolve(model, spec, registry=registry)
    if isinstance(spec, Plan):
        plan.check(model)
    only = None if optimizer is None else _optimizers(optimizer)
    attachments(model)
    return _in_force(model, plan, only, loss_scale)


def attachments(model: nn.Module) -> tuple[Attachment, ...]:
    """The attachments in force on this very model, in the order in which they were made.

    A copy of a model (`copy.deepcopy`, pickle, `torch.save`) brings its own: the same plan, from the step count that
    the original had then. This is where to get it, to take `penalty()` from; weights need nothing.
    """
    found: list[Attachment] = []
    for one in compiled_from(model):
        for companion in companions(one):
            if companion.dormant:
                companion.wake()
        found += _attached.get(id(one), ())
    return tuple(found)


def attach_copy(model: nn.Module, plan: Plan, count: int) -> Listener:
    """Put an attachment's plan in force on a copy of its model."""
    plan.check(model)
    attachment = _in_force(model, plan, None, None)
    attachment._steps.count.restore(count, ())
    return attachment._steps


def _in_force(model: nn.Module, plan: Plan, only: list[Optimizer] | None, loss_scale: Scale | None) -> Attachment:
    keep_clear(*_hook_numbers(model))
    drop_copied_hooks(model)
    watchdog.drop_copied_hooks(model)
    reshard(model)
    attachment = Attachment(model, plan, only, loss_scale)
    _refuse_twice(attachment)
    attachment._try()
    if only is not None:
        _refuse_idle(attachment._rules, only)
    attachment._install(model)
    return attachment


def _hook_numbers(model: nn.Module) -> Iterator[int]:
    """The numbers of all hooks on a model: it may have come with them from another process."""
    for module in model.modules():
        for name, held in vars(module).items():
            if isinstance(held, dict) and held and name.endswith("_hooks"):
                yield from (number for number in held if isinstance(number, int))


def _refuse_twice(attachment: Attachment) -> None:
    """Raise AttachError where a kind acts on a place already, through this model or another that has it in it."""
    # A copy, for a model may be collected meanwhile. One whose modules have moved is an error at its own next step.
    others = [other for siblings in list(_attached.values()) for other in siblings if other._engine.moved() is None]
    live = {place: rule for other in others for place, _, rule in other._rules.acts()}
    for place, name, rule in attachment._rules.acts() if live else ():
        if place in live:
            raise AttachError(
                f"rule {rule!r} acts on {name}, where rule {live[place]!r} of another attachment acts already: it "
                "would count twice. detach() that one first (regkit.attachments(model) has it), or put both rules into "
                "one document"
            )


def _optimizers(given: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    found = [given] if isinstance(given, Optimizer) else list(given)
    for one in found:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer= takes torch optimizers, got {type(one).__name__}")
    return found


def _refuse_idle(rules: RuleSet, optimizers: list[Optimizer]) -> None:
    """Raise AttachError for a rule that none of the only optimizers to act at could ever reach."""
    owned = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    for rule in rules.on_weights:
        if rule.blocks and not any(id(p) in owned for p in rule.parameters()):
            names = listing(type(one).__name__ for one in optimizers)
            raise AttachError(f"rule {rule.binding.key!r} acts on no weight that optimizer= ({names}) owns")
