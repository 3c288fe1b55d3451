"""Registries and kinds of one's own are pickled as what they are, and loaded where installed plugins are gone."""

from __future__ import annotations

import pickle
from typing import Any, Literal

from regkit_standard.torch_adapters import SequenceAdapter
from torch import nn

import regkit
from regkit import Registry
from regkit.registry.registry import default


class Cubes(regkit.Penalty):
    """A penalty."""

    kind: Literal["cubes"] = "cubes"

    def value(self, w):
        return w.abs().pow(3).sum()


class OwnL2(regkit.Penalty):
    """A penalty by the name of an installed one."""

    kind: Literal["l2"] = "l2"

    def value(self, w):
        return w.square().sum()


def again(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def test_the_default_registry_stays_the_default_one():
    assert again(default()) is default()


def test_a_registry_keeps_the_records_of_its_plugins():
    registry = Registry([Cubes])
    loaded = again(registry)
    assert loaded.plugins == registry.plugins != default().plugins
    assert loaded.find("cubes").kind is Cubes
    blocked = Registry(block=["torch-regkit"])
    assert again(blocked).plugins == blocked.plugins != default().plugins


def test_a_registry_loaded_where_its_plugins_are_gone_holds_the_others(monkeypatch):
    pickled = pickle.dumps(Registry([Cubes]))
    monkeypatch.setattr("regkit.registry.registry._default", Registry(block=["torch-regkit"]))
    loaded = pickle.loads(pickled)
    assert [entry.name for entry in loaded.entries()] == ["cubes"]
    assert loaded.adapter(nn.LSTM(3, 4)) is None


def test_a_kind_that_is_only_registered_needs_no_registry_to_be_loaded():
    with default().temporary(Cubes):
        pickled = pickle.dumps(Cubes(strength=2.0))
    assert pickle.loads(pickled) == Cubes(strength=2.0)


def test_a_kind_by_the_name_of_an_installed_one_stays_what_it_is():
    assert type(again(OwnL2(strength=2.0))) is OwnL2
    registry = Registry([OwnL2, SequenceAdapter], entry_points=False)
    plan = regkit.resolve(nn.LSTM(3, 4), {"rules": [{"penalty": "l2(2)"}]}, registry=registry)
    assert again(plan) == plan
    assert again(plan).bindings[0].origin != str(default().find("l2").origin)
