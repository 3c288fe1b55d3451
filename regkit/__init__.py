"""Keras-style regularization of recurrent layers in existing PyTorch models, from a JSON document.

attachment = regkit.attach(model, "spec.json")
for x, y in loader:
    loss = criterion(model(x), y) + attachment.penalty()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
"""

from regkit.activity import Activity, Segment
from regkit.attaching import attach, attachments
from regkit.attachment import Attachment
from regkit.document import load
from regkit.errors import AttachError, PluginError, Problem, RegkitError, ResolveError, SpecError, StepError
from regkit.hookspecs import hookimpl
from regkit.kinds import ActivityPenalty, Constraint, Penalty, Schedule
from regkit.plan import Plan, resolve
from regkit.registry import Registry
from regkit.schema import schema
from regkit.sites import Adapter, Output, OutputSite, Site, Weight, WeightSite
from regkit.spec import Rule, Spec
from regkit.target import Target
from regkit.validity import Validity

__version__ = "0.1.0"

__all__ = [
    "Activity",
    "ActivityPenalty",
    "Adapter",
    "AttachError",
    "Attachment",
    "Constraint",
    "Output",
    "OutputSite",
    "Penalty",
    "Plan",
    "PluginError",
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
    "resolve",
    "schema",
]
