"""No public name is lost: the names that programs and plugins may import have been these before the packages."""

from __future__ import annotations

from importlib import import_module

import pytest

import regkit

TOP = """
    Activity ActivityPenalty Adapter AttachError Attachment Constraint Example Form Output OutputSite Penalty Plan
    PluginError PluginWarning Problem Registry RegkitError RegkitWarning ResolveError Rule Schedule Segment Site Spec
    SpecError StepError Target Validity Weight WeightSite attach attachments hookimpl load register resolve schema
"""
MODULES = {
    "activity": """
        Activity Packed Pairs Reduction Segment Sequenced Stepped at_least_float32 of_output of_step
    """,
    "buckets": "buckets pieces room",
    "errors": """
        AttachError PluginError PluginWarning Problem RegkitError RegkitWarning ResolveError SpecError StepError listing
        nearest unknown
    """,
    "fields": "Count Fraction Index NonNegative Positive Real mistake mistakes_at",
    "kinds": "ActivityPenalty Constraint Kind Layout Penalty Schedule Separable Via",
    "testing": """
        Check ConformanceError Report Result check_activity_penalty check_adapter check_constraint check_example
        check_penalty check_schedule checks parametrize_conformance
    """,
    "integrations.lightning": "RegularizationCallback",
    "integrations.skorch": "RegularizationCallback RegularizedLoss",
    "integrations.transformers": "Document RegularizationCallback RegularizedTrainer",
}


def test_the_package_still_has_every_name():
    assert set(TOP.split()) <= set(regkit.__all__)


def test_the_package_lists_its_public_names_alone():
    assert {name for name in dir(regkit) if not name.startswith("__")} == set(regkit.__all__)
    assert {"__version__", "__doc__", "__path__"} <= set(dir(regkit))
    with pytest.raises(AttributeError, match="module 'regkit' has no attribute 'nothing'"):
        _ = regkit.nothing


@pytest.mark.parametrize("module", MODULES)
def test_a_module_still_has_every_name(module):
    if module.startswith("integrations."):
        pytest.importorskip(module.rpartition(".")[2])
    room = import_module(f"regkit.{module}")
    names = set(MODULES[module].split())
    assert names <= set(vars(room))
    assert names <= set(getattr(room, "__all__", names))
