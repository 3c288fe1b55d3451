"""The attachment: a plan's hooks on a model, from attach to detach.

It holds the model weakly and adds nothing to it but forward hooks where activity rules need them. Weight rules act from
torch's global optimizer hooks, which go when the model goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from regkit.activity import Lengths, Mask, Validity, at_least_float32
from regkit.errors import AttachError, RegkitError, StepError
from regkit.kinds import ActivityPenalty, Penalty
from regkit.plan import Plan, resolve
from regkit.records import ActivityRule, Ledger, Recorder, Ticket
from regkit.registry import Registry, default
from regkit.sites import OutputSite, WeightSite
from regkit.spec import Spec
from regkit.steps import Step, StepHooks
from regkit.weights import Block, ConstraintRule, PenaltyRule

_STATE_VERSION: Final = 1

_attached: dict[int, list[Attachment]] = {}
"""The attachments of each living model, by its id; a model need not be hashable."""


class Attachment:
    """Rules in force on a model. Made by `attach`; leaves with `detach`, or as a context manager, or with the model."""

    def __init__(
        self, model: nn.Module, plan: Plan, registry: Registry, optimizers: Iterable[Optimizer] | None
    ) -> None:
        self.plan = plan
        self._model = weakref.ref(model)
        self._live = False
        modules = dict(model.named_modules(remove_duplicate=False))
        self._recorders = _recorders(plan, modules, registry)
        self._penalties: list[PenaltyRule] = []
        self._constraints: list[ConstraintRule] = []
        self._activities: list[ActivityRule] = []
        for binding in plan.bindings:
            if isinstance(binding.kind, ActivityPenalty):
                places = [(site, self._recorders[id(modules[site.path])]) for site in binding.outputs]
                self._activities.append(ActivityRule(binding, places))
                continue
            layout = binding.kind.layout
            blocks = [Block(site, modules[site.path], layout) for site in binding.weights]
            if isinstance(binding.kind, Penalty):
                self._penalties.append(PenaltyRule(binding, blocks))
            else:
                self._constraints.append(ConstraintRule(binding, blocks))
        self._in_loss = [rule for rule in self._penalties if rule.binding.via == "loss"]
        self._ledgers = {rule.binding.key: Ledger() for rule in self._in_loss}
        self._hooks = StepHooks(_Work(self), optimizers)

    # --- lifecycle ---------------------------------------------------------------------------------------------------

    def _install(self, model: nn.Module) -> None:
        try:
            for recorder in self._recorders.values():
                recorder.install()
            self._hooks.install()
        except BaseException:
            self._remove()
            raise
        self._live = True
        siblings = _attached.setdefault(id(model), [])
        if not siblings:
            # The model's end takes the global hooks along; the attachment itself never keeps the model alive.
            weakref.finalize(model, _forget, id(model)).atexit = False
        siblings.append(self)

    def _remove(self) -> None:
        self._hooks.remove()
        for recorder in self._recorders.values():
            recorder.remove()
        self._live = False

    def detach(self) -> None:
        """Take every hook off the model. May be called again; afterwards the attachment can only be read."""
        self._remove()
        for siblings in _attached.values():
            if self in siblings:
                siblings.remove(self)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        model = self._model()
        state = "detached" if not self._live else f"on {type(model).__name__}, step {self.step_count}"
        return f"<regkit.Attachment of {len(self.plan.bindings)} rules, {state}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise RegkitError("an attachment cannot be copied or pickled; save attachment.state_dict() and attach anew")

    # --- the loss ----------------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """Σ strength · factor · penalty of all that goes through the loss: activity rules, and weight rules via loss.

        Consumes the activity recorded since the last call. The result, in float32 or better, belongs to the loss once:
        `loss = criterion(...) + attachment.penalty()`. Zero where no rule goes through the loss.  -> ()

        Raises RegkitError after detach.
        """
        if not self._live:
            raise RegkitError("the attachment is detached: there is nothing to add to the loss")
        index, ticket = self.step_count, Ticket()
        terms: list[Tensor] = []
        with self._no_autocast():
            for rule in self._activities:
                value = rule.value(index)
                if value is not None:
                    rule.last = value.detach()
                    terms.append(value)
            for weight_rule in self._in_loss:
                weight_value = weight_rule.value(index)
                if weight_value is not None:
                    terms.append(weight_value)
        self._hand_out(ticket)
        total = self._total(terms)
        if total.requires_grad:
            total.register_hook(ticket)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return total

    def _hand_out(self, ticket: Ticket) -> None:
        for recorder in self._recorders.values():
            if recorder.records:
                recorder.ledger.tickets.append(ticket)
                recorder.records.clear()
        for ledger in self._ledgers.values():
            ledger.tickets.append(ticket)

    def _total(self, terms: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=self._device())
        for term in terms:
            total = total + at_least_float32(term).to(total.device)
        return total

    def _device(self) -> torch.device:
        model = self._model()
        first = None if model is None else next(model.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def _no_autocast(self) -> torch.autocast:
        # Penalties are sums of many small numbers: they are taken in float32 whatever the forward pass ran in.
        return torch.autocast(self._device().type, enabled=False)

    @contextmanager
    def lengths(self, lengths: Tensor | Sequence[int]) -> Iterator[None]:
        """Inside, padded outputs count up to these lengths.  lengths: (batch,), whole numbers ≥ 0.

        For a loop over a cell, the context stands around the whole loop: its n-th call is time n. Packed sequences know
        their lengths and need no context.
        """
        values = torch.as_tensor(lengths)
        if values.dim() > 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"lengths are whole numbers (batch,), got {values.dtype} {tuple(values.shape)}")
        if values.numel() == 0 or (values.device.type == "cpu" and int(values.min()) < 0):
            raise ValueError(f"lengths are whole numbers ≥ 0, one for each sequence, got {values.tolist()}")
        with self._validity(Lengths(values.reshape(-1))):
            yield

    @contextmanager
    def mask(self, mask: Tensor) -> Iterator[None]:
        """Inside, padded outputs count where the mask is true.

        mask: bool, laid out as the output without its features: (time, batch), or (batch, time) with batch_first, or
        (time,) unbatched; (batch,) around one call of a cell.
        """
        if mask.dtype != torch.bool:
            raise ValueError(f"a mask is a bool tensor, got {mask.dtype}")
        with self._validity(Mask(mask)):
            yield

    @contextmanager
    def _validity(self, validity: Validity) -> Iterator[None]:
        before = {recorder: recorder.validity for recorder in self._recorders.values()}
        for recorder in before:
            recorder.validity = validity
        try:
            yield
        finally:
            for recorder, earlier in before.items():
                recorder.validity = earlier

    # --- what is optimized -------------------------------------------------------------------------------------------

    @property
    def step_count(self) -> int:
        """Optimizer steps taken since attach, or since the state that was loaded."""
        return self._hooks.count.count

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """For each penalty rule, strength · factor · penalty as optimized now, detached.  -> () each.

        An activity rule gives what is in store, or else what `penalty()` last took; NaN before there was any. Frozen
        weights are not counted: nothing optimizes them.
        """
        with self._no_autocast():
            values: dict[str, Tensor | None] = {r.binding.key: r.value(self.step_count) for r in self._penalties}
            for rule in self._activities:
                value = rule.value(self.step_count)
                missing = torch.full((), torch.nan, device=self._device()) if rule.last is None else rule.last
                values[rule.binding.key] = missing if value is None else value
        zero = torch.zeros((), device=self._device())
        order = (b.key for b in self.plan.bindings if b.key in values)
        return {key: zero if (value := values[key]) is None else value.detach() for key in order}

    @torch.no_grad()
    def violations(self) -> dict[str, Tensor]:
        """For each constraint rule, how far its worst weight is outside, in the unit of its bound.  -> () each."""
        zero = torch.zeros((), device=self._device())
        return {r.binding.key: r.violation(self.step_count) if r.blocks else zero for r in self._constraints}

    @torch.no_grad()
    def apply_constraints(self) -> None:
        """Project every constrained weight now, frozen ones excepted: say, before the first step."""
        for rule in self._constraints:
            rule.project_all(self.step_count)

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model: the step count."""
        return {"version": _STATE_VERSION, "step_count": self.step_count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Raises ValueError for anything that `state_dict` does not return."""
        count = state.get("step_count")
        if set(state) != {"version", "step_count"} or type(count) is not int or count < 0:
            raise ValueError(f"not a state of an attachment: {dict(state)!r}")
        if state["version"] != _STATE_VERSION:
            raise ValueError(f"state version {state['version']!r} is unknown; this regkit reads {_STATE_VERSION}")
        self._hooks.count.restore(count)


class _Work:
    """What an attachment does at each step that is its own."""

    def __init__(self, attachment: Attachment) -> None:
        self._of = attachment

    def parameters(self) -> Iterator[Tensor]:
        rules = chain(self._of._penalties, self._of._constraints)
        yield from chain.from_iterable(rule.parameters() for rule in rules)
        model = self._of._model()
        if self._of._activities and model is not None:
            yield from model.parameters()

    def at_gradients(self, step: Step) -> None:
        self._check(step)
        for rule in self._of._penalties:
            match rule.binding.via:
                case "gradient":
                    rule.add_gradient(step)
                case "decoupled" if any(rule._trained(step)):
                    rule.decay(step)

    def value(self, step: Step) -> Tensor:
        rules = (rule for rule in self._of._penalties if rule.binding.via == "gradient")
        return self._of._total([value for rule in rules if (value := rule.trained_value(step)) is not None])

    def after(self, step: Step) -> None:
        for rule in self._of._penalties:
            if rule.binding.via == "proximal":
                rule.shrink(step)
        for constraint_rule in self._of._constraints:
            if (step.index + 1) % constraint_rule.binding.every == 0:
                constraint_rule.project(step)
        for recorder in self._of._recorders.values():
            if recorder.is_trained(step):
                recorder.ledger.tickets.clear()
        for rule in self._of._in_loss:
            if any(id(p) in step.trained for p in rule.parameters()):
                self._of._ledgers[rule.binding.key].tickets.clear()

    def _check(self, step: Step) -> None:
        """Raise StepError where something would not be optimized as the document says, before anything is changed."""
        for activity_rule in self._of._activities:
            activity_rule.check(step)
        for rule in self._of._in_loss:
            if any(id(p) in step.trained for p in rule.parameters()):
                self._of._ledgers[rule.binding.key].require(
                    f"rule {rule.binding.key!r} ({rule.binding.kind.describe()})"
                )
        for rule in self._of._penalties:
            if rule.binding.via not in ("proximal", "decoupled") or not any(rule._trained(step)):
                continue
            if isinstance(step.optimizer, LBFGS) or step.evaluations > 1:
                raise StepError(
                    f"rule {rule.binding.key!r} is {rule.binding.via}, which goes with one gradient step; "
                    f"{type(step.optimizer).__name__} evaluates its closure several times. Use via gradient"
                )


def _recorders(plan: Plan, modules: Mapping[str, nn.Module], registry: Registry) -> dict[int, Recorder]:
    """One recorder for each module that an activity rule binds, by the module's id."""
    found: dict[int, Recorder] = {}
    for site in chain.from_iterable(binding.outputs for binding in plan.bindings):
        module = modules[site.path]
        if id(module) not in found:
            found[id(module)] = Recorder(module, registry.adapter(module), site.name)
    return found


def _forget(model_id: int) -> None:
    for attachment in _attached.pop(model_id, []):
        attachment._remove()


def attach(
    model: nn.Module,
    spec: str | Path | dict[str, Any] | Spec | Plan,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    registry: Registry | None = None,
) -> Attachment:
    """Put a spec's rules in force on a model: all of them, or, where one fails, none.

    spec: a path, a JSON text, a dict, a Spec, or a Plan that was resolved for this model.
    optimizer: act at the steps of these optimizers alone; left out, of every one that owns the weights.

    Raises SpecError for a bad document, ResolveError where a rule does not fit the model, AttachError where a plan was
    made for another model or the same rules are attached already.
    """
    registry = registry or default()
    plan = spec if isinstance(spec, Plan) else resolve(model, spec, registry=registry)
    if isinstance(spec, Plan):
        _refuse_foreign(plan, model)
    if any(other.plan == plan for other in _attached.get(id(model), [])):
        raise AttachError("these rules are attached to this model already; detach() first, or they would count twice")
    only = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    attachment = Attachment(model, plan, registry, only)
    attachment._install(model)
    return attachment


def _refuse_foreign(plan: Plan, model: nn.Module) -> None:
    """Raise AttachError unless every site of the plan is on the model, of its class and shape."""
    modules = dict(model.named_modules(remove_duplicate=False))
    sites: Callable[[Any], Iterable[WeightSite | OutputSite]] = lambda b: (*b.weights, *b.outputs)  # noqa: E731
    for site in chain.from_iterable(map(sites, plan.bindings)):
        module = modules.get(site.path)
        if module is None or type(module).__name__ != site.module_class:
            has = "nothing" if module is None else type(module).__name__
            raise AttachError(
                f"the plan is of another model: {site.path!r} is {has} here, {site.module_class} in the plan"
            )
        if isinstance(site, WeightSite):
            _refuse_other_shape(site, module)


def _refuse_other_shape(site: WeightSite, module: nn.Module) -> None:
    for name in site.parameters:
        parameter = module._parameters.get(name)
        here = None if parameter is None else tuple(parameter.shape)
        if here is None or here[1:] != site.shape[1:] or here[0] < site.start + site.rows:
            raise AttachError(
                f"the plan is of another model: {site.path}.{name} is {here} here, {site.shape} in the plan"
            )
