"""Thousands of rules on thousands of modules: what is known of a module, of a weight, of a name, is found out once."""

from __future__ import annotations

import copy
import gc
import itertools
import time
import tracemalloc
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import regkit
from regkit import Adapter, Output, Weight, declared, places
from regkit.modules import glob
from regkit.ownership import Met

Document = dict[str, Any]


def cells(number: int, size: int = 4) -> nn.ModuleDict:
    return nn.ModuleDict({"cells": nn.ModuleList(nn.GRUCell(size, size) for _ in range(number))})


def rules(*targets: Document, **rest: Any) -> Document:
    return {"rules": [{"target": target, **(rest or {"penalty": "l2(0.1)"})} for target in targets]}


REALISTIC = {
    "rules": [
        {"target": {"role": "kernel"}, "penalty": "l2(1e-4)"},
        {"target": {"role": "recurrent"}, "penalty": "l2(1e-5)"},
        {"target": {"role": ["kernel", "recurrent"]}, "constraint": "max_norm(3)"},
        {"penalty": "activity_l2(1)"},
    ]
}


class Cell(nn.Module):
    """A stranger's cell."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, 3))
        self.b = nn.Parameter(torch.zeros(4))
        self.c = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.T + self.b + self.c


class Counting(Adapter):
    """The adapter of such cells, which counts what it is asked."""

    modules = (Cell,)
    gates = ("write", "erase")

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def weights(self, module: nn.Module) -> Iterator[Weight]:
        self.asked["weights"] += 1
        yield Weight(("w",), "kernel", gates=self.gates)
        for names in (("b",), ("c",), ("b", "c")):
            yield Weight(names, "bias", gates=self.gates)

    def outputs(self, module: nn.Module) -> list[Output]:
        self.asked["outputs"] += 1
        return [Output("output", sequence=True)]

    def observe(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> dict[str, Any]:
        return {"output": result}

    def segments(self, *_: Any) -> list[Any]:
        return []


@pytest.fixture
def counting() -> tuple[Counting, regkit.Registry]:
    adapter = Counting()
    plugin = types.ModuleType("stranger")
    plugin.regkit_adapters = regkit.hookimpl(lambda: [adapter])
    return adapter, regkit.Registry([plugin])


OF_ALL_SORTS: list[Document] = [
    {},
    {"role": "kernel", "gate": "write"},
    {"module": "**"},
    {"module": ["0", "1", "2"], "role": "bias", "bias": "effective"},
    {"module": "?", "direction": "forward", "layer": 0},
]


def test_an_adapter_is_asked_once_for_each_module_however_many_rules_there_are(counting):
    adapter, registry = counting
    model = nn.Sequential(*(Cell() for _ in range(7)))
    document = rules(*OF_ALL_SORTS * 20)
    document["rules"] += rules(*[{"module": "**"}, {"role": "output"}] * 20, penalty="activity_l2(1)")["rules"]
    plan = regkit.resolve(model, document, registry=registry)
    assert adapter.asked == {"weights": 7, "outputs": 7}
    assert len(plan.bindings) == 140
    regkit.attach(model, plan, registry=registry).detach()
    assert adapter.asked == {"weights": 7, "outputs": 7}


def test_where_a_weight_is_kept_is_looked_up_once_however_many_rules_there_are(counting, monkeypatch):
    _, registry = counting
    looked: Counter[tuple[int, str]] = Counter()

    def storage_of(module: nn.Module, parent: nn.Module | None, name: str, *rest: Any) -> Any:
        looked[id(module), name] += 1
        return kept(module, parent, name, *rest)

    kept = declared.storage_of
    monkeypatch.setattr(declared, "storage_of", storage_of)
    model = nn.Sequential(*(Cell() for _ in range(3)))
    regkit.resolve(model, rules(*[{}, {"role": "kernel"}] * 20), registry=registry)
    assert looked == {(id(cell), name): 1 for cell in model for name in "wbc"}


@pytest.fixture
def matched(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each glob is matched with each name."""
    found: Counter[tuple[str, str]] = Counter()

    def counted(pattern: str) -> Callable[[str], bool]:
        def covers(name: str) -> bool:
            found[pattern, name] += 1
            return glob(pattern)(name)

        return covers

    monkeypatch.setattr(places, "glob", counted)
    return found


def test_a_glob_is_matched_with_a_name_once_however_many_rules_have_it(matched):
    globs = ["cells.*", "**", "*.?", ["cells.?", "**.1?"]]
    regkit.resolve(cells(12), rules(*({"module": one} for one in globs * 10)))
    assert set(matched.values()) == {1}
    assert set(matched) <= set(itertools.product(["cells.*", "**", "*.?", "cells.?", "**.1?"], NAMES[:12]))


def test_a_glob_is_matched_with_those_names_alone_that_have_its_literal_parts(matched):
    regkit.resolve(cells(100), rules(*({"module": f"**.{number}"} for number in range(100))))
    assert matched == {(f"**.{number}", f"cells.{number}"): 1 for number in range(100)}


def test_a_name_is_looked_up_and_not_matched(matched):
    plan = regkit.resolve(cells(100), rules(*({"module": name} for name in NAMES), {"module": NAMES}))
    assert not matched
    *apart, together = ([site.name for site in binding.weights[::4]] for binding in plan.bindings)
    assert apart == [[name] for name in NAMES]
    assert together == NAMES


NAMES = [f"cells.{number}" for number in range(100)]


def tangle() -> nn.Module:
    """Modules under several names, tied weights, a weight that is parametrized, cells and layers."""
    model = nn.ModuleDict({"a": nn.ModuleDict({"rnn": nn.GRU(3, 3)}), "b": nn.ModuleDict(), "c": cells(3, 3)})
    model["b"]["rnn"] = model["b"]["other"] = model["c"]["again"] = model["a"]["rnn"]
    model["c"]["lstm"] = nn.LSTM(3, 3, 2, bidirectional=True)
    model["c"]["cells"][1].weight_hh = model["c"]["cells"][0].weight_hh
    model["c"]["lstm"].weight_hh_l1 = model["c"]["lstm"].weight_hh_l0
    nn.utils.parametrizations.weight_norm(model["c"]["cells"][2], "weight_ih")
    return model


PATTERNS = ["**", "*.rnn", "b.*", "a.rnn", "c.**", "c.cells.?", "**.1", "c.again", "b.other", "*", "absent", "c.lstm"]
TARGETS = st.fixed_dictionaries(
    {},
    optional={
        "module": st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3, unique=True),
        "role": st.lists(st.sampled_from(["kernel", "recurrent", "bias", "output", "state"]), min_size=1, unique=True),
        "layer": st.sampled_from([0, 1]),
        "direction": st.sampled_from(["forward", "backward"]),
        "gate": st.lists(st.sampled_from(["forget", "reset", "new", "update"]), min_size=1, max_size=2, unique=True),
        "bias": st.sampled_from(["each", "effective"]),
    },
)
KINDS = st.sampled_from(
    [
        {"penalty": "l2(1)"},
        {"penalty": "orthogonal(1)"},
        {"constraint": "max_norm(1, per=cell)"},
        {"constraint": "unit_norm"},
        {"penalty": "activity_l2(1)"},
        {"penalty": "temporal(1)"},
    ]
)
TANGLE = tangle()


@given(st.lists(st.tuples(TARGETS, KINDS, st.booleans()), min_size=2, max_size=12))
@settings(deadline=None, max_examples=60)
def test_rules_bind_together_what_each_binds_alone_and_fail_for_the_same_reasons(given_rules):
    """Nothing that one rule has asked for changes what another gets."""
    document = {
        "rules": [
            {"name": str(number), "target": target, **kind, "optional": optional}
            for number, (target, kind, optional) in enumerate(given_rules)
        ]
    }
    bindings, problems = [], []
    for rule in document["rules"]:
        try:
            bindings += regkit.resolve(TANGLE, {"rules": [rule]}).bindings
        except regkit.ResolveError as error:
            problems += error.problems
    if problems:
        with pytest.raises(regkit.ResolveError) as caught:
            regkit.resolve(TANGLE, document)
        assert caught.value.problems == tuple(problems)
    else:
        assert regkit.resolve(TANGLE, document).bindings == tuple(bindings)


def test_rules_on_the_same_weights_share_what_is_known_of_them():
    plan = regkit.resolve(cells(5), rules(*[{}] * 3, {"role": "kernel"}))
    first, second, third, kernels = (binding.weights for binding in plan.bindings)
    for one, other in itertools.combinations((first, second, third), 2):
        assert all(map(is_, one, other))
    assert {id(site) for site in kernels} < {id(site) for site in first}


@pytest.fixture
def traced() -> Iterator[Callable[[], int]]:
    """The bytes that Python holds, once what nobody holds any more is collected."""

    def held() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    model = cells(1)
    with regkit.attach(model, rules({})):  # what is imported and made once, of torch's optimizers, too
        model["cells"][0].weight_hh.grad = torch.zeros(12, 4)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    gc.collect()
    gc.freeze()  # collections look only at what comes from now on: they are much quicker
    tracemalloc.start()
    yield held
    tracemalloc.stop()
    gc.unfreeze()


ONE_RULE_EACH = rules(*({"module": f"cells.{number}"} for number in range(200)))


@pytest.mark.parametrize(
    ("document", "plan_bytes", "attached_bytes"),
    [
        pytest.param(rules({}), 640, 700, id="one rule on all"),
        pytest.param(ONE_RULE_EACH, 800, 1300, id="a rule on each"),
        pytest.param(REALISTIC, 480, 1150, id="a realistic set"),
        pytest.param(rules(*[{}] * 10), 80, 550, id="many rules on all"),
    ],
)
def test_memory_per_binding_is_bounded(document: Document, plan_bytes: int, attached_bytes: int, traced):
    """Per site of a rule: of the plan, and of the attachment. Measured in torch 2.13 on CPython 3.11: some two thirds
    of these. Rules with sites in common hold them once, in plans.
    """
    model = cells(200)
    spec = regkit.load(document)
    before = traced()
    plan = regkit.resolve(model, spec)
    resolved = traced()
    attachment = regkit.attach(model, plan)
    attached = traced()
    sites = sum(len(binding.sites) for binding in plan.bindings)
    assert sites >= 800
    assert (resolved - before) / sites < plan_bytes
    assert (attached - resolved) / sites < attached_bytes
    attachment.detach()


def test_the_garbage_collector_gets_few_objects_for_each_weight():
    """It goes through all there are again and again, while they are being made and for as long as they are there."""
    regkit.attach(cells(1), rules({})).detach()  # what is imported and made once
    model = cells(200)
    plan = regkit.resolve(model, rules({}))
    gc.collect()
    before = len(gc.get_objects())
    attachment = regkit.attach(model, plan)
    gc.collect()
    assert len(gc.get_objects()) - before < 6.5 * 800
    attachment.detach()


@pytest.mark.parametrize("strangers", [0, 3])
def test_what_an_optimizer_owns_is_held_once_where_all_of_it_is_ours(strangers: int):
    ours = list(cells(2).parameters())
    optimizer = torch.optim.SGD([*ours, *nn.GRUCell(2, 2).parameters()][: len(ours) + strangers], lr=0.1)
    owned = Met(optimizer, {id(one): one for one in ours}).owned
    assert (owned.groups is owned.ours) == (not strangers)
    assert len(owned.groups) == len(owned.ours) + strangers


class Tried(regkit.Penalty):
    """A stranger's l2 that notes what it is tried on, and that is wrong for weights of one width."""

    kind: Literal["tried"] = "tried"

    wrong_for: int = 0
    notes: list[int] | None = None

    def value(self, w: Tensor) -> Tensor:
        TRIED.append(w)
        return w.square().sum(0) if w.size(1) == self.wrong_for else w.square().sum()


TRIED: list[Tensor] = []


def tried(model: nn.Module, *given_rules: Document) -> int:
    """How often a stranger's kind is tried as these rules are attached, each to one of the cells."""
    TRIED.clear()
    plugin = types.ModuleType("stranger")
    plugin.regkit_penalties = regkit.hookimpl(lambda: [Tried])
    whole = [
        {"target": {"module": f"cells.{number}", "role": "recurrent"}, "penalty": {"kind": "tried", "strength": 1}}
        | rule
        for number, rule in enumerate(given_rules)
    ]
    regkit.attach(model, {"rules": whole}, registry=regkit.Registry([plugin])).detach()
    return len(TRIED)


def test_a_kind_is_tried_once_for_all_rules_on_weights_that_look_alike():
    once = tried(cells(9), {})
    assert once > 0
    assert tried(cells(9), *[{}] * 9) == once
    assert tried(cells(9), *[{}, {"via": "loss"}] * 4) == 2 * once


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"penalty": {"kind": "tried", "strength": 2}}, id="options"),
        pytest.param({"via": "loss"}, id="via"),
        pytest.param({"schedule": {"kind": "constant", "value": 0.5}}, id="schedule"),
    ],
)
def test_a_rule_that_is_another_is_tried_on_its_own(other: Document):
    assert tried(cells(2), {}, other) == 2 * tried(cells(2), {})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda cells: cells[1].double(), id="dtype"),
        pytest.param(lambda cells: cells[1].to("meta"), id="device"),
        pytest.param(lambda cells: cells.__setitem__(1, nn.RNNCell(4, 4)), id="shape"),
        pytest.param(lambda cells: setattr(cells[1], "weight_hh", nn.Parameter(torch.ones(4, 12).T)), id="strides"),
        pytest.param(lambda cells: nn.utils.parametrizations.weight_norm(cells[1], "weight_hh"), id="storage"),
    ],
)
def test_a_rule_on_weights_that_look_otherwise_is_tried_on_its_own(change: Callable[[nn.Module], object]):
    model = cells(2)
    change(model["cells"])
    assert tried(model, {}, {}) == 2 * tried(cells(2), {})


def test_a_kind_with_an_option_that_is_a_list_is_tried_for_each_rule():
    rule = {"penalty": {"kind": "tried", "strength": 1, "notes": [1, 2]}}
    assert tried(cells(3), *[rule] * 3) == 3 * tried(cells(3), rule)


def test_a_kind_that_is_wrong_for_the_weights_of_one_of_many_equal_rules_is_told_with_that_rule():
    model = cells(4)
    model["cells"].insert(2, nn.GRUCell(5, 5))
    with pytest.raises(regkit.PluginError, match=r"^rule 'rules/2': value of .*Tried returns .*\(5,\), not a"):
        tried(model, *[{"penalty": {"kind": "tried", "strength": 1, "wrong_for": 5}}] * 5)


def test_after_detach_nothing_of_hundreds_of_cells_is_held_and_they_are_as_they_were(traced):
    model = cells(300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    before = traced()
    attachment = regkit.attach(model, REALISTIC)
    model["cells"][0](torch.ones(2, 4)).sum().backward()
    attachment.discard()
    attached = traced() - before
    attachment.detach()
    del attachment
    model["cells"][0].zero_grad()
    assert traced() - before < attached / 8  # a dict of torch's keeps the room that a hook had in it
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks for module in model.modules())
    parts = [weakref.ref(one) for one in (*model.modules(), *model.parameters())]
    del model, optimizer, parameter
    gc.collect()
    assert not [one for one in parts if one() is not None]


def test_a_model_that_goes_while_hundreds_of_cells_are_attached_takes_all_along(traced):
    before = traced()
    model = cells(300)
    attachment = regkit.attach(model, REALISTIC)
    attached = traced() - before
    parts = [weakref.ref(one) for one in (*model.modules(), *model.parameters())]
    del model
    gc.collect()
    assert not [one for one in parts if one() is not None]
    attachment.detach()
    del attachment, parts
    assert traced() - before < attached / 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "document", "seconds"),
    [
        pytest.param(1000, rules(*({"module": f"cells.{n}"} for n in range(1000))), 20, id="a thousand rules"),
        pytest.param(1000, rules(*({"module": f"**.{n}"} for n in range(1000))), 20, id="a thousand globs"),
        pytest.param(10_000, REALISTIC, 50, id="ten thousand cells"),
    ],
)
def test_attach_detach_and_copies_take_seconds_at_scale(number: int, document: Document, seconds: float):
    """Ten times the bars, for machines that are slow or busy: what grows with the square would still fail."""
    model = cells(number, 16)
    start = time.process_time()
    attachment = regkit.attach(model, document)
    assert str(attachment.plan).count("\n") > number
    assert time.process_time() - start < seconds
    start = time.process_time()
    twin = copy.deepcopy(model)
    assert len(regkit.attachments(twin)) == 1
    attachment.detach()
    assert time.process_time() - start < seconds
