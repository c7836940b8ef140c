"""What adapters and checkpoints hold, and how two of them differ: norms, ranks and warnings as tables."""

from jlora.diagnostics._checkpoints import CheckpointDifference, TensorDifference, diff_checkpoints
from jlora.diagnostics._diff import Difference, EntryDifference, diff
from jlora.diagnostics._inspect import InspectedEntry, Inspection, inspect

__all__ = [
    "CheckpointDifference",
    "Difference",
    "EntryDifference",
    "InspectedEntry",
    "Inspection",
    "TensorDifference",
    "diff",
    "diff_checkpoints",
    "inspect",
]
