"""Parameters of a recurrent module that no weight of its adapter is kept in: no rule on every weight may omit one."""

from __future__ import annotations

import copy

import pytest
import torch
from regkit_standard.torch_adapters import CellAdapter
from torch import nn
from torch.nn.utils import parametrizations, prune

import regkit

DECAY = {"rules": [{"name": "decay", "penalty": "l2(1)"}]}


class Peephole(nn.LSTMCell):
    """A cell with weights of its own, as Gers & Schmidhuber (2000)."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.peep = nn.Parameter(torch.ones(3, self.hidden_size))


def target(**fields):
    return {"rules": [{"name": "decay", "target": fields, "penalty": "l2(1)"}]}


@pytest.mark.parametrize("constraint", [False, True])
def test_a_rule_on_every_weight_may_not_leave_out_a_subclasss_own(constraint):
    rule = {"constraint": "max_norm(1)"} if constraint else {"penalty": "l2(1)"}
    with pytest.raises(
        regkit.ResolveError, match=r"would leave out a\.peep, b\.peep, which no adapter describes"
    ) as told:
        regkit.attach(nn.ModuleDict({"a": Peephole(3, 4), "b": Peephole(3, 4), "c": nn.GRU(3, 4)}), {"rules": [rule]})
    assert "name the roles that are meant" in str(told.value)


@pytest.mark.parametrize("optional", [False, True])
def test_optional_does_not_allow_it(optional):
    document = {"rules": [{"penalty": "l2(1)", "optional": optional}]}
    with pytest.raises(regkit.ResolveError, match="would leave out peep"):
        regkit.attach(Peephole(3, 4), document)


def test_rules_that_name_roles_or_see_outputs_mean_what_they_name_and_the_plan_is_loud():
    plan = regkit.resolve(Peephole(3, 4), target(role=["kernel", "recurrent"]))
    assert "peep" in str(plan)
    assert "LEFT ALONE: no adapter describes it" in str(plan)
    regkit.resolve(Peephole(3, 4), {"rules": [{"penalty": "activity_l2(1)"}]})
    regkit.resolve(Peephole(3, 4), {"layers": [{"kernel_regularizer": "l2(1)", "bias_regularizer": "l2(1)"}]})


@pytest.mark.parametrize("pattern", ["peep", "p*", ["peep"]])
def test_a_document_may_leave_it_alone_by_name(pattern):
    cell = Peephole(3, 4)
    attachment = regkit.attach(cell, target(ignore=pattern))
    wanted = sum(float(p.detach().square().sum()) for name, p in cell.named_parameters() if name != "peep")
    assert float(attachment.values()["decay"]) == pytest.approx(wanted)
    assert "LEFT ALONE" in str(attachment.plan)
    saved = regkit.load(regkit.load(target(ignore=pattern)).to_json())
    assert saved.rules[0].target.ignore == (pattern if isinstance(pattern, str) else pattern[0],)
    assert "LEFT ALONE" in str(regkit.attachments(copy.deepcopy(cell))[0].plan)


@pytest.mark.parametrize(
    ("model", "words"), [(Peephole(3, 4), "did you mean 'peep'"), (nn.LSTM(3, 4), "Available: none")]
)
def test_a_name_that_is_for_no_parameter_is_told(model, words):
    with pytest.raises(regkit.ResolveError, match="ignore names 'peeps', and there is no such parameter") as told:
        regkit.resolve(model, target(ignore="peeps"))
    assert words in str(told.value)


def test_an_adapter_may_ignore_or_describe_it():
    class Ignores(CellAdapter):
        modules = (Peephole,)
        ignored = ("pe*",)

    class Describes(CellAdapter):
        modules = (Peephole,)

        def weights(self, module):
            return [*super().weights(module), regkit.Weight(("peep",), "recurrent")]

    def plugin(adapter):
        class Plugin:
            @regkit.hookimpl
            def regkit_adapters(self):
                return [adapter()]

        return regkit.Registry([Plugin()])

    assert "peep" not in str(regkit.resolve(Peephole(3, 4), DECAY, registry=plugin(Ignores)))
    plan = regkit.resolve(Peephole(3, 4), DECAY, registry=plugin(Describes))
    assert "peep" in {site.parameter for site in plan.bindings[0].sites}


def dropped(lstm: nn.LSTM) -> nn.LSTM:
    lstm.register_parameter("weight_hh_l0_raw", nn.Parameter(lstm.weight_hh_l0.detach()))
    del lstm._parameters["weight_hh_l0"]
    lstm.weight_hh_l0 = lstm.weight_hh_l0_raw * 1.0
    return lstm


def tied(lstm: nn.LSTM) -> nn.LSTM:
    lstm.same = lstm.weight_hh_l0
    return lstm


def with_a_head(lstm: nn.LSTM) -> nn.LSTM:
    """A module of its own kind, which is no weight of the recurrent one."""
    lstm.head = nn.Linear(4, 2)
    return lstm


def within(lstm: nn.LSTM) -> nn.LSTM:
    lstm.inner = nn.GRU(4, 4)
    return lstm


@pytest.mark.parametrize(
    "change",
    [
        lambda one: parametrizations.weight_norm(one, "weight_hh_l0"),
        lambda one: prune.l1_unstructured(one, "weight_hh_l0", 0.5),
        dropped, tied, with_a_head, within,
    ],
    ids=["weight norm", "pruned", "dropped", "tied", "with a head", "around another"],
)  # fmt: skip
def test_what_a_weight_is_kept_in_and_what_is_no_weight_of_the_module_is_not_told(change):
    assert "LEFT ALONE" not in str(regkit.resolve(change(nn.LSTM(3, 4)), DECAY))


def own(name: str, value: nn.Module | nn.Parameter) -> nn.LSTMCell:
    cell = nn.LSTMCell(3, 4)
    setattr(cell, name, value)
    return cell


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (parametrizations.weight_norm(own("peep", nn.Parameter(torch.ones(3, 4))), "peep"), "peep"),
        (own("peeps", nn.ParameterList([nn.Parameter(torch.ones(4))])), r"peeps\.0"),
        (own("peeps", nn.ParameterDict({"i": nn.Parameter(torch.ones(4))})), r"peeps\.i"),
        (own("weight_hh_g", nn.Parameter(torch.ones(4))), "weight_hh_g"),
        (own("peep", nn.Parameter(torch.ones(4), requires_grad=False)), "peep"),
    ],
    ids=["parametrized", "in a list", "in a dict", "with a name as of a computed weight", "frozen, for now"],
)
def test_a_parameter_of_its_own_is_told_however_it_is_kept(cell, name):
    with pytest.raises(regkit.ResolveError, match=f"would leave out {name}, which no adapter describes"):
        regkit.resolve(cell, DECAY)


def test_the_plan_names_the_module_and_the_parameter_however_deep_they_are():
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": own("peeps", nn.ParameterList([nn.Parameter(torch.ones(4))]))})})
    (binding,) = regkit.resolve(model, target(role="kernel")).bindings
    assert binding.uncovered == (("a.b", "peeps.0"),)
    (row,) = [row for row in regkit.resolve(model, target(role="kernel")).rows() if row[-1].startswith("LEFT ALONE")]
    assert row[2:4] == ("a.b", "peeps.0")
