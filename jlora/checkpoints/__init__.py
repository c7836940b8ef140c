"""Checkpoints and adapters as files: merged, unmerged, extracted, resized, combined, converted, inspected, compared."""

from jlora.checkpoints._extract import extract
from jlora.checkpoints._jobs import combine, convert, read_adapters, resize, write_adapters
from jlora.checkpoints._look import diff, inspect
from jlora.checkpoints._merge import Merged, Unmerged, merge, unmerge

__all__ = [
    "Merged",
    "Unmerged",
    "combine",
    "convert",
    "diff",
    "extract",
    "inspect",
    "merge",
    "read_adapters",
    "resize",
    "unmerge",
    "write_adapters",
]
