"""A registry of one's own travels with the plan that came from it, as far as the plan needs it."""

from __future__ import annotations

import io
import pickle
from typing import ClassVar, Literal

import pytest
import torch
from torch import nn

import regkit
from regkit import AttachError, Registry
from regkit.activity import of_step


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((4, 3), 0.3))

    def forward(self, x, h):
        return torch.tanh(x @ self.w.T + h)


class Reader(regkit.Adapter):
    modules: ClassVar = (Cell,)
    steps = True

    def weights(self, module):
        return [regkit.Weight(("w",), "kernel")]

    def outputs(self, module):
        return [regkit.Output("output", sequence=True)]

    def observe(self, module, args, kwargs, result):
        return {"output": result, "before": args[1]}

    def segments(self, module, site, observed, valid, step):
        return [of_step(observed["output"], observed["before"], valid, step)]


class Cubes(regkit.Penalty):
    """A penalty."""

    kind: Literal["cubes"] = "cubes"

    def value(self, w):
        return w.abs().pow(3).sum()


RULES = {"rules": [{"penalty": "cubes(0.1)"}, {"penalty": "activity_l2(1)"}]}


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded])
def test_a_pickled_model_finds_its_adapters_again(copied):
    model = Cell()
    attachment = regkit.attach(model, RULES, registry=Registry([Reader, Cubes]))
    twin = copied(model)
    (other,) = regkit.attachments(twin)
    results = []
    for one, rules in ((model, attachment), (twin, other)):
        loss = one(torch.ones(2, 3), torch.zeros(2, 4)).sum() + rules.penalty()
        loss.backward()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
        results.append((one.w.clone(), rules.values()))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert set(results[1][1]) == {"rules/0", "rules/1"}


def test_a_pickled_plan_is_as_good_as_the_one_it_was_made_from():
    plan = regkit.resolve(Cell(), RULES, registry=Registry([Reader, Cubes]))
    attachment = regkit.attach(model := Cell(), pickle.loads(pickle.dumps(plan)))
    (model(torch.ones(2, 3), torch.zeros(2, 4)).sum() + attachment.penalty()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert float(attachment.values()["rules/1"]) > 0


def test_rules_on_weights_take_no_registry_along():
    class Local(Reader):  # which cannot be pickled
        pass

    model = Cell()
    regkit.attach(model, {"rules": [{"penalty": "l2(1)"}]}, registry=Registry([Local]))
    (attachment,) = regkit.attachments(pickle.loads(pickle.dumps(model)))
    assert attachment.step_count == 0


def test_an_output_whose_adapter_is_not_there_any_more_is_an_error_and_not_silence(monkeypatch):
    default = Registry()
    monkeypatch.setattr("regkit.registry.registry._default", default)
    with default.temporary(Reader):
        plan = regkit.resolve(Cell(), {"rules": [{"penalty": "activity_l2(1)"}]})
    with pytest.raises(AttachError, match=r"no adapter for .*Cell is known here, and rules/0 needs one"):
        regkit.attach(Cell(), pickle.loads(pickle.dumps(plan)))
