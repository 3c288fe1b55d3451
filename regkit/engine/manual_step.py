"""Optimizer steps that no torch optimizer makes."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor

from regkit.engine.finite import EVERY
from regkit.engine.program import ActiveStep, Program
from regkit.engine.tracker import StepTracker
from regkit.errors import StepError
from regkit.runtime.modes import uncompiled
from regkit.runtime.sharding import reshard
from regkit.runtime.step import OwnedParameters
from regkit.weights.links import replaced


@dataclass(eq=False)
class ManualStep:
    """A context around an update of weights that no torch optimizer makes: entering and leaving do a step's work.

    tracker: of the attachment.
    lr: the learning rate, which proximal and decoupled rules multiply by.
    """

    tracker: StepTracker
    lr: float | Tensor | None
    step: ActiveStep | None = None

    def __enter__(self) -> None:
        self.step = self._begin()

    @uncompiled
    def _begin(self) -> ActiveStep:
        """Check, and add to gradients. Raises StepError within a step, and where there is no gradient."""
        tracker, engine = self.tracker, self.tracker.engine
        running = tracker.running_steps()
        if running:
            raise StepError("attachment.step() was entered within a step")
        model = engine.model()
        if model is not None:
            reshard(model)
        moved = engine.moved_module()
        if moved is not None:
            raise replaced(moved)
        snapshot = engine.now()
        parameters = snapshot.parameters
        tracker.count.keep(parameters)
        owned = OwnedParameters(parameters, dict.fromkeys(parameters, {} if self.lr is None else {"lr": self.lr}))
        program = Program(None, snapshot, owned)
        step = ActiveStep(None, owned, None, False, tracker.count.index(owned.ids), None, program=program)
        trainable = [parameter for parameter in parameters.values() if parameter.requires_grad]
        if trainable and all(parameter.grad is None for parameter in trainable):
            raise StepError(
                "attachment.step() found no gradient: put the backward pass's gradients into .grad before it, for "
                "that is where penalties are added, and what says which weights are trained"
            )
        if step.index % EVERY == 0 and model is not None and tracker.changed is not None:
            tracker.changed(model, {id(p) for p in model.parameters() if p.grad is not None})
        engine.at_gradients(step)
        engine.ownership.trained_by_hand(step.trained)
        engine.failed_steps.gradients_final()
        running.append(step)
        tracker.open_steps.add(weakref.ref(step, tracker.open_steps.discard))
        return step

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """End the step. Where the update failed nothing is done and counted, as where an optimizer fails."""
        tracker, step = self.tracker, self.step
        assert step is not None
        tracker.running_steps()  # ends the steps that raised in the update
        tracker.leave(step)
        if kind is None:
            watchdog = tracker.engine.watchdog
            if id(watchdog.parameter) in step.groups:
                watchdog.accepted = watchdog.step_ever_seen = True
            try:
                tracker.engine.after(step)
            finally:
                if step.owned.ids:  # of no weight under a rule, as of none of an optimizer, it is no step here
                    tracker.count.advance(step.owned.ids)
