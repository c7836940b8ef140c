"""A shard of the output, written by ranges of its source."""

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from jlora.disk import TensorEntry, TensorFile
from jlora.errors import DataError

_COPY = 64 << 20


class ShardWriter:
    """A shard of the output, of which tensors are written by ranges; a context manager.

    Ranges are those of the source; in the output they lie `shift` bytes further on.
    """

    def __init__(
        self, path: Path, source: TensorFile, advance: Callable[[int], None], workers: int, shift: int = 0
    ) -> None:
        self.path, self.source, self.advance, self._shift = path, source, advance, shift
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._pool, self._running, self._most = ThreadPoolExecutor(workers), set[Future[None]](), 2 * workers

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)
            if kind is None:
                self._collect(self._running)
        finally:
            os.close(self._handle)

    def moved(self, shift: int, source: TensorFile | None = None) -> "ShardWriter":
        """The same writer with another shift, and another source where it is given."""
        other = copy.copy(self)
        other._shift = shift
        other.source = self.source if source is None else source
        return other

    def run(self, task: Callable[..., None], *args: Any) -> None:
        """Runs a task beside others; waits where too many are under way."""
        if len(self._running) >= self._most:
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            self._running.difference_update(done)
            self._collect(done)
        self._running.add(self._pool.submit(task, *args))

    def finish(self) -> None:
        """Waits for all tasks."""
        running = set(self._running)
        self._running.clear()
        self._collect(running)

    def put(self, start: int, array: np.ndarray[Any, Any]) -> None:
        """Writes the bytes of an array from byte `start` on."""
        left = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        while left.nbytes:
            count = os.pwrite(self._handle, left, start + self._shift)
            left, start = left[count:], start + count
        self.advance(array.nbytes)

    def copy(self, start: int, stop: int) -> None:
        """Copies a range of the source, in the kernel where it can."""
        while start < stop:
            count = min(_COPY, stop - start)
            copied = _copy_range(self.source.fileno(), self._handle, start, start + self._shift, count)
            if not copied:
                raise DataError(f"{self.source.path}: cut short at byte {start:,} while it was copied")
            start += copied
            self.advance(copied)

    def copy_in_pieces(self, start: int, stop: int) -> None:
        """Copies a range beside other tasks."""
        for piece in range(start, stop, _COPY):
            self.run(self.copy, piece, min(piece + _COPY, stop))

    @staticmethod
    def _collect(futures: Iterable[Future[None]]) -> None:
        for future in futures:
            future.result()


def blocks_of(entry: TensorEntry, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """For each range of rows: its start and stop, the byte where it begins in the file, and its shape."""
    rows = entry.shape[0] if entry.shape else 1
    width = (entry.stop - entry.start) // max(1, rows)
    for start, stop in ranges:
        yield start, stop, entry.start + start * width, (stop - start, *entry.shape[1:]) if entry.shape else ()


def _copy_range(source: int, target: int, start: int, at: int, count: int) -> int:
    if hasattr(os, "copy_file_range"):
        with contextlib.suppress(OSError):
            return os.copy_file_range(source, target, count, start, at)
    data = os.pread(source, min(count, 1 << 20), start)
    return os.pwrite(target, data, at) if data else 0
