"""The attachment: a plan's hooks on a model, from attach to detach.

It holds the model weakly and adds nothing to it but forward hooks where activity rules need them. Weight rules act from
torch's global optimizer hooks, which go when the model goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regkit.activity.padding import Lengths, Mask, Validity
from regkit.activity.reduction import total
from regkit.attachment import reports, state
from regkit.attachment.copies import ModelCompanion
from regkit.attachment.orphans import OrphanedModules
from regkit.engine.engine import Engine
from regkit.engine.manual_step import ManualStep
from regkit.engine.tracker import StepTracker
from regkit.errors import RegkitError, _CopyError
from regkit.plan.plan import Plan
from regkit.recording.injector import Scale
from regkit.recording.tickets import Ticket
from regkit.rules.rule_set import rules_of
from regkit.rules.trials import try_kinds
from regkit.runtime import optimizer_hooks
from regkit.runtime.modes import eager, uncast
from regkit.runtime.sharding import reshard

_attached: dict[Attachment, None] = {}
"""The attachments in force in this process, in the order of attaching: a dict serves as an ordered set."""


class Attachment:
    """Rules in force on a model. Made by `attach`; ends with `detach`, with its `with` block, or with the model.

    >>> model = nn.LSTM(4, 8)
    >>> rules = [{"penalty": "l2(0.01)"}, {"penalty": "activity_l2(0.001)"}, {"constraint": "max_norm(1)"}]
    >>> attachment = regkit.attach(model, {"rules": rules})
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> output, _ = model(torch.ones(3, 2, 4))
    >>> loss = output.square().mean() + attachment.penalty()
    >>> loss.backward()
    >>> optimizer.step()
    >>> attachment
    <regkit.Attachment of 3 rules, on LSTM, step 1>
    >>> attachment.detach()
    """

    def __init__(
        self, model: nn.Module, plan: Plan, optimizers: Iterable[Optimizer] | None, loss_scale: Scale | None
    ) -> None:
        self.plan = plan
        """The rules, resolved against the model."""
        self._model = weakref.ref(model)
        self._rules = rules_of(plan, model)
        self._engine = Engine(self._rules, model, optimizers is not None)
        self._watchdog = self._engine.watchdog
        self._tracker = StepTracker(self._engine, optimizers)
        self._rules.inject(loss_scale, lambda: self._tracker.upcoming(self._rules.in_the_loss))
        self._companion = ModelCompanion(model, plan, lambda: self.step_count, loss_scale)
        self._hooked = False
        self._model_end: weakref.finalize[..., nn.Module] | None = None
        self._orphans: OrphanedModules | None = None

    # --- lifecycle ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _try_kinds(self) -> None:
        self._engine.check_weights()
        try_kinds(self._rules)
        self._rules.snapshots.release()  # until the first step: parameters may be sharded or replaced before it

    def _install(self, model: nn.Module) -> None:
        try:
            self._hook()
        except BaseException:
            self.detach()
            raise
        # The model's end takes the hooks along; the attachment itself never keeps the model alive.
        self._model_end = weakref.finalize(model, self._model_gone)
        self._model_end.atexit = False
        _attached[self] = None

    def _hook(self) -> None:
        for recorder in self._rules.recorders:
            recorder.install()
        self._watchdog.arm()
        optimizer_hooks.add_listener(self._tracker)
        self._companion.join()
        self._hooked = True

    def _unhook(self) -> None:
        self._hooked = False
        self._companion.leave()
        optimizer_hooks.remove_listener(self._tracker)
        self._watchdog.disarm()
        for recorder in self._rules.recorders:
            recorder.remove()

    def _end(self) -> None:
        self._unhook()
        self._engine.release()
        _attached.pop(self, None)

    def _model_gone(self) -> None:
        with self._watchdog.ending():
            self._end()
            self._orphans = OrphanedModules(self._rules.modules())

    def detach(self) -> None:
        """Take every hook off the model. May be called again; afterwards the attachment can only be read."""
        with self._watchdog.ending():
            self._end()
            if self._model_end is not None:
                self._model_end.detach()
            if self._orphans is not None:
                optimizer_hooks.remove_listener(self._orphans)
            optimizer_hooks.remove_hooks()

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Keep all hooks off the model and act in no step, inside a `with`: for `torch.export`, which bears no hooks.

        A copy that is made inside carries no rules. Outputs that were recorded and not consumed are dropped. Raises
        RegkitError after detach.
        """
        self._refuse_dead("nothing to take off")
        hooked = self._hooked
        self._unhook()
        try:
            yield
        finally:
            if hooked and self in _attached:
                self._hook()

    def _refuse_dead(self, consequence: str) -> None:
        if self not in _attached:
            raise RegkitError(f"the attachment is detached: there is {consequence}")

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        model = self._model()
        standing = "detached" if self not in _attached else f"on {type(model).__name__}, step {self.step_count}"
        return f"<regkit.Attachment of {len(self.plan.bindings)} rules, {standing}>"

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise _CopyError(
            "an attachment cannot be copied or pickled; its model can, with the rules in force on the copy "
            "(regkit.attachments(copy)); what a resumed run needs is attachment.state_dict()"
        )

    # --- updates that no torch optimizer makes -----------------------------------------------------------------------

    def step(self, lr: float | Tensor | None = None) -> ManualStep:
        """The context of an update that no torch optimizer makes: around the update, all work of a step is done.

        `with attachment.step(lr=0.1): update(model)`, with the gradients of the backward pass in `.grad`, unscaled.

        lr: the learning rate, which proximal and decoupled rules multiply by; no other rule needs one.

        Raises RegkitError after detach, StepError as an optimizer's step would.
        """
        self._refuse_dead("no rule in force at a step")
        return ManualStep(self._tracker, lr)

    def weights_changed(self) -> None:
        """Say that the weights were changed on purpose without a step: a new initialization, copied weights."""
        self._watchdog.weights_changed()

    # --- the loss ----------------------------------------------------------------------------------------------------

    @eager
    def penalty(self, optimizer: Optimizer | None = None) -> Tensor:
        """Σ strength · factor · penalty of all that goes through the loss: activity rules, and weight rules via loss.

        Consumes the activity recorded since the last call. The result, in float32 or better, belongs to the loss once:
        `loss = criterion(...) + attachment.penalty()`. Zero where no rule goes through the loss.  -> ()

        optimizer: the one that steps next, for schedules where several take turns; left out, what is known tells it.

        Raises RegkitError after detach.
        """
        if self not in _attached:
            self._refuse_dead("nothing to add to the loss")
        rules = self._rules
        tracker = self._tracker
        index = tracker.upcoming(rules.in_the_loss, optimizer) if rules.scheduled else tracker.count.count
        terms = rules.intake.consume(index) if rules.activities else []
        if rules.by_loss:
            terms += rules.loss_terms(index)
        if len(terms) == 1 and terms[0].dtype in (torch.float32, torch.float64):
            result = terms[0]
        else:
            result = total(terms, terms[0].device if terms else self._device())
        ticket = Ticket()
        if rules.scheduled:
            ticket.index, ticket.behind = index, self._engine.steps
        if result.requires_grad:
            result.register_hook(ticket)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        for recorder in rules.loss_recorders:
            calls = recorder.calls
            if calls.records or calls.last is not None:
                if calls.validity is not None:
                    calls.placed()  # time goes on
                calls.records, calls.before, recorder.left = [], None, 0  # not those that another thread has added
                recorder.ledger.tickets.append(ticket)
        for rule in rules.by_loss:
            if torch.is_grad_enabled() and any(p.requires_grad for p in rule.parameters()):
                rule.ledger.tickets.append(ticket)
        return result

    def discard(self) -> None:
        """Drop recorded outputs, and penalties returned since the last step: for a batch that is skipped."""
        self._rules.discard()

    def _device(self) -> torch.device:
        return next((one.device for one in self._engine.parameters), torch.device("cpu"))

    def lengths(self, lengths: Tensor | Sequence[int]) -> AbstractContextManager[None]:
        """The context in which padded outputs count up to these lengths.

        For a loop over a cell, the context stands around the whole loop: its n-th call is time n. Packed sequences know
        their lengths and need no context.

        lengths: (batch,), whole numbers ≥ 0.
        """
        return self._under(Lengths.of(lengths))

    def mask(self, mask: Tensor) -> AbstractContextManager[None]:
        """The context in which padded outputs count where a mask is true.

        mask: bool, laid out as the output without its features: (time, batch), or (batch, time) with batch_first, or
        (time,) unbatched; (batch,) around one call of a cell.
        """
        return self._under(Mask.of(mask))

    @contextmanager
    def _under(self, validity: Validity) -> Iterator[None]:
        with ExitStack() as stack:
            for recorder in self._rules.recorders:
                stack.enter_context(recorder.under(validity))
            yield

    # --- what is optimized -------------------------------------------------------------------------------------------

    @property
    def step_count(self) -> int:
        """The number of optimizer steps since attach, or since the state that was loaded."""
        return self._tracker.count.count

    @uncast
    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """For each penalty rule, strength · factor · penalty as optimized now, detached.  -> () each.

        An activity rule gives the value of the recorded outputs, or else of those that `penalty()` last consumed; NaN
        before there were any. Frozen weights are not counted: nothing optimizes them.
        """
        found = reports.values(self._rules, self._tracker, self._device())
        return {binding.key: found[binding.key] for binding in self.plan.bindings if binding.key in found}

    @uncast
    @torch.no_grad()
    def violations(self) -> dict[str, Tensor]:
        """For each constraint rule, how far the worst weight is beyond the bound, in the bound's unit.  -> () each.

        Frozen weights are not counted: nothing moves these.
        """
        return reports.violations(self._rules, self._tracker, self._device())

    @uncast
    @torch.no_grad()
    def apply_constraints(self) -> None:
        """Project every constrained weight now, but frozen ones: say, before the first step."""
        model = self._model()
        if model is not None:
            reshard(model)
        self._rules.project_all(self.step_count)

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The numbers and names that a resumed run needs besides the model; no tensor."""
        return state.read(self._tracker.count, self._rules, self._model())

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state. Raises ValueError for anything that `state_dict` does not return."""
        state.restore(saved, self._tracker.count, self._rules, self._model())
