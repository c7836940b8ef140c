"""One tensor of a checkpoint, block by block: merged, unmerged by arithmetic, or brought back by a residual."""

import math
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jlora.adapter import Entry
from jlora.checkpoints._arithmetic import SCRATCH, Array, Moved, Weight, row_blocks
from jlora.checkpoints._residuals import ResidualReader, ResidualWriter, residual_file
from jlora.checkpoints._shards import ShardWriter, blocks_of
from jlora.disk import TensorEntry, TensorFile, bytes_of
from jlora.errors import DataError

SAMPLE = 16
"""How much rounding leaves of an update is asked of every so manieth block of a tensor, the first one among them."""


class Tally:
    """What was done in a shard, over all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed: dict[str, int] = {}
        self._moved: dict[str, Moved] = {}
        self._uncertain, self._largest = 0, 0.0

    def moved(self, name: str, moved: Moved) -> None:
        """Adds how a block of a tensor was moved."""
        with self._lock:
            self._moved[name] = self._moved.get(name, Moved()).plus(moved)

    def changed(self, name: str, before: Array, after: Array) -> None:
        """Counts the numbers of a block of a tensor whose bits are others afterwards."""
        count = _differing(before, after)
        with self._lock:
            self._changed[name] = self._changed.get(name, 0) + count

    def uncertain(self, count: int, largest: float) -> None:
        """Adds numbers that rounding leaves open, and by how much at most."""
        with self._lock:
            self._uncertain, self._largest = self._uncertain + count, max(self._largest, largest)

    def take(self) -> tuple[dict[str, int], int, float, dict[str, Moved]]:
        """What was added since it was taken before.

        Changed numbers by tensor, uncertain ones, by how much, and how the numbers of a sample were moved by tensor.
        """
        taken = self._changed, self._uncertain, self._largest, self._moved
        self._changed, self._uncertain, self._largest, self._moved = {}, 0, 0.0, {}
        return taken


def is_tally(found: Any) -> bool:
    """Whether what a journal says can come from `Tally.take`."""
    if not isinstance(found, list) or len(found) not in (3, 4):
        return False
    changed, uncertain, largest = found[:3]
    moved = found[3] if len(found) > 3 else {}  # an earlier version's note has none
    if not isinstance(changed, dict) or not all(map(_is_count, [*changed.values(), uncertain])):
        return False
    if not isinstance(moved, dict) or not all(map(_is_moved, moved.values())):
        return False
    return type(largest) in (int, float) and 0 <= largest < math.inf


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_moved(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != len(Moved._fields) or not all(map(_is_count, value[:2])):
        return False
    return all(type(number) in (int, float) and math.isfinite(number) for number in value[2:])


def merge_tensor(
    name: str,
    entry: TensorEntry,
    changes: list[Entry],
    file: TensorFile,
    writer: ShardWriter,
    tally: Tally,
    keep_residual: bool,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Writes a tensor, which starts from what lies at `entry` in the source; another `shape` has other rows."""
    end = entry.stop
    if shape is not None:
        entry = entry._replace(shape=shape, stop=entry.start + bytes_of(shape, entry.dtype))
    weight = Weight(entry.shape, entry.dtype, changes)
    blocks = list(blocks_of(entry, row_blocks(entry.shape)))
    if weight.needs_norms:
        for start, stop, at, size in blocks:
            weight.add_norms(_read(file, at, size, entry, end), start, stop)

    sample = {start for start, *_ in blocks[::SAMPLE]}

    def one(start: int, stop: int, at: int, size: tuple[int, ...]) -> tuple[Array, Array]:
        block = _read(file, at, size, entry, end)
        merged = weight.merged(block, start, stop)
        _check_range(name, weight.source(block, start, stop), merged)
        tally.changed(name, block, merged)
        writer.put(at, merged)
        if start in sample:
            tally.moved(name, weight.moved(block, merged, start, stop))
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
            for start, stop, at, size in blocks:
                block, merged = one(start, stop, at, size)
                residual.add(block, weight.unmerged(merged, start, stop))

    writer.run(all_in_order)


def unmerge_tensor(name: str, weight: Weight, file: TensorFile, writer: ShardWriter, tally: Tally) -> None:
    entry = file.entries[name]

    def some(part: list[Any]) -> None:
        for start, stop, at, shape in part:
            block = _read(file, at, shape, entry)
            tally.uncertain(*weight.uncertain(block, start, stop))
            unmerged = weight.unmerged(block, start, stop)
            _check_range(name, block, unmerged)
            tally.changed(name, block, unmerged)
            writer.put(at, unmerged)

    blocks = list(blocks_of(entry, row_blocks(entry.shape)))
    for first in range(0, len(blocks), 16):
        writer.run(some, blocks[first : first + 16])


def restore_tensor(
    name: str, weight: Weight, file: TensorFile, writer: ShardWriter, tally: Tally, folder: Path
) -> None:
    entry = file.entries[name]

    def all_in_order() -> None:
        with ResidualReader(residual_file(folder, writer.path.name, name)) as residual:
            for start, stop, at, shape in blocks_of(entry, row_blocks(entry.shape)):
                block = _read(file, at, shape, entry)
                restored = residual.restore(weight.unmerged(block, start, stop))
                tally.changed(name, block, restored)
                writer.put(at, restored)

    writer.run(all_in_order)


def _read(file: TensorFile, at: int, shape: tuple[int, ...], entry: TensorEntry, end: int | None = None) -> Array:
    """A block of a tensor whose bytes in the source end at `end`; rows behind it are zero."""
    block = SCRATCH.array("block", shape, entry.dtype)
    if end is None or at + block.nbytes <= end:
        file.read_into(at, block)
        return block
    there = max(0, end - at) // (block.nbytes // shape[0])
    block[there:] = 0
    if there:
        file.read_into(at, block[:there])
    return block


def _differing(before: Array, after: Array) -> int:
    """How many numbers of two arrays of one dtype differ in their bits."""
    unsigned = np.dtype(f"u{min(8, before.itemsize)}")
    left, right = (array.reshape(-1, 1).view(unsigned) for array in (before, after))  # (numbers, words of one)
    differs = SCRATCH.array("differs", left.shape, np.bool_)
    np.not_equal(left, right, out=differs)
    return int(np.count_nonzero(differs if differs.shape[1] == 1 else differs.any(1)))


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
