"""Keras-style regularization of recurrent layers in existing PyTorch models, from a JSON document.

attachment = regkit.attach(model, "spec.json")
for x, y in loader:
    loss = criterion(model(x), y) + attachment.penalty()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from regkit.activity import Activity, Segment
    from regkit.activity.padding import Validity
    from regkit.adapters import Adapter, Example, Form, Output, OutputSite, Site, Weight, WeightSite
    from regkit.attachment.attaching import attach, attachments
    from regkit.attachment.attachment import Attachment
    from regkit.document.json_schema import schema
    from regkit.document.reader import load
    from regkit.document.spec import Rule, Spec
    from regkit.document.target import Target
    from regkit.errors import (
        AttachError,
        PluginError,
        PluginWarning,
        Problem,
        RegkitError,
        RegkitWarning,
        ResolveError,
        SpecError,
        StepError,
    )
    from regkit.kinds import ActivityPenalty, Constraint, Penalty, Schedule
    from regkit.plan.plan import Plan, resolve
    from regkit.registry.hookspecs import hookimpl
    from regkit.registry.registry import Registry, register

__version__ = "0.1.0"

# Each public name is imported from its module when it is first asked for (PEP 562). `import regkit` alone, the version
# and the errors import no torch; other names do, `load` too, which validates documents by the classes of their kinds.
_ROOMS: _typing.Final = {
    "activity": ("Activity", "Segment"),
    "attachment.attaching": ("attach", "attachments"),
    "attachment.attachment": ("Attachment",),
    "document.reader": ("load",),
    "errors": (
        *("AttachError", "PluginError", "PluginWarning", "Problem", "RegkitError", "ResolveError", "SpecError"),
        *("RegkitWarning", "StepError"),
    ),
    "registry.hookspecs": ("hookimpl",),
    "document.json_schema": ("schema",),
    "kinds": ("ActivityPenalty", "Constraint", "Penalty", "Schedule"),
    "plan.plan": ("Plan", "resolve"),
    "registry.registry": ("Registry", "register"),
    "adapters": ("Adapter", "Example", "Form", "Output", "OutputSite", "Site", "Weight", "WeightSite"),
    "document.spec": ("Rule", "Spec"),
    "document.target": ("Target",),
    "activity.padding": ("Validity",),
}
_ROOM_OF: _typing.Final = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "Activity",
    "ActivityPenalty",
    "Adapter",
    "AttachError",
    "Attachment",
    "Constraint",
    "Example",
    "Form",
    "Output",
    "OutputSite",
    "Penalty",
    "Plan",
    "PluginError",
    "PluginWarning",
    "Problem",
    "Registry",
    "RegkitError",
    "RegkitWarning",
    "ResolveError",
    "Rule",
    "Schedule",
    "Segment",
    "Site",
    "Spec",
    "SpecError",
    "StepError",
    "Target",
    "Validity",
    "Weight",
    "WeightSite",
    "attach",
    "attachments",
    "hookimpl",
    "load",
    "register",
    "resolve",
    "schema",
]


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


if not _typing.TYPE_CHECKING:  # or a type checker would take any name for a public one

    def __getattr__(name: str) -> _typing.Any:
        if name not in _ROOM_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(_importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
        return value
