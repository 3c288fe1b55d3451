"""Plugins of installed distributions: found by their entry points, imported when asked for, named when they clash."""

import ast
import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys

import pytest

import regkit
from regkit import Adapter, Constraint, Penalty, PluginError, Registry, Schedule
from regkit.document.context import MissingKind
from regkit.kinds import ActivityPenalty, Kind
from tests.support.plugins.installing import PLUGIN


def test_an_installed_distribution_is_found_with_its_version(install):
    install("regkit-nuclear", "1.2", "nuclear_plugin", PLUGIN.format(name="nuclear", title="Nuclear"))
    registry = Registry()
    entry = registry.find("nuclear")
    assert (entry.family, entry.name, entry.meaning) == ("penalty", "nuclear", "The sum of nuclear.")
    assert (entry.origin.distribution, entry.origin.version) == ("regkit-nuclear", "1.2")
    spec = regkit.load({"rules": [{"penalty": "nuclear(1)"}]}, registry=registry)
    assert '"distribution": "regkit-nuclear",\n      "version": "1.2"' in spec.to_json(registry)
    assert Registry(entry_points=False).entries() == []


def test_two_distributions_that_offer_one_name_are_both_named_with_their_versions(install):
    install("first-one", "1.0", "first_plugin", PLUGIN.format(name="nuclear", title="A"))
    install("second-one", "2.5", "second_plugin", PLUGIN.format(name="nuclear", title="B"))
    with pytest.raises(PluginError, match="'nuclear'") as caught:
        Registry()
    for word in ("first-one 1.0", "second-one 2.5", "first_plugin", "second_plugin", "REGKIT_DISABLE_PLUGINS"):
        assert word in str(caught.value)
    assert Registry(block=["first-one"]).find("nuclear").origin.distribution == "second-one"


def test_a_distribution_cannot_take_the_name_of_a_standard_kind(install):
    install("usurper", "1.0", "usurper_plugin", PLUGIN.format(name="l2", title="L2"))
    with pytest.raises(PluginError, match="'l2'") as caught:
        Registry()
    assert "usurper 1.0" in str(caught.value)
    assert f"torch-regkit {regkit.__version__}" in str(caught.value)
    assert Registry(block=["norms"]).find("l2").origin.distribution == "usurper"  # who wants it says so


def test_two_entry_points_of_one_name_are_an_error_and_not_the_first_of_them(install):
    """pluggy would take one, and leave out the other without a word."""
    install("first-one", "1.0", "first_plugin", PLUGIN.format(name="one", title="A"), {"extra": "first_plugin"})
    install("second-one", "2.5", "second_plugin", PLUGIN.format(name="two", title="B"), {"extra": "second_plugin"})
    with pytest.raises(PluginError, match="entry point 'extra'") as caught:
        Registry()
    for word in ("first-one 1.0", "second-one 2.5", "first_plugin", "second_plugin", "REGKIT_DISABLE_PLUGINS"):
        assert word in str(caught.value)
    registry = Registry(block=["second-one:extra"])
    assert registry.find("one") is not None
    assert registry.find("two") is None


ADAPTER = """
import regkit
from torch import nn

class Mine(regkit.Adapter):
    modules = ({known},)

    def weights(self, module): return []
    def outputs(self, module): return []
    def observe(self, module, args, kwargs, result): return {{}}
    def segments(self, module, site, observed, valid, step): return []

@regkit.hookimpl
def regkit_adapters():
    return [Mine()]
"""


@pytest.mark.parametrize("known", ["nn.GRU", "'torch.nn.modules.rnn:GRU'"])
def test_two_adapters_of_one_class_are_both_named(install, known):
    install("their-rnns", "4.0", "their_rnns", ADAPTER.format(known=known))
    with pytest.raises(PluginError, match=r"adapter for GRU: .*their-rnns 4\.0") as caught:
        Registry()
    assert f"torch-regkit {regkit.__version__}" in str(caught.value)


def test_every_clash_is_told_at_once(install):
    install("first-one", "1.0", "first_plugin", PLUGIN.format(name="l1", title="A"))
    install("second-one", "2.5", "second_plugin", PLUGIN.format(name="l2", title="B"))
    with pytest.raises(PluginError, match=r"(?s)'l1'.*'l2'"):
        Registry()


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("nuclear", True),
        ("regkit_low_rank.nuclear", True),
        ("regkit.nuclear", False),
        ("torch_regkit.nuclear", False),
        ("keras.nuclear", False),
    ],
)
def test_a_name_with_a_dot_begins_with_its_distributions_own(install, name, allowed):
    install("Regkit.Low-Rank", "1.0", "low_rank", PLUGIN.format(name=name, title="Nuclear"))
    if allowed:
        assert Registry().find(name) is not None
    else:
        with pytest.warns(regkit.PluginWarning, match=r"'nuclear', or 'regkit_low_rank\.nuclear'"):
            assert Registry().find(name) is None


def test_the_standard_kinds_come_through_entry_points():
    points = importlib.metadata.entry_points(group="regkit")
    ours = [point for point in points if point.dist.name == "torch-regkit"]
    assert {point.value.partition(".")[0] for point in ours} == {"regkit_standard"}
    modules = {point.value for point in ours}
    entries = Registry().entries()
    assert {entry.kind.__module__ for entry in entries} <= modules
    assert {entry.origin.distribution for entry in entries} == {"torch-regkit"}
    assert {entry.family for entry in entries} == {"penalty", "activity penalty", "constraint", "schedule"}


def test_no_kind_and_no_adapter_lives_in_the_package():
    contracts = (Penalty, ActivityPenalty, Constraint, Schedule, Adapter)
    found = []
    names = [name for _, name, _ in pkgutil.walk_packages(regkit.__path__, "regkit.") if not name.endswith("__main__")]
    names = [name for name in names if "testing" not in name]  # some laws bring what they try an adapter with
    assert len(names) > 10
    for name in names:
        module = importlib.import_module(name)
        found += [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, (Kind, Adapter))
            and value.__module__.split(".")[0] == "regkit"
            and not inspect.isabstract(value)
            and value not in (Kind, MissingKind, *contracts)
            and not value.__name__.startswith("_")
        ]
    assert found == []
    assert all(inspect.isabstract(contract) for contract in contracts)


def modules_after(code):
    """The modules that a program has imported beyond those of a bare interpreter."""
    program = f"import sys; bare = set(sys.modules)\n{code}\nprint(*sorted(set(sys.modules) - bare))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_importing_regkit_imports_nothing_else():
    """So it costs no more than torch, for whoever has imported that: its rooms come when they are asked for."""
    found = modules_after("import regkit; regkit.__version__")
    assert {name for name in found if name.split(".")[0] not in sys.stdlib_module_names} == {"regkit"}
    assert len(found) < 30


def test_no_plugin_is_imported_before_a_kind_is_asked_for():
    found = modules_after("import regkit; regkit.attach; regkit.load; regkit.Penalty; regkit.Registry")
    assert {"torch", "pydantic", "regkit.attachment.attaching"} <= found
    assert not any(name.startswith("regkit_standard") for name in found)
    assert "regkit_standard.l1_l2" in modules_after("import regkit; regkit.load({'rules': [{'penalty': 'l2(1)'}]})")


def test_what_is_public_is_said_three_times_and_alike():
    """For `import *`, for whoever asks at run time, and for type checkers."""
    tree = ast.parse(inspect.getsource(regkit))
    (seen,) = (
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "_typing.TYPE_CHECKING"
    )
    typed = {alias.name: one.module for one in seen.body for alias in one.names}
    assert typed == {name: f"regkit.{room}" for room, names in regkit._ROOMS.items() for name in names}
    assert sorted(typed) == regkit.__all__
    rooms = {name for _, name, _ in pkgutil.iter_modules(regkit.__path__)}
    assert rooms.isdisjoint(regkit.__all__)  # or a room that is imported later would take the name


def test_every_public_name_is_found_and_no_other():
    assert [name for name in dir(regkit) if not name.startswith("__")] == sorted(regkit.__all__)
    for name in regkit.__all__:
        assert getattr(regkit, name) is getattr(regkit, name)
    assert callable(regkit.schema)  # beside rooms that are imported by the way
    with pytest.raises(AttributeError, match="has no attribute 'atach'"):
        regkit.atach  # noqa: B018  # to ask is the point
