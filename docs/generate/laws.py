"""The page of the laws that kinds and adapters keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from docs.generate.markdown import table
from regkit.testing.activities import laws as activities
from regkit.testing.adapters import laws as adapters
from regkit.testing.kinds import constraints, penalties, schedules
from regkit.testing.kinds.common import EXAMPLES, KIND_LAWS
from regkit.testing.laws import Law

_INTRODUCTION: Final = """# Laws

Every kind and every adapter keeps these laws: regkit's own, and yours, which `parametrize_conformance` of
[`regkit.testing`](api/testing.md) tries in a test suite and `regkit conformance DISTRIBUTION` from a shell. A law is
tried on each example that a kind or an adapter has, if it applies there. Here each says why it matters.
"""

FAMILIES: Final[Mapping[str, Iterable[Law[Any]]]] = {
    "every kind": [EXAMPLES, *KIND_LAWS],
    "penalties": penalties.LAWS,
    "activity penalties": activities.LAWS,
    "constraints": constraints.LAWS,
    "schedules": schedules.LAWS,
    "adapters": adapters.LAWS,
}
"""The laws by what they are of. Those of every kind are in the tables of its families, too."""


def laws() -> str:
    """The page."""
    everywhere = {law.name for law in KIND_LAWS}
    parts = [_INTRODUCTION]
    for family, of_family in FAMILIES.items():
        own = [law for law in of_family if family == "every kind" or law.name not in everywhere]
        rows = [[f"`{law.name}`", law.why] for law in own]
        parts.append(f"## Laws of {family}\n\n{table(['law', 'why it matters'], rows)}\n")
    return "\n".join(parts)
