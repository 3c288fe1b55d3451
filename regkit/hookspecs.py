"""Everything that a plugin can teach regkit. A plugin implements any of these with `@regkit.hookimpl`."""

from __future__ import annotations

from typing import Final

import pluggy

from regkit.kinds import ActivityPenalty, Constraint, Penalty, Schedule
from regkit.sites import Adapter

GROUP: Final = "regkit"
"""The entry-point group, and pluggy's project name."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def regkit_penalties() -> list[type[Penalty]]:  # type: ignore[empty-body]  # a hookspec has no body
    """Penalties on weights."""


@hookspec
def regkit_activity_penalties() -> list[type[ActivityPenalty]]:  # type: ignore[empty-body]
    """Penalties on what a module puts out."""


@hookspec
def regkit_constraints() -> list[type[Constraint]]:  # type: ignore[empty-body]
    """Constraints on weights."""


@hookspec
def regkit_schedules() -> list[type[Schedule]]:  # type: ignore[empty-body]
    """Schedules of strengths and bounds."""


@hookspec
def regkit_adapters() -> list[Adapter]:  # type: ignore[empty-body]
    """Adapters for classes of recurrent modules."""
