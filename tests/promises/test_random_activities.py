"""Random nets and activity rules against a plain interpreter: penalties, gradients, and gradients of gradients.

A test is named by its seed: `draw(seed)` makes the same case again.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regkit
from regkit.activity import reduction
from tests.support.random.activity_interpreter import penalties
from tests.support.random.nets import FEATURES, Batch, RandomNet

KINDS = ["activity_l1", "activity_l2", "activity_l1_l2", "temporal", "norm_stabilizer"]
IN_TIME = ("temporal", "norm_stabilizer")
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2}


@dataclass
class Case:
    """A net, a document, and how they are trained.

    mode: once, twice (gradients of gradients), autocast; padding: lengths, mask or ""; losses: how many a step has,
    each with a penalty of its own; summed: whether they go back together; room: the bytes of a piece.
    """

    net: RandomNet
    document: dict[str, Any]
    dtype: torch.dtype
    mode: str
    padding: str
    batch: int
    losses: int
    summed: bool
    steps: int
    room: int

    @property
    def tolerance(self) -> float:
        return TOLERANCES[torch.bfloat16 if self.mode == "autocast" else self.dtype]


def draw(seed: int) -> Case:
    r = Random(seed)
    torch.manual_seed(seed)
    dtype, batch = r.choice([torch.float32, torch.float64, torch.float64]), r.choice([1, 2, 3])
    mode = r.choice(["once", "once", "twice", "autocast"])
    dtype = torch.float32 if mode == "autocast" else dtype
    padding = r.choice(["", "", "", "lengths", "mask"])
    net = RandomNet(r, batch, smooth=mode == "twice", padding=padding).to(dtype)
    rules = [_rule(r, net, padding) for _ in range(r.randint(1, 3))]
    document = {"rules": [{"name": f"rule {number}", **rule} for number, rule in enumerate(rules)]}
    room = r.choice([2**20, 2**20, 64, 300])
    losses, steps, summed = r.choice([1, 1, 2]), r.choice([1, 1, 2]), r.random() < 0.5
    return Case(net, document, dtype, mode, padding, batch, losses, summed, steps, room)


def _rule(r: Random, net: RandomNet, padding: str) -> dict[str, Any]:
    kind = r.choice(KINDS)
    penalty: dict[str, Any] = {"kind": kind, "strength": r.choice([0.5, 2.0])}
    if r.random() < 0.8:
        penalty["reduction"] = r.choice(["mean", "batch", "sum"])
    if kind == "activity_l1_l2":
        penalty |= {"l1": 0.3, "l2": 0.2}
    rule = {"target": _target(r, net, padding, kind in IN_TIME), "penalty": penalty}
    if kind in IN_TIME:  # sequences may be of one step
        rule["optional"] = True
    return {**rule, "schedule": _schedule(r)} if r.random() < 0.4 else rule


def _schedule(r: Random) -> dict[str, Any]:
    ramp = {"start": 0.5, "end": 3.0, "steps": 2}
    return r.choice(
        [
            {"kind": "constant", "value": 0.7},
            {"kind": "linear", **ramp},
            {"kind": "cosine", **ramp},
            {"kind": "exponential", "start": 2.0, "decay": 0.25, "steps": 2},
            {"kind": "piecewise", "boundaries": [1], "values": [0.4, 1.5]},
        ]
    )


def _target(r: Random, net: RandomNet, padding: str, in_time: bool) -> dict[str, Any]:
    """All outputs, those of some modules, or one of the states."""
    modules = {name: net.get_submodule(name) for name in net.plans}
    name = r.choice(list(modules))
    one, layer = modules[name], isinstance(modules[name], nn.RNNBase)
    targets: list[dict[str, Any]] = [
        {},
        {"role": "output"},
        {"module": name},
        {"module": f"{name.rstrip('0123456789')}*"},
    ]
    targets.append({"module": list({name, r.choice(list(modules))}), "role": "output"})
    if isinstance(one, nn.LSTMCell):
        targets += [{"module": name, "role": "cell"}, {"module": "lstmcell*", "role": ["output", "cell"]}] * 2
    if layer and one.bidirectional:
        targets += [{"module": name, "direction": r.choice(["forward", "backward"])}] * 2
    if layer and not in_time and (not padding or "packed" in net.plans[name].call):
        final = {"module": name, "role": r.choice(["state", "cell"] if isinstance(one, nn.LSTM) else ["state"])}
        targets += [final, {**final, "layer": r.randrange(one.num_layers)}, {**final, "role": ["output", "state"]}]
        if one.bidirectional:
            targets.append({**final, "direction": r.choice(["forward", "backward"])})
    return r.choice(targets)


def a_batch(case: Case, attachment: regkit.Attachment) -> Batch:
    time, batch = int(torch.randint(1, 5, ())), case.batch
    x = torch.randn(time, batch, FEATURES, dtype=case.dtype, requires_grad=True)
    packed = torch.randint(1, time + 1, (batch,))
    if case.padding == "lengths":
        lengths = torch.randint(0, time + 1, (batch,))
        valid = torch.arange(time)[:, None] < lengths
        return Batch(x, valid, packed, "lengths", lambda _: attachment.lengths(lengths))
    if case.padding == "mask":
        return Batch(x, torch.rand(time, batch) < 0.7, packed, "mask", mask=attachment.mask)
    return Batch(x, torch.ones(time, batch, dtype=torch.bool), packed)


def close(ours: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    scale = max(1.0, float(wanted.detach().abs().max()))
    torch.testing.assert_close(
        ours.double(), wanted.double(), rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{what}: {m}"
    )


def a_loss(case: Case, attachment: regkit.Attachment, batch: Batch, step: int, goes_on: bool) -> tuple[Tensor, Tensor]:
    """The loss with regkit's penalty and with the interpreter's, which agree in value, rule by rule."""
    cast = torch.autocast("cpu", torch.bfloat16) if case.mode == "autocast" else nullcontext()
    with cast:
        base = case.net(batch, goes_on)
        in_store = attachment.values()
        ours = attachment.penalty()
    wanted = penalties(case.document, case.net.sights, step)
    tolerance = min(case.tolerance, TOLERANCES[torch.float32])
    for values, when in ((in_store, "in store"), (attachment.values(), "taken")):
        assert list(values) == list(wanted)
        for name, value in wanted.items():
            close(values[name], value.detach(), tolerance, f"{name}, {when}")
    total = torch.stack(list(wanted.values())).sum()
    assert ours.dtype is (torch.float64 if case.dtype is torch.float64 else torch.float32)
    close(ours.detach(), total.detach(), tolerance, "penalty")
    return base + 3.0 * ours, base + 3.0 * total


def gradients(case: Case, losses: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Of the sum of the losses, or of each and added up; in mode twice, of the norm of those."""
    twice = case.mode == "twice"
    parts = [sum(losses[1:], losses[0])] if case.summed else losses
    found = [torch.zeros_like(leaf) for leaf in leaves]
    for loss in parts:
        some = torch.autograd.grad(loss, leaves, create_graph=twice, retain_graph=True, allow_unused=True)
        found = [one if new is None else one + new for one, new in zip(found, some, strict=True)]
    if twice:
        norm = torch.stack([one.square().sum() for one in found]).sum()
        found += torch.autograd.grad(norm, leaves, retain_graph=True, materialize_grads=True)
    return found


def compare(seed: int) -> Case:
    """Train a random net for a step or two, and hold regkit to the interpreter at each."""
    case = draw(seed)
    net = case.net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    with pytest.MonkeyPatch.context() as patch, regkit.attach(net, case.document) as attachment:
        for on_cpu in (True, False):
            patch.setitem(reduction.ROOM, on_cpu, case.room)
        for step in range(case.steps):
            batches = [a_batch(case, attachment) for _ in range(case.losses)]
            pairs = [
                a_loss(case, attachment, batch, step, goes_on=number > 0 and not case.padding)
                for number, batch in enumerate(batches)
            ]
            free = {name: p for name, p in net.named_parameters() if p.requires_grad}
            leaves = [*free.values(), *(batch.x for batch in batches)]
            ours, wanted = (gradients(case, list(losses), leaves) for losses in zip(*pairs, strict=True))
            names = [*free, *["x"] * len(batches)]
            for number, (one, other) in enumerate(zip(ours, wanted, strict=True)):
                close(one, other, case.tolerance, f"gradient of {names[number % len(names)]}")
            for parameter, gradient in zip(free.values(), ours, strict=False):
                parameter.grad = gradient.detach()
            optimizer.step()
    return case


def test_the_first_hundred_cases_have_some_of_everything():
    seen: set[str] = set()
    for case in map(draw, range(100)):
        seen |= {case.mode, case.padding, str(case.dtype), f"{case.losses} losses", f"{case.steps} steps"}
        for name, plan in case.net.plans.items():
            seen |= {name.rstrip("0123456789"), plan.call, f"from {plan.start}", plan.hand}
        for rule in case.document["rules"]:
            penalty, target = rule["penalty"], rule["target"]
            seen |= {penalty["kind"], penalty.get("reduction", "mean"), f"of {target.get('role')}", *target}
            seen.add(rule.get("schedule", {}).get("kind", ""))
    wanted = {*KINDS, "mean", "batch", "sum", "once", "twice", "autocast", "lengths", "mask", "torch.float32"}
    wanted |= {"rnn", "lstm", "gru", "rnncell", "lstmcell", "grucell", "of output", "of state", "of cell", "of None"}
    wanted |= {"whole", "packed", "unbatched", "packed twice", "layer", "direction", "module", "2 losses", "2 steps"}
    wanted |= {"from none", "from zeros", "from learned", "from computed", "torch.float64"}
    wanted |= {"steps", "chunks", "as it is", "copied", "h copied", "detached", "anew", "branching"}
    wanted |= {"constant", "linear", "cosine", "exponential", "piecewise"}
    assert not wanted - seen


ONE_DNN = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
CHANGED = pytest.mark.filterwarnings("ignore:the state handed to:regkit.RegkitWarning")


@ONE_DNN
@CHANGED
@pytest.mark.parametrize("seed", range(100))
def test_a_random_net_with_random_rules_comes_to_what_the_interpreter_says(seed):
    compare(seed)


@ONE_DNN
@CHANGED
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 700))
def test_so_do_many_more(seed):
    compare(seed)
