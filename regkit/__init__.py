"""Keras-style regularization of recurrent layers in existing PyTorch models, from a JSON document.

attachment = regkit.attach(model, "spec.json")
for x, y in loader:
    loss = criterion(model(x), y) + attachment.penalty()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from regkit.activity import Activity, Segment
    from regkit.attaching import attach, attachments
    from regkit.attachment import Attachment
    from regkit.document import load
    from regkit.errors import (
        AttachError,
        PluginError,
        PluginWarning,
        Problem,
        RegkitError,
        ResolveError,
        SpecError,
        StepError,
    )
    from regkit.hookspecs import hookimpl
    from regkit.jsonschema import schema
    from regkit.kinds import ActivityPenalty, Constraint, Penalty, Schedule
    from regkit.plan import Plan, resolve
    from regkit.registry import Registry, register
    from regkit.sites import Adapter, Example, Form, Output, OutputSite, Site, Weight, WeightSite
    from regkit.spec import Rule, Spec
    from regkit.target import Target
    from regkit.validity import Validity

__version__ = "0.1.0"

# Each public name is imported from its room when it is first asked for (PEP 562): `import regkit` alone costs nothing,
# and a program that only reads documents, or asks for the version, does not wait for torch.
_ROOMS: Final = {
    "activity": ("Activity", "Segment"),
    "attaching": ("attach", "attachments"),
    "attachment": ("Attachment",),
    "document": ("load",),
    "errors": (
        *("AttachError", "PluginError", "PluginWarning", "Problem", "RegkitError", "ResolveError", "SpecError"),
        "StepError",
    ),
    "hookspecs": ("hookimpl",),
    "jsonschema": ("schema",),
    "kinds": ("ActivityPenalty", "Constraint", "Penalty", "Schedule"),
    "plan": ("Plan", "resolve"),
    "registry": ("Registry", "register"),
    "sites": ("Adapter", "Example", "Form", "Output", "OutputSite", "Site", "Weight", "WeightSite"),
    "spec": ("Rule", "Spec"),
    "target": ("Target",),
    "validity": ("Validity",),
}
_ROOM_OF: Final = {name: room for room, names in _ROOMS.items() for name in names}

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
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # or a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _ROOM_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
        return value
