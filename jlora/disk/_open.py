"""Files opened for reading, whatever a path leads to."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from jlora.errors import DataError


def open_to_read(path: str | Path) -> int:
    """The descriptor of a regular file; a pipe, a device or a folder is refused and never waited for.

    Raises:
      DataError: no such file, one that may not be read, no regular file, a path that the system cannot have.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise DataError(f"{_shown(path)}: cannot be read: {reason(error)}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DataError(f"{_shown(path)}: cannot be read: no regular file")
    return handle


def read_bytes(path: str | Path, most: int) -> bytes:
    """The contents of a file of at most `most` bytes.

    Raises:
      DataError: a file that cannot be read, or is larger.
    """
    with os.fdopen(open_to_read(path), "rb") as file:
        return read_all(file, path, most)


def read_all(file: BinaryIO, path: str | Path, most: int) -> bytes:
    """The contents of an open file, which lies at `path`, of at most `most` bytes."""
    size = os.fstat(file.fileno()).st_size
    if size > most:
        raise DataError(f"{_shown(path)}: larger than {most:,} bytes")
    try:
        return file.read(size)
    except OSError as error:
        raise DataError(f"{_shown(path)}: cannot be read: {reason(error)}") from None


def identity(found: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to, even by one of the same size and time."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def changed(path: str | Path) -> DataError:
    """The error for a file that is another than it was when it was opened first."""
    return DataError(f"{_shown(path)}: was changed while it was read; start again when it is at rest")


def reason(error: Exception) -> str:
    """What the system says, without the number of the error and the path."""
    return str(getattr(error, "strerror", None) or error)


def _shown(path: str | Path) -> str:
    return str(path).replace("\0", "\\0")
