"""Documents with a rule for every kind that comes with regkit, and for every way in which it may act."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

import regkit
from tests.support.laws import ACTS, CONS, PENS

Rule = dict[str, Any]
Document = list[Rule]


def _rule(kind: Any, **more: Any) -> Rule:
    on = "constraint" if isinstance(kind, regkit.Constraint) else "penalty"
    target = {} if 1 in getattr(kind, "ranks", (1,)) else {"role": ["kernel", "recurrent"]}
    return {"target": target, on: kind.model_dump(), **more}


def kind_of(rule: Rule) -> Rule:
    """The options of its kind, name included."""
    kind: Rule = rule.get("penalty") or rule["constraint"]
    return kind


def _label(rule: Rule) -> str:
    return " ".join(str(value) for key, value in kind_of(rule).items() if key in ("kind", "per", "mode", "l2"))


def _together(rules: Iterable[Rule]) -> list[Document]:
    """The same rules in as few documents as can be: in each a kind comes once, or it would act twice on a weight."""
    found: list[dict[str, Rule]] = []
    for rule in rules:
        kind = kind_of(rule)["kind"]
        home = next((one for one in found if kind not in one), None)
        if home is None:
            found.append(home := {})
        home[kind] = rule
    return [list(one.values()) for one in found]


def _via(way: str) -> list[Document]:
    kinds = [case.kind for case in PENS]
    return _together(_rule(kind, via=way) for kind in kinds if way != "proximal" or kind.offers_prox)


_L1 = {"kind": "l1", "strength": 0.1}
_L2 = {"kind": "l2", "strength": 0.1}
_BALL = {"kind": "max_norm", "max_value": 2.0}
_LINE = {"kind": "linear", "start": 2.0, "end": 1.0, "steps": 3}

_USUAL = [_rule(case.kind) for case in (*PENS, *CONS)]
ON_WEIGHTS: dict[str, Document] = {
    **{_label(rule): [rule] for rule in _USUAL},
    **{f"via {way}, {i}": rules for way in ("loss", "decoupled", "proximal") for i, rules in enumerate(_via(way))},
    "schedules": [{"target": {}, "penalty": _L1, "schedule": _LINE}, {"constraint": _BALL, "schedule": _LINE}],
    "every": [{"target": {}, "constraint": {"kind": "unit_norm"}, "every": 2}],
    "sum of biases": [{"target": {"role": "bias", "bias": "effective"}, "penalty": _L1, "via": "proximal"}],
    "gate": [{"target": {"gate": "forget"}, "penalty": _L2}],
}
"""Each kind on weights alone; then all in every other way; then what depends on the step, or on parts of weights."""

ON_ACTIVITY: dict[str, Document] = {way: [_rule(case.kind, via=way) for case in ACTS] for way in ("loss", "inject")}
"""All activity penalties, in both ways."""

ALL_TOGETHER: list[Document] = [*_together(_USUAL), *ON_ACTIVITY.values()]
"""Every kind in as few documents as can be."""


def attached(model: nn.Module, rules: Document) -> regkit.Attachment:
    """The rules in force on the model, in a loop that does not scale its loss."""
    injected = any(rule.get("via") == "inject" for rule in rules)
    return regkit.attach(model, {"rules": rules}, **({"loss_scale": 1.0} if injected else {}))
