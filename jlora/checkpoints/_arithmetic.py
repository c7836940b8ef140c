"""A weight in a file, changed block by block along its first axis: sums in float32, rounded once.

The blocks are small enough to stay in the cache, and the same in both directions, so that what was merged block by
block is unmerged by the same arithmetic.
"""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jlora.adapter import Entry

Array = Any  # np.ndarray; its stubs do not know the operators of a dtype that is Any

BLOCK = 1 << 18  # numbers; 1 MiB in float32


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The ranges of the first axis that make up the blocks of a tensor."""
    count = shape[0] if shape else 1
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    yield from ((start, min(start + step, count)) for start in range(0, count, step))


class Moved(NamedTuple):
    """How an update d of some numbers would move them, and the difference k that is kept when the sums are rounded.

    Numbers that are not finite before or after are left out: one of them would hide what becomes of all others.

    Attributes:
      wanted: how many numbers of d are not zero.
      numbers: of k.
      squares: the sum of d^2.
      kept: of k^2.
      both: of d k.
    """

    wanted: int = 0
    numbers: int = 0
    squares: float = 0.0
    kept: float = 0.0
    both: float = 0.0

    def plus(self, other: "Moved") -> "Moved":
        """The same of the numbers of both."""
        return Moved(
            self.wanted + other.wanted,
            self.numbers + other.numbers,
            self.squares + other.squares,
            self.kept + other.kept,
            self.both + other.both,
        )

    @property
    def share(self) -> float:
        """The share of the numbers that are moved, of those that the update moves; 1 where it moves none."""
        return min(1.0, self.numbers / self.wanted) if self.wanted else 1.0

    @property
    def error(self) -> float:
        """||k - d|| / ||d||: 1 for an update that is lost as a whole, 0 for one of zeros."""
        lost = max(0.0, self.kept - 2 * self.both + self.squares)
        return math.sqrt(lost / self.squares) if self.squares else 0.0

    @property
    def cosine(self) -> float:
        """The cosine between d and k; 1 where the update is zero, 0 where nothing of it is kept."""
        if not self.squares:
            return 1.0
        return min(1.0, self.both / math.sqrt(self.squares * self.kept)) if self.kept else 0.0


class Scratch(threading.local):
    """Arrays that a thread takes again for every block; fresh ones cost more than the arithmetic, in page faults."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, np.dtype[Any]], Array] = {}

    def array(self, use: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array for this use, until this thread asks for the next; its contents are left from before."""
        key, size = (use, np.dtype(dtype)), math.prod(shape)
        if key not in self._held or self._held[key].size < size:
            self._held[key] = np.empty(size, dtype)
        return self._held[key][:size].reshape(shape)

    def cast(self, use: str, array: Array, dtype: Any) -> Array:
        """A copy in another dtype."""
        copy = self.array(use, array.shape, dtype)
        np.copyto(copy, array, casting="unsafe")
        return copy


SCRATCH = Scratch()


class Weight:
    """One tensor with all its changes, ready to be worked through block by block; safe to share between threads.

    A change that is not reversible is the only one.

    Norms under a magnitude span blocks where the first axis is one of the in axes: `add_norms` has to have seen all
    blocks before `merged` is called.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], changes: Sequence[Entry]) -> None:
        self.shape, self.dtype = shape, dtype
        self.wide = np.dtype(np.float64) if dtype == np.float64 else np.dtype(np.float32)
        self._value = np.asarray(changes[0].parts["value"]) if "value" in changes[0].parts else None
        offsets = [change for change in changes if "offset" in change.parts]
        self._offsets: list[tuple[float, Array]] = [(c.scaling, np.asarray(c.parts["offset"])) for c in offsets]
        adapters = [change for change in changes if "A" in change.parts]
        self._products = [_Product(change, self.wide, f"product {n}") for n, change in enumerate(adapters)]
        self._magnitude, self._norms, self._in_axes = _magnitude(changes[0], shape)

    @property
    def needs_norms(self) -> bool:
        """Whether there is a magnitude."""
        return self._magnitude is not None

    def add_norms(self, block: Array, start: int, stop: int) -> None:
        """Takes in the squares of a block before it is scaled by its magnitude; blocks in order."""
        with np.errstate(over="ignore", invalid="ignore"):
            total = self._sum(block, start, stop)
        squares = np.sum(np.square(total, dtype=np.float64), self._in_axes, keepdims=True)
        self._norms[self._rows(self._norms, start, stop)] += squares

    def merged(self, block: Array, start: int, stop: int) -> Array:
        """Rows start to stop of the merged tensor, from those of the base; until this thread's next block."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self._is_value:  # which may be of integers
                return SCRATCH.cast("merged", self.source(block, start, stop), self.dtype)
            return SCRATCH.cast("merged", self._exact(block, start, stop), self.dtype)

    def moved(self, block: Array, merged: Array, start: int, stop: int) -> Moved:
        """How rows start to stop were moved to the merged ones, and how the update would have moved them."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self._is_value:
                return Moved()
            source = self.source(block, start, stop)
            if self._magnitude is None:  # the update alone, which a sum in float32 could have lost already
                update = SCRATCH.array("update", merged.shape, self.wide)
                update[...] = 0
                _plus(update, self._addends(start, stop))
            else:
                update = np.subtract(self._exact(block, start, stop), source, dtype=self.wide)
            kept = SCRATCH.cast("kept", merged, self.wide)
            kept -= source
            return _moved(update.reshape(-1), kept.reshape(-1))

    def unmerged(self, block: Array, start: int, stop: int) -> Array:
        """Rows of what arithmetic makes of the merged tensor: the base up to rounding where all is reversible."""
        with np.errstate(over="ignore", invalid="ignore"):
            total = _less(SCRATCH.cast("total", block, self.wide), self._addends(start, stop))
            return SCRATCH.cast("unmerged", total, self.dtype)

    def uncertain(self, block: Array, start: int, stop: int) -> tuple[int, float]:
        """Of rows of the merged tensor, how many numbers of the base rounding leaves open, and by how much at most.

        Rounded sums are monotone: a number is certain where what unmerging gives merges to what is there, and neither
        of its neighbours does. An open one lies within half a spacing of the merged number, and the sums' own rounding.
        """
        addends, limits = list(self._addends(start, stop)), ml_dtypes.finfo(self.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            there = SCRATCH.cast("there", block, self.wide)
            exact = _less(SCRATCH.cast("exact", block, self.wide), addends)
            guess = SCRATCH.cast("guess", exact, self.dtype)

            def merges_to_it(number: Array) -> Array:
                total = _plus(SCRATCH.cast("total", number, self.wide), addends)
                return SCRATCH.cast("total", SCRATCH.cast("merged", total, self.dtype), self.wide) == there

            open_ = ~merges_to_it(guess)
            for neighbour in _neighbours(guess):
                open_ |= merges_to_it(neighbour)
            size = sum((np.abs(addend[open_]) for addend in addends), np.abs(there[open_]))
            rounding = 2 * len(addends) * np.finfo(self.wide).eps * size
            half = float(limits.eps) / 2 * np.abs(there[open_]) + float(np.spacing(self.dtype.type(0)))
            reach = half + np.abs(guess[open_].astype(self.wide) - exact[open_]) + rounding
        return int(np.count_nonzero(open_)), float(reach[np.isfinite(reach)].max(initial=0.0))

    def source(self, block: Array, start: int, stop: int) -> Array:
        """What the rows of the merged tensor start from: those of the base, or of the value that takes their place."""
        if self._value is None:
            return block
        return self._value[start:stop] if self.shape else self._value

    @property
    def _is_value(self) -> bool:
        """Whether a value takes the tensor's place as it is."""
        return not (self._offsets or self._products)

    def _exact(self, block: Array, start: int, stop: int) -> Array:
        """The sum, times the gain of a magnitude, before it is rounded."""
        total = self._sum(block, start, stop)
        if self._magnitude is not None:
            rows = self._rows(self._norms, start, stop)
            squares = np.where(self._norms[rows] == 0, 1, self._norms[rows])  # what is zero stays zero
            squares = np.where(np.isfinite(squares), squares, np.nan)  # an infinite norm would make zeros
            total *= (self._magnitude[rows] / np.sqrt(squares)).astype(self.wide)
        return total

    def _sum(self, block: Array, start: int, stop: int) -> Array:
        total = SCRATCH.cast("total", self.source(block, start, stop), self.wide)
        return _plus(total, self._addends(start, stop))

    def _addends(self, start: int, stop: int) -> Iterator[Array]:
        """What is added to rows start to stop, in order."""
        for scaling, offset in self._offsets:
            yield scaling * (offset[start:stop] if self.shape else offset).astype(self.wide)
        for product in self._products:
            yield product.rows(start, stop)

    def _rows(self, array: Array, start: int, stop: int) -> slice:
        return slice(None) if array.shape[0] == 1 else slice(start, stop)


def _plus(total: Array, addends: Iterable[Array]) -> Array:
    for addend in addends:
        total += addend
    return total


def _moved(wanted: Array, found: Array) -> Moved:
    """The sums over an update (numbers,) and what is kept of it (numbers,), all of them finite.

    They are in the arrays' dtype; where its range is too small, in float64, without the numbers that are not finite.
    """
    sums = _sums(wanted, found)
    if np.finfo(wanted.dtype).tiny <= sums.squares and _is_finite(sums):
        return sums
    there = np.isfinite(wanted) & np.isfinite(found)
    sums = _sums(wanted[there].astype(np.float64), found[there].astype(np.float64))
    return sums if _is_finite(sums) else Moved()


def _sums(wanted: Array, found: Array) -> Moved:
    numbers = int(np.count_nonzero(wanted)), int(np.count_nonzero(found))
    return Moved(*numbers, float(wanted @ wanted), float(found @ found), float(wanted @ found))


def _is_finite(sums: Moved) -> bool:
    return all(map(math.isfinite, sums))


def _less(total: Array, addends: Iterable[Array]) -> Array:
    for addend in addends:
        total -= addend
    return total


def _neighbours(numbers: Array) -> Iterator[Array]:
    """The next numbers of the dtype away from zero, and towards it; beyond zero where there is no nearer one."""
    sign = 1 << 8 * numbers.dtype.itemsize - 1
    bits = numbers.view(f"u{numbers.dtype.itemsize}")
    moved = SCRATCH.array("moved", bits.shape, bits.dtype)
    yield np.add(bits, bits.dtype.type(1), out=moved).view(numbers.dtype)
    np.subtract(bits, bits.dtype.type(1), out=moved)
    zero = numbers == 0
    moved[zero] = (bits[zero] ^ bits.dtype.type(sign)) + bits.dtype.type(1)
    yield moved.view(numbers.dtype)


class _Product:
    """Rows of scaling * A@B, in the order of the weight's axes."""

    def __init__(self, change: Entry, wide: np.dtype[Any], use: str) -> None:
        self._use, self._wide = use, wide
        assert change.split is not None
        roles = change.split.roles
        self._batch, self._ins = roles.count("b"), roles.count("i")
        self._first = roles[0]
        order = [axis for role in "bio" for axis in change.split.axes(role)]
        self._back = [order.index(axis) for axis in range(len(roles))]
        self._swapped = roles == "b" * self._batch + "o" * roles.count("o") + "i" * self._ins
        a, b = (np.asarray(change.parts[name]) for name in "AB")
        self._a = np.ascontiguousarray(a.astype(wide))
        self._b = np.ascontiguousarray((b.astype(np.float64) * change.scaling).astype(wide))

    def rows(self, start: int, stop: int) -> Array:
        n, a, b = self._batch, self._a, self._b
        if self._first == "b":
            a, b = a[start:stop], b[start:stop]
        elif self._first == "i":
            a = a[(slice(None),) * n + (slice(start, stop),)]
        else:
            b = b[(slice(None),) * (n + 1) + (slice(start, stop),)]
        batch, ins, outs, rank = a.shape[:n], a.shape[n:-1], b.shape[n + 1 :], a.shape[-1]
        left, right = a.reshape(*batch, math.prod(ins), rank), b.reshape(*batch, rank, math.prod(outs))
        if self._swapped:
            left, right = right.swapaxes(-1, -2), left.swapaxes(-1, -2)
        product = SCRATCH.array(self._use, (*batch, left.shape[-2], right.shape[-1]), self._wide)
        np.matmul(left, right, out=product)
        if self._swapped:
            return product.reshape(*batch, *outs, *ins)
        return product.reshape(*batch, *ins, *outs).transpose(self._back)


def _magnitude(change: Entry, shape: tuple[int, ...]) -> tuple[Array | None, Array, tuple[int, ...]]:
    """The magnitude with the axes of the weight, room for the squares of the norms, and the axes they are over."""
    split = change.split
    if "magnitude" not in change.parts or split is None:
        return None, np.zeros(()), ()
    axes = split.axes("i")
    magnitude = np.expand_dims(split.out_like(np.asarray(change.parts["magnitude"])).astype(np.float64), axes)
    return magnitude, np.zeros([1 if axis in axes else size for axis, size in enumerate(shape)]), axes
