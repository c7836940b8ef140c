"""Residuals of a merge on the disk: a folder for each shard, in it a file for each tensor.

A file is the deflated bits (`jlora.residual`) and behind them the SHA-256 of the base in 64 characters.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from jlora.checkpoints._arithmetic import Array
from jlora.errors import DataError
from jlora.residual import Packer, Unpacker

RESIDUALS = "jlora_residual"
_DIGEST = 64


def residual_file(folder: Path, shard: str, tensor: str) -> Path:
    """Where the residual of a tensor lies in the folder of a checkpoint."""
    return folder / RESIDUALS / shard / quote(tensor, safe="")


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


@contextlib.contextmanager
def residual_reader(path: Path) -> Iterator[Unpacker]:
    """What gives the base back, block by block; its hash is checked at the end.

    Raises:
      DataError: the file is missing or damaged, or does not lead back to the base.
    """
    with os.fdopen(open_to_read(path), "rb") as file:
        left = os.fstat(file.fileno()).st_size - _DIGEST
        digest = os.pread(file.fileno(), _DIGEST, max(left, 0)).decode("ascii", "replace")

        def read(count: int) -> bytes:
            nonlocal left
            data = file.read(max(0, min(count, left)))
            left -= len(data)
            return data

        unpacker = Unpacker(read, digest)
        try:
            yield unpacker
            unpacker.check()
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
