"""However many rules there are, what is known of a module, of a weight, of a name, is found out once."""

from __future__ import annotations

import itertools
import types
from collections import Counter
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import regkit
from regkit import Adapter, Output, Weight
from regkit.plan import candidates, declarations
from regkit.plan.patterns import glob
from tests.support.scale import Document, cells, rules


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

    kept = declarations.storage_of
    monkeypatch.setattr(declarations, "storage_of", storage_of)
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

    monkeypatch.setattr(candidates, "glob", counted)
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
