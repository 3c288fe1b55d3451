"""Everything that a plugin can teach regkit. A plugin implements any of these with `@regkit.hookimpl`.

Each is called once, when a registry is made or the plugin is registered.
"""

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
    """Return the `Penalty` classes that this plugin offers."""


@hookspec
def regkit_activity_penalties() -> list[type[ActivityPenalty]]:  # type: ignore[empty-body]
    """Return the `ActivityPenalty` classes that this plugin offers."""


@hookspec
def regkit_constraints() -> list[type[Constraint]]:  # type: ignore[empty-body]
    """Return the `Constraint` classes that this plugin offers."""


@hookspec
def regkit_schedules() -> list[type[Schedule]]:  # type: ignore[empty-body]
    """Return the `Schedule` classes that this plugin offers."""


@hookspec
def regkit_adapters() -> list[Adapter]:  # type: ignore[empty-body]
    """Return `Adapter` objects, one for each family of recurrent modules that this plugin knows."""
