"""Files that are written whole or not at all."""

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jlora.disk._open import reason
from jlora.errors import DataError


@contextlib.contextmanager
def file_written_whole(path: str | Path, *, like: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write to under a temporary name beside `path`, which it takes when the block ends without an error.

    The contents are on the disk before the name is: a crash, a full disk or a kill leaves the old file or the new one.
    A link at `path` is replaced, never followed. The mode bits are those of the file that was there,
    or of the file `like`, or the usual ones.

    Raises:
      DataError: the system refuses, as for a full disk or a folder that is missing or may not be written to.
    """
    target = Path(path)
    try:
        with _replacing(target, like or target) as file:
            yield file
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {reason(error)}") from None


def write_whole(path: str | Path, contents: bytes, *, like: Path | None = None) -> None:
    """Writes a small file whole or not at all."""
    with file_written_whole(path, like=like) as file:
        file.write(contents)


def remove_leftovers(path: str | Path) -> None:
    """Removes the temporary files of writers of `path` that were killed; for when no other writer is at work."""
    target = Path(path)
    ours = re.compile(re.escape(_prefix(target)) + r"[0-9a-f]{16}\.tmp")
    with contextlib.suppress(OSError):
        for file in target.parent.iterdir():
            if ours.fullmatch(file.name):
                file.unlink()


def sync_folder(folder: Path) -> None:
    """Puts the names of a folder on the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keeps other writers out of a folder, where the system has locks; one that is killed lets go.

    Raises:
      DataError: another process is writing there.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {reason(error)}") from None
    try:
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{folder}: another process is writing here") from None
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _replacing(target: Path, like: Path) -> Iterator[BinaryIO]:
    temporary = target.parent / f"{_prefix(target)}{secrets.token_hex(8)}.tmp"
    try:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except ValueError as error:
        raise DataError(f"{str(target)!r}: cannot be written: {error}") from None
    try:
        with os.fdopen(handle, "w+b") as file:
            _copy_mode(like, temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(target.parent)


def _prefix(target: Path) -> str:
    return f".{os.fsdecode(os.fsencode(target.name)[:100])}."


def _copy_mode(old: Path, new: Path) -> None:
    """Gives a new file the mode bits of a regular file, where there is one, before anything is in it."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(old).st_mode
        if stat.S_ISREG(mode) and (mode ^ os.lstat(new).st_mode) & 0o777:
            os.chmod(new, mode & 0o777)
