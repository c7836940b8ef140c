"""`inspect` and `diff` for what lies on the disk."""

from pathlib import Path
from typing import Any

from jlora import diagnostics
from jlora.adapter import is_entry
from jlora.checkpoints._adapter_files import read_adapters
from jlora.checkpoints._forms import is_adapters
from jlora.checkpoints._lazy import lazy_tree
from jlora.checkpoints._rewrite import Progress
from jlora.disk import Checkpoint, LazyArray
from jlora.paths import leaves_by_path


def inspect(adapters: str | Path, *, base: str | Path | None = None) -> diagnostics.Inspection:
    """The table of what a folder of adapters holds, and what looks wrong; see `jlora.diagnostics.inspect`.

    With the checkpoint `base`, also the sizes of the updates beside their weights, and shares of the parameters.
    """
    checkpoint = None if base is None else Checkpoint(base)
    tree, config, _ = read_adapters(adapters, base=checkpoint)
    return diagnostics.inspect(tree, config, params=None if checkpoint is None else _params(checkpoint, tree))


def diff(
    left: str | Path, right: str | Path, *, on_progress: Progress | None = None
) -> diagnostics.Difference | diagnostics.CheckpointDifference:
    """How two folders of adapters, or two checkpoints, differ."""
    if is_adapters(left) or is_adapters(right):
        (one, first, _), (other, second, _) = read_adapters(left), read_adapters(right)
        return diagnostics.diff((one, first), (other, second))
    return diagnostics.diff_checkpoints(left, right, on_progress=on_progress)


def _params(base: Checkpoint, adapters: Any) -> dict[str, LazyArray]:
    """The tensors of a checkpoint, read when they are asked for, by paths as the adapters have them."""
    params = lazy_tree(base, lambda _: None)
    if any("/" in path for path in leaves_by_path(adapters, is_leaf=is_entry)):
        return params
    return {path.replace("/", "."): leaf for path, leaf in params.items()}
