"""Plugins that do while they are loaded what nobody expects: they fail in their own way, and hurt nobody else."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys

import pytest

import regkit
from regkit import PluginError, PluginWarning, Registry
from tests.support.plugins.installing import PLUGIN

ONE = PLUGIN.format(name="one", title="One")
REGISTERED = ONE.replace("class One", "@regkit.register\nclass One")
HOOK = "import regkit\n@regkit.hookimpl\ndef regkit_penalties():\n    "
CLASS = """
import regkit
class Odd(regkit.{of}):
    {body}
@regkit.hookimpl
def regkit_{hook}():
    return [Odd{call}]
"""


def after_loading() -> Registry:
    with pytest.warns(PluginWarning):
        registry = Registry()
    assert registry.find("l2") is not None
    return registry


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (REGISTERED, ["does not import", "leave @regkit.register off"]),
        (
            f"{HOOK}return [regkit.registry.registry.default().kind('l2')]",
            ["regkit_penalties failed", "inside functions"],
        ),
        (f"{HOOK}regkit.Registry()", ["regkit_penalties failed", "inside functions"]),
    ],
    ids=["registers", "asks", "makes another"],
)
def test_a_plugin_that_needs_the_registry_while_it_is_loaded_is_broken_and_waits_for_nobody(
    install, monkeypatch, code, words
):
    install("regkit-odd", "1.0", "odd_plugin", code)
    monkeypatch.setattr("regkit.registry.registry._default", None)
    with pytest.warns(PluginWarning) as warned:
        assert regkit.load({"rules": [{"penalty": "l2(1)"}]}).rules
    for word in ["regkit-odd 1.0", *words]:
        assert word in str(warned[0].message)


def test_a_module_that_reads_a_document_while_it_is_imported_cannot_offer_what_it_has_not_defined_yet(
    install, monkeypatch
):
    reads = "import regkit\nregkit.load({'rules': [{'penalty': 'l2(1)'}]})\n"
    install("regkit-odd", "1.0", "odd_plugin", reads + ONE)
    monkeypatch.setattr("regkit.registry.registry._default", None)
    with pytest.warns(PluginWarning, match=r"'odd_plugin' of regkit-odd 1\.0 is half imported.*inside functions"):
        importlib.import_module("odd_plugin")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("class Panic(BaseException): ...\nraise Panic('at the border')", ["Panic", "at the border"]),
        ("class E(Exception):\n    def __repr__(self): 1 / 0\nraise E", ["does not import: E"]),
        (f"{HOOK}raise SystemExit(3)", ["regkit_penalties failed", "SystemExit"]),
        (f"{HOOK}import asyncio; raise asyncio.CancelledError", ["regkit_penalties failed", "CancelledError"]),
        (
            CLASS.format(of="Penalty", body="kind_name = classmethod(lambda cls: 1 / 0)", hook="penalties", call="")
            + "\nOdd.__abstractmethods__ = frozenset()",
            ["ZeroDivisionError"],
        ),
        (
            CLASS.format(of="Adapter", body="modules = property(lambda self: 1 / 0)", hook="adapters", call="()")
            + "\nOdd.__abstractmethods__ = frozenset()",
            ["ZeroDivisionError"],
        ),
        (ONE.replace("[One]", "[One, One]"), ["offers the kind 'one' twice"]),
    ],
    ids=["base exception", "repr", "exit", "cancelled", "name", "modules", "twice"],
)
def test_whatever_a_plugin_raises_is_its_own_affair(install, code, words):
    install("regkit-odd", "1.0", "odd_plugin", code)
    (broken,) = after_loading().broken
    for word in ["regkit-odd 1.0", *words]:
        assert word in broken.reason


def test_an_interrupt_while_a_plugin_is_imported_is_the_users(install):
    install("regkit-odd", "1.0", "odd_plugin", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        Registry()


def test_a_distribution_that_has_lost_its_metadata_is_known_by_its_module(install, tmp_path):
    """As a half uninstalled one has."""
    install("regkit-odd", "1.0", "odd_plugin", ONE)
    (tmp_path / "regkit_odd-1.0.dist-info" / "METADATA").unlink()
    importlib.invalidate_caches()
    registry = Registry()
    assert str(registry.find("one").origin) == "odd_plugin"
    assert '"version": null' in regkit.load({"rules": [{"penalty": "one(1)"}]}, registry=registry).to_json(registry)


def test_what_an_installer_left_behind_twice_is_one_plugin(install, tmp_path):
    install("regkit-odd", "1.0", "odd_plugin", ONE)
    shutil.copytree(tmp_path / "regkit_odd-1.0.dist-info", tmp_path / "~egkit_odd-1.0.dist-info")
    importlib.invalidate_caches()
    (plugin,) = (one for one in Registry().plugins if one.origin.distribution == "regkit-odd")
    assert (plugin.state, plugin.kinds) == ("loaded", ("one",))


def test_one_class_under_two_entry_points_is_an_error_that_names_them(install):
    install("regkit-odd", "1.0", "odd_plugin", ONE, {"a": "odd_plugin", "b": "odd_plugin"})
    with pytest.raises(PluginError, match=r"1\.0 \(a, odd_plugin:One\) and regkit-odd 1\.0 \(b, odd_plugin:One\)"):
        Registry()
    assert Registry(block=["b"]).find("one") is not None


def test_threads_that_need_the_registry_at_once_get_the_same():
    program = """
import threading
import regkit.registry.registry

found = []
threads = [threading.Thread(target=lambda: found.append(regkit.registry.registry.default())) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(found), len(set(map(id, found))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "8 1\n"
