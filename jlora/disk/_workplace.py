"""Folders that are made beside their place, and take it when they are whole.

A workplace is a folder `.NAME.<16 hex digits>.jlora` beside the target NAME. In it lies a file that says so, by which
the next run knows that it may go on there, or tidy up; nothing else is touched, and nothing through a link.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from jlora.disk._atomic import locked_folder, sync_folder
from jlora.disk._dry import is_dry_run
from jlora.disk._open import open_to_read, read_bytes
from jlora.disk._rename import exchange
from jlora.errors import DataError

_MARK, _NAME = "jlora_workplace", 100


class Workplace:
    """Where one folder is made.

    Attributes:
      path: the workplace itself, in which notes may lie.
      new: the folder that is made.
      target: the place that it takes.
    """

    def __init__(self, path: Path, target: Path) -> None:
        self.path, self.target = path, target
        self.new, self._old = path / "new", path / "old"

    def publish(self) -> None:
        """Gives `new` the place of a target that is not there, or is an empty folder.

        Raises:
          DataError: the target holds something.
        """
        try:
            os.rename(self.new, self.target)  # never takes the place of a folder that holds something
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise there_already(self.target) from None

    def replace(self) -> None:
        """Lets `new` and the target change places when `new` is on the disk, with the modes of what is replaced."""
        _copy_modes(self.target, self.new)
        _sync(self.new)
        if not exchange(self.new, self.target):
            os.rename(self.target, self._old)
            try:
                os.rename(self.new, self.target)
            except BaseException:
                os.rename(self._old, self.target)
                raise
        sync_folder(self.target.parent)

    def remove(self) -> None:
        """Takes the workplace away; what the system refuses is left to the next run."""
        with contextlib.suppress(OSError):
            _remove(self.path)


@contextlib.contextmanager
def workplace(target: Path, fits: Callable[[Path], bool]) -> Iterator[Workplace]:
    """The workplace of a target, which other processes are kept out of; it stays where it is not removed.

    Args:
      target: an absolute path without links.
      fits: whether to go on in the workplace that a run left; others are taken away.

    Raises:
      DataError: another process is at work for this target.
    """
    assert not is_dry_run(), target
    with contextlib.ExitStack() as locks:
        place = None
        _remove_empty(target)
        for path in _found(target):
            locks.enter_context(locked_folder(path))
            if place is None and fits(path):
                place = Workplace(path, target)
            else:
                _remove(path)
        if place is None:
            place = _made(target)
            locks.enter_context(locked_folder(place.path))
        place.new.mkdir(exist_ok=True)
        yield place


def bring_back(target: Path) -> None:
    """Gives a target its place again that a run was about to replace when it was killed, without an exchange."""
    _remove_empty(target)
    for path in _found(target):
        if not os.path.lexists(target) and os.path.isdir(path / "old"):
            os.rename(path / "old", target)


def left_places(target: Path) -> list[Path]:
    """The workplaces of a target that earlier runs left, which the next one goes on in, or takes away.

    Raises:
      DataError: another process is at work for this target.
    """
    found = _found(target)
    for path in found:
        with locked_folder(path):
            pass
    return found


def there_already(target: Path) -> DataError:
    """The error for a target that is not to be replaced."""
    return DataError(f"{target}: is there already; give another folder, or --force (force=True) to replace it")


def _made(target: Path) -> Workplace:
    path = target.parent / f"{_prefix(target)}{os.urandom(8).hex()}.jlora"
    path.mkdir(mode=0o700)
    (path / _MARK).write_bytes(os.fsencode(target.name))
    return Workplace(path, target)


def _found(target: Path) -> list[Path]:
    """The workplaces of a target that earlier runs left."""
    found = []
    for path in _named(target):
        with contextlib.suppress(DataError):
            # A run that was killed may have written no more than the beginning of the name.
            found += [path] if os.fsencode(target.name).startswith(read_bytes(path / _MARK, 1000)) else []
    return found


def _remove_empty(target: Path) -> None:
    """Takes away what runs left that were killed before the mark; never a folder that holds something."""
    for path in _named(target):
        with contextlib.suppress(OSError):
            os.rmdir(path)


def _named(target: Path) -> list[Path]:
    """The folders beside a target with the name of a workplace of it."""
    ours = re.compile(re.escape(_prefix(target)) + r"[0-9a-f]{16}\.jlora")
    names = sorted(os.listdir(target.parent)) if target.parent.is_dir() else ()
    paths = [target.parent / name for name in names if ours.fullmatch(name)]
    return [path for path in paths if stat.S_ISDIR(os.lstat(path).st_mode)]


def _remove(path: Path) -> None:
    """Takes a workplace away, its mark last."""
    for name in os.listdir(path):
        inner = path / name
        if stat.S_ISDIR(os.lstat(inner).st_mode):
            shutil.rmtree(inner)
        elif name != _MARK:
            inner.unlink()
    (path / _MARK).unlink()
    path.rmdir()


def _prefix(target: Path) -> str:
    return f".{os.fsdecode(os.fsencode(target.name)[:_NAME])}."


def _copy_modes(old: Path, new: Path) -> None:
    """The modes of a folder and its files to those of the same names."""
    os.chmod(new, stat.S_IMODE(os.stat(old).st_mode))
    for file in _files(new):
        with contextlib.suppress(FileNotFoundError):
            before = os.lstat(old / file.relative_to(new)).st_mode
            if stat.S_ISREG(before):
                os.chmod(file, stat.S_IMODE(before))


def _sync(folder: Path) -> None:
    for file in _files(folder):
        handle = open_to_read(file)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        sync_folder(inner)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
