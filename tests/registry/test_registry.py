"""Plugins of this process: which kinds they add, and what is refused as no kind."""

import itertools
import types
from typing import Literal

import pytest
from torch import nn

import regkit
from regkit import Adapter, Constraint, Penalty, PluginError, Registry, hookimpl

NUMBERS = itertools.count()


def penalty(name, bases=(Penalty,), **members):
    """A penalty class of this name."""
    members = {"__annotations__": {"kind": Literal[name]}, "kind": name, "__doc__": "A penalty.\n\nMore.", **members}
    return type(name.title(), bases, {"__module__": __name__, "value": lambda self, w: w.sum(), **members})


def plugin(**hooks):
    """A plugin, as a module is one, whose hooks return these."""
    module = types.ModuleType(f"stranger{next(NUMBERS)}")
    for hook, offers in hooks.items():
        setattr(module, hook, hookimpl(lambda offers=offers: offers))
    return module


def bare(*plugins):
    return Registry(plugins, entry_points=False)


def test_a_class_instance_and_a_module_are_plugins():
    class Stranger:
        @hookimpl
        def regkit_penalties(self):
            return [penalty("one")]

        @hookimpl
        def regkit_schedules(self):
            return []

    registry = bare(Stranger())
    registry.register(plugin(regkit_penalties=[penalty("two"), penalty("three.four")]))
    assert [entry.name for entry in registry.entries()] == ["one", "three.four", "two"]
    assert str(registry.find("one").origin) == __name__
    assert str(registry.find("two").origin).startswith("stranger")
    assert regkit.load({"rules": [{"penalty": "three.four(2)"}]}, registry=registry).rules[0].kind.strength == 2


def test_registering_one_plugin_twice_changes_nothing():
    """A notebook's cell is run again."""
    stranger = plugin(regkit_penalties=[penalty("one")])
    registry = bare(stranger, stranger)
    assert [entry.name for entry in registry.entries()] == ["one"]
    assert len(registry.plugins) == 1


def test_two_plugins_may_be_called_alike():
    """Two distributions whose entry points are both `their_package:Plugin`, say."""

    def made(name):
        class Plugin:
            @staticmethod
            @hookimpl
            def regkit_penalties():
                return [penalty(name)]

        return Plugin

    registry = bare(made("one"), made("two"))
    assert [entry.name for entry in registry.entries()] == ["one", "two"]


def test_entries_are_sorted_within_their_families():
    registry = Registry()
    families = [entry.family for entry in registry.entries()]
    assert families == sorted(families, key=["penalty", "activity penalty", "constraint", "schedule"].index)
    names = [entry.name for entry in registry.entries("constraint")]
    assert names == sorted(names)
    assert set(names) >= {"max_norm", "unit_norm"}


def test_a_kind_is_found_in_its_family_alone_and_the_nearest_is_named():
    registry = Registry()
    assert registry.find("l2", "penalty").kind is registry.kind("l2")
    assert registry.find("l2", "constraint") is None
    with pytest.raises(PluginError, match="unknown constraint 'maxnorm'; did you mean 'max_norm'"):
        registry.kind("maxnorm", "constraint")


class Unfinished(Penalty):
    kind: Literal["unfinished"] = "unfinished"


class Halfway(Constraint):
    kind: Literal["halfway"] = "halfway"

    def project(self, w):
        return w


class Nameless(Penalty):
    def value(self, w):
        return w.sum()


class Twofold(Penalty):
    kind: Literal["two", "fold"] = "two"

    def value(self, w):
        return w.sum()


@pytest.mark.parametrize(
    ("hooks", "words"),
    [
        ({"regkit_penalties": [Unfinished]}, ["Unfinished", "value"]),
        ({"regkit_constraints": [Halfway]}, ["Halfway", "violation"]),
        ({"regkit_penalties": [Nameless]}, ["Nameless", "kind: Literal"]),
        ({"regkit_penalties": [Twofold]}, ["Twofold", "kind: Literal"]),
        ({"regkit_penalties": [penalty("one")(strength=1.0)]}, ["not a penalty", "subclass of Penalty"]),
        ({"regkit_penalties": [nn.LSTM]}, ["LSTM", "subclass of Penalty"]),
        ({"regkit_constraints": [penalty("one")]}, ["One", "subclass of Constraint"]),
        ({"regkit_penalties": ["l2"]}, ["'l2'", "subclass of Penalty"]),
        ({"regkit_penalties": None}, ["regkit_penalties"]),
        ({"regkit_penalties": penalty("one")}, ["regkit_penalties"]),
        ({"regkit_penalties": [penalty("one"), penalty("one")]}, ["'one'"]),
        ({"regkit_adapters": [nn.LSTM(1, 1)]}, ["LSTM", "Adapter"]),
        ({"regkit_adapters": [Adapter]}, ["Adapter"]),
        *(
            ({"regkit_penalties": [penalty(name)]}, [repr(name), "lower_case"])
            for name in ("L2", "a-b", "a b", "", "1a", "é", ".a", "a.", "a..b", "_a", "a(", "a" * 101)
        ),
    ],
    ids=lambda value: str(value)[-60:] if isinstance(value, dict) else "",
)
def test_what_is_no_kind_is_refused_with_the_reason_and_the_plugin(hooks, words):
    with pytest.raises(PluginError) as caught:
        bare(plugin(**hooks))
    for word in [*words, "stranger"] if hooks.get("regkit_penalties") not in ([Nameless], [Twofold]) else words:
        assert word in str(caught.value)


def test_a_plugin_that_implements_no_hook_is_an_error():
    """It forgot @hookimpl: all that it offers would silently not be there."""
    forgetful = types.ModuleType("forgetful")
    forgetful.regkit_penalties = lambda: [penalty("one")]
    with pytest.raises(PluginError, match="forgetful"):
        bare(forgetful)


@pytest.mark.parametrize(
    "hooks",
    [
        {"regkit_penalties": [penalty("good"), penalty("Bad")]},
        {"regkit_penalties": [penalty("good")], "regkit_constraints": [3]},
        {"regkit_penalties": [penalty("good")], "regkit_adapters": [3]},
        {"regkit_penalties": [penalty("good"), penalty("taken")]},
        {"regkit_penalties": [penalty("good")], "regkit_misspelt": []},
    ],
)
def test_a_refused_plugin_leaves_the_registry_as_it_was(hooks):
    registry = bare(plugin(regkit_penalties=[penalty("taken")]))
    before = registry.entries()
    with pytest.raises(PluginError):
        registry.register(plugin(**hooks))
    assert registry.entries() == before
    registry.register(plugin(regkit_penalties=[penalty("good")]))
    assert registry.find("good") is not None


def test_a_proximal_operator_may_be_inherited():
    class Shrinking(Penalty):
        def prox(self, w, step):
            return w

    heir = penalty("heir", (Shrinking,))
    registry = bare(plugin(regkit_penalties=[heir]))
    (rule,) = regkit.load({"rules": [{"penalty": "heir(1)", "via": "proximal"}]}, registry=registry).rules
    assert rule.via == "proximal"
