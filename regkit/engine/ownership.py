"""Ownership: which parameters optimizers own, and the error that no optimizer owns a weight under a rule."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable
from itertools import chain
from typing import Final

from torch import nn
from torch.optim import Optimizer

from regkit.engine.program import Program
from regkit.errors import RegkitWarning, StepError, listing
from regkit.rules.rule_set import RuleSet
from regkit.weights.snapshot import Snapshot

_HIDDEN: Final = (
    "no optimizer that can be seen owns {}, though its neighbours are being trained: if none does, a rule on it can "
    "never act. It cannot be told, for gc.freeze() hides optimizers made before it; freeze after the first steps"
)


class Ownership:
    """The knowledge of the owners of a model's parameters.

    parameters: the model's.
    seen: the optimizers that have stepped.
    """

    def __init__(self, rules: RuleSet, parameters: Iterable[nn.Parameter]) -> None:
        self._rules, self._parameters = rules, parameters
        self.seen: set[weakref.ref[Optimizer]] = set()
        self._owned: set[int] = set()
        """The ids of parameters that optimizers were found to own, or that a manual step has trained."""
        self._owned_now: tuple[Snapshot, set[int]] | None = None
        """The ids of the parameters that optimizers owned when a snapshot was taken."""

    def expected(self, snapshot: Snapshot) -> set[int]:
        """The ids of the model's trainable parameters that any optimizer owns."""
        if self._owned_now is None or self._owned_now[0] is not snapshot:
            self._owned_now = snapshot, owned_by_any() | self._owned
        owned = self._owned_now[1]
        return {key for key, parameter in snapshot.parameters.items() if key in owned and parameter.requires_grad}

    def trained_by_hand(self, ids: frozenset[int]) -> None:
        """Take note that a manual step has trained the parameters of these ids, which need no optimizer then."""
        self._owned |= ids

    def verify(self, optimizer: Optimizer, program: Program) -> None:
        """At an optimizer's first step, raise StepError for a weight of the trained model that no optimizer owns."""
        groups = program.owned.all_groups
        if any(id(p) in groups for p in self._parameters):
            self._owned |= set(groups)
            self._refuse_unowned(program.snapshot)
        self.seen.add(weakref.ref(optimizer, self.seen.discard))

    def _refuse_unowned(self, snapshot: Snapshot) -> None:
        blocks = chain.from_iterable(rule.blocks for rule in self._rules.on_weights if not rule.binding.optional)
        kept = ((block, storage) for block in blocks for storage in snapshot.storages[block])
        trainable = [(block, p) for block, storage in kept for p in storage.parameters if p.requires_grad]
        if any(id(p) not in self._owned for _, p in trainable):
            self._owned |= owned_by_any()
        unowned = [(block, p) for block, p in trainable if id(p) not in self._owned]
        names = [block.name for block, _ in unowned]
        if unowned and all(_hidden(p for _, p in unowned)):
            warnings.warn(_HIDDEN.format(listing(names)), RegkitWarning, stacklevel=2)
        elif unowned:
            raise StepError(
                f"no optimizer owns {listing(names)}, though its neighbours are being trained: a rule on it can never "
                "act. Give it to an optimizer, freeze it (requires_grad_(False)), update it inside `with "
                'attachment.step():`, or narrow the rule\'s target; a rule with "optional": true may act on nothing'
            )

    def release(self) -> None:
        """Hold no snapshot any more."""
        self._owned_now = None


def owned_by_any() -> set[int]:
    """The ids of all parameters of all optimizers in the process.

    torch keeps no list of optimizers; the garbage collector does, and is asked at most once for each optimizer. It
    shows none that was made before `gc.freeze()`: see `_hidden`.
    """
    optimizers = [one for one in gc.get_objects() if issubclass(type(one), Optimizer)]
    return {id(p) for one in optimizers for group in getattr(one, "param_groups", ()) for p in group["params"]}


def _hidden(parameters: Iterable[nn.Parameter]) -> list[bool]:
    """Whether `gc.freeze()` hides each parameter, and so any optimizer that was made of the parameter before."""
    shown = set(map(id, gc.get_objects()))
    return [id(parameter) not in shown for parameter in parameters]
