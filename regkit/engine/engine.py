"""What an attachment does at each of its optimizer steps: check, then gradients; after the update, projections."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled as _casts
from torch.optim import Optimizer

from regkit.activity.reduction import total
from regkit.engine.finite import EVERY, FiniteCheck
from regkit.engine.program import ActiveStep, Jobs, Program
from regkit.engine.watchdog import Watchdog, owned_by_any
from regkit.errors import AttachError, StepError, listing
from regkit.recording.recorder import all_in_the_loss, settle
from regkit.rules.penalty_rule import PenaltyRule
from regkit.rules.rule_set import RuleSet, raise_named
from regkit.rules.weight_rule import WeightRule
from regkit.runtime.modes import plain
from regkit.runtime.sharding import FSDP1, flattened
from regkit.weights.links import Parameters
from regkit.weights.snapshot import Snapshot

_grad, _requires_grad = attrgetter("grad"), attrgetter("requires_grad")
_set_grad: Final = torch._C._set_grad_enabled


class Engine:
    """The rules at work. It holds the model weakly, as everything does that torch's global hooks hold.

    restricted: whether `attach(optimizer=...)` said which steps to act in.
    """

    def __init__(self, rules: RuleSet, model: nn.Module, restricted: bool) -> None:
        self._rules = rules
        self.model = weakref.ref(model)  # the model, while it lives
        self._parameters = Parameters(model)
        self._restricted = restricted
        self._met: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.snapshots, self.recorders = rules.snapshots, rules.recorders
        self._armed: Snapshot | None = None
        self._owned: set[int] = set()
        self._expected: tuple[Snapshot, set[int]] | None = None
        self._health = FiniteCheck(rules.snapshots)
        self._counting = [rule.binding for rule in rules.on_weights if rule.binding.counts]
        self._checks = bool(self._counting or rules.activities or rules.by_loss or rules.by_prox or rules.by_decay)
        self.watch = Watchdog(self._watched)
        self._by_hand = False

    def moved(self) -> str | None:
        """The name of a bound module that is not where it was bound any more, if there is one."""
        return next((link.name for link in self.snapshots.links if not link.intact()), None)

    def now(self) -> Snapshot:
        """The model as it is. Raises AttachError where FSDP1 has flattened a parameter that a rule needs."""
        self._refuse_flattened()
        return self.snapshots.now()

    def expected(self) -> set[int]:
        """The ids of the model's trainable parameters that any optimizer owns."""
        here = self.snapshots.now()
        if self._expected is None or self._expected[0] is not here:
            self._expected = here, owned_by_any() | self._owned
        owned = self._expected[1]
        return {key for key, parameter in here.parameters.items() if key in owned and parameter.requires_grad}

    def check_weights(self) -> None:
        """Raise AttachError where a weight is not finite, or where FSDP1 has flattened one that a rule needs."""
        self._refuse_flattened()
        self._health.check_finite()

    def _refuse_flattened(self) -> None:
        # What trains such a module could not be told any more. Rules on weights refuse as they look for them.
        for recorder in self._rules.recorders:
            if flattened(recorder.module):
                raise AttachError(f"a weight of {recorder.title} {FSDP1}")

    def _watched(self) -> tuple[str, nn.Module, nn.Parameter] | None:
        """The first parameter under a rule that is trained: its name, its module, itself.

        If there is one whose gradient is added to, it is the first of these: a backward pass is heard of before it
        changes that.
        """
        rules = (*self._rules.by_gradient, *self._rules.by_decay, *self._rules.on_weights)
        for block in chain.from_iterable(rule.blocks for rule in rules):
            for leaf in block.parameters():
                if leaf.requires_grad:
                    return block.name, block.module, leaf
        for recorder in self._rules.recorders:
            for parameter in recorder.module.parameters():
                if parameter.requires_grad:
                    return f"a weight of {recorder.title}", recorder.module, parameter
        return None

    def step_seen(self, optimizer: Optimizer, program: Program, acts: bool) -> None:
        """Take note of a step that runs within no other. acts: whether the attachment acts in this optimizer's steps.

        At an optimizer's first step, raises StepError for a weight that no optimizer owns.
        """
        watch, groups = self.watch, program.owned.all_groups
        if id(watch.parameter) in groups:
            watch.accepted = watch.step_ever_seen = True
            if not acts:
                watch.give_up()
        for recorder in self.recorders:
            if recorder.calls.last is not None or recorder.calls.records:
                recorder.skip_step(groups)
        if program.optimizer_seen or self._restricted or self._by_hand:
            return
        if optimizer not in self._met:
            if any(id(p) in groups for p in self._parameters):
                self._refuse_unowned(program.snapshot, groups)
            self._met.add(optimizer)
        program.optimizer_seen = True

    def _refuse_unowned(self, snapshot: Snapshot, groups: Mapping[int, Any]) -> None:
        blocks = chain.from_iterable(rule.blocks for rule in self._rules.on_weights if not rule.binding.optional)
        kept = ((block, storage) for block in blocks for storage in snapshot.storages[block])
        trained = [(block, leaf) for block, storage in kept for leaf in storage.parameters if leaf.requires_grad]
        self._owned |= set(groups)
        if any(id(leaf) not in self._owned for _, leaf in trained):
            self._owned |= owned_by_any()
        names = [block.name for block, leaf in trained if id(leaf) not in self._owned]
        if names:
            raise StepError(
                f"no optimizer owns {listing(names)}, though its neighbours are being trained: a rule on it can never "
                "act. Give it to an optimizer, freeze it (requires_grad_(False)), update it inside `with "
                'attachment.step():`, or narrow the rule\'s target; a rule with "optional": true may act on nothing'
            )

    def at_gradients(self, step: ActiveStep) -> None:
        """Add gradients and decay, once it is sure that nothing the document says is left out of this step."""
        if _casts():
            with torch._C._DisableAutocast():
                self.at_gradients(step)
            return
        step.evaluations += 1
        leaves, jobs = step.owned.parameters, step.program.jobs
        found = list(map(_grad, leaves))
        if (
            jobs is None
            or not jobs.usual
            or any(map(is_, found, repeat(None)))
            or not all(map(_requires_grad, leaves))
            or (step.optimizer is not None and any(map(dict.get, step.optimizer.param_groups, repeat("maximize"))))
        ):
            jobs = self._jobs(step, found)
        step.jobs, step.trained = jobs, jobs.trained
        if self.watch.mark.gradient is not None and step.evaluations == 1 and self.watch.mark.holds(step):
            return  # the optimizer failed, and the step is taken again: all is in the gradients
        if step.optimizer is None:
            self._refuse_nothing(step)
        differentiated = torch.is_grad_enabled()
        _set_grad(False)
        try:
            if self._checks:
                self._check(step, jobs)
            if step.index % EVERY == 0:
                self._health.look(step.index)
            self._add(step, jobs, found)
        finally:
            _set_grad(differentiated)

    def _jobs(self, step: ActiveStep, found: list[Tensor | None]) -> Jobs:
        """What is to be done for those that have a gradient."""
        program, owned = step.program, step.owned
        trained = owned.ids
        if any(map(is_, found, repeat(None))) or not all(map(_requires_grad, owned.parameters)):
            pairs = zip(owned.parameters, found, strict=True)
            trained = frozenset(id(leaf) for leaf, gradient in pairs if gradient is not None and leaf.requires_grad)
        up = frozenset(key for key in trained if owned.groups[key].get("maximize"))
        jobs = program.jobs
        if jobs is None or jobs.trained != trained or jobs.up != up:
            jobs = program.jobs = Jobs(self._rules, program.snapshot, owned, trained, up)
        return jobs

    def _add(self, step: ActiveStep, jobs: Jobs, found: list[Tensor]) -> None:
        """Add gradients and decay. The first gradient is marked, so that a step that fails is known again."""
        mark, snapshot = self.watch.mark, jobs.snapshot
        rule: PenaltyRule | None = None
        complete = False
        try:
            if snapshot.cached:
                snapshot.forget()
            for rule, work in jobs.gradients:
                rule.add_gradient(work, step, found)
            for rule, work in jobs.decays:
                rule.decay(work, step)
                if snapshot.cached:
                    snapshot.written(work.parameter_ids(), work.storages())
            complete = True
        except Exception as error:  # a kind is a stranger's code: anything can come out
            assert rule is not None
            raise_named(rule, error)
        finally:
            mark.gradient = None
            if jobs.marked is not None:
                mark.parameter, mark.gradient = step.owned.parameters[jobs.marked], found[jobs.marked]
                mark.version, mark.renewed, mark.complete = mark.gradient._version, False, complete
                mark.trained = jobs.trained
            if snapshot.cached:
                snapshot.forget()  # or what was gathered would stay until the next step

    def _refuse_nothing(self, step: ActiveStep) -> None:
        self._by_hand = True
        if not step.trained and any(p.requires_grad for p in step.program.snapshot.parameters.values()):
            raise StepError(
                "attachment.step() found no gradient: put the backward pass's gradients into .grad before it, for "
                "that is where penalties are added, and what says which weights are trained"
            )

    def release(self) -> None:
        """Hold no parameter and no gradient any more."""
        self.watch.mark.parameter = self.watch.mark.gradient = self._armed = self._expected = None
        self.snapshots.release()

    @plain
    def value(self, step: ActiveStep) -> Tensor:
        """The value of what `at_gradients` added to gradients."""
        snapshot = self.snapshots.fresh()
        terms = [rule.trained_value(step) for rule in self._rules.by_gradient]
        snapshot.forget()
        device = next((p.device for p in step.program.snapshot.parameters.values()), torch.device("cpu"))
        return total([term for term in terms if term is not None], device)

    def after(self, step: ActiveStep) -> None:
        """Proximal operators, then constraints in the document's order."""
        watch, jobs = self.watch, step.jobs
        watch.mark.parameter = watch.mark.gradient = None
        if jobs is None:  # the optimizer never called its closure
            return
        if step.optimizer is None and id(watch.parameter) in step.groups:
            watch.accepted = watch.step_ever_seen = True
        if self._armed is not jobs.snapshot or watch.parameter is None or not watch.parameter.requires_grad:
            self._armed = jobs.snapshot
            watch.arm()
        # First of all: whatever fails below, the step is taken.
        if jobs.recorders:
            settle(jobs.recorders)
        for recorder in jobs.apart:
            if jobs.trained and recorder.frozen:
                recorder.ledger.settle(jobs.trained)
        for rule, trained in jobs.losses:
            rule.ledger.settle(trained)
        if jobs.moves:
            self._move(step, jobs)

    def _move(self, step: ActiveStep, jobs: Jobs) -> None:
        if not jobs.snapshot.holds():  # a hook of the optimizer's own may have put new parameters in the place of old
            jobs = Jobs(self._rules, self.snapshots.now(), step.owned, jobs.trained, jobs.up)
        snapshot, differentiated = jobs.snapshot, torch.is_grad_enabled()
        _set_grad(False)
        rule: WeightRule | None = None
        try:
            if snapshot.cached:
                snapshot.forget()  # the update has changed them, and may have read them
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
        """Raise StepError where something that the document says would be left out of this step."""
        for binding in self._counting:
            binding.refuse_capture(step.index)
        if jobs.apart or not all_in_the_loss(jobs.recorders):
            trained = dict(jobs.recorders)
            trained.update((one, jobs.trained) for one in jobs.apart if one.frozen)
            for activity in self._rules.activities:
                activity.verify_consumed(trained)
        for rule, mine in jobs.losses:
            reason = rule.ledger.missing(mine)
            if reason is not None:
                raise StepError(f"{rule.binding.label} {reason}")
        for rule, work in (*jobs.proximal, *jobs.decays):
            rule.verify_applicable(work, step)
