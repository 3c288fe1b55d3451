"""The hooks of plugins: a plugin implements any number of these functions with `@regkit.hookimpl`.

Each is called once, when a registry is made or the plugin is registered.
"""

from __future__ import annotations

from typing import Final

import pluggy

from regkit.adapters import Adapter
from regkit.kinds import ActivityPenalty, Constraint, Penalty, Schedule

GROUP: Final = "regkit"
"""The entry-point group, and pluggy's project name."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)
"""A decorator that marks a function of a plugin as one of the hooks, such as `regkit_penalties`."""


@hookspec
def regkit_penalties() -> list[type[Penalty]]:
    """Return the `Penalty` classes that this plugin offers."""
    return []


@hookspec
def regkit_activity_penalties() -> list[type[ActivityPenalty]]:
    """Return the `ActivityPenalty` classes that this plugin offers."""
    return []


@hookspec
def regkit_constraints() -> list[type[Constraint]]:
    """Return the `Constraint` classes that this plugin offers."""
    return []


@hookspec
def regkit_schedules() -> list[type[Schedule]]:
    """Return the `Schedule` classes that this plugin offers."""
    return []


@hookspec
def regkit_adapters() -> list[Adapter]:
    """Return `Adapter` objects, one for each family of recurrent modules that this plugin knows."""
    return []
