"""The rows of the tables: ways to regularize a step, regkit's and others'."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final, Literal

from tests.benchmarks import by_hand
from tests.benchmarks.by_hand import BOUND, SMALL, Loop, Parametrize, Term
from tests.benchmarks.workloads import Workload

Floor = Literal["axpy", "row norms", "read and write"]
Optimizer = Literal["Adam", "Adam foreach", "Adam fused", "SGD"]


@dataclass(frozen=True)
class Way:
    """One way to regularize a step.

    rules: what is attached; term: what is added to the loss; loop: what is done after the step; decay: the optimizer's
    own `weight_decay`; parametrize: what is done to the net before, where it is a loop over a cell. floor: what it is a
    multiple of. matrices: whether it leaves the biases alone, as constraints do. penalizes: whether
    `attachment.penalty()` is part of the loss. outputs: whether it acts on those, and so needs some in time. calls: how
    many calls on its own make one sample.
    """

    name: str
    rules: tuple[dict[str, Any], ...] = ()
    term: Term | None = None
    loop: Loop | None = None
    decay: float = 0.0
    parametrize: Parametrize | None = None
    optimizer: Optimizer = "Adam"
    floor: Floor | None = "axpy"
    matrices: bool = False
    penalizes: bool = False
    outputs: bool = False
    calls: int | None = None

    @property
    def at_step(self) -> bool:
        """Whether all that it adds is within the optimizer's step or right after it."""
        return self.loop is not None or self.decay > 0 or (bool(self.rules) and not self.penalizes)

    @property
    def works_alone(self) -> bool:
        """Whether there is work to be timed on its own."""
        return self.parametrize is None and (self.at_step or self.penalizes or self.term is not None)


def _l2(**more: Any) -> dict[str, Any]:
    return {"penalty": {"kind": "l2", "strength": SMALL}, **more}


def _l1() -> dict[str, Any]:
    return {"penalty": {"kind": "l1", "strength": SMALL}}


def _on_matrices(**rule: Any) -> dict[str, Any]:
    return {"target": {"role": ["kernel", "recurrent"]}, **rule}


_ELASTIC: Final = {"penalty": {"kind": "l1_l2", "l1": SMALL, "l2": SMALL}}
_FAR: Final = {"constraint": {"kind": "max_norm", "max_value": 1e6}}
_NEAR: Final = {"constraint": {"kind": "max_norm", "max_value": BOUND}}
_AR: Final = {"penalty": {"kind": "activity_l2", "strength": 2.0}}
_TAR: Final = {"penalty": {"kind": "temporal", "strength": 1.0}}
_ORTHOGONAL: Final = _on_matrices(penalty={"kind": "orthogonal", "strength": SMALL})
_UNIT: Final = {"constraint": "unit_norm"}
_POSITIVE: Final = {"constraint": "non_negative"}

WAYS: Final = (
    Way("A/A", floor=None),
    Way("L2: regkit", rules=(_l2(),)),
    Way("L2: regkit, 64 steps with their look at the weights", rules=(_l2(),), calls=64),
    Way("L2: regkit, kernel and recurrent as two rules", matrices=True,
        rules=(_l2(target={"role": "kernel"}), _l2(target={"role": "recurrent"}))),
    Way("L2: one _foreach_add_ by hand", loop=by_hand.one_addition),
    Way("L2: regkit, via the loss", rules=(_l2(via="loss"),), penalizes=True),
    Way("L2: loss term", term=by_hand.l2_term),
    Way("L2: loss term, one autograd Function", term=by_hand.l2_function),
    Way("L2: weight_decay, single", decay=SMALL),
    Way("L2: weight_decay, foreach", decay=SMALL, optimizer="Adam foreach"),
    Way("L2: weight_decay, fused", decay=SMALL, optimizer="Adam fused"),
    Way("L2: regkit, SGD", rules=(_l2(),), optimizer="SGD"),
    Way("L2: weight_decay, SGD", decay=SMALL, optimizer="SGD"),
    Way("L1: regkit", rules=(_l1(),)),
    Way("L1: loss term", term=by_hand.l1_term),
    Way("elastic net: regkit", rules=(_ELASTIC,)),
    Way("elastic net: regkit, L1 and L2 as two rules", rules=(_l1(), _l2())),
    Way("elastic net: loss term", term=by_hand.elastic_term),
    Way("orthogonal: regkit", rules=(_ORTHOGONAL,), matrices=True),
    Way("orthogonal: loss term", term=by_hand.orthogonal_term, matrices=True),
    Way("orthogonal: torch's parametrization", parametrize=by_hand.orthogonal_parametrized, floor=None),
    Way("orthogonal: geotorch", parametrize=by_hand.orthogonal_by_geotorch, floor=None),
    Way("max-norm, nothing violates: regkit", rules=(_FAR,), floor="row norms", matrices=True),
    Way("max-norm, every row violates: regkit", rules=(_NEAR,), floor="row norms", matrices=True),
    Way("max-norm: renorm_ loop", loop=by_hand.renorm_loop, floor="row norms", matrices=True),
    Way("max-norm: loop of norms", loop=by_hand.max_norm_loop, floor="row norms", matrices=True),
    Way("max-norm: parametrization", parametrize=by_hand.max_norm_parametrized, floor=None),
    Way("max-norm: Keras' formula", loop=by_hand.max_norm_of_keras, floor="row norms", matrices=True),
    Way("unit-norm: regkit", rules=(_UNIT,), floor="row norms", matrices=True),
    Way("unit-norm: loop", loop=by_hand.unit_norm_loop, floor="row norms", matrices=True),
    Way("non-negative: regkit", rules=(_POSITIVE,), floor="read and write", matrices=True),
    Way("non-negative: Keras' formula", loop=by_hand.non_negative_of_keras, floor="read and write", matrices=True),
    Way("AR: regkit", rules=(_AR,), penalizes=True, outputs=True, floor=None),
    Way("AR: loss term", term=by_hand.ar_term, outputs=True, floor=None),
    Way("AR and TAR: regkit", rules=(_AR, _TAR), penalizes=True, outputs=True, floor=None),
    Way("AR and TAR: loss term", term=by_hand.ar_tar_term, outputs=True, floor=None),
)  # fmt: skip

GROWING: Final = ("L2: regkit", "L2: loss term", "max-norm, every row violates: regkit", "max-norm: loop of norms")
"""The rows of the growth curves."""


def ways_of(workload: Workload) -> list[Way]:
    """Those that make sense of a workload, with what is installed."""
    return [
        way
        for way in WAYS
        if not (way.outputs and workload.cells and not workload.loops)
        and (way.parametrize is None or workload.loops)
        and (way.parametrize is not by_hand.orthogonal_by_geotorch or find_spec("geotorch"))
    ]
