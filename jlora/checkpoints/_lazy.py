"""The tensors of a checkpoint as a tree of arrays that are read when they are asked for."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jlora.disk import Checkpoint, LazyArray
from jlora.errors import DataError


def lazy_tree(checkpoint: Checkpoint, advance: Callable[[int], None]) -> dict[str, LazyArray]:
    """All tensors that are numbers, by their names with slashes for dots; `advance` is told the bytes that are read."""

    def lazy(name: str) -> LazyArray:
        def load() -> np.ndarray[Any, Any]:
            array = checkpoint.read(name)
            advance(array.nbytes)
            return array

        entry = checkpoint.entries[name]
        return LazyArray(entry.shape, entry.dtype, load)

    tree = {}
    for name in checkpoint.entries:
        try:
            tree[name.replace(".", "/")] = lazy(name)
        except DataError:  # a dtype that NumPy does not have
            continue
    return tree


def lazy_row(checkpoint: Checkpoint, name: str, index: int) -> LazyArray:
    """One place on the first axis of a tensor, of which no more is read."""
    entry = checkpoint.entries[name]
    shape = entry.shape[1:]

    def load() -> np.ndarray[Any, Any]:
        row = np.empty(shape, entry.dtype)
        with checkpoint.open(checkpoint.shard_of[name]) as file:
            file.read_into(file.entries[name].start + index * row.nbytes, row)
        return row

    return LazyArray(shape, entry.dtype, load)
