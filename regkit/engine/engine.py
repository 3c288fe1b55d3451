"""The engine of an attachment: at each of its optimizer steps checks, then gradients; after the update, projections."""

from __future__ import annotations

import weakref
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Final

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled as _casts
from torch.optim import Optimizer

from regkit.activity.reduction import total
from regkit.engine.averaging import at_base, averages, verify
from regkit.engine.failed_step import FailedSteps, PenalizedGradient
from regkit.engine.finite import EVERY, FiniteCheck
from regkit.engine.ownership import Ownership
from regkit.engine.program import ActiveStep, Jobs, Program
from regkit.engine.watchdog import Watchdog
from regkit.errors import StepError
from regkit.recording.recorder import all_in_the_loss
from regkit.recording.tickets import settle
from regkit.recording.witness import watch
from regkit.rules.penalty_rule import PenaltyRule
from regkit.rules.rule_set import RuleSet, raise_named
from regkit.rules.weight_rule import WeightRule
from regkit.runtime.modes import plain
from regkit.runtime.sharding import refuse_flattened
from regkit.weights.links import Parameters
from regkit.weights.snapshot import Snapshot

_grad = attrgetter("grad")
_set_grad: Final = torch._C._set_grad_enabled


class Engine:
    """The rules of one attachment at work. The model is held weakly, as by everything that torch's global hooks hold.

    restricted: whether `attach(optimizer=...)` said which optimizers' steps to act in.
    """

    def __init__(self, rules: RuleSet, model: nn.Module, restricted: bool) -> None:
        self._rules = rules
        self.model = weakref.ref(model)
        self.parameters = Parameters(model)
        self.snapshots, self.recorders, self.modules = rules.snapshots, rules.recorders, rules.modules
        self._restricted = restricted
        self.ownership = Ownership(rules, self.parameters)
        self._finite_check = FiniteCheck(rules.snapshots)
        self._counting = [rule.binding for rule in rules.on_weights if rule.binding.counts]
        self._checks = bool(self._counting or rules.activities or rules.by_loss or rules.by_prox or rules.by_decay)
        self.failed_steps = FailedSteps()
        self.watchdog = Watchdog(self._parameter_to_watch, self.failed_steps)
        self.steps = 0
        """The number of steps that optimizers have taken, however many of these make up one."""
        self._armed_at: Snapshot | None = None
        """The snapshot for which the watchdog was armed."""

    def moved_module(self) -> str | None:
        """The name of the first bound module that is no more in its place in the model, None if all are."""
        return next((link.name for link in self.snapshots.links if not link.intact()), None)

    def now(self) -> Snapshot:
        """A snapshot of the model. Raises AttachError where FSDP1 has flattened a parameter that a rule needs."""
        # No step could be known to train a flattened module. Rules on weights refuse as they look for their weights.
        if self.recorders:
            refuse_flattened((one.module, f"a weight of {one.title}") for one in self.recorders)
        return self.snapshots.now()

    def expected(self) -> set[int]:
        """The ids of the model's trainable parameters that any optimizer owns."""
        return self.ownership.expected(self.snapshots.now())

    def check_weights(self) -> None:
        """Raise AttachError where a weight is not finite, or FSDP1 has flattened a parameter that a rule needs."""
        self.now()
        self._finite_check.check_finite()

    def _parameter_to_watch(self) -> tuple[str, nn.Module, nn.Parameter] | None:
        """The first trainable parameter under a rule: its name, its module, itself.

        One whose gradient is added to comes first: the watchdog hears of a backward pass before that changes the
        gradient.
        """
        rules = (*self._rules.by_gradient, *self._rules.by_decay, *self._rules.on_weights)
        for block in chain.from_iterable(rule.blocks for rule in rules):
            for parameter in block.parameters():
                if parameter.requires_grad:
                    return block.name, block.module, parameter
        for recorder in self.recorders:
            for parameter in recorder.module.parameters():
                if parameter.requires_grad:
                    return f"a weight of {recorder.title}", recorder.module, parameter
        return None

    def step_seen(self, optimizer: Optimizer, program: Program, acts: bool) -> None:
        """Take note of a step that runs within no other. acts: whether the attachment acts in this optimizer's steps.

        At an optimizer's first step, raises StepError for a weight that no optimizer owns.
        """
        watchdog, groups = self.watchdog, program.owned.all_groups
        if id(watchdog.parameter) in groups:
            watchdog.accepted = watchdog.step_ever_seen = True
            if not acts:
                watchdog.give_up()
        for recorder in self.recorders:
            if recorder.calls.last is not None or recorder.calls.records:
                recorder.skip_step(groups)
        if not self._restricted and weakref.ref(optimizer) not in self.ownership.seen:
            self.ownership.verify(optimizer, program)

    def at_gradients(self, step: ActiveStep) -> None:
        """Add gradients and decay. Raises StepError first where a rule would be left out of this step."""
        if _casts():
            with torch._C._DisableAutocast():
                self.at_gradients(step)
            return
        step.evaluations += 1
        parameters, jobs, failed = step.owned.parameters, step.program.jobs, self.failed_steps
        gradients = list(map(_grad, parameters))
        all_trained = not any(map(is_, gradients, repeat(None)))
        if (
            jobs is None
            or not (jobs.usual and all_trained)
            or (step.optimizer is not None and any(map(dict.get, step.optimizer.param_groups, repeat("maximize"))))
        ):
            jobs = self._jobs(step, gradients, all_trained)
        step.jobs, step.trained = jobs, jobs.trained
        failed.last = None
        if failed.begun and step.evaluations == 1:
            failed.last = step.penalized = failed.retried_by(step)
            if step.penalized is not None:
                return  # the optimizer failed, and the step is taken again: all is in the gradients
        differentiated = torch.is_grad_enabled()
        _set_grad(False)
        try:
            if self._checks:
                self._check(step, jobs)
            if step.index % EVERY == 0:
                self._finite_check.look(step.index)
                watch(self.recorders)
            if jobs.gradients or jobs.decays:
                self._add(step, jobs, gradients)
        finally:
            _set_grad(differentiated)

    def _jobs(self, step: ActiveStep, gradients: list[Tensor | None], all_trained: bool) -> Jobs:
        """The work for the parameters that have a gradient."""
        program, owned = step.program, step.owned
        trained = owned.ids
        if not all_trained:
            pairs = zip(owned.parameters, gradients, strict=True)
            trained = frozenset(id(p) for p, gradient in pairs if gradient is not None)
        ascending = frozenset(key for key in trained if owned.groups[key].get("maximize"))
        jobs = program.jobs
        if jobs is None or jobs.trained != trained or jobs.ascending != ascending:
            jobs = Jobs(self._rules, program.snapshot, owned, trained, ascending)
            verify(step, jobs)
            jobs.averaged = bool(jobs.proximal or jobs.projections) and any(map(averages, owned.groups.values()))
            program.jobs = jobs
        return jobs

    def _add(self, step: ActiveStep, jobs: Jobs, gradients: list[Tensor]) -> None:
        """Add gradients and decay, and remember the first gradient in case that the step fails."""
        snapshot = jobs.snapshot
        rule: PenaltyRule | None = None
        complete = False
        try:
            if snapshot.cached:
                snapshot.forget()
            for rule, work in jobs.gradients:
                rule.add_gradient(work, step, gradients)
            for rule, work in jobs.decays:
                rule.decay(work, step)
                if snapshot.cached:
                    snapshot.written(work.parameter_ids(), work.storages())
            complete = True
        except Exception as error:  # a kind is a stranger's code: anything can come out
            assert rule is not None
            raise_named(rule, error)
        finally:
            if (first := jobs.first_changed) is not None:
                one = step.penalized
                if one is None:
                    one = step.penalized = PenalizedGradient()
                    self.failed_steps.begun.append(one)
                one.parameter, one.gradient = step.owned.parameters[first], gradients[first]
                one.version, one.renewed, one.complete = one.gradient._version, False, complete
                one.trained, self.failed_steps.last = jobs.trained, one
            if snapshot.cached:
                snapshot.forget()  # or what was gathered would stay until the next step

    def release(self) -> None:
        """Hold no parameter and no gradient any more."""
        self._armed_at = None
        self.ownership.release()
        self.failed_steps.release()
        self.snapshots.release()

    @plain
    def value(self, step: ActiveStep) -> Tensor:
        """The sum of the penalties of which `at_gradients` has added the gradients.  -> ()."""
        snapshot = self.snapshots.fresh()
        terms = [rule.trained_value(step) for rule in self._rules.by_gradient]
        snapshot.forget()
        device = next((p.device for p in step.program.snapshot.parameters.values()), torch.device("cpu"))
        return total([term for term in terms if term is not None], device)

    def after(self, step: ActiveStep) -> None:
        """Apply proximal operators, then constraints in the document's order."""
        watchdog, jobs = self.watchdog, step.jobs
        if step.penalized is not None:
            begun, self.failed_steps.last = self.failed_steps.begun, None
            if step.penalized in begun:  # or it was renewed within the step
                begun.remove(step.penalized)
        self.steps += 1
        if jobs is None:  # the optimizer never called its closure
            return
        if self._armed_at is not jobs.snapshot or watchdog.parameter is None or not watchdog.parameter.requires_grad:
            self._armed_at = jobs.snapshot
            watchdog.arm()
        # First of all: whatever fails below, the step is taken.
        if jobs.recorders:
            settle(jobs.recorders)
        if jobs.untrained_recorders and jobs.trained:
            settle((recorder, jobs.trained) for recorder in jobs.untrained_recorders if recorder.frozen)
        if jobs.by_loss:
            settle(jobs.by_loss)
        if jobs.averaged:
            with at_base(step, jobs):
                self._project(step, jobs)
        elif jobs.proximal or jobs.projections:
            self._project(step, jobs)

    def _project(self, step: ActiveStep, jobs: Jobs) -> None:
        """Apply proximal operators and constraints to the weights that the update has changed."""
        if not jobs.snapshot.holds():  # a hook of the optimizer's own may have put new parameters in the place of old
            jobs = Jobs(self._rules, self.snapshots.now(), step.owned, jobs.trained, jobs.ascending)
        snapshot, differentiated = jobs.snapshot, torch.is_grad_enabled()
        _set_grad(False)
        rule: WeightRule | None = None
        try:
            if snapshot.cached:
                snapshot.forget()  # the update has changed the weights, and may have read some
            for rule, work in jobs.proximal:
                rule.shrink(work, step)
                if snapshot.cached:
                    snapshot.written(work.parameter_ids(), work.storages())
            for rule, work in jobs.projections:
                rule.project(work, step.index)
                if snapshot.cached:
                    snapshot.written(work.parameter_ids(), work.storages())
        except Exception as error:  # a kind is a stranger's code: anything can come out
            assert rule is not None
            raise_named(rule, error)
        finally:
            if snapshot.cached:
                snapshot.forget()
            _set_grad(differentiated)

    def _check(self, step: ActiveStep, jobs: Jobs) -> None:
        """Raise StepError where a rule would be left out of this step."""
        for binding in self._counting:
            binding.refuse_capture(step.index)
        if jobs.untrained_recorders or not all_in_the_loss(jobs.recorders):
            trained = dict(jobs.recorders)
            trained.update((one, jobs.trained) for one in jobs.untrained_recorders if one.frozen)
            for activity in self._rules.activities:
                activity.verify_consumed(trained)
        for rule, ids in jobs.by_loss:
            reason = rule.ledger.missing(ids)
            if reason is not None:
                raise StepError(f"{rule.binding.label} {reason}")
        if self._rules.scheduled:
            self._verify_scheduled(step, jobs)
        for rule, work in (*jobs.proximal, *jobs.decays):
            rule.verify_applicable(work, step)

    def _verify_scheduled(self, step: ActiveStep, jobs: Jobs) -> None:
        """Raise StepError where a penalty in the loss was computed for a step at which its factor is another."""
        recorders = dict(jobs.recorders)
        activities = self._rules.activities
        owners = [(rule.binding, one.ledger) for rule in activities for _, one in rule.places if one in recorders]
        owners += [(rule.binding, rule.ledger) for rule, _ in jobs.by_loss]
        for binding, ledger in owners:
            now = step.index
            for index in ledger.of_other_steps(now, self.steps) if binding.schedule is not None else ():
                if binding.factor(index) != binding.factor(now):
                    for _, told in owners:
                        told.forget(index)
                    raise StepError(
                        f"{binding.label} is in the loss with the factor of step {index}, {binding.factor(index):.6g}, "
                        f"and {step.by} takes step {now}, of which it is {binding.factor(now):.6g}: which optimizer "
                        "steps next was not known. Tell it, attachment.penalty(optimizer), and take the penalty right "
                        "before the backward pass for that step, into gradients that are zero"
                    )
