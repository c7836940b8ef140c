"""Two safetensors checkpoints compared tensor by tensor, a block of each at a time."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from jlora.diagnostics._factors import count, short, sized
from jlora.disk import Checkpoint, TensorEntry, TensorFile
from jlora.errors import DataError
from jlora.tables import html_table, text_table

BLOCK_BYTES = 1 << 22
MOST_ROWS = 20

_COLUMNS = ("tensor", "status", "shape", "dtype", "elements differ", "largest", "relative")
STATUSES = ("identical", "changed", "dtype differs", "shape differs", "only left", "only right")

Blocks = Iterator[tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs.

    Attributes:
      name: of the tensor.
      status: "identical" (the same dtype, shape and bytes), "changed", "dtype differs" (the numbers below say whether
        the values do too), "shape differs", "only left" or "only right".
      shapes, dtypes: left and right, the dtypes as the files name them; None where a side has no such tensor.
      elements: how many elements differ: in their bits where the dtype is one, else in their value.
      largest: the largest absolute difference; nan where a number stands against a NaN.
      relative: ||left - right||_F / ||left||_F.

    The last three are None where they are not computed: other shapes, only one side, a dtype that is no number to NumPy
    (F4, F6_E2M3, F6_E3M2), which is compared by its bytes.
    """

    name: str
    status: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    elements: int | None = None
    largest: float | None = None
    relative: float | None = None

    def row(self) -> tuple[str, ...]:
        """The cells of the table."""
        shapes = [sized(shape) for shape in self.shapes if shape is not None]
        dtypes = [dtype for dtype in self.dtypes if dtype is not None]
        return (
            self.name,
            self.status,
            " | ".join(dict.fromkeys(shapes)),
            " | ".join(dict.fromkeys(dtypes)),
            "-" if self.elements is None else f"{self.elements:,}",
            short(self.largest),
            short(self.relative),
        )


@dataclasses.dataclass(frozen=True)
class CheckpointDifference:
    """What `diff_checkpoints` found; `str` is a table of what is not identical, a notebook shows it as HTML.

    Attributes:
      rows: one for each tensor of either side, in the order of the left's files.
    """

    rows: tuple[TensorDifference, ...]

    @property
    def is_identical(self) -> bool:
        """Whether both hold the same tensors with the same bytes."""
        return all(row.status == "identical" for row in self.rows)

    def counts(self) -> dict[str, int]:
        """How many tensors have each status."""
        found = collections.Counter(row.status for row in self.rows)
        return {status: found[status] for status in STATUSES}

    def _footer(self) -> tuple[str, ...]:
        elements = sum(row.elements or 0 for row in self.rows)
        return count(len(self.rows), "tensor"), "", "", "", f"{elements:,}", "", ""

    def _shown(self) -> tuple[list[tuple[str, ...]], list[str]]:
        """The rows of the table, and the lines below it."""
        changed = [row.row() for row in self.rows if row.status != "identical"]
        more = [f"and {len(changed) - MOST_ROWS:,} more"] if len(changed) > MOST_ROWS else []
        counts = [f"{n:,} {status}" for status, n in self.counts().items() if n]
        return changed[:MOST_ROWS], [*more, *([", ".join(counts)] if counts else [])]

    def __str__(self) -> str:
        rows, lines = self._shown()
        return "\n".join([text_table(_COLUMNS, rows, self._footer(), left=4), *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows, lines = self._shown()
        return html_table(_COLUMNS, rows, self._footer()) + "".join(f"<p>{line}</p>" for line in lines)


def diff_checkpoints(
    left_path: str | Path,
    right_path: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckpointDifference:
    """How two checkpoints differ, tensor by tensor; a few blocks of 4 MiB in memory, whatever their size.

    Args:
      left_path, right_path: a safetensors file, or a folder of them with an index.
      names: the right's name of tensors that the left has under another one, by the left's.
      on_progress: called with (bytes done, bytes in all), the bytes of the left.

    Returns:
      A `CheckpointDifference`: print it, or read its `rows`. Tensors are compared by their bytes first; where these
      differ, or the dtypes do, by value in float64.

    Raises:
      DataError: no such checkpoint, files that are missing, damaged, or change while they are read.
    """
    left, right = _Reader(left_path), _Reader(right_path)
    total = sum(entry.stop - entry.start for entry in left.checkpoint.entries.values())
    rows, done = [], 0
    paired: set[str] = set()
    try:
        for name, entry in left.checkpoint.entries.items():
            other = (names or {}).get(name, name)
            paired.add(other)
            rows.append(_compared(name, other, left, right))
            done += entry.stop - entry.start
            if on_progress is not None:
                on_progress(done, total)
    finally:
        left.close()
        right.close()
    for name, entry in right.checkpoint.entries.items():
        if name not in paired:
            rows.append(TensorDifference(name, "only right", (None, entry.shape), (None, entry.code)))
    return CheckpointDifference(tuple(rows))


class _Reader:
    """A checkpoint of which one file at a time is open."""

    def __init__(self, path: str | Path) -> None:
        self.checkpoint = Checkpoint(path)
        self._file: TensorFile | None = None
        self._shard = ""

    def blocks(self, name: str, size: int) -> Iterator[np.ndarray]:
        """The bytes of a tensor, `size` at a time, in one buffer that is used again."""
        shard = self.checkpoint.shard_of[name]
        if self._file is None or shard != self._shard:
            self.close()
            self._file, self._shard = self.checkpoint.open(shard), shard
        entry, file = self.checkpoint.entries[name], self._file
        if file.entries.get(name) != entry:
            raise DataError(f"{file.path}: changed while it was read")
        buffer = np.empty(min(size, entry.stop - entry.start), np.uint8)
        for start in range(entry.start, entry.stop, size):
            block = buffer[: min(size, entry.stop - start)]
            file.read_into(start, block)
            yield block

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def _compared(name: str, other: str, left: _Reader, right: _Reader) -> TensorDifference:
    x, y = left.checkpoint.entries[name], right.checkpoint.entries.get(other)
    if y is None:
        return TensorDifference(name, "only left", (x.shape, None), (x.code, None))
    shapes, codes = (x.shape, y.shape), (x.code, y.code)
    if x.shape != y.shape:
        return TensorDifference(name, "shape differs", shapes, codes)
    if x.code == y.code:
        pairs = zip(left.blocks(name, BLOCK_BYTES), right.blocks(other, BLOCK_BYTES), strict=True)
        if all(np.array_equal(one, other) for one, other in pairs):
            return TensorDifference(name, "identical", shapes, codes, 0, 0.0, 0.0)
    status = "changed" if x.code == y.code else "dtype differs"
    if not (_is_number(x) and _is_number(y)):
        return TensorDifference(name, status, shapes, codes)
    elements = max(1, BLOCK_BYTES // max(8, x.dtype.itemsize, y.dtype.itemsize))
    pairs = zip(
        left.blocks(name, elements * x.dtype.itemsize), right.blocks(other, elements * y.dtype.itemsize), strict=True
    )
    return TensorDifference(
        name, status, shapes, codes, *_distance((p.view(x.dtype), q.view(y.dtype)) for p, q in pairs)
    )


def _is_number(entry: TensorEntry) -> bool:
    try:
        entry.dtype  # noqa: B018
    except DataError:
        return False
    return True


def _distance(blocks: Blocks) -> tuple[int, float, float]:
    """How many elements differ, the largest absolute difference, and the relative one in the Frobenius norm."""
    elements, largest, squares, whole = 0, 0.0, 0.0, 0.0
    with np.errstate(all="ignore"), threadpool_limits(limits=1, user_api="blas"):
        for x, y in blocks:
            wide_x, wide_y = _wide(x), _wide(y)
            differs = _differs(x, y, wide_x, wide_y)
            whole += float(np.vdot(wide_x, wide_x).real)
            if not differs.any():
                continue
            elements += int(np.count_nonzero(differs))
            apart = np.abs(wide_x[differs] - wide_y[differs])
            largest = float(np.max(apart, initial=largest))
            squares += float(np.vdot(apart, apart))
    if whole:
        return elements, largest, math.sqrt(squares / whole)
    return elements, largest, math.inf if squares else squares


def _differs(x: np.ndarray, y: np.ndarray, wide_x: np.ndarray, wide_y: np.ndarray) -> Any:
    """Which elements differ: by their bits where the dtype is one; by value otherwise, NaN being NaN."""
    if x.dtype == y.dtype:
        word = f"u{x.dtype.itemsize}"
        return x.view(word) != y.view(word)
    if x.dtype.kind in "iu" and y.dtype.kind in "iu":
        return x != y
    return (wide_x != wide_y) & ~(np.isnan(wide_x) & np.isnan(wide_y))


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
