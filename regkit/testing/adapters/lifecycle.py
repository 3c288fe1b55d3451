"""Laws of an attached model: the module computes as before, and the adapter remembers nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

import regkit
from regkit.testing.adapters.case import Case, seeded, trained_parameters, true_on_error
from regkit.testing.adapters.outputs import by_hand, has_main_output, kinds, main_output
from regkit.testing.adapters.weights import ignored, masked_out
from regkit.testing.laws import Laws, hold
from regkit.testing.memory import remembers_nothing

TRACES: Laws[Case] = Laws()

_DECAY: Final = 0.1


def _on_everything(case: Case, module: nn.Module) -> list[dict[str, Any]]:
    weights = {"penalty": "squares(0.1)"}
    activity = [{"target": {"role": o.role}, "penalty": "mean_square(1)"} for o in case.outputs(module)]
    return [weights, *activity]


def _pass(case: Case, module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a module, and the gradients of a random sum of the output."""
    module.zero_grad()
    out = case.run(module, x)
    with seeded(3):
        (out * torch.randn_like(out)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in trained_parameters(module).items() if p.grad is not None}


def _same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]], when: str) -> None:
    hold(torch.equal(one[0], other[0]), f"what the module puts out is not bitwise the same {when}")
    hold(one[1].keys() == other[1].keys(), f"other parameters have gradients {when}")
    for name, gradient in one[1].items():
        hold(torch.equal(gradient, other[1][name]), f"the gradient of {name} is not bitwise the same {when}")


@TRACES.add()
def attaching_changes_nothing(case: Case) -> None:
    """An attached model computes as before, bit for bit, and has the same class, parameters and attributes; a detached
    one as well. Leave the module alone in all that an adapter does.
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


@TRACES.add()
def holds_no_state(case: Case) -> None:
    """One adapter serves every model, in every thread. Keep nothing on the adapter: observe() hands on all that
    segments() needs.
    """
    module = case.module()

    def use() -> None:
        with case.attached(module, *_on_everything(case, module)) as attachment:
            for seed in (1, 2):
                case.run(module, case.inputs(seed=seed))
                attachment.penalty()

    remembers_nothing(case.adapter, regkit.Adapter, use)


@TRACES.add(true_on_error(has_main_output))
def serves_several_modules_in_turn(case: Case) -> None:
    """Two modules of a model are called in turn, and each more than once, before their activity is penalized. Take all
    from what was observed of each call.
    """
    modules = nn.ModuleList([case.module(), case.module(seed=1)])
    output = main_output(case, case.module())
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
            attachments = regkit.attachments(copied)
            hold(attachments, f"a {name} of an attached module has no rules")
            value = float(attachments[0].values()["squares"])
            attachments[0].detach()
            hold(value == expected, f"a penalty is {expected:.6g}, and {value:.6g} of a {name} of the module")


def _pickles(module: nn.Module) -> bool:
    try:
        pickle.loads(pickle.dumps(module))
    except Exception:  # of a class within a function, say: no fault of an adapter
        return False
    return True


def acts_as_kept(case: Case) -> bool:
    """Whether no weight goes through a function: an l2 of a function is no decay of the parameter."""
    return all(weight.through is None for weight in case.weights(case.module()))


@TRACES.add(true_on_error(acts_as_kept))
def l2_is_weight_decay(case: Case) -> None:
    """A rule on everything acts in a training step as torch's own weight decay does. Cover every weight once."""
    x = case.inputs()
    regularized, decayed = case.module(), case.module()
    left_out, out = ignored(case, trained_parameters(regularized)), masked_out(case, regularized)
    groups = [
        {"params": [parameter], "weight_decay": 0.0 if name in left_out else _DECAY}
        for name, parameter in trained_parameters(decayed).items()
    ]
    optimizers = [torch.optim.SGD(trained_parameters(regularized).values(), lr=0.1), torch.optim.SGD(groups, lr=0.1)]
    with case.attached(regularized, {"penalty": {"kind": "squares", "strength": _DECAY / 2}}):
        for module, optimizer in zip((regularized, decayed), optimizers, strict=True):
            for _ in range(2):
                _pass(case, module, x)
                optimizer.step()
    for name, parameter in trained_parameters(regularized).items():
        away = torch.where(out[name], 0.0, (parameter - trained_parameters(decayed)[name]).detach()).abs().max()
        hold(away < 1e-9, f"after two steps with an l2, {name} is {away:.2g} away from where weight_decay brings it")
