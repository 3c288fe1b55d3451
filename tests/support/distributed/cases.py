"""What is trained in the worlds of two and of four processes, by the row of docs/works-with.md that a case proves."""

from __future__ import annotations

from functools import cache

from tests.support.distributed import collectives, silence, spreads, tasks
from tests.support.distributed.workers import Case, CaseTask, Rules, Task, World

STRENGTH, BOUND = 0.05, 0.5
GATES_OF_PARTS = ["forget", "output"]
L2 = {"name": "l2", "penalty": {"kind": "l2", "strength": STRENGTH}}
MAX_NORM = {"name": "max-norm", "constraint": {"kind": "max_norm", "max_value": BOUND}}
L1 = {"name": "l1", "penalty": {"kind": "l1", "strength": STRENGTH}, "via": "proximal"}
L1_GRADIENT = {"name": "l1", "target": {"role": ["kernel", "recurrent"]}, "penalty": "l1(0.05)"}
L2_OF_WEIGHTS = {"name": "l2", "target": {"role": ["kernel", "recurrent"]}, "penalty": L2["penalty"]}
ORTHOGONAL = {
    "name": "orthogonal",
    "target": {"role": "recurrent"},
    "penalty": {"kind": "orthogonal", "strength": 0.02},
}
GATES = {"name": "gates", "target": {"gate": ["forget", "output"], "role": "recurrent"}, "penalty": "l2(0.1)"}
CELLS = {
    "name": "cells",
    "target": {"role": ["kernel", "recurrent"]},
    "constraint": {"kind": "max_norm", "max_value": 0.6, "per": "cell"},
}
BIASES = {"name": "biases", "target": {"role": "bias", "bias": "effective"}, "penalty": "l2(0.1)", "via": "decoupled"}
BY_LOSS = {"name": "by loss", "target": {"role": "kernel"}, "penalty": "orthogonal(0.05)", "via": "loss"}
AR = {"name": "ar", "penalty": {"kind": "activity_l2", "strength": 2.0}}
TAR = {"name": "tar", "penalty": {"kind": "temporal", "strength": 1.0}}

RECURRENT, MATRICES = {"role": "recurrent"}, {"role": ["kernel", "recurrent"]}
IN_PARTS: Rules = [
    {"name": "l1 of gates", "target": {**MATRICES, "gate": GATES_OF_PARTS}, "penalty": "l1(0.05)"},
    {"name": "elastic net", "target": MATRICES, "penalty": "l1_l2(0.02, 0.05)", "via": "proximal"},
    {"name": "decay", "target": {"role": "bias"}, "penalty": "l2(0.1)", "via": "decoupled"},
    {"name": "by loss", "target": RECURRENT, "penalty": "l2(0.05)", "via": "loss"},
    {"name": "inputs", "target": MATRICES, "constraint": {"kind": "max_norm", "max_value": 0.8, "per": "input"}},
    {"name": "one gate", "target": {**RECURRENT, "gate": GATES_OF_PARTS[0]}, "constraint": "max_norm(0.5)"},
    {"name": "matrix", "target": RECURRENT, "constraint": {"kind": "min_max_norm", "max_value": 1.5, "per": "matrix"}},
    {"name": "units", "target": MATRICES, "constraint": {"kind": "min_max_norm", "min_value": 0.3, "max_value": 0.7}},
    {"name": "signs", "target": {"role": "bias"}, "constraint": "non_negative", "every": 2},
]
"""Rules on shards, and on sums over them, of every way in which they act."""
IN_PARTS_WITHOUT_GATES = [rule for rule in IN_PARTS if "gate" not in rule["target"]]

ONE_GATE: Rules = [
    {"name": "added", "target": {**RECURRENT, "gate": "forget"}, "penalty": "l1(0.05)"},
    {"name": "by loss", "target": {**RECURRENT, "gate": "output"}, "penalty": "l2(0.05)", "via": "loss"},
    {"name": "proximal", "target": {**RECURRENT, "gate": "input"}, "penalty": "l1(0.05)", "via": "proximal"},
    {"name": "decay", "target": {**RECURRENT, "gate": "cell"}, "penalty": "l2(0.1)", "via": "decoupled"},
    {"name": "matrix", "target": {**RECURRENT, "gate": "cell"}, "constraint": "max_norm(0.6, per=matrix)"},
    {"name": "units", "target": {**RECURRENT, "gate": "forget"}, "constraint": "max_norm(0.3)"},
]
"""Rules on one gate alone, of which a process may hold nothing."""

DOCUMENTS: dict[str, Rules] = {
    "L2": [L2],
    "max-norm": [MAX_NORM],
    "L1, proximal": [L1],
    "orthogonal": [ORTHOGONAL],
    "gates and cells": [GATES, CELLS],
    "decoupled, of effective biases": [BIASES],
    "through the loss": [BY_LOSS],
    "activity": [AR, TAR],
}
ALL: Rules = [L2, ORTHOGONAL, L1, BY_LOSS, AR, TAR, MAX_NORM, CELLS]
GRADIENTS: Rules = [L2, ORTHOGONAL, GATES, BY_LOSS, AR, TAR]
BOTH = (2, 4)

DDP = {
    **{name: Case(spreads.ddp, rules) for name, rules in DOCUMENTS.items()},
    "attached before": Case(spreads.ddp, ALL, BOTH),
    "attached after": Case(spreads.ddp, ALL, attach_first=False),
    "static_graph": Case(spreads.ddp_static_graph, ALL),
    "find_unused_parameters": Case(spreads.ddp_finding_unused, [L2, MAX_NORM], spare=True),
    "no_sync": Case(spreads.ddp, ALL, accumulate=2),
    "clipped": Case(spreads.ddp, ALL, clip=0.05),
    "a cell": Case(spreads.ddp, ALL, layer="GRUCell"),
}
FSDP2 = {
    **{name: Case(spreads.fsdp, rules) for name, rules in DOCUMENTS.items()},
    "attached before": Case(spreads.fsdp, ALL, BOTH),
    "attached after": Case(spreads.fsdp, ALL, attach_first=False),
    "uneven shards": Case(spreads.fsdp, ALL, BOTH, layer="GRU", attach_first=False),
    "a process with no rows": Case(spreads.fsdp, ALL, (4,), layer="RNN", hidden=3),
    "a shard for each layer": Case(spreads.fsdp_by_layer, ALL, layer="RNN"),
    "a cell": Case(spreads.fsdp_by_layer, ALL, layer="LSTMCell"),
    "resharded after forward": Case(spreads.fsdp_resharding, ALL),
    "not resharded after forward": Case(spreads.fsdp_not_resharding, ALL),
    "not resharded after backward": Case(spreads.fsdp_left_whole, ALL),
    "evaluated before the step": Case(spreads.fsdp, ALL, evaluate=True),
    "read before the backward pass": Case(spreads.fsdp, ALL, look=True),
    "accumulated without sending": Case(spreads.fsdp, ALL, accumulate=2),
    "clipped": Case(spreads.fsdp, ALL, clip=0.05),
    "shards of columns": Case(spreads.fsdp_by_columns, ALL, hidden=4),
    "max-norm, columns": Case(spreads.fsdp_by_columns, [MAX_NORM], hidden=4),
    "copies of shards": Case(spreads.fsdp_hybrid, ALL, (4,)),
    "in parts": Case(spreads.fsdp, IN_PARTS, BOTH),
    "in parts, attached after": Case(spreads.fsdp, IN_PARTS, attach_first=False),
    "one gate": Case(spreads.fsdp, ONE_GATE, BOTH),
    "one gate, attached after": Case(spreads.fsdp, ONE_GATE, BOTH, attach_first=False),
    "in parts, a process with no rows": Case(spreads.fsdp, IN_PARTS_WITHOUT_GATES, (4,), layer="RNN", hidden=3),
    "in parts, a shard for each layer": Case(spreads.fsdp_by_layer, IN_PARTS, layer="LSTMCell"),
    "in parts, columns": Case(spreads.fsdp_by_columns, IN_PARTS, hidden=4),
    "in parts, copies of shards": Case(spreads.fsdp_hybrid, IN_PARTS, (4,)),
}
COMPUTED = {
    "weight_norm": Case(spreads.fsdp, ALL, computed="weight_norm"),
    "weight_norm, attached after": Case(spreads.fsdp, ALL, computed="weight_norm", layer="GRU", attach_first=False),
    "weight_norm, a process with no rows": Case(spreads.fsdp, ALL, (4,), computed="weight_norm", layer="RNN", hidden=3),
    "weight_norm, L2": Case(spreads.fsdp, [L2_OF_WEIGHTS], computed="weight_norm"),
    "weight_norm, max-norm": Case(spreads.fsdp, [MAX_NORM], computed="weight_norm"),
    "spectral_norm": Case(spreads.fsdp, GRADIENTS, computed="spectral_norm", layer="LSTMCell"),
    "orthogonal": Case(spreads.fsdp, [L1_GRADIENT], computed="orthogonal", layer="GRUCell"),
    "a parametrization with a weight of its own": Case(spreads.fsdp, GRADIENTS, computed="scaled"),
    "pruned": Case(spreads.fsdp, ALL, computed="pruned"),
    "pruned, attached after": Case(spreads.fsdp_by_layer, ALL, computed="pruned", layer="GRUCell", attach_first=False),
}
TENSOR_PARALLEL = {
    "rows": Case(spreads.tensor_parallel_rows, ALL, BOTH, attach_first=False, layer="MatmulCell"),
    "columns": Case(spreads.tensor_parallel_columns, ALL, attach_first=False, layer="MatmulCell"),
    "attached before": Case(spreads.tensor_parallel_rows, ALL, layer="MatmulCell"),
    "max-norm, columns": Case(spreads.tensor_parallel_columns, [MAX_NORM], layer="MatmulCell"),
    "in parts, rows": Case(spreads.tensor_parallel_rows, IN_PARTS, BOTH, layer="MatmulCell"),
    "in parts, columns": Case(spreads.tensor_parallel_columns, IN_PARTS, layer="MatmulCell"),
    "pruned": Case(spreads.tensor_parallel_rows, ALL, layer="MatmulCell", computed="pruned"),
}
FSDP2_AND_TENSOR_PARALLEL = {
    "rows": Case(spreads.fsdp_and_rows, ALL, (4,), attach_first=False, layer="MatmulCell"),
    "columns": Case(spreads.fsdp_and_columns, ALL, (4,), layer="MatmulCell"),
    "in parts, rows": Case(spreads.fsdp_and_rows, IN_PARTS, (4,), layer="MatmulCell"),
    "in parts, columns": Case(spreads.fsdp_and_columns, IN_PARTS, (4,), layer="MatmulCell"),
}
ZERO = {
    "attached before": Case(spreads.ddp_and_zero, ALL),
    "attached after": Case(spreads.ddp_and_zero, ALL, attach_first=False),
}

CASES = {
    "DDP": DDP,
    "FSDP2": FSDP2,
    "FSDP2 of computed weights": COMPUTED,
    "Tensor parallel": TENSOR_PARALLEL,
    "FSDP2 with tensor parallel": FSDP2_AND_TENSOR_PARALLEL,
    "ZeroRedundancyOptimizer": ZERO,
}


def _tasks(size: int) -> dict[str, Task]:
    rows = CASES.items()
    cases = {f"{row}: {name}": case for row, named in rows for name, case in named.items() if size in case.sizes}
    return {
        **{name: CaseTask(case) for name, case in cases.items()},
        **tasks.of_size(size),
        **silence.of_size(size),
        **collectives.of_size(size),
    }


@cache
def world(size: int) -> World:
    """The world of so many processes, which is run once for all tests."""
    return World(size, _tasks(size))
