"""The contracts of kinds: penalties, activity penalties, constraints and schedules.

A kind is mathematics: a final, frozen pydantic class whose fields are its options in the document, and whose methods
are functions of tensors. A kind holds no step counter, registers no hook and writes nothing in place; rules decide when
and where it acts. The `Literal` field `kind` names it, and the docstrings under its fields are its manual.

`values`, `add_gradients` and `project_` are list forms: the mathematics of many weights at once, which a kind may have
for speed, in operations over lists (`torch._foreach_add_`). The defaults here are loops. A kind's own list forms agree
with the loops up to rounding, which is tried when a rule is attached; they write only into the tensors that are given
for that, and never wait for a GPU: no `if` and no `float()` of a tensor's numbers, unless the tensor is on a CPU, and
neither fake nor traced. There is at least one weight; all are on one device and of one dtype; shapes may differ, and
tensors need not be contiguous. `regkit.buckets` says how much to hold at a time.
"""

from regkit.kinds.activity_penalty import ActivityPenalty
from regkit.kinds.constraint import Constraint
from regkit.kinds.kind import Kind, Via
from regkit.kinds.on_weights import Layout, Separable
from regkit.kinds.penalty import Penalty
from regkit.kinds.schedule import Schedule

__all__ = ["ActivityPenalty", "Constraint", "Kind", "Layout", "Penalty", "Schedule", "Separable", "Via"]
