"""Adapters for torch's own recurrent modules, and their subclasses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from regkit import Adapter, Example, Form, Output, OutputSite, StepError, Validity, Weight, hookimpl
from regkit.activity import Segment, Stepped, of_output, of_step

# The order in which torch stacks the gates in the rows of weight_ih and weight_hh.
_LSTM_GATES: Final = ("input", "forget", "cell", "output")
_GRU_GATES: Final = ("reset", "update", "new")

# n_t = tanh(W_in x + b_in + r_t ⊙ (W_hn h + b_hn)): in GRU's new gate the two biases do not act as a sum.
_GRU_SEPARATE: Final = ("new",)

_BEFORE: Final = "output before"
"""The role of the state that was handed in, in what is observed."""


def _gates(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The module's gates, and the gates in which its two biases act apart."""
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return _LSTM_GATES, ()
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return _GRU_GATES, _GRU_SEPARATE
    return (), ()


def _block(module: nn.Module, suffix: str, layer: int, direction: str, bias: bool) -> Iterator[Weight]:
    """The weights of one layer in one direction."""
    gates, separate = _gates(module)
    yield Weight((f"weight_ih{suffix}",), "kernel", layer, direction, gates)
    yield Weight((f"weight_hh{suffix}",), "recurrent", layer, direction, gates)
    if bias:
        pair = (f"bias_ih{suffix}", f"bias_hh{suffix}")
        for name in pair:
            yield Weight((name,), "bias", layer, direction, gates)
        yield Weight(pair, "bias", layer, direction, gates, separate)


def _equations(
    module: nn.Module, x: Tensor, h: Any, layer: int, direction: str
) -> tuple[Mapping[str, Tensor], tuple[Tensor, ...]]:
    """One step, in the equations of torch's own documentation of nn.LSTM, nn.GRU and nn.RNN."""
    suffix = f"_l{layer}{'_reverse' if direction == 'backward' else ''}" if isinstance(module, nn.RNNBase) else ""
    own = dict(module.named_parameters())
    a, b = x @ own[f"weight_ih{suffix}"].T, h[0] @ own[f"weight_hh{suffix}"].T
    if f"bias_ih{suffix}" in own:
        a, b = a + own[f"bias_ih{suffix}"], b + own[f"bias_hh{suffix}"]
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        i, f, g, o = (a + b).chunk(4, -1)
        c = f.sigmoid() * h[1] + i.sigmoid() * g.tanh()
        new = o.sigmoid() * c.tanh()
        projection = own.get(f"weight_hr{suffix}")
        return {"input": i, "forget": f, "cell": g, "output": o}, (new if projection is None else new @ projection.T, c)
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
        r, z = (a_r + b_r).sigmoid(), (a_z + b_z).sigmoid()
        n = torch.tanh(a_n + r * b_n)
        return {"reset": r, "update": z, "new": n}, ((1 - z) * n + z * h[0],)
    return {}, ((a + b).relu() if module.nonlinearity == "relu" else (a + b).tanh(),)


def _zeros(module: nn.Module, batch: int) -> tuple[Tensor, ...]:
    """The state that torch begins with."""
    assert isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    sizes = [getattr(module, "proj_size", 0) or module.hidden_size, module.hidden_size]
    return tuple(torch.zeros(batch, size) for size in sizes[: 2 if isinstance(module, (nn.LSTM, nn.LSTMCell)) else 1])


def _example(make: Callable[[], nn.Module]) -> Example:
    return Example(make, 3, _equations, _zeros)


class SequenceAdapter(Adapter):
    """nn.RNN, nn.LSTM and nn.GRU: stacked, bidirectional, with or without biases, LSTM with a projection.

    >>> [output.role for output in SequenceAdapter().outputs(nn.LSTM(3, 4))]
    ['output', 'state', 'cell']
    """

    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.RNN, nn.LSTM, nn.GRU)
    gates: ClassVar[tuple[str, ...]] = (*_LSTM_GATES, *_GRU_GATES)

    @staticmethod
    def _directions(module: nn.RNNBase) -> tuple[str, ...]:
        return ("forward", "backward") if module.bidirectional else ("forward",)

    def weights(self, module: nn.Module) -> Iterator[Weight]:
        assert isinstance(module, nn.RNNBase)
        for layer in range(module.num_layers):
            for direction in self._directions(module):
                suffix = f"_l{layer}{'_reverse' if direction == 'backward' else ''}"
                yield from _block(module, suffix, layer, direction, bool(module.bias))
                if module.proj_size:
                    yield Weight((f"weight_hr{suffix}",), "projection", layer, direction)

    def outputs(self, module: nn.Module) -> Sequence[Output]:
        assert isinstance(module, nn.RNNBase)
        directions, layers = self._directions(module), tuple(range(module.num_layers))
        outputs = [
            Output("output", layers[-1:], directions, sequence=True),  # the layers below stay inside the kernel
            Output("state", layers, directions),
        ]
        return [*outputs, Output("cell", layers, directions)] if isinstance(module, nn.LSTM) else outputs

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Mapping[str, Any]:
        sequence, state = result
        before = kwargs.get("hx", args[1] if len(args) > 1 else None)
        if isinstance(module, nn.LSTM):
            observed = {"output": sequence, "state": state[0], "cell": state[1]}
            return observed if before is None else {**observed, _BEFORE: before[0]}
        observed = {"output": sequence, "state": state}
        return observed if before is None else {**observed, _BEFORE: before}

    def segments(
        self,
        module: nn.Module,
        site: OutputSite,
        observed: Mapping[str, Any],
        valid: Validity | None,
        step: int,
    ) -> Sequence[Segment]:
        assert isinstance(module, nn.RNNBase)
        directions = self._directions(module)
        h = observed[site.role]
        if site.role == "output":
            before = observed.get(_BEFORE)
            return of_output(
                h,
                batch_first=module.batch_first,
                directions=directions,
                wanted=site.directions,
                valid=valid,
                before=None if before is None else before[-len(directions) :],  # the last layer's
            )
        if valid is not None and not isinstance(observed["output"], PackedSequence):
            raise StepError(f"the {site.role} of a padded batch is computed from its padding; pack the sequences")
        h = h.unsqueeze(1) if h.dim() == 2 else h  # unbatched: (layers · directions, features)
        places = [(layer, direction) for layer in range(module.num_layers) for direction in directions]
        kept = [
            index
            for index, (layer, direction) in enumerate(places)
            if layer in site.layers and direction in site.directions
        ]
        return [Stepped(h if len(kept) == len(places) else h[kept])]

    def form(self, module: nn.Module, site: OutputSite) -> Form | None:
        assert isinstance(module, nn.RNNBase)
        if site.role != "output":
            return None
        return Form("output", batch_first=module.batch_first, directions=self._directions(module), initial=_BEFORE)

    def examples(self) -> Sequence[Example]:
        return [
            _example(lambda: nn.RNN(3, 4, 2, bidirectional=True)),
            _example(lambda: nn.RNN(3, 4, nonlinearity="relu", bias=False, batch_first=True)),
            _example(lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True)),
            _example(lambda: nn.LSTM(3, 4, 2, proj_size=2, bias=False)),
            _example(lambda: nn.GRU(3, 4, 2, bidirectional=True)),
            _example(lambda: nn.GRU(3, 4, bias=False)),
        ]


class CellAdapter(Adapter):
    """nn.RNNCell, nn.LSTMCell and nn.GRUCell, called in a loop: each call is one step of time.

    >>> [weight.parameters for weight in CellAdapter().weights(nn.RNNCell(3, 4, bias=False))]
    [('weight_ih',), ('weight_hh',)]
    """

    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
    steps: ClassVar[bool] = True
    gates: ClassVar[tuple[str, ...]] = (*_LSTM_GATES, *_GRU_GATES)

    def weights(self, module: nn.Module) -> Iterator[Weight]:
        yield from _block(module, "", 0, "forward", bool(module.bias))

    def outputs(self, module: nn.Module) -> Sequence[Output]:
        outputs = [Output("output", sequence=True)]
        return [*outputs, Output("cell", sequence=True)] if isinstance(module, nn.LSTMCell) else outputs

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Mapping[str, Any]:
        hx = kwargs.get("hx", args[1] if len(args) > 1 else None)
        if isinstance(module, nn.LSTMCell):
            h, c = result
            previous, previous_cell = (None, None) if hx is None else hx
            return {"output": h, "cell": c, "output before": previous, "cell before": previous_cell}
        return {"output": result, "output before": hx}

    def starts(self, observed: Mapping[str, Any]) -> bool:
        return observed["output before"] is None

    def segments(
        self,
        module: nn.Module,
        site: OutputSite,
        observed: Mapping[str, Any],
        valid: Validity | None,
        step: int,
    ) -> Sequence[Segment]:
        return [of_step(observed[site.role], observed[f"{site.role} before"], valid, step)]

    def form(self, module: nn.Module, site: OutputSite) -> Form:
        return Form(site.role, f"{site.role} before")

    def examples(self) -> Sequence[Example]:
        return [
            _example(lambda: nn.RNNCell(3, 4)),
            _example(lambda: nn.LSTMCell(3, 4)),
            _example(lambda: nn.LSTMCell(3, 4, bias=False)),
            _example(lambda: nn.GRUCell(3, 4)),
        ]


@hookimpl
def regkit_adapters() -> list[Adapter]:
    return [SequenceAdapter(), CellAdapter()]
