"""Residuals of a merge on the disk: a folder for each shard, in it a file for each tensor.

A file is the deflated bits (`jlora.residual`) and behind them the SHA-256 of the base in 64 characters.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from jlora.checkpoints._arithmetic import Array
from jlora.disk import RESIDUALS, open_to_read, reason
from jlora.errors import DataError, shortened
from jlora.residual import Packer, Unpacker

_DIGEST = 64
_MOST_NAME = 255  # bytes of a file's name, on Linux and macOS


def residual_file(folder: Path, shard: str, tensor: str) -> Path:
    """Where the residual of a tensor lies in the folder of a checkpoint."""
    return folder / RESIDUALS / shard / quote(tensor, safe="")


def check_names(tensors: Iterable[str]) -> None:
    """Refuses names of which no file can be called."""
    for name in tensors:
        if len(quote(name, safe="")) > _MOST_NAME:
            raise DataError(f"{shortened(name)}: too long a name for the file of a residual; merge without one")


class ResidualWriter:
    """Writes the residual of one tensor, block by block; a context manager."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._packer = path.open("wb"), Packer()

    def add(self, base: Array, guess: Array) -> None:
        """A block of the base, and what unmerging makes of it."""
        self._file.write(self._packer.add(base, guess))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Ends the file with the hash of the base."""
        with self._file:
            if kind is None:
                end, digest = self._packer.finish()
                self._file.write(end + digest.encode("ascii"))


class ResidualReader:
    """Gives the base of one tensor back, block by block; a context manager, at whose end its hash is checked.

    Raises:
      DataError: the file is missing or damaged, or does not lead back to the base.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._named():
            self._file = os.fdopen(open_to_read(path), "rb")
            self._left = max(0, os.fstat(self._file.fileno()).st_size - _DIGEST)
            digest = os.pread(self._file.fileno(), _DIGEST, self._left)
        self._unpacker = Unpacker(self._read, digest.decode("ascii", "replace"))

    def close(self) -> None:
        """Closes the file, whose hash is not checked."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        with self._file, self._named():
            if kind is None:
                self._unpacker.check()

    def restore(self, guess: Array) -> Array:
        """The block of the base whose unmerging gave `guess`."""
        with self._named():
            return self._unpacker.restore(guess)

    def _read(self, count: int) -> bytes:
        data = self._file.read(min(count, self._left))
        self._left -= len(data)
        return data

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read: {reason(error)}") from None
        except DataError as error:
            raise DataError(f"{self._path}: {error}") from None
