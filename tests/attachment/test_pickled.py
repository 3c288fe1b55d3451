"""Pickles outlive renames: they name one room of regkit, whatever rooms and classes are behind it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import regkit
from regkit import PluginError, Registry, RegkitError, _pickled
from tests.support.loops import assert_equal_weights
from tests.support.pickled_models import FOLDER, MAKERS, RULES, STEPS, batch, train, trained
from tests.support.plugins.installing import PLUGIN

pytestmark = pytest.mark.works_with("Copies: deepcopy, pickle, torch.save")

KEPT = sorted(FOLDER.glob("*_1.p*"))


def loaded(path: Path) -> nn.Module:
    if path.suffix == ".pkl":
        return pickle.loads(path.read_bytes())
    return torch.load(path, weights_only=False)


def pickle_in(path: Path) -> bytes:
    if path.suffix == ".pkl":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return archive.read(name)


def named(pickled: bytes) -> Iterator[tuple[str, str]]:
    """Every (module, name) that a pickle imports, read from its opcodes."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            yield tuple(argument.split(" "))
        elif opcode.name == "STACK_GLOBAL":
            yield stack[-2], stack[-1]
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif opcode.name.endswith("PUT"):
            memo[argument] = stack[-1]
        else:
            stack.append(memo[argument] if opcode.name.endswith("GET") else argument)


def of_regkit(pickled: bytes) -> set[tuple[str, str]]:
    return {one for one in named(pickled) if one[0].partition(".")[0] in ("regkit", "regkit_standard")}


ONE_ROOM = {("regkit._pickled", "read")}


def test_there_is_a_kept_pickle_of_each_model_and_each_way():
    assert [path.name for path in KEPT] == sorted(f"{name}_1.{end}" for name in MAKERS for end in ("pkl", "pt"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_a_model_pickled_long_ago_trains_on_as_if_it_had_never_stopped(path):
    model = loaded(path)
    (attachment,) = regkit.attachments(model)
    assert attachment.step_count == STEPS
    train(model, STEPS, STEPS + 4)
    assert attachment.step_count == STEPS + 4
    name = path.stem.partition("_")[0]
    uninterrupted = trained(name, STEPS + 4)
    assert_equal_weights(model, uninterrupted, 1e-12)
    (other,) = regkit.attachments(uninterrupted)
    assert attachment.plan == other.plan
    for key, value in {**other.values(), **other.violations()}.items():
        torch.testing.assert_close({**attachment.values(), **attachment.violations()}[key], value)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_the_rules_of_a_model_pickled_long_ago_are_in_force_before_anyone_asks(path):
    model = loaded(path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch(0))[0].sum().backward()
    with pytest.raises(regkit.StepError, match=r"'small'.* recorded nothing in this step"):
        optimizer.step()


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_a_kept_pickle_names_one_room_of_regkit(path):
    assert of_regkit(pickle_in(path)) == ONE_ROOM
    assert not any(name == "getattr" for _, name in named(pickle_in(path)))  # a method would be named, too


def cells() -> nn.Module:
    return nn.ModuleDict({"lstm": nn.LSTMCell(3, 4), "gru": nn.GRUCell(3, 4), "rnn": nn.RNNCell(3, 4)})


def lazy() -> nn.Module:
    return nn.Sequential(nn.LSTM(3, 4), nn.LazyLinear(2))


def pruned() -> nn.Module:
    model = nn.LSTM(3, 4)
    prune.random_unstructured(model, "weight_hh_l0", 0.5)
    return model


def projected() -> nn.Module:
    return nn.LSTM(3, 4, proj_size=2, num_layers=2, batch_first=True)


@pytest.mark.parametrize("make", [cells, lazy, pruned, projected, *MAKERS.values()])
@pytest.mark.parametrize("end", ["pkl", "pt"])
def test_what_is_pickled_names_one_room_of_regkit_whatever_the_model(make, end, tmp_path):
    model = make()
    attachment = regkit.attach(model, RULES)
    path = tmp_path / f"model.{end}"
    if end == "pt":
        torch.save(model, path)
    else:
        path.write_bytes(pickle.dumps(model))
    assert of_regkit(pickle_in(path)) == ONE_ROOM
    (other,) = regkit.attachments(loaded(path))
    assert other.plan == attachment.plan


def test_every_installed_kind_is_pickled_as_its_name_and_options():
    for entry in regkit.registry.registry.default().entries():
        for kind in entry.kind.examples():
            pickled = pickle.dumps(kind)
            assert of_regkit(pickled) == ONE_ROOM
            assert kind.__reduce_ex__(4)[1] == (1, "kind", kind.kind, kind.model_dump_json())
            assert pickle.loads(pickled) == kind
            assert type(pickle.loads(pickled)) is type(kind)


def values() -> dict[str, Any]:
    spec = regkit.load({"$schema": "a.json", **RULES})
    plan = regkit.resolve(nn.LSTM(3, 4), spec)
    kept = regkit.load({"rules": [{"penalty": {"kind": "unheard_of", "depth": [1]}}]}, unknown="keep")
    return {
        "spec": spec,
        "rule": spec.rules[0],
        "target": spec.rules[0].target,
        "spec of kinds that are not here": kept,
        "plan": plan,
        "weight site": plan.bindings[0].weights[0],
        "output site": plan.bindings[2].outputs[0],
        "weight": regkit.Weight(("w", "v"), "kernel", gates=("input",), columns=(0, 3)),
        "output": regkit.Output("output", (0, 1), sequence=True),
        "example": regkit.Example(nn.RNN, 3),
        "registry": Registry(),
    }


@pytest.mark.parametrize("name", values())
def test_a_value_pickled_alone_names_one_room_of_regkit_and_comes_back_equal(name):
    value = values()[name]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        pickled = pickle.dumps(value, protocol)
        again = pickle.loads(pickled)
        assert type(again) is type(value)
        if name == "registry":
            assert (again.entries(), again.plugins) == (value.entries(), value.plugins)
            assert (again.roles, again.gates) == (value.roles, value.gates)
        else:
            assert again == value == copy.deepcopy(value) == copy.copy(value)
        if protocol >= 4:
            assert of_regkit(pickled) == ONE_ROOM
    if name.startswith("spec"):
        assert again.to_json() == value.to_json()


def test_a_spec_made_with_another_registrys_roles_is_loaded_where_they_are_unknown():
    target = regkit.Target.model_construct(role=("spikes",))
    assert pickle.loads(pickle.dumps(target)).role == ("spikes",)


class Narrow(regkit.Spec):
    """A stranger's own document."""


def test_a_strangers_subclass_of_a_value_stays_what_it_is():
    narrow = Narrow.model_validate(RULES)
    again = pickle.loads(pickle.dumps(narrow))
    assert type(again) is Narrow
    assert again == narrow


@pytest.mark.parametrize("what", ["model", "plan", "spec"])
def test_a_pickle_of_a_newer_format_is_refused_with_what_to_do(what, monkeypatch):
    model = trained("rnn")
    (attachment,) = regkit.attachments(model)
    one = {"model": model, "plan": attachment.plan, "spec": regkit.load(RULES)}[what]
    with monkeypatch.context() as newer:
        newer.setattr(_pickled, "FORMAT", 2)
        pickled = pickle.dumps(one)
        pickle.loads(pickled)
    with pytest.raises(RegkitError, match=r"format 2 .* reads formats up to 1: it takes a newer torch-regkit"):
        pickle.loads(pickled)


def test_a_pickle_of_an_older_format_is_read(monkeypatch):
    monkeypatch.setattr(_pickled, "FORMAT", 2)
    assert len(regkit.attachments(loaded(KEPT[0]))) == 1


NUCLEAR = PLUGIN.format(name="nuclear", title="Nuclear")


@pytest.fixture
def nuclear(install, monkeypatch) -> bytes:
    """A pickled model with a rule of an installed plugin."""
    install("regkit-low-rank", "1.2", "low_rank", NUCLEAR)
    monkeypatch.setattr("regkit.registry.registry._default", Registry())
    model = nn.RNN(3, 4)
    regkit.attach(model, {"rules": [{"penalty": "nuclear(1)"}]})
    return pickle.dumps(model)


def test_a_plugin_that_is_gone_is_named_with_its_version(nuclear, monkeypatch):
    assert not any(module == "low_rank" for module, _ in named(nuclear))
    (attachment,) = regkit.attachments(pickle.loads(nuclear))
    assert attachment.plan.bindings[0].origin == "regkit-low-rank 1.2"
    monkeypatch.setattr("regkit.registry.registry._default", Registry(block=["regkit-low-rank"]))
    with pytest.raises(PluginError, match=r"unknown kind 'nuclear'.* saved with it from regkit-low-rank 1\.2"):
        pickle.loads(nuclear)


def test_a_kind_of_the_same_name_from_another_distribution_is_refused(nuclear, install, tmp_path, monkeypatch):
    install("somebody-elses", "3.0", "somebody_elses", NUCLEAR)
    monkeypatch.setattr("regkit.registry.registry._default", Registry(block=["regkit-low-rank"]))
    with pytest.raises(PluginError, match=r"'nuclear' was pickled from regkit-low-rank; here .* of somebody-elses 3"):
        pickle.loads(nuclear)


def test_a_plugin_that_was_moved_or_upgraded_within_its_distribution_is_found(nuclear, install, monkeypatch, tmp_path):
    (tmp_path / "low_rank.py").unlink()
    for file in (tmp_path / "regkit_low_rank-1.2.dist-info").iterdir():
        file.unlink()
    (tmp_path / "regkit_low_rank-1.2.dist-info").rmdir()
    install("regkit-low-rank", "2.0", "low_ranks", NUCLEAR)
    monkeypatch.setattr("regkit.registry.registry._default", Registry())
    model = pickle.loads(nuclear)
    (attachment,) = regkit.attachments(model)
    assert type(attachment.plan.bindings[0].kind).__module__ == "low_ranks"
    assert attachment.plan == regkit.resolve(model, {"rules": [{"penalty": "nuclear(1)"}]})


def test_a_distribution_is_the_same_however_its_name_is_spelled(nuclear):
    kind = _pickled.read(1, "kind", "nuclear", '{"strength": 2.0}', "Regkit_Low.Rank", "1.2")
    assert kind.describe() == "nuclear(strength=2.0)"


def test_deepcopy_goes_through_no_json(monkeypatch):
    model = trained("lstm")
    monkeypatch.setattr(_pickled, "reduce_plan", None)
    monkeypatch.setattr(_pickled, "reduce_kind", None)
    assert regkit.attachments(copy.deepcopy(model))[0].plan is regkit.attachments(model)[0].plan


def test_everything_that_a_kept_pickle_calls_takes_plain_values():
    """No state of a class of regkit, or of pydantic, is in it: only calls of `read`, and the companion's tuple."""
    words: set[str] = set()

    def read(format: int, word: str, *values: Any) -> Any:
        words.add(word)
        assert format == 1
        return _pickled.read(format, word, *values)

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return read if (module, name) == ("regkit._pickled", "read") else super().find_class(module, name)

    for path in KEPT:
        if path.suffix == ".pkl":
            Reader(io.BytesIO(path.read_bytes())).load()
    assert words == {"companion", "hook", "plan", "registry", "kind", "weight site", "output site"}
    assert list(inspect.signature(_pickled.read).parameters) == ["format", "word", "values"]
