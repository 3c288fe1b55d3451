"""A broken plugin hurts nobody who does not need it, and is named to everybody who does."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import regkit
from regkit import PluginError, PluginWarning, Registry
from tests.support.plugins.installing import PLUGIN

HOOK = "import regkit\n@regkit.hookimpl\n"
MISTAKES = [
    ("import a_module_that_is_not_there", ["a_module_that_is_not_there", "does not import"]),
    ("def f(:", ["SyntaxError", "does not import"]),
    ("1 / 0", ["ZeroDivisionError", "does not import"]),
    ("import sys; sys.exit('no licence')", ["SystemExit", "no licence", "does not import"]),
    (f"{HOOK}def regkit_penalties():\n    1 / 0", ["ZeroDivisionError", "regkit_penalties failed"]),
    (f"{HOOK}def regkit_penaltys():\n    return []", ["'regkit_penaltys'; did you mean 'regkit_penalties'?"]),
    (f"{HOOK}def regkit_schedules():\n    return regkit.Schedule", ["regkit.kinds.schedule.Schedule'>, not a list"]),
    (f"{HOOK}def regkit_penalties():\n    return 'l2'", ["it returned 'l2', not a list"]),
    (f"{HOOK}def regkit_penalties(model):\n    return []", ["regkit_penalties", "model"]),
    (f"{HOOK}def regkit_penalties():\n    return [3]", ["3", "Penalty"]),
    (f"{HOOK}def regkit_penalties():\n    pass", ["regkit_penalties", "None"]),
    (f"{HOOK}def regkit_adapters():\n    return [3]", ["3", "Adapter"]),
    ("import regkit", ["implements no hook", "regkit_penalties"]),
]  # fmt: skip


@pytest.mark.parametrize(("code", "words"), MISTAKES, ids=[words[0] for _, words in MISTAKES])
def test_a_broken_plugin_is_a_warning_with_a_record_and_everything_else_works(install, code, words):
    install("regkit-broken", "3.1", "broken_plugin", code, {"my_point": "broken_plugin"})
    install("regkit-good", "1.0", "good_plugin", PLUGIN.format(name="nuclear", title="Nuclear"))
    with pytest.warns(PluginWarning) as warned:
        registry = Registry()
    (broken,) = registry.broken
    for word in ["regkit-broken 3.1", *words]:
        assert word in str(warned[0].message)
        assert word in broken.reason
    assert (broken.state, broken.origin.point, broken.place) == ("broken", "my_point", "broken_plugin")
    assert "Traceback" in broken.report
    assert {one.state for one in registry.plugins if one is not broken} == {"loaded"}
    assert regkit.load({"rules": [{"penalty": "nuclear(1)"}, {"penalty": "l2(1)"}]}, registry=registry).rules


@pytest.mark.parametrize(("code", "words"), MISTAKES, ids=[words[0] for _, words in MISTAKES])
def test_strictness_makes_a_broken_plugin_fatal(install, monkeypatch, code, words):
    install("regkit-broken", "3.1", "broken_plugin", code)
    monkeypatch.setenv("REGKIT_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError) as caught:
        Registry()
    for word in ["regkit-broken 3.1", "REGKIT_STRICT_PLUGINS", "Traceback", *words]:
        assert word in str(caught.value)


def test_a_report_shows_the_line_in_which_a_plugin_failed(install):
    install("regkit-broken", "3.1", "broken_plugin", "def helper():\n    return 1 / 0\n\nhelper()\n")
    with pytest.warns(PluginWarning):
        registry = Registry()
    assert "broken_plugin.py" in registry.broken[0].report
    assert "return 1 / 0" in registry.broken[0].report


HALF = PLUGIN.format(name="nuclear", title="Nuclear") + "\n@regkit.hookimpl\ndef regkit_schedules():\n    return [3]\n"


def test_a_document_that_needs_a_broken_plugins_kind_is_told_exactly_that(install):
    install("regkit-low-rank", "1.2", "low_rank", HALF)
    with pytest.warns(PluginWarning):
        registry = Registry()
    assert registry.find("nuclear") is None
    with pytest.raises(regkit.SpecError) as caught:
        regkit.load({"rules": [{"penalty": "nuclear(1)"}]}, registry=registry)
    message = (
        "It is of regkit-low-rank 1.2 (low_rank), which is broken: plugin regkit-low-rank 1.2: 3 is not a schedule"
    )
    assert "unknown penalty 'nuclear'" in str(caught.value)
    assert message in str(caught.value)
    with pytest.raises(PluginError, match=r"regkit-low-rank 1\.2"):
        registry.kind("nuclear")


def test_where_a_broken_plugin_could_not_even_say_what_it_offers_it_is_named_as_a_candidate(install):
    install("regkit-broken", "3.1", "broken_plugin", "1 / 0")
    with pytest.warns(PluginWarning):
        registry = Registry()
    with pytest.raises(regkit.SpecError, match=r"may have it: regkit-broken 3\.1 .*ZeroDivisionError"):
        regkit.load({"rules": [{"penalty": "nuclear(1)"}]}, registry=registry)


def test_a_document_that_was_saved_with_a_plugin_that_is_broken_now_is_told_so(install):
    install("regkit-broken", "3.1", "broken_plugin", "1 / 0")
    with pytest.warns(PluginWarning):
        registry = Registry()
    saved = {"nuclear": {"distribution": "Regkit_Broken", "version": "3.0"}}
    with pytest.raises(
        regkit.SpecError, match=r"from Regkit_Broken 3\.0; here is regkit-broken 3\.1 .*broken: .*ZeroDiv"
    ):
        regkit.load({"provenance": saved, "rules": [{"penalty": "nuclear(1)"}]}, registry=registry)


def test_a_model_whose_adapter_is_broken_is_told_which_plugins_are(install):
    class Cell(nn.Module):
        pass

    install("regkit-broken", "3.1", "broken_plugin", "1 / 0")
    with pytest.warns(PluginWarning):
        registry = Registry()
    with pytest.raises(regkit.ResolveError, match=r"(?s)no recurrent module.*regkit-broken 3\.1"):
        regkit.resolve(Cell(), {"rules": [{"penalty": "l2(1)"}]}, registry=registry)


def test_a_blocked_plugin_is_never_imported_and_its_kind_is_told_to_be_blocked(install, monkeypatch):
    install("regkit-low-rank", "1.2", "low_rank", "raise AssertionError('imported')")
    monkeypatch.setenv("REGKIT_DISABLE_PLUGINS", "other-one, Regkit.Low_Rank")
    with pytest.warns(PluginWarning, match="'other-one', which no installed plugin is"):
        registry = Registry()
    assert "low_rank" not in sys.modules
    (blocked,) = [plugin for plugin in registry.plugins if plugin.state == "blocked"]
    assert blocked.reason == "REGKIT_DISABLE_PLUGINS names it"
    with pytest.raises(regkit.SpecError, match=r"regkit-low-rank 1\.2 .*REGKIT_DISABLE_PLUGINS names it"):
        regkit.load({"rules": [{"penalty": "nuclear(1)"}]}, registry=registry)


WRAPPED = """
import pluggy, regkit
wrapper = pluggy.HookimplMarker("regkit")

class Plugin:
    @wrapper(wrapper=True)
    def regkit_penalties(self):
        return (yield)

plugin = Plugin()
"""


def test_a_hook_that_only_wraps_offers_nothing_and_is_no_mistake(install):
    install("wrapping", "1.0", "wrapping", WRAPPED, {"wrapping": "wrapping:plugin"})
    registry = Registry()
    (plugin,) = [one for one in registry.plugins if one.origin.distribution == "wrapping"]
    assert (plugin.state, plugin.kinds) == ("loaded", ())


def test_training_goes_on_beside_a_broken_plugin(install):
    install("regkit-broken", "3.1", "broken_plugin", "1 / 0")
    with pytest.warns(PluginWarning):
        registry = Registry()
    model = nn.LSTM(2, 3)
    attachment = regkit.attach(model, {"rules": [{"penalty": "l2(1)"}]}, registry=registry)
    model(torch.randn(2, 1, 2))[0].sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert attachment.step_count == 1
