"""What an attachment does at each of its optimizer steps: check, then gradients; after the update, projections."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regkit.errors import AttachError, StepError, listing
from regkit.health import Health
from regkit.mark import Mark
from regkit.modes import plain
from regkit.modules import Parameters
from regkit.ownership import Here, Met
from regkit.records import total
from regkit.routine import Jobs, Routine
from regkit.rules import Rules, named
from regkit.shards import FSDP1, flattened
from regkit.step import Step
from regkit.watch import Watch, owned_by_any


class Engine:
    """The rules at work. It holds the model weakly, as everything does that torch's global hooks hold.

    restricted: whether `attach(optimizer=...)` said which steps to act in.
    """

    def __init__(self, rules: Rules, model: nn.Module, restricted: bool) -> None:
        self._rules = rules
        self._reference = weakref.ref(model)
        self._model = Parameters(model)
        self._restricted = restricted
        self._met: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._census = rules.census
        self._here: Here = {}
        self._changed: list[nn.Parameter] = []
        self._version = self._armed = -1
        self._owned: set[int] = set()
        self._health = Health(block for rule in rules.on_weights for block in rule.blocks)
        self._counting = [rule.binding for rule in rules.on_weights if rule.binding.counts]
        self._checks = bool(self._counting or rules.activities or rules.by_loss or rules.by_prox or rules.by_decay)
        self.watch = Watch(self._watched)
        self._by_hand = False

    def hold(self) -> nn.Module | None:
        """The model, while it lives."""
        return self._reference()

    def moved(self) -> str | None:
        """The name of a bound module that is not where it was bound any more, if there is one."""
        return next((link.name for link in self._rules.links if not link.intact()), None)

    def here(self) -> Here:
        """Every parameter that makes a step ours, by its id: the very same mapping while they are the same.

        Activity rules make every step ours that trains any part of the model: their gradient may flow anywhere. Raises
        AttachError where FSDP1 has flattened one that a rule needs.
        """
        self._refuse_flattened()
        self._census.look()
        if self._version != self._census.version:
            here = {id(parameter): parameter for parameter in self._parameters()}
            if list(here) != list(self._here):  # the old ones are held, so that no id is another's by now
                self._here = here
            rules = (*self._rules.by_gradient, *self._rules.by_decay)
            self._changed = [leaf for rule in rules for leaf in rule.parameters()]
            steady = all(block.steady for rule in self._rules.on_weights for block in rule.blocks)
            self._version = self._census.version if steady else -1
        return self._here

    def unchanged(self, here: Here) -> bool:
        """Whether `here` would give these."""
        self._census.look()
        return self._version == self._census.version and here is self._here

    def as_ever(self, here: Here) -> bool:
        """Whether `here` last gave these, and a sample of them is the same still."""
        return here is self._here and self._census.first_is_the_same()

    def _parameters(self) -> Iterator[nn.Parameter]:
        yield from chain.from_iterable(rule.parameters() for rule in self._rules.on_weights)
        if self._rules.activities:
            yield from self._model

    def prove(self) -> None:
        """Raise AttachError where a weight is not finite, or where FSDP1 has flattened one that a rule needs."""
        self._refuse_flattened()
        self._census.look()
        self._health.prove()

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
            for leaf in block.leaves():
                if leaf.requires_grad:
                    return block.name, block.module, leaf
        for recorder in self._rules.recorders:
            for parameter in recorder.module.parameters():
                if parameter.requires_grad:
                    return f"a weight of {recorder.title}", recorder.module, parameter
        return None

    def met(self, optimizer: Optimizer, groups: Mapping[int, Any], acts: bool) -> None:
        """Tell the watchdog; at an optimizer's first step, raise StepError for a weight that no optimizer owns."""
        self.watch.heard(groups, acts)
        for recorder in self._rules.recorders:
            recorder.pass_by(groups)
        if optimizer in self._met or self._restricted or self._by_hand:
            return
        if any(id(p) in groups for p in self._model):
            self._refuse_unowned(groups)
        self._met.add(optimizer)

    def _refuse_unowned(self, groups: Mapping[int, Any]) -> None:
        blocks = chain.from_iterable(rule.blocks for rule in self._rules.on_weights if not rule.binding.optional)
        trained = [(block, leaf) for block in blocks for leaf in block.leaves() if leaf.requires_grad]
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

    @plain
    def at_gradients(self, step: Step) -> None:
        """Add gradients and decay, once it is sure that nothing the document says is left out of this step."""
        mark = self.watch.mark
        if step.evaluations == 1 and mark is not None and mark.holds(step):
            return  # the optimizer failed, and the step is taken again: all is in the gradients
        if step.optimizer is None:
            self._by_hand = True
            if not step.trained and any(p.requires_grad for p in self._here.values()):
                raise StepError(
                    "attachment.step() found no gradient: put the backward pass's gradients into .grad before it, for "
                    "that is where penalties are added, and what says which weights are trained"
                )
        self._check(step)
        self._health.look(step.index)
        complete = False
        try:
            for rule in self._rules.by_gradient:
                named(rule, rule.add_gradient, step)
            for rule in self._rules.by_decay:
                named(rule, rule.decay, step)
            complete = True
        finally:
            self.watch.mark = self._marked(step, complete)

    def routine(self, step: Step, met: Met) -> Routine | None:
        """What was done at the gradients of a step, if the same may be done at the next; None where it may not."""
        jobs: Jobs = []
        for rule in self._rules.by_gradient:
            work = rule.repeatable(step.owned.leaves, step.trained)
            if work is None:
                return None
            jobs.append((rule, work))
        return Routine(met, self._census, jobs, self._changed) if self._version >= 0 else None

    @plain
    def repeat(self, step: Step, routine: Routine, found: list[Tensor]) -> bool:
        """Do that. False where this step needs more: the last one failed, or the weights are to be looked at."""
        if self.watch.mark is not None or self._health.due(step.index):
            return False
        self.watch.heard(step.owned.groups, True)
        for recorder in self._rules.recorders:
            recorder.pass_by(step.owned.groups)
        if self._checks:
            self._check(step)
        complete = False
        try:
            for rule, work in routine.jobs:
                named(rule, rule.repeat, work, step.index, found)
            for rule in self._rules.by_decay:
                named(rule, rule.decay, step)
            complete = True
        finally:
            if routine.changed is not None:
                self.watch.mark = Mark(step.owned.leaves[routine.changed], found[routine.changed], complete)
        return True

    def _marked(self, step: Step, complete: bool) -> Mark | None:
        for leaf in self._changed:
            if id(leaf) in step.trained and leaf.grad is not None:
                return Mark(leaf, leaf.grad, complete)
        return None

    def settled(self) -> None:
        """Gradients are as the optimizer will have them."""
        if self.watch.mark is not None:
            self.watch.mark.settle()

    def release(self) -> None:
        """Hold no parameter and no gradient any more."""
        self.watch.mark, self._here, self._changed, self._version = None, {}, [], -1
        self._census.release()

    @plain
    def value(self, step: Step) -> Tensor:
        """The value of what `at_gradients` added to gradients."""
        terms = [rule.trained_value(step) for rule in self._rules.by_gradient]
        device = next((p.device for p in self._here.values()), torch.device("cpu"))
        return total([term for term in terms if term is not None], device)

    def after(self, step: Step) -> None:
        """Proximal operators, then constraints in the document's order."""
        self.watch.mark = None
        self._settle(step)  # first of all: whatever fails below, the step is taken
        if self._rules.by_prox or self._rules.constraints:
            self._move(step)

    @plain
    def _move(self, step: Step) -> None:
        self._census.look()  # a hook of the optimizer's own may have put new parameters in the place of old ones
        for rule in self._rules.by_prox:
            named(rule, rule.shrink, step)
        for constraint in self._rules.constraints:
            named(constraint, constraint.project, step)

    def _check(self, step: Step) -> None:
        for binding in self._counting:
            binding.refuse_capture(step.index)
        for activity in self._rules.activities:
            activity.check(step)
        for rule in self._rules.by_loss:
            trained = rule.trained_by(step)
            reason = rule.ledger.missing(trained) if trained else None
            if reason is not None:
                raise StepError(f"rule {rule.binding.key!r} ({rule.binding.kind.describe()}) {reason}")
        for rule in (*self._rules.by_prox, *self._rules.by_decay):
            rule.check(step)

    def _settle(self, step: Step) -> None:
        """Settle the tickets of what this step trained, and watch what is in the model by now."""
        if step.optimizer is None:
            self.watch.heard(step.groups, True)
        if self._armed != self._version or self._version < 0 or not self.watch.on_trained:
            self._armed = self._version
            self.watch.arm()
        for recorder in self._rules.recorders:
            if trained := recorder.trained_by(step):
                recorder.ledger.settle(trained)
        for rule in self._rules.by_loss:
            if trained := rule.trained_by(step):
                rule.ledger.settle(trained)
