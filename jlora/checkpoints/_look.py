"""`inspect` and `diff` for what lies on the disk."""

from pathlib import Path

from jlora import diagnostics
from jlora.checkpoints._jobs import read_adapters
from jlora.checkpoints._rewrite import Progress
from jlora.interop.peft import is_peft_folder
from jlora.storage import is_adapters_folder


def inspect(adapters: str | Path) -> diagnostics.Inspection:
    """The table of what a folder of adapters holds, and what looks wrong; see `jlora.diagnostics.inspect`."""
    tree, config, _ = read_adapters(adapters)
    return diagnostics.inspect(tree, config)


def diff(
    left: str | Path, right: str | Path, *, on_progress: Progress | None = None
) -> diagnostics.Difference | diagnostics.CheckpointDifference:
    """How two folders of adapters, or two checkpoints, differ."""
    if is_adapters(left) or is_adapters(right):
        (one, first, _), (other, second, _) = read_adapters(left), read_adapters(right)
        return diagnostics.diff((one, first), (other, second))
    return diagnostics.diff_checkpoints(left, right, on_progress=on_progress)


def is_adapters(path: str | Path) -> bool:
    """Whether a folder holds adapters, jlora's own or PEFT's."""
    return is_peft_folder(path) or is_adapters_folder(path)
