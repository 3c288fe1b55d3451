"""A case for the laws of adapters: an adapter with an example, the modules, inputs and rules made from the example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import regkit
from regkit.adapters import Adapter, Example, Output, Weight
from regkit.plan.modules import RecurrentModule
from regkit.testing.adapters.probes import numbered, registry_of
from regkit.testing.laws import hold

TIME: Final = 5
BATCH: Final = 3

_RULES_AT_ONCE: Final = 48
"""The rules that can be told apart in one gradient: each adds a power of two, and float64 is exact up to 2⁵³."""

Parts = Mapping[str, Tensor]
"""A mask or a number for each element of parameters, by the name of the parameter."""


@dataclass(frozen=True)
class Case:
    """An adapter with an example of a module."""

    adapter: Adapter
    example: Example

    @cached_property
    def title(self) -> str:
        """The adapter and the module, for a report: `SequenceAdapter on LSTM(3, 4)`."""
        module = self.module()
        name = repr(module)
        return f"{type(self.adapter).__name__} on {type(module).__name__ if chr(10) in name else name}"

    def module(self, seed: int = 0) -> nn.Module:
        """The example's module, in float64 and eval mode; equal at each call with one seed.

        Every parameter is moved a little, so that none is at zero, where much has no effect.
        """
        with seeded(seed):
            module = self.example.make()
            if not isinstance(module, nn.Module):
                raise TypeError(f"the factory makes {type(module).__name__}, not an nn.Module")
            module = module.double().eval()
            with torch.no_grad():
                for parameter in trained_parameters(module).values():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return module

    def inputs(self, time: int = TIME, batch: int = BATCH, seed: int = 1) -> Tensor:
        """(time, batch, features)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(time, batch, self.example.features, generator=generator, dtype=torch.float64)

    def run(self, module: nn.Module, x: Tensor | PackedSequence) -> Any:
        """The output of the module over x, in time: laid out as x is."""
        with seeded(0):
            return self._call(module, x) if self.example.call is None else self.example.call(module, x)

    def _call(self, module: nn.Module, x: Any) -> Any:
        if not self.adapter.steps:
            turned = getattr(module, "batch_first", False) and isinstance(x, Tensor) and x.dim() == 3
            out = output_of(module(x.transpose(0, 1) if turned else x))
            return out.transpose(0, 1) if turned else out
        state = None if self.starts_without_state(module) else self.start(module, x.size(1))
        outs = []
        for step in x:
            state = module(step) if state is None else module(step, state)
            outs.append(output_of(state))
        return torch.stack(outs)

    def starts_without_state(self, module: nn.Module) -> bool:
        """Whether the module can be called without a state."""
        try:
            inspect.signature(module.forward).bind(None)
        except TypeError:
            return False
        return True

    def start(self, module: nn.Module, batch: int) -> Any:
        """The first state of a sequence. Raises Broken where the example gives none."""
        hold(self.example.state is not None, "the example does not say with which state to begin: give state=")
        assert self.example.state is not None
        return map_state(Tensor.double, self.example.state(module, batch))

    # --- the adapter's declarations ----------------------------------------------------------------------------------

    def weights(self, module: nn.Module) -> list[Weight]:
        """Every weight that the adapter gives."""
        return list(self.adapter.weights(module))

    def singles(self, module: nn.Module) -> list[Weight]:
        """The weights that are no pairs."""
        return [weight for weight in self.weights(module) if len(weight.parameters) == 1]

    def outputs(self, module: nn.Module) -> list[Output]:
        """Every output that the adapter gives."""
        return list(self.adapter.outputs(module))

    def recurrent(self, module: nn.Module) -> RecurrentModule:
        """The module with the adapter, for regkit's own checks of an adapter."""
        cls = type(module)
        return RecurrentModule("", "", module, cls.__name__, self.adapter, None, type(self.adapter).__module__)

    def main_output(self, module: nn.Module) -> Output | None:
        """The module's main output, if there is just one: that with the role `output`, or the only sequence."""
        outputs = self.outputs(module)
        named = [output for output in outputs if output.role == "output"]
        found = named or [output for output in outputs if output.sequence]
        return found[0] if len(found) == 1 else None

    # --- rules by this adapter ---------------------------------------------------------------------------------------

    @cached_property
    def registry(self) -> regkit.Registry:
        """A registry with this adapter alone."""
        return registry_of(self.adapter)

    @contextmanager
    def attached(self, model: nn.Module, *rules: dict[str, Any]) -> Iterator[regkit.Attachment]:
        """Rules in force on a model, by this adapter."""
        with regkit.attach(model, {"rules": list(rules)}, registry=self.registry) as attachment:
            yield attachment

    @cached_property
    def numbered_registry(self) -> regkit.Registry:
        """A registry in which each weight that is no pair is a layer of its own, with the weight's number."""
        module = self.module()
        return registry_of(numbered(self.adapter, module, self.singles(module)))

    @cached_property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """The shape that kinds see, of each weight that is no pair."""
        module = self.module()
        rules = [_mark_rule(number, None, 1.0) for number in range(len(self.singles(module)))]
        plan = regkit.resolve(module, {"rules": rules}, registry=self.numbered_registry)
        return [binding.weights[0].shape for binding in plan.bindings]

    @cached_property
    def blocks(self) -> Mapping[tuple[int, str | None], Parts]:
        """The elements that a rule reaches, by the number of a weight that is no pair, and a gate (None: the whole).

        Read from the gradients that a step with such a rule adds, and so through all of regkit.
        """
        module = self.module()
        weights = self.singles(module)
        keys = [(number, gate) for number, weight in enumerate(weights) for gate in (None, *weight.gates)]
        as_kept = all(weight.through is None for weight in weights)
        at_once = _RULES_AT_ONCE if as_kept else 1  # what is kept has its own derivative, and no power of two
        found: dict[tuple[int, str | None], Parts] = {}
        for start in range(0, len(keys), at_once):
            some = keys[start : start + at_once]
            rules = [_mark_rule(*key, 2.0**bit) for bit, key in enumerate(some)]
            marks = _gradients_added(module, {"rules": rules}, self.numbered_registry)
            for bit, key in enumerate(some):
                found[key] = {
                    name: (mark.long() >> bit & 1).bool() if as_kept else mark != 0 for name, mark in marks.items()
                }
        return found

    def activity(
        self,
        module: nn.Module,
        kind: str,
        x: Tensor | PackedSequence,
        target: Mapping[str, Any],
        lengths: Sequence[int] | None = None,
        run: Callable[[nn.Module, Any], Any] | None = None,
    ) -> Tensor:
        """The value of an activity penalty over one run.  -> ()

        run: runs the module over x in another way.
        """
        rule = {"target": dict(target), "penalty": f"{kind}(1)", "optional": True}  # without neighbours, it is 0
        with self.attached(module, rule) as attachment:
            with nullcontext() if lengths is None else attachment.lengths(lengths):
                (run or self.run)(module, x)
            return attachment.penalty().detach()


def _mark_rule(number: int, gate: str | None, strength: float) -> dict[str, Any]:
    target = {"layer": number} if gate is None else {"layer": number, "gate": gate}
    return {"name": f"{number} {gate}", "target": target, "penalty": {"kind": "mark", "strength": strength}}


def _gradients_added(module: nn.Module, spec: dict[str, Any], registry: regkit.Registry) -> dict[str, Tensor]:
    """The gradients that a step adds to gradients of zero, by parameter."""
    parameters = trained_parameters(module)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    with regkit.attach(module, spec, registry=registry) as attachment, attachment.step():
        pass
    added = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    module.zero_grad()
    return added


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def gradients_of(total: Tensor, module: nn.Module, *, retain_graph: bool = False) -> Parts:
    """The gradient of a scalar by each trained parameter of a module, by name; zeros where there is no path."""
    parameters = trained_parameters(module)
    leaves = list(parameters.values())
    gradients = torch.autograd.grad(total, leaves, retain_graph=retain_graph, allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which torch draws from a seed and makes tensors in float64; afterwards torch is as before."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would be heard on every device
        torch.set_default_dtype(torch.float64)  # for states of zeros that a module makes for itself
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def true_on_error(predicate: Callable[[Case], bool]) -> Callable[[Case], bool]:
    """A predicate that is also true where the given one raises: then the law is tried, and tells the error."""

    def applies(case: Case) -> bool:
        try:
            return predicate(case)
        except Exception:  # a stranger's code runs in it: anything can come out
            return True

    return applies


def output_of(result: Any) -> Any:
    """The output in the result of a call: the first part, where there are several."""
    while isinstance(result, (tuple, list)) and not isinstance(result, PackedSequence):
        result = result[0]
    return result


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """A state, a tensor or nested tuples of tensors, with the function applied to each tensor."""
    return function(state) if isinstance(state, Tensor) else tuple(map_state(function, part) for part in state)


def listed(names: Iterable[str]) -> str:
    """Names, for a sentence."""
    return ", ".join(names) or "none"
