"""Attaching: a spec's rules are put in force on a model, or on a copy of one, all or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from regkit.attachment.attachment import Attachment, _attached
from regkit.attachment.copies import companions, compiled_from
from regkit.attachment.growth import Growth
from regkit.document.spec import Spec
from regkit.errors import AttachError, listing
from regkit.plan.plan import Plan, resolve
from regkit.recording.injector import Scale
from regkit.registry.registry import Registry
from regkit.rules.rule_set import RuleSet
from regkit.runtime.inert_hook import drop_inert_hooks
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
    """Put a spec's rules in force on a model: all, or, where one fails, none.

    spec: a path, a JSON text, a dict, a Spec, or a Plan that was resolved for this model.
    optimizer: act at the steps of these optimizers alone; left out, of every one that owns the weights.
    registry: the kinds and adapters to use; left out, those of the installed plugins.
    loss_scale: for rules via inject, what the loop multiplies its loss by: a number, or a function that is asked.

    Raises SpecError for a bad document, ResolveError where a rule does not fit the model, AttachError where a plan was
    made for another model, a kind acts on the same places already, or a rule acts on frozen weights alone or on none of
    `optimizer`; PluginError where a kind returns something else than its contract says.

    >>> model = nn.GRU(4, 8)
    >>> regkit.attach(model, {"rules": [{"penalty": "l2(0.01)", "target": {"role": "recurrent"}}]})
    <regkit.Attachment of 1 rules, on GRU, step 0>
    """
    plan = spec if isinstance(spec, Plan) else resolve(model, spec, registry=registry)
    if isinstance(spec, Plan):
        plan.check(model)
    only = None if optimizer is None else _optimizers(optimizer)
    attachments(model)
    return _put_in_force(model, plan, only, loss_scale)


def attachments(model: nn.Module) -> tuple[Attachment, ...]:
    """The attachments in force on this very model, in the order of attaching.

    A copy of a model (`copy.deepcopy`, pickle, `torch.save`) brings its own: the same plan, from the step count that
    the original had then. This is where to get it, to take `penalty()` from; weights need nothing.

    >>> import copy
    >>> model = nn.GRU(4, 8)
    >>> attachment = regkit.attach(model, {"rules": [{"penalty": "l2(0.01)"}]})
    >>> regkit.attachments(model) == (attachment,)
    True
    >>> copied = copy.deepcopy(model)
    >>> regkit.attachments(copied)
    (<regkit.Attachment of 1 rules, on GRU, step 0>,)
    """
    found: list[Attachment] = []
    for one in compiled_from(model):
        for companion in companions(one):
            if companion.dormant:
                companion.wake()
        found += (attachment for attachment in list(_attached) if attachment._model() is one)
    return tuple(found)


def attach_copy(model: nn.Module, plan: Plan, count: int, scale: float | None) -> Listener:
    """Put an attachment's plan in force on a copy of the model. Returns the new attachment's listener."""
    plan.check(model)
    tracker = _put_in_force(model, plan, None, scale, copied=True)._tracker
    tracker.count.restore(count, ())
    return tracker


def _put_in_force(
    model: nn.Module,
    plan: Plan,
    only: list[Optimizer] | None,
    loss_scale: Scale | None,
    *,
    copied: bool = False,
) -> Attachment:
    keep_clear(*_hook_numbers(model))
    drop_inert_hooks(model)
    reshard(model)
    attachment = Attachment(model, plan, only, loss_scale)
    growth = Growth(model, plan, attachment._rules.modules)

    def verify(model: nn.Module, trained: AbstractSet[int]) -> None:
        growth.verify(model, trained)
        _refuse_twice(attachment)

    attachment._tracker.changed = verify
    _refuse_twice(attachment)
    if not copied:  # as an average of weights, a copy may well be frozen
        _refuse_frozen(attachment._rules)
    attachment._try_kinds()
    if only is not None:
        _refuse_idle(attachment._rules, only)
    attachment._install(model)
    return attachment


def _hook_numbers(model: nn.Module) -> Iterator[int]:
    """The numbers of all hooks on a model, which may have come with the model from another process."""
    for module in model.modules():
        for name, hooks in vars(module).items():
            if isinstance(hooks, dict) and hooks and name.endswith("_hooks"):
                yield from (number for number in hooks if isinstance(number, int))


def _refuse_twice(attachment: Attachment) -> None:
    """Raise AttachError where a kind acts on a place already, through this model or another that shares the module."""
    # A copy, for a model may be collected meanwhile. One whose modules have moved is an error at its own next step.
    others = [one for one in list(_attached) if one is not attachment and one._engine.moved_module() is None]
    live = {place: rule for other in others for place, _, rule in other._rules.acts()}
    for place, name, rule in attachment._rules.acts() if live else ():
        if place in live:
            raise AttachError(
                f"rule {rule!r} acts on {name}, where rule {live[place]!r} of another attachment acts already: it "
                "would count twice. detach() that one first (regkit.attachments(model) has it), or put both rules into "
                "one document"
            )


def _optimizers(given: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """The optimizers given as one or as several. Raises TypeError for anything else."""
    optimizers = [given] if isinstance(given, Optimizer) else list(given)
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer= takes torch optimizers, got {type(one).__name__}")
    return optimizers


def _refuse_frozen(rules: RuleSet) -> None:
    """Raise AttachError for a rule of which every weight is frozen."""
    for rule in rules.on_weights:
        if rule.blocks and not rule.binding.optional and not rule.moving():
            raise AttachError(
                f"{rule.binding.label} acts on frozen weights alone, and so on nothing "
                f"({listing(block.name for block in rule.blocks)}): unfreeze some (requires_grad_(True)) before attach "
                'or narrow the rule\'s target; a rule with "optional": true may wait until some are unfrozen'
            )


def _refuse_idle(rules: RuleSet, optimizers: list[Optimizer]) -> None:
    """Raise AttachError for a rule on weights of which the only optimizers to act at own none."""
    owned = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    for rule in rules.on_weights:
        if rule.blocks and not any(id(p) in owned for p in rule.parameters()):
            names = listing(type(one).__name__ for one in optimizers)
            raise AttachError(f"rule {rule.binding.key!r} acts on no weight that optimizer= ({names}) owns")
