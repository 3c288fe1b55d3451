"""How a kind on weights could be faster, for whoever wants it to be: what no law asks."""

from __future__ import annotations

from regkit import Constraint, Penalty
from regkit.kinds import Kind


def hints(kind: Kind | type[Kind]) -> tuple[str, ...]:
    """A line for each of its functions that runs for one weight after another at each step, and could for all at once.

    None for a kind that is not on weights.
    """
    cls = kind if isinstance(kind, type) else type(kind)
    if issubclass(cls, Penalty) and cls.add_gradients is Penalty.add_gradients:
        derived = ", and by autograd; a closed form costs less, and" if cls.gradient is Penalty.gradient else ";"
        return (f"gradient() is called once for each weight{derived} `add_gradients` takes all at once: {_WHERE}",)
    if issubclass(cls, Constraint) and cls.project_ is Constraint.project_:
        return (f"project() is called once for each weight; `project_` takes all at once: {_WHERE}",)
    return ()


_WHERE = "see regkit.kinds"
