"""Laws of living on a model: an attached module is what it was, and an adapter remembers nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

import regkit
from regkit.testing.adapters.case import Case, quiet, surely, trained
from regkit.testing.adapters.outputs import by_hand, kinds, put_out, puts_out
from regkit.testing.adapters.weights import ignored, masked_out
from regkit.testing.laws import Laws, hold

TRACES: Laws[Case] = Laws()

_DECAY: Final = 0.1


def _on_everything(case: Case, module: nn.Module) -> list[dict[str, Any]]:
    weights = {"penalty": "squares(0.1)"}
    activity = [{"target": {"role": o.role}, "penalty": "mean_square(1)"} for o in case.outputs(module)]
    return [weights, *activity]


def _pass(case: Case, module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What a module puts out, and the gradients of a random sum of it."""
    module.zero_grad()
    out = case.run(module, x)
    with quiet(3):
        (out * torch.randn_like(out)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in trained(module).items() if p.grad is not None}


def _same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], when: str) -> None:
    hold(torch.equal(one[0], other[0]), f"what the module puts out is not bitwise the same {when}")
    hold(one[1].keys() == other[1].keys(), f"other parameters have gradients {when}")
    for name, gradient in one[1].items():
        hold(torch.equal(gradient, other[1][name]), f"the gradient of {name} is not bitwise the same {when}")


@TRACES.add()
def attaching_changes_nothing(case: Case) -> None:
    """An attached model computes what it computed, bit for bit, and has the same class, parameters and attributes; a
    detached one as well. Leave the module alone in all that an adapter does.
    """
    module, x = case.module(), case.inputs()
    before, kind, keys, own = _pass(case, module, x), type(module), list(module.state_dict()), set(vars(module))
    with case.attached(module, *_on_everything(case, module)) as attachment:
        _same(before, _pass(case, module, x), "while rules are attached")
        attachment.discard()
        hold(type(module) is kind, f"the class of an attached module is {type(module).__name__}")
        hold(list(module.state_dict()) == keys, "the state_dict of an attached module has other keys")
    _same(before, _pass(case, module, x), "after detach()")
    left = sorted(set(vars(module)) ^ own)
    hold(not left, f"the attributes {left} of the module came or went")
    hold(type(module) is kind and list(module.state_dict()) == keys, "the module is not what it was, after detach()")


def _memory(case: Case) -> dict[str, str]:
    """All that an adapter has of its own, and its classes."""
    own = {name: repr(value) for name, value in vars(case.adapter).items()}
    for cls in type(case.adapter).__mro__:
        if cls not in (regkit.Adapter, object):
            shared = {name: value for name, value in vars(cls).items() if not name.startswith("__")}
            own |= {f"{cls.__name__}.{name}": repr(value) for name, value in shared.items()}
    return own


@TRACES.add()
def holds_no_state(case: Case) -> None:
    """One adapter serves every model, in every thread. Keep nothing on it: what segments() needs, observe() hands
    on.
    """
    before = _memory(case)
    module = case.module()
    with case.attached(module, *_on_everything(case, module)) as attachment:
        for seed in (1, 2):
            case.run(module, case.inputs(seed=seed))
            attachment.penalty()
    after = _memory(case)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    hold(not changed, f"after a pass the adapter has other attributes: {', '.join(changed)}")


@TRACES.add(surely(puts_out))
def serves_several_modules_in_turn(case: Case) -> None:
    """Two modules of a model are called in turn, and each more than once, before their activity is penalized. Take all
    from what was observed of each call.
    """
    modules = nn.ModuleList([case.module(), case.module(seed=1)])
    output = put_out(case, case.module())
    outs: list[list[Tensor]] = [[], []]
    rules = [
        {"name": f"{kind} {at}", "target": {"module": str(at), "role": output.role}, "penalty": f"{kind}(1)"}
        for at in (0, 1)
        for kind in kinds(output)
    ]
    with case.attached(modules, *rules) as attachment:
        for seed, at in enumerate((0, 1, 0)):
            outs[at] += case.run(modules[at], case.inputs(seed=seed)).detach().unbind(1)
        attachment.penalty()
        values = attachment.values()
    for at, out in enumerate(outs):
        for kind in kinds(output):
            value, expected = (
                float(values[f"{kind} {at}"]),
                float(by_hand(kind, out, output.directions, output.directions)),
            )
            hold(
                abs(value - expected) < 1e-9,
                f"with two modules called in turn, a penalty on {output.role!r} of module {at} is {value:.6g}, and "
                f"{expected:.6g} by hand",
            )


@TRACES.add()
def copies_carry_the_rules(case: Case) -> None:
    """A deep copy of an attached model, and one from a pickle, is trained with the same rules. Let a module and its
    attributes be what they were.
    """
    module = case.module()
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {"deepcopy": copy.deepcopy}
    if _pickles(module):
        ways["pickle"] = lambda one: pickle.loads(pickle.dumps(one))
    with case.attached(module, {"name": "squares", "penalty": "squares(1)"}) as attachment:
        expected = float(attachment.values()["squares"])
        for name, way in ways.items():
            copied = way(module)
            theirs = regkit.attachments(copied)
            hold(theirs, f"a {name} of an attached module has no rules")
            value = float(theirs[0].values()["squares"])
            theirs[0].detach()
            hold(value == expected, f"a penalty is {expected:.6g}, and {value:.6g} of a {name} of the module")


def _pickles(module: nn.Module) -> bool:
    try:
        pickle.loads(pickle.dumps(module))
    except Exception:  # of a class within a function, say: no fault of an adapter
        return False
    return True


def acts_as_kept(case: Case) -> bool:
    """Whether no weight goes through a function first, of which an l2 is no decay of what is kept."""
    return all(weight.through is None for weight in case.weights(case.module()))


@TRACES.add(surely(acts_as_kept))
def l2_is_weight_decay(case: Case) -> None:
    """A rule on everything does in a training step what torch's own weight decay does. Cover every weight once."""
    x = case.inputs()
    ours, theirs = case.module(), case.module()
    left_out, out = ignored(case, trained(ours)), masked_out(case, ours)
    groups = [
        {"params": [p for name, p in trained(theirs).items() if name not in left_out], "weight_decay": _DECAY},
        {"params": [p for name, p in trained(theirs).items() if name in left_out], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.SGD(trained(ours).values(), lr=0.1), torch.optim.SGD(groups, lr=0.1)]
    with case.attached(ours, {"penalty": {"kind": "squares", "strength": _DECAY / 2}}):
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            for _ in range(2):
                _pass(case, module, x)
                optimizer.step()
    for name, parameter in trained(ours).items():
        away = torch.where(out[name], 0.0, (parameter - trained(theirs)[name]).detach()).abs().max()
        hold(away < 1e-9, f"after two steps with an l2, {name} is {away:.2g} away from where weight_decay brings it")
