"""Hints for authors: ways to make a kind faster that no law demands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal

from regkit import ActivityPenalty, Constraint, Penalty
from regkit.kinds import Kind
from regkit.testing.activities import parts as activity_parts
from regkit.testing.sharding.separable import adds_up, stands_alone

_WHERE: Final = "see regkit.kinds"


def hints(kind: Kind | type[Kind]) -> tuple[str, ...]:
    """A line for each function of a kind that runs for one weight after another and could run for all at once; and a
    line for each declaration that the kind could make and does not, tried on the examples of a class.
    """
    cls = kind if isinstance(kind, type) else type(kind)
    return (*_list_forms(cls), *sorted(set(map(_undeclared, _instances(kind))) - {""}))


def _instances(kind: Kind | type[Kind]) -> list[Kind]:
    if not isinstance(kind, type):
        return [kind]
    try:
        return list(kind.examples())
    except Exception:  # a stranger's code: that it raises is what a law tells
        return []


def _list_forms(cls: type[Kind]) -> Iterator[str]:
    if issubclass(cls, Penalty) and cls.add_gradients is Penalty.add_gradients:
        derived = ", and by autograd; a closed form costs less, and" if cls.gradient is Penalty.gradient else ";"
        yield f"gradient() is called once for each weight{derived} `add_gradients` takes all at once: {_WHERE}"
    if issubclass(cls, Constraint) and cls.project_ is Constraint.project_:
        yield f"project() is called once for each weight; `project_` takes all at once: {_WHERE}"


def _undeclared(kind: Kind) -> str:
    """The hint at a declaration that a kind could make; empty where there is none."""
    if isinstance(kind, ActivityPenalty):
        if kind.separable or not kind.offers_gradients or not _holds(lambda: activity_parts.adds_up(kind)):
            return ""
        return f"its outputs count one by one: declare separable = True, and many are reduced at once: {_WHERE}"
    if not isinstance(kind, Penalty | Constraint) or kind.separable is not None:
        return ""
    if _holds(lambda: _in_parts(kind, "elements")):
        parts = "elements"
    elif kind.layout != "cell" and _holds(lambda: _in_parts(kind, "rows")):
        parts = "rows"
    else:
        return ""
    return (
        f'its {parts} count one by one: declare separable = "{parts}", and no process need gather the weight: {_WHERE}'
    )


def _in_parts(kind: Penalty | Constraint, separable: Literal["elements", "rows"]) -> None:
    if isinstance(kind, Penalty):
        adds_up(kind, separable)
    else:
        stands_alone(kind, separable)


def _holds(trial: Callable[[], None]) -> bool:
    try:
        trial()
    except Exception:  # as above
        return False
    return True
