"""Laws of outputs: the observed outputs of a call, and activity penalties of just these outputs, in every layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from regkit.adapters import Adapter, Output
from regkit.testing.adapters.case import TIME, Case, listed, true_on_error
from regkit.testing.adapters.equations import has_equations, walk
from regkit.testing.laws import Laws, hold

OUTPUTS: Laws[Case] = Laws()

LENGTHS: Final = (TIME, TIME - 2, TIME - 3)
"""The lengths of the sequences in a padded or packed batch."""


@dataclass(frozen=True)
class ObservedCall:
    """One call of a module: the arguments, the result, and the outputs that the adapter observed."""

    arguments: tuple[Any, ...]
    result: Any
    observed: Mapping[str, Any]


def observed_calls(case: Case, module: nn.Module, x: Tensor | PackedSequence) -> tuple[Any, list[ObservedCall]]:
    """The output of the module over x, and the calls of the module."""
    calls: list[ObservedCall] = []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        calls.append(ObservedCall((args, kwargs), result, case.adapter.observe(module, args, kwargs, result)))

    handle = module.register_forward_hook(see, with_kwargs=True)
    try:
        return case.run(module, x), calls
    finally:
        handle.remove()


def tensors(parts: Any) -> Iterator[Tensor]:
    """Every tensor in the arguments or the result of a call."""
    if isinstance(parts, Tensor):
        yield parts
    elif isinstance(parts, PackedSequence):
        yield parts.data
    elif isinstance(parts, Mapping):
        yield from tensors(tuple(parts.values()))
    elif isinstance(parts, (tuple, list)):
        for part in parts:
            yield from tensors(part)


# --- observed outputs ------------------------------------------------------------------------------------------------


@OUTPUTS.add()
def observe_gives_every_output(case: Case) -> None:
    """An output of outputs() must be given by observe(), with its gradient: a penalty on a detached tensor trains
    nothing, and no one would be told.
    """
    module = case.module()
    _, calls = observed_calls(case, module, case.inputs())
    hold(calls, "the module was not called: call it, not its forward(), which runs no hooks")
    for call in calls:
        for output in case.outputs(module):
            hold(output.role in call.observed, f"observe() gives {listed(call.observed)}, and no {output.role!r}")
            one = call.observed[output.role]
            parts = list(tensors(one))
            hold(len(parts) == 1, f"observe() gives {type(one).__name__} for {output.role!r}, not a tensor")
            hold(parts[0].requires_grad, f"observe() gives {output.role!r} without its gradient: was it detached?")


@OUTPUTS.add()
def observe_computes_nothing(case: Case) -> None:
    """observe() runs within the forward pass, also in evaluation, under checkpoints and compiled. Pick parts of the
    arguments and the result, or views of them; compute in segments().
    """
    module = case.module()
    _, calls = observed_calls(case, module, case.inputs())
    for call in calls:
        there = {part.untyped_storage().data_ptr() for part in tensors((*call.arguments, call.result))}
        for name, one in call.observed.items():
            made = [part for part in tensors(one) if part.untyped_storage().data_ptr() not in there]
            hold(not made, f"observe() gives for {name!r} a new tensor, which is no part of what the call returned")


def has_main_output(case: Case) -> bool:
    """Whether the adapter has the module's main output."""
    return case.main_output(case.module()) is not None


def main_output(case: Case, module: nn.Module) -> Output:
    """The module's main output."""
    found = case.main_output(module)
    assert found is not None
    return found


@OUTPUTS.add(true_on_error(has_main_output))
def output_is_what_the_module_puts_out(case: Case) -> None:
    """The output is the input of the next layer; another state beside the output has a role of its own, as `cell`."""
    module = case.module()
    role = main_output(case, module).role
    out, calls = observed_calls(case, module, case.inputs())
    observed = [call.observed[role] for call in calls]
    whole = torch.stack(observed) if case.adapter.steps else observed[-1]
    layouts = [whole, whole.transpose(0, 1)] if getattr(module, "batch_first", False) else [whole]
    same = any(one.shape == out.shape and torch.equal(one, out) for one in layouts)
    hold(same, f"observe() gives for {role!r} something else than the module puts out")


def _steps(case: Case) -> bool:
    return case.adapter.steps


@OUTPUTS.add(true_on_error(_steps))
def starts_only_at_the_beginning(case: Case) -> None:
    """starts() tells one sequence from the next where a cell runs twice within lengths(). Only of a first call may
    starts() be true, and where it is told by the missing state it must be.
    """
    module = case.module()
    _, calls = observed_calls(case, module, case.inputs())
    claims = type(case.adapter).starts is not Adapter.starts
    for at, call in enumerate(calls):
        said = bool(case.adapter.starts(call.observed))
        hold(not said or at == 0, f"starts() is true at call {at} of one sequence, counted from 0")
        missed = claims and at == 0 and not said and case.starts_without_state(module)
        hold(not missed, "starts() is false at a first call, which was given no state")


# --- penalties on outputs --------------------------------------------------------------------------------------------


def by_hand(kind: str, sequences: Sequence[Tensor], directions: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """The value of an activity penalty, by hand.  sequences: (time, directions · features) each, no padding -> ()."""
    parts = [torch.zeros(0, dtype=torch.float64)]
    for sequence in sequences:
        for direction, h in zip(directions, sequence.chunk(len(directions), -1), strict=True):
            if direction not in wanted:
                continue
            later, before = (h[:-1], h[1:]) if direction == "backward" else (h[1:], h[:-1])
            parts.append(h.square().flatten() if kind == "mean_square" else (later - before / 2).square().flatten())
    return torch.cat(parts).mean()


_WHAT: Final = {"mean_square": "the mean of h²", "neighbours": "the mean of (h_t − ½ h_{t−1})²"}


def kinds(output: Output) -> list[str]:
    """The activity penalties that an output can have: without `neighbours` where the output is no sequence."""
    return list(_WHAT) if output.sequence else ["mean_square"]


def _check_values(
    case: Case, x: Tensor | PackedSequence, out: Sequence[Tensor], lengths: Sequence[int] | None = None
) -> None:
    """Raise Broken unless the penalties over x, in all directions and in each, are the values by hand."""
    module = case.module()
    output = main_output(case, module)
    choices = [output.directions, *((one,) for one in output.directions if len(output.directions) > 1)]
    for wanted in choices:
        for kind in kinds(output):
            target = {"role": output.role, "direction": list(wanted)}
            value = float(case.activity(module, kind, x, target, lengths))
            expected = float(by_hand(kind, out, output.directions, wanted))
            hold(
                abs(value - expected) <= 1e-9 * max(1.0, abs(expected)),
                f"{_WHAT[kind]} of {output.role!r}, {' and '.join(wanted)}, is {expected:.6g} by hand, and {value:.6g} "
                "over its segments",
            )


@OUTPUTS.add(true_on_error(has_main_output))
def segments_are_of_the_whole_output(case: Case) -> None:
    """Activity penalties are means over all that was put out, and over all neighbours in time. Lay out the segments as
    (time, batch, features), for each direction that the site wants: `of_output` and `of_step` do it.
    """
    x = case.inputs()
    _check_values(case, x, list(case.run(case.module(), x).detach().unbind(1)))


@OUTPUTS.add(true_on_error(has_main_output))
def segments_leave_out_padding(case: Case) -> None:
    """Within lengths(), padding behind the end of a sequence counts for nothing. Hand `valid` and `step` on to
    `of_output` or `of_step`.
    """
    x = case.inputs()
    sequences = case.run(case.module(), x).detach().unbind(1)
    data = [one[:length] for one, length in zip(sequences, LENGTHS, strict=True)]
    _check_values(case, x, data, LENGTHS)


def takes_unbatched(case: Case) -> bool:
    """Whether the module takes (time, features), with the output of a batch of one."""
    if not has_main_output(case) or not (case.starts_without_state(case.module()) or case.example.call):
        return False
    module, x = case.module(), case.inputs(batch=1)
    with torch.no_grad():
        batched = case.run(module, x)[:, 0]
        try:
            out = case.run(module, x[:, 0])
        except Exception:  # a module says in its own way that it takes no such thing
            return False
    return isinstance(out, Tensor) and out.shape == batched.shape and torch.allclose(out, batched, atol=1e-9)


@OUTPUTS.add(true_on_error(takes_unbatched))
def segments_of_unbatched_input_are_right(case: Case) -> None:
    """(time, features) is one sequence, not a batch of short ones, whatever batch_first says: `of_output` knows."""
    x = case.inputs(batch=1)[:, 0]
    _check_values(case, x, [case.run(case.module(), x).detach()])


def takes_packed(case: Case) -> bool:
    """Whether the module takes packed sequences, with the outputs of the sequences one by one."""
    if not has_main_output(case) or case.adapter.steps:
        return False
    module, x = case.module(), case.inputs()
    with torch.no_grad():
        alone = [case.run(module, x[:length, [at]])[:, 0] for at, length in enumerate(LENGTHS)]
        try:
            out = case.run(module, pack_padded_sequence(x, torch.tensor(LENGTHS)))
        except Exception:  # as above
            return False
    if not isinstance(out, PackedSequence):
        return False
    padded, _ = pad_packed_sequence(out)
    found = [padded[:length, at] for at, length in enumerate(LENGTHS)]
    return all(torch.allclose(one, other, atol=1e-9) for one, other in zip(alone, found, strict=True))


@OUTPUTS.add(true_on_error(takes_packed))
def segments_of_packed_sequences_are_right(case: Case) -> None:
    """A packed sequence knows its own lengths, and has rows of all sequences in turn. `of_output` takes such a sequence
    as it is."""
    x = case.inputs()
    module = case.module()
    alone = [case.run(module, x[:length, [at]])[:, 0].detach() for at, length in enumerate(LENGTHS)]
    _check_values(case, pack_padded_sequence(x, torch.tensor(LENGTHS)), alone)


def _has_states(case: Case) -> bool:
    outputs = case.outputs(case.module())
    return has_equations(case) and any(output.role in ("state", "cell") for output in outputs)


@OUTPUTS.add(true_on_error(_has_states))
def states_are_those_of_the_equations(case: Case) -> None:
    """`state` is the last h of every layer and direction, `cell` the last c (of a cell, each c). Give the segments of
    the layers and directions that the site wants, and no others.
    """
    module, x = case.module(), case.inputs()
    with torch.no_grad():
        states = walk(case, module, x).states
    for output in case.outputs(module):
        if output.role not in ("state", "cell"):
            continue
        everything = []
        for layer in output.layers:
            for direction in output.directions:
                target = {"role": output.role, "layer": layer, "direction": direction}
                value = float(case.activity(module, "mean_square", x, target))
                parts = [list(tensors(h)) for h in states[layer, direction]]
                h = torch.stack([one[0 if output.role == "state" else -1] for one in parts])
                last = h if output.sequence else h[0 if direction == "backward" else -1]
                everything.append(last.flatten())
                hold(
                    abs(value - float(last.square().mean())) < 1e-9,
                    f"the mean square of {output.role!r}, layer {layer}, {direction}, is {last.square().mean():.6g} by "
                    f"the equations, and {value:.6g} over its segments",
                )
        whole = float(case.activity(module, "mean_square", x, {"role": output.role}))
        mean = float(torch.cat(everything).square().mean())
        hold(abs(whole - mean) < 1e-9, f"{output.role!r} as a whole is not the mean over its layers and directions")
