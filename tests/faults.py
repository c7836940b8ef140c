"""Every call that changes files made to fail, one after the other: killed before or after it, refused, interrupted.

"SIGKILL" ends the process itself, for a child that was forked for it.
"""

import builtins
import contextlib
import errno
import functools
import io
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jlora.disk import _rename

KINDS = (
    *("killed before", "killed after", "half written", "ENOSPC", "EIO", "EIO for good", "EACCES", "interrupted"),
    "SIGTERM",
)
SOME_KINDS = [  # the others in .ci/run alone, where a write takes long
    pytest.param(kind, marks=() if kind in ("killed after", "ENOSPC", "interrupted") else pytest.mark.slow)
    for kind in KINDS
]

_CALLS = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "link", "symlink", "chmod", "utime", "fsync")
_WRITES = ("write", "pwrite", "copy_file_range", "sendfile")


class Crash(BaseException):
    """The end of the process, so to speak: nothing after it has an effect."""


class Faults:
    """Lets a number of calls that change files through, and then does as `kind` says."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: str, calls: int) -> None:
        self.kind, self.left, self.happened = kind, calls, False
        self.open: set[int] = set()
        for name in (*_CALLS, *_WRITES):
            patch.setattr(os, name, self._wrapped(getattr(os, name)))
        patch.setattr(_rename, "_renameat2", self._wrapped(_rename._renameat2))
        patch.setattr(os, "open", self._handles(os.open))
        patch.setattr(os, "close", self._closed(os.close))
        patch.setattr(os, "fdopen", self._opened(os.fdopen))
        for module in (io, builtins):
            patch.setattr(module, "open", self._wrapped(module.open, _opens_to_write))

    def _wrapped(self, call: Any, changes: Callable[..., Any] = lambda *args, **_: True) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return self._counted(call, args, kwargs) if changes(*args, **kwargs) else call(*args, **kwargs)

        return wrapped

    def _handles(self, call: Any) -> Any:
        counted = self._wrapped(call, lambda *args, **_: args[1] & (os.O_CREAT | os.O_RDWR))

        def opened(*args: Any, **kwargs: Any) -> Any:
            handle = counted(*args, **kwargs)
            self.open.add(handle)
            return handle

        return opened

    def _closed(self, call: Any) -> Any:
        def closed(handle: int) -> None:
            self.open.discard(handle)
            call(handle)

        return closed

    def _opened(self, call: Any) -> Any:
        def opened(*args: Any, **kwargs: Any) -> Any:
            file = call(*args, **kwargs)
            self.open.discard(args[0])
            if "w" not in "".join(args[1:2]):
                return file
            return _File(file, lambda data: self._counted(file.write, (data,), {}))

        return opened

    def _counted(self, call: Any, args: Any, kwargs: Any) -> Any:
        self.left -= 1
        if self.left >= 0:
            return call(*args, **kwargs)
        if self.kind == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        again, self.happened = self.happened, True
        if self.kind.startswith("EIO for") or (self.kind.startswith("E") and not again):
            number = getattr(errno, self.kind.split()[0])
            raise OSError(number, os.strerror(number))
        if self.kind in ("interrupted", "SIGTERM") and not again:
            self._kept(call.__name__, call(*args, **kwargs))
            if self.kind == "interrupted":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)
        if self.kind == "killed after" and not again:
            self._kept(call.__name__, call(*args, **kwargs))
        if self.kind == "half written" and not again and call.__name__ in ("write", "pwrite"):
            where = 0 if len(args) == 1 else 1  # of a file, or of the system
            half = memoryview(args[where]).cast("B")
            call(*args[:where], half[: len(half) // 2], *args[where + 1 :], **kwargs)
        if self.kind in ("killed before", "killed after", "half written"):
            raise Crash
        return call(*args, **kwargs)

    def _kept(self, name: str, result: Any) -> None:
        """What a call gave to nobody is closed, as by the end of a process."""
        if isinstance(result, io.IOBase):
            result.close()
        elif name == "open":
            self.open.add(result)


def _opens_to_write(file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
    return not isinstance(file, int) and bool(set(mode) & set("wax+"))


class _File:
    """A file whose writes are counted."""

    def __init__(self, file: Any, write: Callable[[Any], Any]) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends the process as the commands have it: by an exception, wherever it is."""

    def handle(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def failed(kind: str, calls: int, write: Callable[[], Any]) -> bool:
    """Whether a write met its fault, which comes at this call."""
    with pytest.MonkeyPatch.context() as patch, _terminated():
        faults = Faults(patch, kind, calls)
        try:
            write()
        except (Crash, KeyboardInterrupt, SystemExit, ValueError, OSError):
            assert faults.happened
    for handle in faults.open:  # as the end of a process does
        os.close(handle)
    return faults.happened


def calls_of(write: Callable[[], Any]) -> int:
    """How many calls that change files a write makes."""
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, "EIO", 10**9)
        write()
    return 10**9 - faults.left


def at_every_call(kind: str, write: Callable[[int], Any], least: int = 5) -> Iterator[int]:
    """The numbers of the calls at which `write(number)` failed, each right after it did."""
    calls = 0
    while failed(kind, calls, functools.partial(write, calls)):
        yield calls
        calls += 1
    assert calls >= least, f"only {calls} calls that change files"
