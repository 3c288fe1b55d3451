"""Whatever fails in a plugin, wherever, is told with the names of the rule, the kind, the plugin and the place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import regkit
from tests.support.plugins import strangers as mine
from tests.support.plugins.strangers import RULES, Fault, Layer, attached, stepping

pytestmark = pytest.mark.works_with("Faults: exceptions")


@pytest.fixture(autouse=True)
def nothing_fails() -> Iterator[None]:
    Fault.after.clear()
    yield
    Fault.after.clear()


WHERE = {"project": "rnn.weight_hh_l0", "activity": "rnn", "factor": "slow"}


@pytest.mark.parametrize("place", RULES)
def test_what_a_plugin_raises_is_told_with_rule_kind_plugin_and_weight(place, make_model, batches):
    model = make_model()
    attachment = attached(model, RULES[place])
    failing = "gradient" if place == "decay" else place
    Fault.after[failing] = 0
    with pytest.raises(regkit.StepError) as caught:
        stepping(model, attachment, batches)()
    told = str(caught.value)
    kind = {"project": "ball", "activity": "mean"}.get(place, "squares")
    wanted = ["'mine'", f"ZeroDivisionError('{failing}')", WHERE.get(place, "rnn.weight_ih_l0")]
    wanted += [mine.__name__] if place == "factor" else [kind, mine.__name__]
    assert all(one in told for one in wanted), told
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(("place", "ask"), [("value", "values"), ("violation", "violations"), ("activity", "values")])
def test_what_a_plugin_raises_when_it_is_asked_is_told_as_well(place, ask, make_model, batches):
    model = make_model()
    attachment = attached(model, RULES["project" if place == "violation" else place])
    model(batches[0][0])
    Fault.after[place] = 0
    with pytest.raises(regkit.StepError, match=rf"'mine'.*of plugin .*{mine.__name__}.*failed on rnn.*{place}"):
        getattr(attachment, ask)()


@pytest.mark.parametrize("place", ["value", "gradient", "prox", "project", "violation"])
def test_what_a_plugin_raises_at_attach_is_told_and_nothing_is_attached(place, make_model):
    model = make_model()
    Fault.after[place] = 0
    rule = RULES[{"violation": "project"}.get(place, place)]
    with pytest.raises(
        regkit.PluginError, match=rf"'mine'.*of plugin .*{mine.__name__}.*failed on rnn.weight.*{place}"
    ):
        attached(model, rule)
    Fault.after.clear()
    assert regkit.attachments(model) == ()
    attached(model, rule)


@pytest.mark.parametrize("place", ["observe", "starts"])
def test_an_adapter_that_cannot_read_a_call_is_told_with_the_module(place):
    model = nn.ModuleDict({"rnn": Layer(3, 4)})
    attachment = attached(model, RULES["activity"])
    Fault.after[place] = 0
    # Where a sequence starts is only asked where calls count in time.
    with (
        attachment.lengths([2]),
        pytest.raises(regkit.StepError, match=rf"rnn \(Layer\) .*adapter Reader cannot read.*'{place}'"),
    ):
        model["rnn"](torch.randn(2, 1, 3))


def test_an_adapter_that_fails_when_its_records_are_read_is_told_with_the_rule_and_they_are_kept():
    model = nn.ModuleDict({"rnn": Layer(3, 4)})
    attachment = attached(model, RULES["activity"])
    h, _ = model["rnn"](torch.randn(2, 1, 3))
    Fault.after["segments"] = 0
    with pytest.raises(regkit.StepError, match=r"'mine': mean.*failed on rnn.*'segments'"):
        attachment.penalty()
    Fault.after.clear()
    torch.testing.assert_close(attachment.penalty(), 0.1 * h.square().mean())


def test_a_broken_contract_that_shows_in_a_step_is_told_with_rule_kind_plugin_and_weight(make_model, batches):
    """A kind may keep its contract at attach, and call what it does not offer for other weights."""
    model = make_model()
    step = stepping(model, attached(model, RULES["gradient"]), batches)
    told = (
        rf"^rule 'mine': squares\(.*, of plugin .*{mine.__name__}.*, failed on rnn.weight_ih_l0: squares offers no prox"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mine.Squares, "gradient", lambda kind, w: regkit.Penalty.prox(kind, w, 0.1))
        with pytest.raises(regkit.PluginError, match=told):
            step()


@pytest.mark.parametrize("ask", ["penalty", "values"])
def test_a_broken_contract_of_an_activity_rule_is_told_with_rule_and_module(ask, make_model, batches):
    """`reduce` refuses a function that changes the shape, which is known only once there are outputs."""
    model = make_model()
    attachment = attached(model, RULES["activity"])
    model(batches[0][0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mine.Mean, "value", lambda kind, activity: activity.reduce(lambda h: h.sum(), "mean"))
        with pytest.raises(regkit.PluginError, match=r"^rule 'mine': mean.*failed on rnn: reduce\(\) was given"):
            getattr(attachment, ask)()
