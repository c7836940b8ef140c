"""Tensors of a checkpoint that are read when their numbers are asked for, and not kept."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jlora.disk import Checkpoint
from jlora.errors import DataError


class LazyTensor:
    """One tensor: shape and dtype at once, its numbers as often as `np.asarray` asks for them."""

    def __init__(self, checkpoint: Checkpoint, name: str, advance: Callable[[int], None]) -> None:
        entry = checkpoint.entries[name]
        self.shape, self.dtype, self.ndim = entry.shape, entry.dtype, len(entry.shape)
        self._checkpoint, self._name, self._advance = checkpoint, name, advance

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        array = self._checkpoint.read(self._name)
        self._advance(array.nbytes)
        return array if dtype is None else array.astype(dtype, copy=False)


def lazy_tree(checkpoint: Checkpoint, advance: Callable[[int], None]) -> dict[str, LazyTensor]:
    """All tensors that are numbers, by their names with slashes for dots."""
    tree = {}
    for name in checkpoint.entries:
        try:
            tree[name.replace(".", "/")] = LazyTensor(checkpoint, name, advance)
        except DataError:  # a dtype that NumPy does not have
            continue
    return tree
