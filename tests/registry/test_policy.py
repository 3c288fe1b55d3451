"""Which installed plugins may be imported: allowed and blocked by code and by the environment, never by a document."""

from __future__ import annotations

import sys

import pytest

import regkit
from regkit import PluginError, PluginWarning, Registry
from tests.support.plugins.installing import PLUGIN, Install


@pytest.fixture
def two(install: Install) -> None:
    install("Regkit_One", "1.0", "one_plugin", PLUGIN.format(name="one", title="One"), {"first": "one_plugin"})
    install("regkit-two", "2.0", "two_plugin", PLUGIN.format(name="two", title="Two"), {"second": "two_plugin"})


def strangers(registry: Registry) -> set[str]:
    return {entry.name for entry in registry.entries() if entry.origin.distribution != "torch-regkit"}


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("name", ["regkit-one", "Regkit_One", "regkit.one", "first", "regkit-one:first"])
def test_a_plugin_is_named_by_its_distribution_or_its_entry_point(monkeypatch, name):
    assert strangers(Registry(allow=[name])) == {"one"}
    assert strangers(Registry(block=[name])) == {"two"}
    monkeypatch.setenv("REGKIT_PLUGINS", f" {name} ,")
    assert strangers(Registry()) == {"one"}
    monkeypatch.delenv("REGKIT_PLUGINS")
    monkeypatch.setenv("REGKIT_DISABLE_PLUGINS", name)
    assert strangers(Registry()) == {"two"}


@pytest.mark.usefixtures("two")
def test_what_is_not_allowed_is_never_imported():
    registry = Registry(allow=["first"])
    assert "one_plugin" in sys.modules
    assert "two_plugin" not in sys.modules
    (other,) = [plugin for plugin in registry.plugins if plugin.state == "blocked"]
    assert str(other) == "regkit-two 2.0 (second), which is blocked: allow= does not name it"


@pytest.mark.usefixtures("two")
def test_regkits_own_kinds_need_no_leave_but_can_be_blocked():
    assert Registry(allow=[]).find("l2") is not None
    assert strangers(Registry(allow=[])) == set()
    assert strangers(Registry(allow=["torch-regkit"])) == set()
    registry = Registry(block=["torch-regkit:norms"])
    assert registry.find("l2") is None
    assert registry.find("max_norm") is not None
    assert Registry(block=["torch-regkit", "first", "second"]).entries() == []


@pytest.mark.usefixtures("two")
def test_code_and_environment_must_both_agree(monkeypatch):
    monkeypatch.setenv("REGKIT_PLUGINS", "first,second")
    assert strangers(Registry(allow=["first"])) == {"one"}
    assert strangers(Registry(block=["first"])) == {"two"}
    monkeypatch.setenv("REGKIT_DISABLE_PLUGINS", "second")
    assert strangers(Registry()) == {"one"}
    assert strangers(Registry(allow=["second"])) == set()


@pytest.mark.usefixtures("two")
def test_an_empty_variable_says_nothing(monkeypatch):
    for name in ("REGKIT_PLUGINS", "REGKIT_DISABLE_PLUGINS", "REGKIT_STRICT_PLUGINS"):
        monkeypatch.setenv(name, "")
    assert strangers(Registry()) == {"one", "two"}


@pytest.mark.usefixtures("two")
def test_an_allowed_name_that_nothing_has_is_an_error_with_the_nearest(monkeypatch):
    with pytest.raises(PluginError, match="allow= names 'regkit-tow', which no installed plugin is; did you mean 'reg"):
        Registry(allow=["regkit-tow"])
    monkeypatch.setenv("REGKIT_PLUGINS", "regkit-oen")
    with pytest.raises(PluginError, match=r"REGKIT_PLUGINS names 'regkit-oen'.*'regkit-one'"):
        Registry()


@pytest.mark.usefixtures("two")
def test_a_blocked_name_that_nothing_has_is_a_warning():
    """A list of what to block may be shared by environments that do not have it all."""
    with pytest.warns(PluginWarning, match="block= names 'regkit-tow'.*did you mean 'regkit-two'"):
        assert strangers(Registry(block=["regkit-tow"])) == {"one", "two"}


def test_what_cannot_be_understood_is_refused(monkeypatch):
    with pytest.raises(PluginError, match="not the string 'regkit-one'"):
        Registry(allow="regkit-one")
    with pytest.raises(PluginError, match="entry_points is False"):
        Registry(entry_points=False, block=["regkit-one"])
    monkeypatch.setenv("REGKIT_STRICT_PLUGINS", "yes")
    with pytest.raises(PluginError, match="1 or 0, not 'yes'"):
        Registry()


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("key", ["plugins", "allow", "block", "registry"])
def test_a_document_has_no_say_in_it(key):
    with pytest.raises(regkit.SpecError, match=f"unknown key '{key}'"):
        regkit.load({key: ["regkit-one"], "rules": [{"penalty": "l2(1)"}]}, registry=Registry())
