"""More adapters that are wrong on purpose: in what they observe, in their segments, in how they live on a model."""

from __future__ import annotations

import threading
from dataclasses import replace

import torch
from regkit_standard.torch_adapters import CellAdapter, SequenceAdapter
from torch.nn.utils.rnn import PackedSequence

from regkit import Form
from regkit.activity import Sequenced, Stepped, of_output, of_step
from tests.mutants.adapters import BATCH_FIRST, GRU, GRU_CELL, LSTM, LSTM_CELL, STACKED, mutant

# --- what is observed ------------------------------------------------------------------------------------------------


@mutant(LSTM, "observe_gives_every_output", "observe.. gives output, state, and no 'cell'")
class CellForgotten(SequenceAdapter):
    def observe(self, module, args, kwargs, result):
        return {"output": result[0], "state": result[1][0]}


@mutant(LSTM, "observe_gives_every_output", "gives 'output' without its gradient: was it detached")
class Detached(SequenceAdapter):
    def observe(self, *call):
        return {role: one.detach() for role, one in super().observe(*call).items()}


@mutant(LSTM, "observe_computes_nothing", "for 'output' a new tensor, which is no part of what the call returned")
class Cloned(SequenceAdapter):
    def observe(self, *call):
        return {role: one.clone() for role, one in super().observe(*call).items()}


@mutant(GRU, "observe_computes_nothing", "for 'state' a new tensor")
class Computed(SequenceAdapter):
    def observe(self, *call):
        observed = super().observe(*call)
        return {**observed, "state": observed["state"] * 1.0}


@mutant(LSTM_CELL, "output_is_what_the_module_puts_out", "for 'output' something else than the module puts out")
class CellGivenAsOutput(CellAdapter):
    def observe(self, module, args, kwargs, result):
        h, c = result
        return super().observe(module, args, kwargs, (c, h))


@mutant(GRU_CELL, "starts_only_at_the_beginning", "is true at call 1 of one sequence")
class StartsAlways(CellAdapter):
    def starts(self, observed):
        return True


@mutant(GRU_CELL, "starts_only_at_the_beginning", "is false at a first call, which was given no state")
class StartsNever(CellAdapter):
    def starts(self, observed):
        return "state" in observed


# --- segments --------------------------------------------------------------------------------------------------------


@mutant(BATCH_FIRST, "segments_are_of_the_whole_output", r"mean of \(h_t − ½ h_\{t−1\}\)² of 'output', forward, is")
class BatchFirstIgnored(SequenceAdapter):
    def segments(self, module, site, observed, valid, step):
        if site.role != "output":
            return super().segments(module, site, observed, valid, step)
        directions = self._directions(module)
        h = observed["output"]
        return of_output(h, batch_first=False, directions=directions, wanted=site.directions, valid=valid)


class _Reshaped(SequenceAdapter):
    """One whose segments of the output are changed."""

    def segments(self, module, site, observed, valid, step):
        found = super().segments(module, site, observed, valid, step)
        return [self.changed(one) if isinstance(one, Sequenced) else one for one in found]


@mutant(LSTM, "segments_are_of_the_whole_output", r"the mean of h² of 'output', forward, is")
class LastStepDropped(_Reshaped):
    def changed(self, segment):
        return replace(segment, h=segment.h[:-1])


@mutant(STACKED, "segments_are_of_the_whole_output", r"h_\{t−1\}\)² of 'output', forward and backward, is")
class BackwardInTheOrderOfTime(_Reshaped):
    def changed(self, segment):
        return replace(segment, backward=False)


@mutant(LSTM, "segments_leave_out_padding", "the mean of h² of 'output', forward, is")
class PaddingCounted(_Reshaped):
    def changed(self, segment):
        return replace(segment, valid=None)


@mutant(GRU_CELL, "segments_leave_out_padding", "the mean of h² of 'output', forward, is")
class EveryStepTheFirst(CellAdapter):
    def segments(self, module, site, observed, valid, step):
        return super().segments(module, site, observed, valid, 0)


@mutant(STACKED, "segments_are_of_the_whole_output", "of 'output', forward, is")
class EveryDirectionWhateverIsWanted(SequenceAdapter):
    def segments(self, module, site, observed, valid, step):
        return super().segments(module, replace(site, directions=self._directions(module)), observed, valid, step)


@mutant(GRU_CELL, "segments_are_of_the_whole_output", r"h_\{t−1\}\)² of 'output', forward, is")
class NoNeighbours(CellAdapter):
    def segments(self, module, site, observed, valid, step):
        return [of_step(observed[site.role], None, valid, step)]


@mutant(GRU, "state_handed_in_is_a_neighbour", "over a sequence at once, and .* where the last step comes on its own")
class ForgetsTheStateHandedIn(SequenceAdapter):
    def observe(self, module, args, kwargs, result):
        return super().observe(module, args[:1], {}, result)


@mutant(GRU, "segments_of_unbatched_input_are_right", "of 'output', forward, is .* by hand")
class UnbatchedTakenForABatch(SequenceAdapter):
    def segments(self, module, site, observed, valid, step):
        h = observed[site.role]
        if site.role == "output" and not isinstance(h, PackedSequence) and h.dim() == 2:
            return [Sequenced(h.unsqueeze(0))]
        return super().segments(module, site, observed, valid, step)


@mutant(GRU, "segments_of_packed_sequences_are_right", r"h_\{t−1\}\)² of 'output', forward, is")
class PackedTakenForOneSequence(SequenceAdapter):
    def segments(self, module, site, observed, valid, step):
        h = observed[site.role]
        if isinstance(h, PackedSequence):
            return [Sequenced(h.data.unsqueeze(1))]
        return super().segments(module, site, observed, valid, step)


@mutant(STACKED, "states_are_those_of_the_equations", "the mean square of 'state', layer 0, forward, is")
class EveryStateWhateverIsWanted(SequenceAdapter):
    def segments(self, module, site, observed, valid, step):
        if site.role == "output":
            return super().segments(module, site, observed, valid, step)
        return [Stepped(observed[site.role])]


@mutant(LSTM_CELL, "states_are_those_of_the_equations", "the mean square of 'cell', layer 0, forward, is")
class OutputGivenAsCell(CellAdapter):
    def observe(self, *call):
        observed = super().observe(*call)
        return {**observed, "cell": observed["output"]}


# --- forms -----------------------------------------------------------------------------------------------------------


@mutant(
    BATCH_FIRST,
    "form_is_what_segments_make",
    r"of 'output', forward means \(3, 5, 4\) .*segments\(\) makes \(5, 3, 4\)",
)
class FormForgetsBatchFirst(SequenceAdapter):
    def form(self, module, site):
        found = super().form(module, site)
        return found and found._replace(batch_first=False)


@mutant(STACKED, "form_is_what_segments_make", r"segments\(\) makes 2 segments of 'output', forward and backward")
class FormOfBothDirections(SequenceAdapter):
    def form(self, module, site):
        return Form("output") if site.role == "output" else None


@mutant(LSTM, "form_is_what_segments_make", "of 'state', forward has other neighbours")
class FormOfFinalStates(SequenceAdapter):
    def form(self, module, site):
        return Form(site.role)


@mutant(LSTM_CELL, "form_is_what_segments_make", "of 'output', forward has other neighbours at call 1")
class FormWithTheOtherStateBefore(CellAdapter):
    def form(self, module, site):
        return Form(site.role, "cell before")


@mutant(GRU_CELL, "form_is_what_segments_make", "'output', which is no tensor of 3 dimensions")
class FormOfASequenceForACell(CellAdapter):
    def form(self, module, site):
        return Form(site.role)


@mutant(GRU_CELL, "form_is_what_segments_make", "names 'h before', which observe.. does not give")
class FormNamesWhatIsNotThere(CellAdapter):
    def form(self, module, site):
        return Form(site.role, "h before")


@mutant(LSTM, "form_is_what_segments_make", r"form\(\) gives 'output' for 'output', not a regkit.Form or None")
class FormIsAName(SequenceAdapter):
    def form(self, module, site):
        return site.role if site.role == "output" else None


# --- living on a model -----------------------------------------------------------------------------------------------


@mutant(LSTM, "attaching_changes_nothing", "what the module puts out is not bitwise the same while rules are attached")
class ChangesTheOutput(SequenceAdapter):
    def observe(self, module, args, kwargs, result):
        with torch.no_grad():
            result[0].data.mul_(1.001)
        return super().observe(module, args, kwargs, result)


@mutant(LSTM, "attaching_changes_nothing", r"the attributes \['_weights_seen'\] of the module came or went")
class LeavesANote(SequenceAdapter):
    def weights(self, module):
        module._weights_seen = True
        return super().weights(module)


@mutant(GRU, "holds_no_state", "its functions changed self.last")
class StateOnItself(SequenceAdapter):
    def observe(self, *call):
        self.last = super().observe(*call)
        return self.last

    def segments(self, module, site, observed, valid, step):
        return super().segments(module, site, self.last, valid, step)


@mutant(GRU_CELL, "holds_no_state", "its functions changed StateOnItsClass.calls")
class StateOnItsClass(CellAdapter):
    calls = 0

    def observe(self, *call):
        type(self).calls += 1
        return super().observe(*call)


_LAST = {}


@mutant(GRU_CELL, "serves_several_modules_in_turn", "two modules called in turn, a penalty on 'output' of module 0")
class StateElsewhere(CellAdapter):
    """What was put out last, kept in a global, is taken for the state before."""

    def observe(self, module, args, kwargs, result):
        before, _LAST["h"] = _LAST.get("h"), result
        return {**super().observe(module, args, kwargs, result), "output before": before}

    def starts(self, observed):
        return False


@mutant(GRU, "copies_carry_the_rules", "cannot pickle '_thread.lock' object")
class HangsALockOnTheModule(SequenceAdapter):
    def weights(self, module):
        module.__dict__.setdefault("lock", threading.Lock())
        return super().weights(module)
