"""The attachment: a plan's hooks on a model, from attach to detach.

It holds the model weakly and adds nothing to it but forward hooks where activity rules need them. Weight rules act from
torch's global optimizer hooks, which go when the model goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regkit import hooks
from regkit.engine import Engine, total
from regkit.errors import AttachError, RegkitError, listing
from regkit.ledger import Ticket
from regkit.modules import Parameters
from regkit.plan import Plan, resolve
from regkit.registry import Registry
from regkit.rules import Rules, rules_of
from regkit.spec import Spec
from regkit.steps import Steps
from regkit.validity import Lengths, Mask, Validity

_STATE_VERSION: Final = 1

_attached: dict[int, list[Attachment]] = {}
"""The attachments of each living model, by its id; a model need not be hashable."""


class Attachment:
    """Rules in force on a model. Made by `attach`; leaves with `detach`, or as a context manager, or with the model."""

    def __init__(self, model: nn.Module, plan: Plan, optimizers: Iterable[Optimizer] | None) -> None:
        self.plan = plan
        self._model = weakref.ref(model)
        self._key = id(model)
        self._parameters = Parameters(model)
        self._live = False
        self._rules = rules_of(plan, model)
        self._engine = Engine(self._rules, model)
        self._steps = Steps(self._engine, optimizers)

    # --- lifecycle ---------------------------------------------------------------------------------------------------

    def _acts(self) -> Iterator[tuple[Hashable, str, str]]:
        """Every place that a kind acts on, by what it is and not by its name; the name; the rule."""
        for rule in (*self._rules.penalties, *self._rules.constraints):
            for block in rule.blocks:
                site, ids = block.site, tuple(map(id, block.parameters()))
                name = f"{site.name}.{' + '.join(site.parameters)}".lstrip(".")
                yield (rule.binding.kind.kind, ids, site.start, site.rows), name, rule.binding.key
        for activity in self._rules.activities:
            for output, recorder in activity.places:
                place = (activity.binding.kind.kind, id(recorder.module), output.role, output.layers, output.directions)
                yield place, f"the {output.role} of {output.name or 'the model'}", activity.binding.key

    @torch.no_grad()
    def _prove(self) -> None:
        for rule in (*self._rules.penalties, *self._rules.constraints):
            rule.prove()

    def _install(self, model: nn.Module) -> None:
        try:
            for recorder in self._rules.recorders:
                recorder.install()
            hooks.enlist(self._steps)
        except BaseException:
            self.detach()
            raise
        self._live = True
        if self._key not in _attached:
            # The model's end takes the hooks along; the attachment itself never keeps the model alive.
            weakref.finalize(model, _forget, self._key).atexit = False
        _attached.setdefault(self._key, []).append(self)

    def _remove(self) -> None:
        hooks.dismiss(self._steps)
        for recorder in self._rules.recorders:
            recorder.remove()
        self._live = False

    def detach(self) -> None:
        """Take every hook off the model. May be called again; afterwards the attachment can only be read."""
        self._remove()
        hooks.leave()
        siblings = _attached.get(self._key, [])
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
        with self._no_autocast():
            result = total(self._rules.loss_terms(self.step_count), self._device())
        ticket = Ticket()
        if result.requires_grad:
            result.register_hook(ticket)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        for recorder in self._rules.recorders:
            recorder.consume(ticket)
        for rule in self._rules.by_loss:
            if torch.is_grad_enabled() and any(p.requires_grad for p in rule.parameters()):
                rule.ledger.tickets.append(ticket)
        return result

    def discard(self) -> None:
        """Drop what is recorded and what `penalty()` has returned since the last step: for a batch that is skipped."""
        for recorder in self._rules.recorders:
            recorder.clear()
            recorder.ledger.tickets.clear()
        for rule in self._rules.by_loss:
            rule.ledger.tickets.clear()

    def _device(self) -> torch.device:
        first = next(iter(self._parameters), None)
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
        with self._validity(Lengths(values.reshape(-1).clone())):
            yield

    @contextmanager
    def mask(self, mask: Tensor) -> Iterator[None]:
        """Inside, padded outputs count where the mask is true.

        mask: bool, laid out as the output without its features: (time, batch), or (batch, time) with batch_first, or
        (time,) unbatched; (batch,) around one call of a cell.
        """
        if mask.dtype != torch.bool:
            raise ValueError(f"a mask is a bool tensor, got {mask.dtype}")
        with self._validity(Mask(mask.clone())):
            yield

    @contextmanager
    def _validity(self, validity: Validity) -> Iterator[None]:
        with ExitStack() as stack:
            for recorder in self._rules.recorders:
                stack.enter_context(recorder.under(validity))
            yield

    # --- what is optimized -------------------------------------------------------------------------------------------

    @property
    def step_count(self) -> int:
        """Optimizer steps taken since attach, or since the state that was loaded."""
        return self._steps.count.count

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """For each penalty rule, strength · factor · penalty as optimized now, detached.  -> () each.

        An activity rule gives what is in store, or else what `penalty()` last took; NaN before there was any. Frozen
        weights are not counted: nothing optimizes them.
        """
        with self._no_autocast():
            values: dict[str, Tensor | None] = {r.binding.key: r.value(self.step_count) for r in self._rules.penalties}
            for rule in self._rules.activities:
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
        return {r.binding.key: r.violation(self.step_count) if r.blocks else zero for r in self._rules.constraints}

    @torch.no_grad()
    def apply_constraints(self) -> None:
        """Project every constrained weight now, frozen ones excepted: say, before the first step."""
        for rule in self._rules.constraints:
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
        self._steps.count.restore(count)


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
    made for another model, a kind acts on the same places already, or a rule acts on no weight of `optimizer`;
    PluginError where a kind returns something else than its contract says.
    """
    plan = spec if isinstance(spec, Plan) else resolve(model, spec, registry=registry)
    if isinstance(spec, Plan):
        plan.check(model)
    only = None if optimizer is None else _optimizers(optimizer)
    attachment = Attachment(model, plan, only)
    _refuse_twice(attachment)
    attachment._prove()
    if only is not None:
        _refuse_idle(attachment._rules, only)
    attachment._install(model)
    return attachment


def _refuse_twice(attachment: Attachment) -> None:
    """Raise AttachError where a kind acts on a place already, through this model or another that has it in it."""
    # A copy, for a model may be collected meanwhile. One whose modules have moved is an error at its own next step.
    others = [other for siblings in list(_attached.values()) for other in siblings if other._engine.moved() is None]
    live = {place: rule for other in others for place, _, rule in other._acts()}
    for place, name, rule in attachment._acts():
        if place in live:
            raise AttachError(
                f"rule {rule!r} acts on {name}, where rule {live[place]!r} of another attachment acts already: it "
                "would count twice. detach() that one first, or put both rules into one document"
            )


def _optimizers(given: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    found = [given] if isinstance(given, Optimizer) else list(given)
    for one in found:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer= takes torch optimizers, got {type(one).__name__}")
    return found


def _refuse_idle(rules: Rules, optimizers: list[Optimizer]) -> None:
    """Raise AttachError for a rule that none of the only optimizers to act at could ever reach."""
    owned = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    for rule in (*rules.penalties, *rules.constraints):
        if rule.blocks and not any(id(p) in owned for p in rule.parameters()):
            names = listing(type(one).__name__ for one in optimizers)
            raise AttachError(f"rule {rule.binding.key!r} acts on no weight that optimizer= ({names}) owns")
