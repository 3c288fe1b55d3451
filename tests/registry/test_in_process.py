"""Plugins of this process: registered and decorated, replaced when a cell is run again, there for a while only."""

from __future__ import annotations

import copy
import pickle
import types
from typing import ClassVar, Literal

import pluggy
import pytest
import torch
from torch import Tensor, nn

import regkit
from regkit import PluginError, Registry
from regkit.registry.entries import Origin
from regkit.registry.plugin import HOOKS, PluginOffers, ask

CELL = """
from typing import Literal
import regkit

@registry.register
class Nuclear(regkit.Penalty):
    '''A sum of powers.'''
    kind: Literal["nuclear"] = "nuclear"

    def value(self, w):
        return {formula}
"""
SPEC = {"rules": [{"penalty": "nuclear(1)"}]}


def run_cell(registry, formula, module="__main__", cell=CELL):
    """What a notebook does with a cell."""
    namespace = {"registry": registry, "__name__": module}
    exec(compile(cell.format(formula=formula), "cell", "exec", dont_inherit=True), namespace)
    return namespace.get("Nuclear")


def test_a_decorated_class_is_a_kind_and_is_still_the_class():
    registry = Registry()
    cls = run_cell(registry, "w.sum()")
    assert registry.kind("nuclear") is cls
    assert regkit.load(SPEC, registry=registry).rules[0].kind == cls(strength=1)
    (plugin,) = [one for one in registry.plugins if not one.origin.installed]
    assert (plugin.place, plugin.kinds, plugin.state) == ("__main__:Nuclear", ("nuclear",), "loaded")


def test_a_cell_that_is_run_again_replaces_its_class():
    registry = Registry()
    run_cell(registry, "w.sum()")
    kept = regkit.load(SPEC, registry=registry).rules[0].kind
    run_cell(registry, "w.square().sum()")
    now = regkit.load(SPEC, registry=registry).rules[0].kind
    w = torch.tensor([[3.0]])
    assert (kept.value(w), now.value(w)) == (3, 9)
    assert len([one for one in registry.plugins if not one.origin.installed]) == 1


def test_a_class_of_another_module_is_a_clash_and_replaces_nothing():
    registry = Registry()
    mine = run_cell(registry, "w.sum()")
    with pytest.raises(PluginError, match=r"two plugins offer the kind 'nuclear': __main__ .* and elsewhere"):
        run_cell(registry, "w.sum()", "elsewhere")
    assert registry.kind("nuclear") is mine


def test_another_class_of_the_same_module_is_a_clash_too():
    """Two classes of one file with one name are a mistake of copying, not a cell that is run again."""
    registry = Registry()
    run_cell(registry, "w.sum()")
    with pytest.raises(PluginError, match="'nuclear'"):
        run_cell(registry, "w.sum()", cell=CELL.replace("class Nuclear", "class Other"))


def test_a_standard_kind_cannot_be_redefined():
    registry = Registry()

    class L2(regkit.Penalty):
        """Ours."""

        kind: Literal["l2"] = "l2"

        def value(self, w: Tensor) -> Tensor:
            return w.sum()

    with pytest.raises(PluginError, match=f"'l2': torch-regkit {regkit.__version__}"):
        registry.register(L2)
    assert registry.kind("l2") is not L2


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(6, 2))


class Reader(regkit.Adapter):
    modules: ClassVar = (Cell,)

    def weights(self, module):
        return [regkit.Weight(("w",), "kernel")]

    def outputs(self, module):
        return [regkit.Output("output")]

    def observe(self, module, args, kwargs, result):
        return {"output": result}

    def segments(self, module, site, observed, valid, step):
        return []


@pytest.mark.parametrize("form", [Reader, Reader()], ids=["class", "object"])
def test_an_adapter_is_registered_as_a_class_or_an_object(form):
    registry = Registry()
    assert registry.register(form) is form
    assert registry.register(form) is form  # as when a cell is run again
    assert isinstance(registry.adapter(Cell()), Reader)
    assert str(registry.adapter_origin(Cell())) == __name__
    (binding,) = regkit.resolve(Cell(), {"rules": [{"penalty": "l2(1)"}]}, registry=registry).bindings
    assert [site.parameters for site in binding.weights] == [("w",)]


def test_the_decorator_of_the_package_is_that_of_the_default_registry(monkeypatch):
    monkeypatch.setattr("regkit.registry.registry._default", None)

    @regkit.register
    class Nuclear(regkit.Penalty):
        """Ours."""

        kind: Literal["nuclear"] = "nuclear"

        def value(self, w: Tensor) -> Tensor:
            return w.sum()

    assert regkit.load(SPEC).rules[0].kind == Nuclear(strength=1)


def test_what_is_registered_for_a_while_goes_again():
    registry = Registry()
    names = [entry.name for entry in registry.entries()]
    with registry.temporary(Reader) as same:
        assert same is registry
        run_cell(registry, "w.sum()")
        assert registry.find("nuclear") is not None
        assert registry.adapter(Cell()) is not None
    assert [entry.name for entry in registry.entries()] == names
    assert registry.adapter(Cell()) is None
    assert all(plugin.origin.installed for plugin in registry.plugins)
    with pytest.raises(regkit.SpecError, match="unknown penalty 'nuclear'"):
        regkit.load(SPEC, registry=registry)


def test_where_one_of_several_is_refused_none_is_registered():
    registry = Registry()
    with pytest.raises(PluginError), registry.temporary(Reader, 3):
        pytest.fail("it was entered")
    assert registry.adapter(Cell()) is None


def test_an_exception_inside_takes_what_is_temporary_along():
    registry = Registry()
    with pytest.raises(ZeroDivisionError), registry.temporary(Reader):
        1 / 0  # noqa: B018  # to fail is the point
    assert registry.adapter(Cell()) is None


def test_a_class_may_be_known_by_its_name_without_being_imported():
    class Lazy(Reader):
        modules: ClassVar = (f"{__name__}:Cell", "a_package_that_is_not_there.cells:LiquidCell")

    class Sub(Cell):
        pass

    registry = Registry([Lazy()])
    assert isinstance(registry.adapter(Cell()), Lazy)
    assert isinstance(registry.adapter(Sub()), Lazy)
    assert "LiquidCell" in registry.module_classes
    with pytest.raises(PluginError, match="two plugins offer an adapter for Cell"):
        registry.register(Reader)


def test_an_adapter_that_knows_its_class_in_another_way_than_before_replaces_itself():
    registry = Registry()
    for modules in ((Cell,), (f"{__name__}:Cell",), (Cell,)):
        again = type("Again", (Reader,), {"modules": modules, "__module__": __name__})
        registry.register(again)
        assert type(registry.adapter(Cell())) is again


def test_two_adapters_of_one_file_are_told_by_their_names():
    registry = Registry([Reader])
    other = type("Other", (Reader,), {"__module__": __name__})
    with pytest.raises(PluginError, match=rf"for Cell: .*{__name__}:Reader\) and .*{__name__}:Other\)"):
        registry.register(other)


@pytest.mark.parametrize("modules", [("Cell",), ("a.b.Cell",), ("a:",), (3,), (Tensor,), "a:B", ()])
def test_what_names_no_class_is_refused(modules):
    class Wrong(Reader):
        pass

    Wrong.modules = modules
    with pytest.raises(PluginError, match=r"Wrong\.modules must be a tuple"):
        Registry().register(Wrong)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("gates", ["new"], "tuple of names"),
        ("gates", ("not a name",), "tuple of names"),
        ("gates", ("o", "keep"), "documents use for other gates"),
        ("roles", "kernel", "tuple of names"),
    ],
)
def test_an_adapters_words_must_fit_into_the_language_of_documents(field, value, words):
    wrong = type("Wrong", (Reader,), {field: value, "__module__": __name__})
    with pytest.raises(PluginError, match=words):
        Registry().register(wrong)


def test_an_adapter_that_cannot_be_made_is_named():
    class Unfinished(regkit.Adapter):
        modules: ClassVar = (Cell,)

    with pytest.raises(PluginError, match=r"Unfinished\(\) failed: .*abstract"):
        Registry().register(Unfinished)


WORDS = (
    *("version", "provenance", "rules", "rule", "layers", "layer", "name", "kind", "target", "via", "optional"),
    *("penalty", "activity", "constraint", "schedule", "regkit"),
    *("null", "none", "true", "false", "any", "all", "auto", "default", "custom", "unknown"),
)


@pytest.mark.parametrize("name", WORDS)
def test_words_of_the_document_are_reserved(name):
    members = {"__annotations__": {"kind": Literal[name]}, "kind": name, "value": lambda self, w: w.sum()}
    taken = type("Taken", (regkit.Penalty,), {"__module__": __name__, **members})
    with pytest.raises(PluginError, match=f"no kind may be named '{name}'"):
        Registry().register(taken)


def test_a_registry_is_itself_when_copied_and_the_same_when_pickled():
    registry = Registry([Reader()])
    assert copy.deepcopy(registry) is registry
    again = pickle.loads(pickle.dumps(registry))
    assert again.entries() == registry.entries()
    assert isinstance(again.adapter(Cell()), Reader)
    default = regkit.registry.registry.default()
    assert pickle.loads(pickle.dumps(default)) is default


def nothing():
    return []


def specs(**hooks):
    """A later regkit's hooks."""
    room = types.ModuleType("later")
    for name, (function, options) in hooks.items():
        setattr(room, name, pluggy.HookspecMarker("regkit")(function, **options))
    for name in (*HOOKS, "regkit_adapters"):
        if not hasattr(room, name):
            setattr(room, name, pluggy.HookspecMarker("regkit")(types.FunctionType(nothing.__code__, {}, name)))
    return room


class Today:
    @regkit.hookimpl
    def regkit_penalties(self) -> list[type[regkit.Penalty]]:
        return [regkit.registry.registry.default().kind("l2")]


def test_a_plugin_of_today_works_where_a_hook_has_gained_an_argument():
    def regkit_penalties(model=None):
        return []

    offers = PluginOffers(Origin("stranger"))
    ask(Today(), offers, specs(regkit_penalties=(regkit_penalties, {})))
    assert [entry.name for entry in offers.kinds] == ["l2"]


def test_a_hook_that_is_to_go_warns_its_implementer():
    def regkit_penalties():
        return []

    later = specs(regkit_penalties=(regkit_penalties, {"warn_on_impl": DeprecationWarning("use regkit_kinds")}))
    with pytest.warns(DeprecationWarning, match="use regkit_kinds"):
        ask(Today(), PluginOffers(Origin("stranger")), later)
