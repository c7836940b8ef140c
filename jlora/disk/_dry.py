"""Dry runs, in which all is read and checked and nothing is written."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

_IS_DRY = ContextVar("jlora_dry_run", default=False)


@contextlib.contextmanager
def dry_run() -> Iterator[None]:
    """Within the block whatever would be written is read, computed and checked, and is not written.

    >>> with dry_run():
    ...     is_dry_run()
    True
    >>> is_dry_run()
    False
    """
    token = _IS_DRY.set(True)
    try:
        yield
    finally:
        _IS_DRY.reset(token)


def is_dry_run() -> bool:
    """Whether nothing is to be written."""
    return _IS_DRY.get()


def check_can_hold(folder: Path, room: int = 0) -> None:
    """Raises the OSError or ValueError with which the system would refuse to make a folder, or a file in it.

    Args:
      folder: which may not be there yet.
      room: how many bytes are to be written there.
    """
    there = missing = folder
    with contextlib.suppress(FileNotFoundError):
        os.stat(folder)
    while not os.path.lexists(there):
        there, missing = there.absolute().parent, there
    if not there.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(missing))
    if shutil.disk_usage(there).free < room:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
