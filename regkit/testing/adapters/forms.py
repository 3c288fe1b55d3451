"""Laws of forms and of chunks: a form and the segments mean one tensor, and a sequence in chunks is one sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regkit.activity import Pairs, Segment, of_output, of_step
from regkit.adapters import Adapter, Form, OutputSite
from regkit.testing.adapters.case import Case, true_on_error
from regkit.testing.adapters.outputs import by_hand, main_output, observed_calls
from regkit.testing.laws import Laws, hold

FORMS: Laws[Case] = Laws()


def _sites(case: Case, module: nn.Module) -> Iterator[OutputSite]:
    """The sites of each output: the whole, and every layer and direction alone."""
    for output in case.outputs(module):
        whole = OutputSite("", "", type(module).__name__, output.role, output.layers, output.directions)
        yield whole
        parts = [(layer, direction) for layer in output.layers for direction in output.directions]
        for layer, direction in parts if len(parts) > 1 else ():
            yield replace(whole, layers=(layer,), directions=(direction,))


def _sites_with_form(case: Case, module: nn.Module) -> list[tuple[OutputSite, Form]]:
    """The outputs that have a form, each with the form."""
    found = ((site, case.adapter.form(module, site)) for site in _sites(case, module))
    return [(site, form) for site, form in found if form is not None]


def _has_forms(case: Case) -> bool:
    return type(case.adapter).form is not Adapter.form and bool(_sites_with_form(case, case.module()))


@FORMS.add(true_on_error(_has_forms))
def form_is_what_segments_make(case: Case) -> None:
    """Outputs of a form are reduced many at a time, from the tensors of observe() and without segments(): both must
    mean one tensor, with the same neighbours in time. Name the role, `before` for a cell, the module's batch_first and
    its directions; for final states, and where padding is known without lengths(), return None.
    """
    module = case.module()
    formed = _sites_with_form(case, module)
    _, calls = observed_calls(case, module, case.inputs())
    for site, form in formed:
        hold(isinstance(form, Form), f"form() gives {form!r} for {site.role!r}, not a regkit.Form or None")
        for step, call in enumerate(calls):
            _compare(case, module, site, form, call.observed, step)


def _compare(
    case: Case, module: nn.Module, site: OutputSite, form: Form, observed: Mapping[str, Any], step: int
) -> None:
    what = f"of {site.role!r}, {' and '.join(site.directions)}"
    for name in (form.role, form.before):
        hold(name is None or name in observed, f"the form {what} names {name!r}, which observe() does not give")
    h = observed[form.role]
    rank = 3 if form.before is None else 2
    fits = isinstance(h, Tensor) and h.dim() == rank
    hold(fits, f"the form {what} names {form.role!r}, which is no tensor of {rank} dimensions")
    meant, made = _segments_of_form(site, form, observed), case.adapter.segments(module, site, observed, None, step)
    hold(len(made) == len(meant), f"segments() makes {len(made)} segments {what}, where the form means {len(meant)}")
    for meant_segment, made_segment in zip(meant, made, strict=True):
        (values, _), (others, valid) = meant_segment.values(), made_segment.values()
        hold(valid is None, f"segments() leaves something out {what}, which has a form, without being told to")
        hold(
            _same(values, others),
            f"the form {what} means {_described(values)}, and segments() makes {_described(others)}",
        )
        same = _same_pairs(meant_segment.pairs(), made_segment.pairs())
        hold(same, f"the form {what} has other neighbours at call {step} than segments() gives")


def _segments_of_form(site: OutputSite, form: Form, observed: Mapping[str, Any]) -> list[Segment]:
    """The segments that a form means."""
    h = observed[form.role]
    if form.before is not None:
        return [of_step(h, observed[form.before], None, 0)]
    return of_output(h, batch_first=form.batch_first, directions=form.directions, wanted=site.directions, valid=None)


def _in_chunks(module: nn.Module, x: Tensor) -> Tensor:
    """The output over x, (time, batch, features), in chunks: all but the last step, and that with the state handed on.

    Raises TypeError where the module returns no state.
    """
    time = 1 if getattr(module, "batch_first", False) else 0
    first, last = (x.transpose(0, 1) if time else x).tensor_split([len(x) - 1], time)
    out, state = module(first)
    whole = torch.cat([out, module(last, state)[0]], time)
    return whole.transpose(0, 1) if time else whole


def _comes_in_chunks(case: Case) -> bool:
    """Whether the output runs forward in time, and is one and the same in chunks with the state handed on."""
    module, x = case.module(), case.inputs()
    output = case.main_output(module)
    if output is None or case.adapter.steps or not output.sequence or output.directions != ("forward",):
        return False
    with torch.no_grad():
        return torch.allclose(_in_chunks(module, x), case.run(module, x), atol=1e-9)


@FORMS.add(true_on_error(_comes_in_chunks))
def state_handed_in_is_a_neighbour(case: Case) -> None:
    """A sequence may come in chunks, as in truncated backpropagation, or step by step, as a decoder is called: the
    state that is handed in is the neighbour of the first output where a gradient can reach the state. Keep the
    state in observe(), and give the output's layer of it to `of_output` as `before`.
    """
    module, x = case.module(), case.inputs()
    output = main_output(case, module)
    whole = float(by_hand("neighbours", [case.run(module, x).detach()], output.directions, output.directions))
    value = float(case.activity(module, "neighbours", x, {"role": output.role}, run=_in_chunks))
    hold(
        abs(value - whole) <= 1e-9 * max(1.0, abs(whole)),
        f"the mean of (h_t − ½ h_{{t−1}})² of {output.role!r} is {whole:.6g} over a sequence at once, and {value:.6g} "
        "where the last step comes on its own, with the state handed on",
    )


def _same(meant: Tensor, made: Tensor) -> bool:
    return meant.shape == made.shape and torch.equal(meant, made)


def _same_pairs(meant: Pairs | None, made: Pairs | None) -> bool:
    if meant is None or made is None:
        return meant is made
    return all(map(_same, meant[:2], made[:2])) and made[2] is None


def _described(h: Tensor) -> str:
    return f"{tuple(h.shape)} of norm {float(h.detach().norm()):.6g}"
