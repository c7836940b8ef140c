"""One tensor of a checkpoint, block by block: merged, unmerged by arithmetic, or brought back by a residual."""

import math
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jlora.adapter import Entry
from jlora.checkpoints._arithmetic import SCRATCH, Array, Weight, row_blocks
from jlora.checkpoints._residuals import ResidualReader, ResidualWriter, residual_file
from jlora.checkpoints._rewrite import ShardWriter, blocks_of
from jlora.disk import TensorEntry, TensorFile
from jlora.errors import DataError


class Tally:
    """What rounding leaves open in a shard, over all threads."""

    def __init__(self) -> None:
        self._lock, self._count, self._largest = threading.Lock(), 0, 0.0

    def add(self, count: int, largest: float) -> None:
        with self._lock:
            self._count, self._largest = self._count + count, max(self._largest, largest)

    def take(self) -> tuple[int, float]:
        """What was added since it was taken before."""
        count, largest, self._count, self._largest = self._count, self._largest, 0, 0.0
        return count, largest


def is_tally(found: Any) -> bool:
    """Whether what a journal says can come from `Tally.take`."""
    if not isinstance(found, list) or len(found) != 2:
        return False
    count, largest = found
    return type(count) is int and 0 <= count < 2**63 and type(largest) in (int, float) and 0 <= largest < math.inf


def merge_tensor(name: str, changes: list[Entry], file: TensorFile, writer: ShardWriter, keep_residual: bool) -> None:
    entry = file.entries[name]
    weight = Weight(entry.shape, entry.dtype, changes)
    blocks = list(blocks_of(entry, row_blocks(entry.shape)))
    if weight.needs_norms:
        for start, stop, at, shape in blocks:
            weight.add_norms(_read(file, at, shape, entry), start, stop)

    def one(start: int, stop: int, at: int, shape: tuple[int, ...]) -> tuple[Array, Array]:
        block = _read(file, at, shape, entry)
        merged = weight.merged(block, start, stop)
        _check_range(name, weight.source(block, start, stop), merged)
        writer.put(at, merged)
        return block, merged

    def some(part: list[Any]) -> None:
        for block in part:
            one(*block)

    if not keep_residual:
        for first in range(0, len(blocks), 16):
            writer.run(some, blocks[first : first + 16])
        return

    def all_in_order() -> None:
        with ResidualWriter(residual_file(writer.path.parent, writer.path.name, name)) as residual:
            for start, stop, at, shape in blocks:
                block, merged = one(start, stop, at, shape)
                residual.add(block, weight.unmerged(merged, start, stop))

    writer.run(all_in_order)


def unmerge_tensor(name: str, weight: Weight, file: TensorFile, writer: ShardWriter, tally: Tally) -> None:
    entry = file.entries[name]

    def some(part: list[Any]) -> None:
        for start, stop, at, shape in part:
            block = _read(file, at, shape, entry)
            tally.add(*weight.uncertain(block, start, stop))
            unmerged = weight.unmerged(block, start, stop)
            _check_range(name, block, unmerged)
            writer.put(at, unmerged)

    blocks = list(blocks_of(entry, row_blocks(entry.shape)))
    for first in range(0, len(blocks), 16):
        writer.run(some, blocks[first : first + 16])


def restore_tensor(name: str, weight: Weight, file: TensorFile, writer: ShardWriter, folder: Path) -> None:
    entry = file.entries[name]

    def all_in_order() -> None:
        with ResidualReader(residual_file(folder, writer.path.name, name)) as residual:
            for start, stop, at, shape in blocks_of(entry, row_blocks(entry.shape)):
                block = _read(file, at, shape, entry)
                writer.put(at, residual.restore(weight.unmerged(block, start, stop)))

    writer.run(all_in_order)


def _read(file: TensorFile, at: int, shape: tuple[int, ...], entry: TensorEntry) -> Array:
    block = SCRATCH.array("block", shape, entry.dtype)
    file.read_into(at, block)
    return block


def _check_range(name: str, before: Array, after: Array) -> None:
    """Refuses sums that the dtype cannot hold: numbers that were finite and no longer are."""
    if not _are_finite(after) and (_finite(before) & ~_finite(after)).any():
        raise DataError(f"{name}: a sum is too large for {after.dtype}; scale the adapter, or use a wider checkpoint")


def _are_finite(array: Array) -> bool:
    """Whether all numbers are; of two bytes by their bits, which is ten times as fast as to convert them."""
    if array.dtype in (np.float16, ml_dtypes.bfloat16):
        infinity = np.asarray(np.inf, array.dtype).view(np.uint16)
        bits = SCRATCH.array("bits", array.shape, np.uint16)
        return bool(np.bitwise_and(array.view(np.uint16), 0x7FFF, out=bits).max(initial=0) < infinity)
    return bool(_finite(array).all())


def _finite(array: Array) -> Array:
    """Which numbers are."""
    with np.errstate(invalid="ignore"):  # of NaNs that signal
        return np.isfinite(array if array.dtype.itemsize >= 4 else array.astype(np.float32))
