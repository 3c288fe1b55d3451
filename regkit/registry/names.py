"""Names that regkit itself gives, takes or reserves. The help of the command line uses the room: no torch here."""

from __future__ import annotations

from typing import Final, Literal, get_args

Family = Literal["penalty", "activity penalty", "constraint", "schedule"]
"""The family of a kind."""

FAMILIES: Final[tuple[Family, ...]] = get_args(Family)
"""The families of kinds."""

OWN: Final = "torch-regkit"
"""The name of regkit's own distribution. The one called `regkit` on PyPI is a stranger's."""

RESERVED: Final = frozenset(
    {
        *("version", "provenance", "rules", "rule", "layers", "layer", "name", "kind", "target", "via", "optional"),
        *("penalty", "activity", "constraint", "schedule", "regkit"),
        *("null", "none", "true", "false", "any", "all", "auto", "default", "custom", "unknown"),
    }
)
"""Words of the document and of JSON, which no kind may be named."""
