"""The outputs of recurrent modules: segments in time, with their neighbours and without padding.

Segments are padded or packed sequences, or steps of a cell.
"""

from regkit.activity.activity import Activity
from regkit.activity.reduction import Reduction, at_least_float32
from regkit.activity.segments import Packed, Pairs, Segment, Sequenced, Stepped, of_output, of_step

__all__ = [
    "Activity",
    "Packed",
    "Pairs",
    "Reduction",
    "Segment",
    "Sequenced",
    "Stepped",
    "at_least_float32",
    "of_output",
    "of_step",
]
