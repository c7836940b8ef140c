"""One line on the terminal for what takes a while."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_WIDTH = 24
_SECONDS = 0.1
_Show = Callable[[int, int], None]


@contextlib.contextmanager
def progress_line(what: str) -> Iterator[_Show | None]:
    """A function of (bytes done, bytes in all) that shows both; None where the output is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    begin, shown = time.monotonic(), 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < _SECONDS and done < total:
            return
        shown, share = now, done / max(1, total)
        bar = ("━" * round(_WIDTH * share)).ljust(_WIDTH)
        speed = done / 1e6 / max(1e-3, now - begin)
        sys.stderr.write(f"\r{what} {bar} {share:4.0%} {done / 1e9:.2f}/{total / 1e9:.2f} GB {speed:,.0f} MB/s ")
        sys.stderr.flush()

    try:
        yield show
    finally:
        if shown:
            sys.stderr.write("\n")


def progress_of(what: str, arguments: argparse.Namespace) -> contextlib.AbstractContextManager[_Show | None]:
    """The progress line of a command, which --json and --quiet leave out."""
    return contextlib.nullcontext() if arguments.json or arguments.quiet else progress_line(what)
