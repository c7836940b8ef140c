"""What a command does when it is asked to stop, and with warnings."""

import contextlib
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from jlora.cli._print import say
from jlora.errors import JloraWarning, plain


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt as Ctrl-C does: a KeyboardInterrupt of the signal, unless they are ignored."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number))

    changed = []
    if threading.current_thread() is threading.main_thread():
        changed = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) == signal.SIG_DFL]
    for one in changed:
        signal.signal(one, interrupt)
    try:
        yield
    finally:
        for one in changed:
            signal.signal(one, signal.SIG_DFL)


@contextlib.contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """A JloraWarning is a line on standard error, as an error is; those of others are shown as ever."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, JloraWarning):
            say(f"jlora: warning: {plain(str(message))}")
        else:
            shown(message, category, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def exit_code(error: KeyboardInterrupt) -> int:
    """128 and the number of the signal, as shells count."""
    by = getattr(error, "signal", error.args[0] if error.args else None)
    return 128 + (by if isinstance(by, signal.Signals) else signal.SIGINT)
