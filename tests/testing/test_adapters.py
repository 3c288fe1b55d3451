"""The laws of adapters: those of torch's own modules keep them, and wrong ones are caught by the law that knows why."""

import re

import pytest
import torch
from torch import nn

from regkit import Adapter, Example, Output, Weight
from regkit.activity import of_output, of_step
from regkit.testing.adapters.laws import LAWS, Case, check_adapter, check_example
from tests.mutants import adapter_outputs  # noqa: F401  # it adds its own to MUTANTS
from tests.mutants.adapters import CELL, GRU, MUTANTS, SEQUENCE, like
from tests.support.plugins.minimal_gated import MinimalGatedAdapter, MinimalGatedCell


def laws_of(report):
    return {result.law for result in report}


def seen_by(report):
    return {failure.law: failure.seen for failure in report.failures}


# --- torch's own modules ---------------------------------------------------------------------------------------------

FORMS = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"num_layers": 2, "dropout": 0.0},
    {"bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
]
SEQUENCES = [
    *((layer, form) for layer in (nn.RNN, nn.LSTM, nn.GRU) for form in FORMS),
    (nn.RNN, {"nonlinearity": "relu"}),
    (nn.LSTM, {"proj_size": 2}),
    (nn.LSTM, {"proj_size": 2, "num_layers": 2, "bidirectional": True, "batch_first": True}),
    (nn.LSTM, {"num_layers": 2, "dropout": 0.5}),
]


@pytest.mark.parametrize(("layer", "form"), SEQUENCES, ids=lambda one: getattr(one, "__name__", str(one)))
def test_every_form_of_torchs_layers_keeps_every_law(layer, form):
    report = check_example(SEQUENCE, like(SEQUENCE, lambda: layer(3, 4, **form)))
    assert report.passed, str(report)
    assert laws_of(report) >= {"segments_of_unbatched_input_are_right", "segments_of_packed_sequences_are_right"}
    assert laws_of(report) >= {"states_are_those_of_the_equations", "equations_are_the_modules_own"}
    assert ("gates_are_those_of_the_equations" in laws_of(report)) == (layer is not nn.RNN)
    assert "form_is_what_segments_make" in laws_of(report)
    assert report.hints == ()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_every_form_of_torchs_cells_keeps_every_law(cell, bias):
    report = check_example(CELL, like(CELL, lambda: cell(3, 4, bias=bias)))
    assert report.passed, str(report)
    assert laws_of(report) >= {"segments_of_unbatched_input_are_right", "starts_only_at_the_beginning"}
    assert "form_is_what_segments_make" in laws_of(report)
    assert "segments_of_packed_sequences_are_right" not in laws_of(report)


@pytest.mark.parametrize("adapter", [SEQUENCE, CELL], ids=lambda one: type(one).__name__)
def test_the_adapters_bring_examples_of_each_class_they_know(adapter):
    examples = adapter.examples()
    assert {type(example.make()) for example in examples} == set(adapter.modules)
    for example in examples:
        assert check_example(adapter, example).passed


# --- a stranger's modules --------------------------------------------------------------------------------------------


def minimal_gated_unit(cell, x, h, *_):
    wf, wh = (x @ cell.w.T + cell.b).chunk(2, -1)
    uf, uh = cell.u.chunk(2)
    f = torch.sigmoid(wf + h @ uf.T)
    n = torch.tanh(wh + (f * h) @ uh.T)
    return {"forget": f, "new": n}, (1 - f) * h + f * n


def check_minimal(adapter=None, **options):
    return check_adapter(
        adapter or MinimalGatedAdapter(),
        lambda: MinimalGatedCell(3, 4),
        features=3,
        equations=minimal_gated_unit,
        state=lambda cell, batch: torch.zeros(batch, 4),
        **options,
    )


def test_a_strangers_cell_keeps_every_law():
    report = check_minimal()
    assert report.passed, str(report)
    assert len(report.results) >= 20


def test_a_strangers_wrong_gate_order_is_told_although_one_gate_enters_the_other():
    class Wrong(MinimalGatedAdapter):
        def weights(self, module):
            for name, role in (("w", "kernel"), ("u", "recurrent"), ("b", "bias")):
                yield Weight((name,), role, gates=("new", "forget"))

    assert seen_by(check_minimal(Wrong())) == {
        "gates_are_those_of_the_equations": "rows 0 to 3 of w (kernel) are given as the gate 'new', and in the "
        "equations move forget"
    }


def test_a_cell_without_a_state_to_begin_with_is_told_what_to_give():
    report = check_adapter(MinimalGatedAdapter(), lambda: MinimalGatedCell(3, 4), features=3)
    assert "give state=" in seen_by(report)["segments_are_of_the_whole_output"]


def test_a_module_that_does_not_say_how_many_features_it_takes_needs_them():
    with pytest.raises(TypeError, match="say features="):
        check_adapter(MinimalGatedAdapter(), lambda: MinimalGatedCell(3, 4))
    assert check_adapter(CELL, lambda: nn.RNNCell(3, 4)).passed


class Wired(nn.Module):
    """Vanilla units with input and state in one matrix, kept as Keras does, under a mask; with a norm behind."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = nn.Module()
        self.ff.w = nn.Parameter(torch.randn(7, 4))
        self.ff.b = nn.Parameter(torch.randn(4))
        self.register_buffer("wiring", (torch.arange(28).reshape(7, 4) % 3 > 0).float())
        self.norm = nn.LayerNorm(4)

    def forward(self, x, h=None):
        h = x.new_zeros(*x.shape[:-1], 4) if h is None else h
        new = torch.tanh(torch.cat([x, h], -1) @ (self.ff.w * self.wiring) + self.ff.b)
        return self.norm(new), new


class WiredAdapter(Adapter):
    modules = (f"{__name__}:Wired",)
    steps = True

    def weights(self, module):
        yield Weight(("ff.w",), "kernel", transposed=True, columns=(0, 3), mask="wiring")
        yield Weight(("ff.w",), "recurrent", transposed=True, columns=(3, 7), mask="wiring")
        yield Weight(("ff.b",), "bias")

    def outputs(self, module):
        return [Output("output")]  # the state that is handed on is another: there are no neighbours to compare

    def observe(self, module, args, kwargs, result):
        return {"output": result[0]}

    def segments(self, module, site, observed, valid, step):
        return [of_step(observed["output"], None, valid, step)]


def run_wired(cell, x):
    h, outs = None, []
    for step in x:
        out, h = cell(step, h)
        outs.append(out)
    return torch.stack(outs)


def test_columns_masks_and_dotted_names_are_weights_like_any_other():
    report = check_adapter(WiredAdapter(), Wired, features=3, call=run_wired, ignored=("norm.*",))
    assert laws_of(report) >= {"segments_of_unbatched_input_are_right", "l2_is_weight_decay"}
    assert report.passed, str(report)


def test_a_sequence_without_neighbours_is_told():
    class Claiming(WiredAdapter):
        def outputs(self, module):
            return [Output("output", sequence=True)]

    report = check_adapter(Claiming(), Wired, features=3, call=run_wired, ignored=("norm.*",))
    assert ", and 0 over its segments" in seen_by(report)["segments_are_of_the_whole_output"]


def test_what_is_neither_covered_nor_ignored_is_told_by_name():
    assert seen_by(check_adapter(WiredAdapter(), Wired, features=3, call=run_wired))[
        "every_weight_is_covered_once"
    ] == ("norm.weight (4,) is covered by no weight of the adapter")
    both = check_adapter(WiredAdapter(), Wired, features=3, call=run_wired, ignored=("norm.*", "*.b"))
    assert seen_by(both)["every_weight_is_covered_once"] == "ff.b is declared ignored, and covered: ff.b (bias)"
    none = check_adapter(WiredAdapter(), Wired, features=3, call=run_wired, ignored=("nrom.*",))
    assert "ignored has 'nrom.*'" in seen_by(none)["every_weight_is_covered_once"]


class OnlyBatches(nn.GRU):
    """A GRU whose author takes nothing but padded batches."""

    def forward(self, x, h=None):
        if not isinstance(x, torch.Tensor) or x.dim() != 3:
            raise ValueError("batches, please")
        return super().forward(x, h)


def test_what_a_module_does_not_take_is_not_its_adapters_fault():
    class BatchesAdapter(type(SEQUENCE)):
        def segments(self, module, site, observed, valid, step):
            if site.role == "output":
                return of_output(observed["output"], batch_first=False, directions=("forward",),
                                 wanted=site.directions, valid=valid, before=observed.get("output before"))  # fmt: skip
            return super().segments(module, site, observed, valid, step)

    report = check_example(BatchesAdapter(), like(SEQUENCE, lambda: OnlyBatches(3, 4)))
    assert report.passed, str(report)
    assert not laws_of(report) & {"segments_of_unbatched_input_are_right", "segments_of_packed_sequences_are_right"}


# --- mutants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_adapter_is_caught_by_the_law_that_knows_why(name):
    mutant = MUTANTS[name]
    seen = seen_by(check_example(mutant.adapter, mutant.example))
    assert mutant.law in seen, f"{mutant.law} holds; these do not: {seen}"
    assert re.search(mutant.words, seen[mutant.law]), seen[mutant.law]


@pytest.mark.parametrize("name", [name for name in MUTANTS if name.startswith("Form")])
def test_a_wrong_form_is_caught_by_no_other_law(name):
    mutant = MUTANTS[name]
    assert set(seen_by(check_example(mutant.adapter, mutant.example))) == {"form_is_what_segments_make"}


def test_every_law_is_the_one_to_catch_some_mutant():
    assert {mutant.law for mutant in MUTANTS.values()} == {law.name for law in LAWS}


def test_every_law_says_why_it_matters():
    for law in LAWS:
        assert len(law.why) > 80, law.name


def test_an_adapter_that_raises_is_told_of_like_any_other():
    class Raising(type(SEQUENCE)):
        def outputs(self, module):
            raise KeyError("hidden")

    report = check_example(Raising(), GRU)
    assert seen_by(report)["outputs_are_well_formed"] == "it raised KeyError: 'hidden'"
    every = {law.name for law in LAWS}
    assert {law.name for law in LAWS.applying_to(Case(Raising(), GRU))} == every - {"starts_only_at_the_beginning"}


# --- the kit itself --------------------------------------------------------------------------------------------------


def test_a_check_draws_no_random_number_of_the_callers():
    before = torch.get_rng_state()
    assert check_example(SEQUENCE, GRU).passed
    assert check_adapter(CELL, lambda: nn.GRUCell(3, 4), equations=GRU.equations, state=GRU.state).passed
    assert torch.equal(torch.get_rng_state(), before)


def test_a_check_comes_out_the_same_each_time():
    mutant = MUTANTS["LastStepDropped"]
    one, other = (check_example(mutant.adapter, mutant.example) for _ in range(2))
    assert one == other


def test_an_adapter_has_no_examples_unless_it_says_so():
    assert MinimalGatedAdapter().examples() == ()
    assert isinstance(SEQUENCE.examples()[0], Example)
