"""What a command says, on standard output and on standard error, whoever listens there."""

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from jlora.errors import DataError

_PLAIN = "jlora_plain"


@contextlib.contextmanager
def plain_output() -> Iterator[None]:
    """Both streams write what their encoding has no character for in ASCII: rules as hyphens, all else escaped."""
    codecs.register_error(_PLAIN, _in_ascii)
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors=_PLAIN)
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            with contextlib.suppress(OSError, ValueError):  # of what is left in the buffer; it may be closed
                stream.reconfigure(errors=errors)


def show(text: str, end: str = "\n") -> bool:
    """Prints to standard output. That nobody listens any more, as in `jlora ... | head -1`, is no error.

    Returns:
      whether somebody listened; for the first text that nobody hears it is false.

    Raises:
      DataError: it cannot be written, as on a full disk.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        _silence(sys.stdout)
        return False
    except OSError as error:
        _silence(sys.stdout)
        raise DataError(f"standard output: cannot be written: {error.strerror}") from None
    return True


def say(message: str) -> None:
    """Prints a message to standard error, where anybody still listens."""
    for text, stream in ((f"{message}\n", sys.stderr), ("", sys.stdout)):
        try:
            print(text, end="", file=stream, flush=True)
        except OSError:
            _silence(stream)


def _silence(stream: TextIO) -> None:
    """Leads a stream to nowhere, so that what is left in its buffer does not fail again as Python ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    if error.object[error.start] in "─━":  # of tables and of bars
        return "-", error.start + 1
    return codecs.backslashreplace_errors(
        UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    )
