"""Plugins of installed distributions: found by their entry points, named when they are broken or clash."""

import importlib.metadata
import inspect
import pkgutil
import subprocess
import sys
import textwrap

import pytest

import regkit
from regkit import Adapter, Constraint, Penalty, PluginError, Registry, Schedule
from regkit.kinds import ActivityPenalty, Kind

PLUGIN = """
from typing import Literal
import regkit

class {title}(regkit.Penalty):
    '''The sum of {name}.'''
    kind: Literal["{name}"] = "{name}"

    def value(self, w):
        return w.sum()

@regkit.hookimpl
def regkit_penalties():
    return [{title}]
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make a distribution with one module and an entry point for it, as an installer would leave it behind."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(distribution, version, module, code, points=None):
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = "\n".join(f"{name} = {target}" for name, target in (points or {module: module}).items())
        (info / "entry_points.txt").write_text(f"[regkit]\n{lines}\n")
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, module, raising=False)

    yield install
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


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
    for word in ("first-one 1.0", "second-one 2.5", "first_plugin", "second_plugin"):
        assert word in str(caught.value)


def test_a_distribution_cannot_take_the_name_of_a_standard_kind(install):
    install("usurper", "1.0", "usurper_plugin", PLUGIN.format(name="l2", title="L2"))
    with pytest.raises(PluginError, match="'l2'") as caught:
        Registry()
    assert "usurper 1.0" in str(caught.value)
    assert f"regkit {regkit.__version__}" in str(caught.value)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import a_module_that_is_not_there", ["a_module_that_is_not_there", "does not import"]),
        ("def f(:", ["SyntaxError", "does not import"]),
        ("1 / 0", ["ZeroDivisionError", "does not import"]),
        ("import regkit\n@regkit.hookimpl\ndef regkit_penalties():\n    1 / 0", ["ZeroDivisionError", "regkit_pen"]),
        ("import regkit\n@regkit.hookimpl\ndef regkit_penaltys():\n    return []", ["regkit_penaltys"]),
        ("import regkit\n@regkit.hookimpl\ndef regkit_penalties(model):\n    return []", ["regkit_penalties", "model"]),
        ("import regkit\n@regkit.hookimpl\ndef regkit_penalties():\n    return [3]", ["3", "Penalty"]),
        ("import regkit\n@regkit.hookimpl\ndef regkit_penalties():\n    pass", ["regkit_penalties"]),
    ],
)  # fmt: skip
def test_a_broken_plugin_is_named_with_its_distribution(install, code, words):
    install("regkit-broken", "3.1", "broken_plugin", code)
    with pytest.raises(PluginError) as caught:
        Registry()
    for word in ["regkit-broken 3.1", *words]:
        assert word in str(caught.value)


def test_a_plugin_that_does_not_import_is_named_by_its_entry_point(install):
    install("regkit-broken", "3.1", "broken_plugin", "", {"my_point": "broken_plugin:absent"})
    with pytest.raises(PluginError, match=r"'my_point'.*absent"):
        Registry()


def test_the_standard_kinds_come_through_entry_points():
    points = importlib.metadata.entry_points(group="regkit")
    ours = [point for point in points if point.dist.name == "regkit"]
    assert {point.value.partition(".")[0] for point in ours} == {"regkit_standard"}
    modules = {point.value for point in ours}
    entries = Registry().entries()
    assert {entry.kind.__module__ for entry in entries} <= modules
    assert {entry.origin.distribution for entry in entries} == {"regkit"}
    assert {entry.family for entry in entries} == {"penalty", "activity penalty", "constraint", "schedule"}


def test_no_kind_and_no_adapter_lives_in_the_package():
    contracts = (Penalty, ActivityPenalty, Constraint, Schedule, Adapter)
    found = []
    names = [name for _, name, _ in pkgutil.walk_packages(regkit.__path__, "regkit.") if not name.endswith("__main__")]
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
            and value not in (Kind, *contracts)
            and not value.__name__.startswith("_")
        ]
    assert found == []
    assert all(inspect.isabstract(contract) for contract in contracts)


def test_importing_regkit_imports_no_plugin():
    code = "import sys, regkit; print([m for m in sys.modules if m.startswith('regkit_standard')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
