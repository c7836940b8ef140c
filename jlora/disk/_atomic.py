"""Files that are written whole or not at all."""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jlora.disk._dry import is_dry_run
from jlora.disk._open import reason
from jlora.errors import DataError


@contextlib.contextmanager
def file_written_whole(path: str | Path, *, like: Path | None = None, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write to under a temporary name beside `path`, which it takes when the block ends without an error.

    A full disk, an interrupt or a kill leaves the old file or the new one; so does a crash of the machine, but with
    `sync=False`: the contents are on the disk before the name is. A link at `path` is replaced, never followed. The
    mode bits are those of the file that was there, or of the file `like`, or the usual ones.

    Raises:
      DataError: the system refuses, as for a full disk or a folder that is missing or may not be written to.
    """
    assert not is_dry_run(), path
    target = Path(path)
    try:
        with _replacing(target, like or target, sync) as file:
            yield file
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {reason(error)}") from None


def write_whole(path: str | Path, contents: bytes, *, like: Path | None = None, sync: bool = True) -> None:
    """Writes a small file whole or not at all."""
    with file_written_whole(path, like=like, sync=sync) as file:
        file.write(contents)


def remove_leftovers(path: str | Path) -> None:
    """Removes the temporary files of writers of `path` that were killed; those at work hold a lock on theirs."""
    target = Path(path)
    ours = re.compile(re.escape(_prefix(target)) + r"[0-9a-f]{16}\.jlora")
    with contextlib.suppress(OSError, ValueError):
        for name in os.listdir(target.parent):
            if ours.fullmatch(name):
                _remove_unless_locked(target.parent / name)


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
        if _locked(handle) is False:
            raise DataError(f"{folder}: another process is writing here")
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool | None:
    """Whether a lock was got, which ends with the process; None where the system or the file system has none."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _remove_unless_locked(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    try:
        if _locked(handle):
            os.unlink(file)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _replacing(target: Path, like: Path, sync: bool) -> Iterator[BinaryIO]:
    remove_leftovers(target)
    temporary, handle = _created(target)
    try:
        with os.fdopen(handle, "w+b") as file:
            _copy_mode(like, temporary)
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if sync:
        sync_folder(target.parent)


def _created(target: Path) -> tuple[Path, int]:
    """A new file beside the target, and its descriptor, which holds a lock on it."""
    while True:
        temporary = target.parent / f"{_prefix(target)}{os.urandom(8).hex()}.jlora"
        try:
            handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except ValueError as error:
            raise DataError(f"{str(target)!r}: cannot be written: {error}") from None
        # Another writer may have taken the file for a leftover before it was locked, and removed it.
        if _locked(handle) is not False and os.path.lexists(temporary):
            return temporary, handle
        os.close(handle)


def _prefix(target: Path) -> str:
    return f".{os.fsdecode(os.fsencode(target.name)[:100])}."


def _copy_mode(old: Path, new: Path) -> None:
    """Gives a new file the mode bits of a regular file, where there is one, before anything is in it."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(old).st_mode
        if stat.S_ISREG(mode) and (mode ^ os.lstat(new).st_mode) & 0o777:
            os.chmod(new, mode & 0o777)
