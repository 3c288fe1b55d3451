"""Copies of a model with rules: in force on what is trained, no concern of the original, and gone when dropped."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, Adam

import regkit
from tests.support.copying import WAYS, inert_hooks
from tests.support.loops import DECAY, RULE, Batches, assert_equal_weights, loss_of, rnn_groups, train

pytestmark = pytest.mark.works_with("Copies: deepcopy, pickle, torch.save")

L2 = {"rules": [{"name": "l2", "penalty": "l2(0.1)"}]}
SCHEDULED = {
    "rules": [
        {"penalty": "l2(0.2)", "schedule": "linear(0, 1, 8)"},
        {"name": "ball", "constraint": "max_norm(0.4)", "every": 3},
    ]
}
ACTIVITY = {"rules": [{"name": "ar", "penalty": "activity_l2(0.5)"}, *SCHEDULED["rules"]]}


def none(model: nn.Module, batches: Batches) -> None:
    """Copied before anything has run."""


def forward(model: nn.Module, batches: Batches) -> None:
    model(batches[0][0])


def stepped_before_any_forward(model: nn.Module, batches: Batches) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    SGD(model.parameters(), lr=0.0).step()
    model.zero_grad()


def amid_accumulation(model: nn.Module, batches: Batches) -> None:
    loss_of(model, *batches[0]).backward()


@pytest.mark.parametrize("before", [none, forward, stepped_before_any_forward, amid_accumulation])
@pytest.mark.parametrize("way", WAYS)
def test_training_a_copy_keeps_the_rules_in_force(way, before, make_model, batches):
    decayed, model = make_model(), make_model()
    attachment = regkit.attach(model, {"rules": [*RULE["rules"], {"name": "ball", "constraint": "max_norm(2)"}]})
    before(model, batches)
    copied = way(model)
    originally = [p.detach().clone() for p in model.parameters()]
    steps = attachment.step_count

    train(decayed, SGD(rnn_groups(decayed, DECAY), lr=0.1), batches)
    train(copied, SGD(rnn_groups(copied, 0.0), lr=0.1), batches)
    assert_equal_weights(decayed, copied)
    (of_copy,) = regkit.attachments(copied)
    assert of_copy.step_count == steps + len(batches)
    assert of_copy.violations()["ball"] == 0
    assert attachment.step_count == steps
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), originally, strict=True))
    assert of_copy is not attachment


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_goes_on_as_the_original_would(way, make_model, batches):
    """Its schedules and its `every` go on from the original's step count."""
    original, model = make_model(), make_model()
    for one in (original, model):
        attachment = regkit.attach(one, SCHEDULED)
        train(one, SGD(one.parameters(), lr=0.1), batches)
    copied = way(model)
    for one in (original, copied):
        train(one, SGD(one.parameters(), lr=0.1), batches[:3])
    assert_equal_weights(original, copied, 0)
    assert [len(regkit.attachments(one)) for one in (copied, model)] == [1, 1]
    assert regkit.attachments(copied)[0].step_count == 7
    assert attachment.step_count == 4


def test_an_optimizer_copied_along_with_its_model_steps_the_copy(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, L2)
    optimizer = Adam(model.parameters(), lr=0.01)
    train(model, optimizer, batches[:1])
    copied, of_copy = copy.deepcopy((model, optimizer))
    train(model, optimizer, batches[1:])
    train(copied, of_copy, batches[1:])
    assert_equal_weights(model, copied, 0)
    assert [attachment.step_count, regkit.attachments(copied)[0].step_count] == [4, 4]


def test_an_optimizer_that_is_given_the_copys_parameters_later_steps_it(make_model, batches):
    model = make_model()
    regkit.attach(model, L2)
    optimizer = SGD(model.parameters(), lr=0.1)
    copied = copy.deepcopy(model)
    train(model, optimizer, batches)
    optimizer.param_groups[0]["params"] = list(copied.parameters())
    train(copied, optimizer, batches)
    assert regkit.attachments(copied)[0].step_count == 4


def test_activity_on_a_copy_has_a_penalty_of_its_own(make_model, batches):
    by_hand, model = make_model(), make_model()
    original = regkit.attach(model, {"rules": ACTIVITY["rules"][:1]})
    model(batches[0][0])
    copied = copy.deepcopy(model)
    (attachment,) = regkit.attachments(copied)
    for one, penalty in ((copied, attachment.penalty), (by_hand, None)):
        optimizer = SGD(one.parameters(), lr=0.1)
        for x, y in batches:
            optimizer.zero_grad()
            h = one.rnn(x)[0]
            extra = 0.5 * h.square().mean() if penalty is None else penalty()
            (nn.functional.mse_loss(one.head(h), y) + extra).backward()
            optimizer.step()
    assert_equal_weights(by_hand, copied)
    torch.testing.assert_close(original.values()["ar"], 0.5 * model.rnn(batches[0][0])[0].detach().square().mean())


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_whose_activity_penalty_is_forgotten_is_an_error(way, make_model, batches):
    model = make_model()
    regkit.attach(model, ACTIVITY)
    copied = way(model)
    with pytest.raises(regkit.StepError, match=r"'ar'.*is a copy.*regkit.attachments\(model\) has its attachment"):
        train(copied, SGD(copied.parameters(), lr=0.1), batches)
    with pytest.raises(regkit.StepError, match="'ar'"):
        train(copied, SGD(copied.parameters(), lr=0.1), batches)


def test_detaching_the_one_does_not_detach_the_other(make_model, batches):
    models = [make_model()]
    regkit.attach(models[0], L2)
    models += [copy.deepcopy(models[0]), copy.deepcopy(models[0])]
    regkit.attachments(models[1])
    regkit.attachments(models[0])[0].detach()
    assert [len(regkit.attachments(model)) for model in models] == [0, 1, 1]
    regkit.attachments(models[1])[0].detach()
    assert [len(regkit.attachments(model)) for model in models] == [0, 0, 1]
    for model in models:
        train(model, SGD(model.parameters(), lr=0.1), batches)
    assert_equal_weights(models[0], models[1], 0)
    assert not torch.allclose(models[0].rnn.weight_hh_l0, models[2].rnn.weight_hh_l0, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["after detach", "inside detached"])
def test_a_copy_may_be_made_that_carries_nothing(how, way, make_model, batches):
    bare, model = make_model(), make_model()
    attachment = regkit.attach(model, {"rules": SCHEDULED["rules"]})
    if how == "after detach":
        attachment.detach()
        copied = way(model)
    else:
        with attachment.detached():
            copied = way(model)
        assert attachment in regkit.attachments(way(model) and model)
    assert vars(copied).keys() == vars(bare).keys()
    assert inert_hooks(copied) == 0
    for one in (bare, copied):
        train(one, SGD(one.parameters(), lr=0.1), batches)
    assert_equal_weights(bare, copied, 0)


def test_a_second_document_joins_on_a_copy_and_the_first_again_is_refused(make_model):
    model = make_model()
    regkit.attach(model, L2)
    copied = copy.deepcopy(model)
    with pytest.raises(regkit.AttachError, match="acts already"):
        regkit.attach(copied, L2)
    regkit.attach(copied, {"rules": [{"constraint": "max_norm(1)"}]})
    assert [len(regkit.attachments(one)) for one in (model, copied)] == [1, 2]
    assert [len(regkit.attachments(one)) for one in (copy.deepcopy(copied), copy.deepcopy(model))] == [2, 1]


def test_a_copy_that_was_changed_is_an_error_at_every_step_and_says_how_to_make_a_bare_one(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, L2)
    copied = copy.deepcopy(model)
    copied.rnn = nn.LSTM(3, 4, num_layers=2, batch_first=True).double()
    copied.rnn.weight_ih_l0 = nn.Parameter(torch.zeros(16, 2).double())
    for p in copied.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        with pytest.raises(regkit.AttachError, match=r"of another model.*`with attachment.detached\(\):` carries no"):
            SGD(copied.parameters(), lr=0.1).step()
    train(model, SGD(model.parameters(), lr=0.1), batches)
    assert attachment.step_count == 4


def test_a_copy_of_a_part_has_no_rules_and_a_document_of_its_own_fits_it(make_model, batches):
    model = make_model()
    attachment = regkit.attach(model, ACTIVITY)
    part = copy.deepcopy(model.rnn)
    part(batches[0][0])[0].sum().backward()
    SGD(part.parameters(), lr=0.1).step()
    assert attachment.values()["ar"].isnan()
    assert regkit.attachments(part) == ()
    own = regkit.attach(part, {"rules": ACTIVITY["rules"][:1]})
    part(batches[0][0])
    assert own.values()["ar"] > 0
    own.detach()
    assert inert_hooks(part) == 0


def test_a_shallow_copy_is_the_same_weights_and_is_counted_once(make_model, batches):
    decayed, model = make_model(), make_model()
    attachment = regkit.attach(model, RULE)
    shallow = copy.copy(model)
    train(decayed, SGD(rnn_groups(decayed, DECAY), lr=0.1), batches)
    train(shallow, SGD(rnn_groups(shallow, 0.0), lr=0.1), batches)
    assert_equal_weights(decayed, model)
    assert attachment.step_count == 4
    attachment.detach()
    assert regkit.attachments(shallow) == ()


@pytest.mark.parametrize("outside", [False, True])
def test_a_copy_of_a_compiled_model_keeps_its_rules(outside, make_model, batches):
    decayed, model = make_model(nn.RNN), make_model(nn.RNN)
    whole = torch.compile(model, backend="eager")
    regkit.attach(whole if outside else model, RULE)
    copied = copy.deepcopy(whole)
    train(decayed, SGD(rnn_groups(decayed, DECAY), lr=0.1), batches)
    inner = copied._orig_mod
    train(copied, SGD(rnn_groups(inner, 0.0), lr=0.1), batches)
    assert_equal_weights(decayed, inner)
    assert len(regkit.attachments(copied if outside else inner)) == 1


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("outside", [False, True])
def test_a_copy_of_a_model_under_ddp_keeps_its_rules(outside, make_model, batches):
    decayed, model = make_model(), make_model()
    whole = nn.parallel.DistributedDataParallel(model)
    attachment = regkit.attach(whole if outside else model, RULE)
    copied = copy.deepcopy(whole)
    train(decayed, SGD(rnn_groups(decayed, DECAY), lr=0.1), batches)
    train(copied, SGD(rnn_groups(copied.module, 0.0), lr=0.1), batches)
    assert_equal_weights(decayed, copied.module)
    assert len(regkit.attachments(copied if outside else copied.module)) == 1
    assert attachment.step_count == 0


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickled"]
)
def test_a_copy_shares_a_loss_scale_that_is_a_number_and_is_told_of_one_that_is_asked(how):
    rule = {"penalty": "activity_l2(1)", "via": "inject"}
    model = nn.GRU(3, 4).double()
    regkit.attach(model, {"rules": [rule]}, loss_scale=8.0)
    twin = how(model)
    assert len(regkit.attachments(twin)) == 1
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for one in (model, twin):
        (8.0 * one(x)[0].sum()).backward()
    torch.testing.assert_close(twin.weight_hh_l0.grad, model.weight_hh_l0.grad)
    asked = nn.GRU(3, 4)
    regkit.attach(asked, {"rules": [rule]}, loss_scale=lambda: 8.0)
    with pytest.raises(
        regkit.AttachError, match=r"loss_scale= goes with rules via .inject.*This model is a copy of one"
    ):
        regkit.attachments(copy.deepcopy(asked))
