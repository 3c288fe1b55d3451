"""Adapters for the modules of `ncps`: closed-form continuous-time (CfC) and liquid time-constant (LTC) networks.

They are known by name: nothing here imports ncps, and without it nothing here does anything.

CfC (Hasani et al. 2022): kernel and recurrent are the columns of one matrix that multiply the input and the state: of
the backbone's first layer, or of each gate where there is no backbone. `backbone` are the weights behind that. The
gates are the module's own: ff1, ff2, time_a, time_b. LTC (Hasani et al. 2021): kernel and recurrent are the synapses'
weights sensory_w and w, as they act: positive and wired; the other parameters are roles of their own, by their names.

Inside CfC and LTC, cells are not called but run through their forward(): so the outer module speaks for all in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from regkit import Adapter, Example, Output, OutputSite, StepError, Validity, Weight, hookimpl
from regkit.activity import Segment, Stepped, of_output, of_step

_CFC_GATES: Final = ("ff1", "ff2", "time_a", "time_b")

# The order in which the LSTM of `mixed_memory` stacks its gates: new content is its `i`, and its gates are ig, fg, og.
_LSTM_GATES: Final = ("cell", "input", "forget", "output")

# The length of a step of time in examples. In one of 1, the biases of time_a and time_b would act as their sum.
_STEP: Final = 0.5

_SYNAPSES: Final = ("mu", "sigma", "erev")
_NEURONS: Final = ("gleak", "vleak", "cm")
_ROLES: Final = ("kernel", "recurrent", "bias", "backbone", "w_tau", "A", *_SYNAPSES, *_NEURONS, "mapping")


def _linear(name: str, role: str, layer: int = 0, gates: tuple[str, ...] = (), bias: bool = True) -> Iterator[Weight]:
    """A linear map."""
    yield Weight((f"{name}.weight",), role, layer, gates=gates)
    if bias:
        yield Weight((f"{name}.bias",), "bias", layer, gates=gates)


def _cfc(cell: Any, at: str = "", layer: int = 0) -> Iterator[Weight]:
    """The weights of a CfCCell, which is at a path such as `rnn_cell.`."""
    backbone = [] if cell.backbone is None else list(cell.backbone)
    inner = [f"{at}backbone.{place}" for place, one in enumerate(backbone) if isinstance(one, nn.Linear)]
    gates = _CFC_GATES[:1] if cell.mode == "pure" else _CFC_GATES
    maps = [*((name, ()) for name in inner), *((f"{at}{gate}", (gate,)) for gate in gates)]
    width = cell.input_size
    sides = (("kernel", (0, width)), ("recurrent", (width, width + cell.hidden_size)))
    for name, own in maps:
        # Of its wiring, a cell lets only ff1 and ff2 know.
        mask = f"{at}sparsity_mask" if cell.sparsity_mask is not None and own in (("ff1",), ("ff2",)) else None
        first = not inner or name == inner[0]
        for role, columns in sides if first else (("backbone", None),):
            yield Weight((f"{name}.weight",), role, layer, gates=own, columns=columns, mask=mask)
        yield Weight((f"{name}.bias",), "bias", layer, gates=own)
    for role in ("w_tau", "A") if cell.mode == "pure" else ():
        yield Weight((f"{at}{role}",), role, layer, transposed=True, columns=0)  # kept as (1, units)


def _ltc(cell: Any, at: str = "") -> Iterator[Weight]:
    """The weights of an LTCCell. Synapses are kept as (source, target) and wired; some go through a softplus."""
    positive = None if isinstance(cell.make_positive_fn, nn.Identity) else f"{at}make_positive_fn"
    for sensory, role in (("sensory_", "kernel"), ("", "recurrent")):
        mask = f"{at}{sensory}sparsity_mask"
        yield Weight((f"{at}{sensory}w",), role, transposed=True, through=positive, mask=mask)
        for name in _SYNAPSES:
            yield Weight((f"{at}{sensory}{name}",), name, transposed=True, mask=mask)
    for name in _NEURONS:
        yield Weight((f"{at}{name}",), name, through=None if name == "vleak" else positive)
    for name, role in (("input_w", "mapping"), ("output_w", "mapping"), ("input_b", "bias"), ("output_b", "bias")):
        if hasattr(cell, name):
            yield Weight((f"{at}{name}",), role)


def _of_cell(cell: Any, at: str = "") -> Iterator[Weight]:
    """The weights of any cell. One that is wired has a CfCCell for each layer of its wiring."""
    if hasattr(cell, "layer_sizes"):
        for layer in range(cell.num_layers):
            yield from _cfc(getattr(cell, f"layer_{layer}"), f"{at}layer_{layer}.", layer)
    else:
        yield from (_cfc if hasattr(cell, "ff1") else _ltc)(cell, at)


# --- what the laws of `regkit conformance` try -----------------------------------------------------------------------


def _example(name: str, *args: Any, wiring: tuple[int, int] | None = None, **options: Any) -> list[Example]:
    """An example of a class of ncps, where that is installed. wiring: an AutoNCP of so many units and outputs."""

    def make() -> nn.Module:
        wired = () if wiring is None else (import_module("ncps.wirings").AutoNCP(*wiring),)
        module: nn.Module = getattr(import_module("ncps.torch"), name)(*args, *wired, **options)
        return module

    equations = _equations if "CfC" in name else None
    call = _loop if "Cell" in name else _over_time
    return [Example(make, 3, equations, _start, call)] if find_spec("ncps") else []


def _start(module: Any, batch: int) -> Tensor:
    """Zeros for each unit."""
    return torch.zeros(batch, sum(_sizes(module)))


def _loop(module: Any, x: Tensor) -> Tensor:
    """The outputs of a cell over the steps of x."""
    state, outs = _start(module, x.size(1)).to(x), []
    for step in x:
        out, state = module(step, state, _STEP)
        outs.append(out)
    return torch.stack(outs)


def _over_time(module: Any, x: Tensor) -> Tensor:
    """The outputs of a layer over the steps of x, which may be unbatched."""
    turned = module.batch_first and x.dim() == 3
    spans = torch.full((len(x), 1)[: x.dim() - 1], _STEP, dtype=x.dtype)
    out: Tensor = module(x.transpose(0, 1), None, spans.T)[0].transpose(0, 1) if turned else module(x, None, spans)[0]
    return out


def _equations(module: Any, x: Tensor, h: Tensor, layer: int, _: str) -> tuple[Mapping[str, Tensor], Tensor]:
    """One step of a layer, in the closed form of Hasani et al. 2022."""
    inner = getattr(module, "rnn_cell", module)
    cell = getattr(inner, f"layer_{layer}", inner)
    z = torch.cat([x, h[:, : cell.hidden_size]], 1)  # of zeros for all layers, at first
    z = z if cell.backbone is None else cell.backbone(z)
    gates = {gate: getattr(cell, gate) for gate in _CFC_GATES if hasattr(cell, gate)}
    mask = {gate: 1.0 if cell.sparsity_mask is None or "time" in gate else cell.sparsity_mask for gate in gates}
    at = {gate: linear(z, one.weight * mask[gate], one.bias) for gate, one in gates.items()}
    if cell.mode == "pure":
        return at, cell.A - cell.A * torch.exp(-_STEP * (cell.w_tau.abs() + at["ff1"].abs())) * at["ff1"]
    t = torch.sigmoid(at["time_a"] * _STEP + at["time_b"])
    f, g = at["ff1"].tanh(), at["ff2"].tanh()
    return at, (f if cell.mode == "no_gate" else f * (1 - t)) + t * g


# --- the adapters ----------------------------------------------------------------------------------------------------


def _sizes(module: Any) -> tuple[int, ...]:
    """The width of each layer's part of the state; the parts lie side by side."""
    cell = getattr(module, "rnn_cell", module)
    if hasattr(cell, "layer_sizes"):
        return tuple(cell.layer_sizes)
    return (cell.hidden_size if hasattr(cell, "hidden_size") else cell.state_size,)


def _part(module: Any, site: OutputSite, state: Tensor) -> Tensor:
    """The part of a state that a site asks for."""
    parts = torch.split(state, list(_sizes(module)), dim=-1)
    return state if len(parts) == len(site.layers) else torch.cat([parts[layer] for layer in site.layers], dim=-1)


def _reachable(before: Tensor | None) -> Tensor | None:
    """The state handed in where a gradient can reach the state; no other is a neighbour in time, nor are its maps."""
    return before if before is not None and before.requires_grad else None


def _put_out(module: Any, state: Tensor) -> Tensor:
    """The output that came with a state: in LTC a map of the state, else the last layer's part, and a projection."""
    mapped = getattr(getattr(module, "rnn_cell", module), "_map_outputs", None)
    h = state[..., -_sizes(module)[-1] :] if mapped is None else mapped(state)
    return module.fc(h) if hasattr(module, "fc") else h


class LayerAdapter(Adapter):
    """CfC and LTC: in every mode, with or without a backbone, a wiring, a memory cell, a projection of the output.

    >>> from ncps.torch import CfC
    >>> [output.role for output in LayerAdapter().outputs(CfC(3, 4, mixed_memory=True))]
    ['output', 'state', 'cell']
    """

    modules: ClassVar[tuple[type[nn.Module] | str, ...]] = ("ncps.torch.cfc:CfC", "ncps.torch.ltc:LTC")
    gates: ClassVar[tuple[str, ...]] = (*_CFC_GATES, *_LSTM_GATES)
    roles: ClassVar[tuple[str, ...]] = (*_ROLES, "projection", "output", "state", "cell")
    encloses: ClassVar[bool] = True

    def weights(self, module: Any) -> Iterator[Weight]:
        if module.use_mixed:
            yield from _linear("lstm.input_map", "kernel", gates=_LSTM_GATES)
            yield from _linear("lstm.recurrent_map", "recurrent", gates=_LSTM_GATES, bias=False)
        yield from _of_cell(module.rnn_cell, "rnn_cell.")
        if getattr(module, "proj_size", None) is not None:
            yield from _linear("fc", "projection", len(_sizes(module)) - 1)

    def outputs(self, module: Any) -> Sequence[Output]:
        layers = tuple(range(len(_sizes(module))))
        outputs = [Output("output", layers[-1:], sequence=module.return_sequences), Output("state", layers)]
        return [*outputs, Output("cell")] if module.use_mixed else outputs

    def observe(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Mapping[str, Any]:
        output, state = result
        before = kwargs.get("hx", args[1] if len(args) > 1 else None)
        if module.use_mixed:
            before = None if before is None else before[0]
            return {"output": output, "state": state[0], "cell": state[1], "before": before}
        return {"output": output, "state": state, "before": before}

    def segments(
        self, module: Any, site: OutputSite, observed: Mapping[str, Any], valid: Validity | None, step: int
    ) -> Sequence[Segment]:
        h, only = observed[site.role], ("forward",)
        if site.role == "output" and module.return_sequences:
            before = _reachable(observed["before"])
            if before is not None:
                before = _put_out(module, before.unsqueeze(0) if before.dim() == 1 else before)
                before = before if h.dim() == 2 else before.unsqueeze(0)
            return of_output(
                h, batch_first=module.batch_first, directions=only, wanted=only, valid=valid, before=before
            )
        if valid is not None:
            raise StepError(
                f"the {site.role} of a padded batch is computed from its padding, of which {type(module).__name__} "
                "knows nothing; run sequences of one length together, or penalize the output over time"
            )
        h = _part(module, site, h) if site.role == "state" else h
        return [Stepped(h.unsqueeze(0) if h.dim() == 1 else h)]

    def examples(self) -> Sequence[Example]:
        return [
            *_example("CfC", 3, 4, backbone_units=5, backbone_layers=2),
            *_example("CfC", 3, 4, mode="no_gate", backbone_layers=0, batch_first=False),
            *_example("CfC", 3, 4, mode="pure", backbone_units=5),
            *_example("CfC", 3, wiring=(8, 2)),
            *_example("LTC", 3, wiring=(8, 2)),
            *_example("LTC", 3, 4, batch_first=False, implicit_param_constraints=False),
        ]


class CellAdapter(Adapter):
    """CfCCell, WiredCfCCell and LTCCell, called in a loop with a state; the result is (output, state).

    >>> from ncps.torch import CfCCell
    >>> [output.role for output in CellAdapter().outputs(CfCCell(3, 4))]
    ['output', 'state']
    """

    modules: ClassVar[tuple[type[nn.Module] | str, ...]] = (
        *("ncps.torch.cfc_cell:CfCCell", "ncps.torch.wired_cfc_cell:WiredCfCCell", "ncps.torch.ltc_cell:LTCCell"),
    )
    gates: ClassVar[tuple[str, ...]] = _CFC_GATES
    roles: ClassVar[tuple[str, ...]] = (*_ROLES, "output", "state")
    steps: ClassVar[bool] = True
    encloses: ClassVar[bool] = True

    def weights(self, module: Any) -> Iterator[Weight]:
        yield from _of_cell(module)

    def outputs(self, module: Any) -> Sequence[Output]:
        layers = tuple(range(len(_sizes(module))))
        return [Output("output", layers[-1:], sequence=True), Output("state", layers, sequence=True)]

    def observe(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Mapping[str, Any]:
        before = args[1] if len(args) > 1 else kwargs.get("hx", kwargs.get("states"))
        return {"output": result[0], "state": result[1], "before": before}

    def segments(
        self, module: Any, site: OutputSite, observed: Mapping[str, Any], valid: Validity | None, step: int
    ) -> Sequence[Segment]:
        h, before = observed[site.role], _reachable(observed["before"])
        if before is not None:
            before = _put_out(module, before) if site.role == "output" else _part(module, site, before)
        return [of_step(_part(module, site, h) if site.role == "state" else h, before, valid, step)]

    def examples(self) -> Sequence[Example]:
        return [
            *_example("CfCCell", 3, 4, backbone_units=5),
            *_example("CfCCell", 3, 4, "pure", backbone_layers=0),
            *_example("WiredCfCCell", 3, wiring=(8, 2)),
            *_example("LTCCell", wiring=(8, 2), in_features=3),
        ]


@hookimpl
def regkit_adapters() -> list[Adapter]:
    return [LayerAdapter(), CellAdapter()]
