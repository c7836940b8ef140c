"""Signals that ask a run to stop: Ctrl-C, and those that take a machine or a terminal away."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, did so after a step, and is saved where there are checkpoints.

    Attributes:
      step: the last step that was done.
      signal: what asked for it: SIGINT (Ctrl-C), SIGTERM or SIGHUP.
    """

    def __init__(self, step: int, by: signal.Signals = signal.SIGINT) -> None:
        asked = "" if by == signal.SIGINT else f" by {by.name}"
        super().__init__(f"interrupted{asked} after step {step}")
        self.step = step
        self.signal = by


@contextlib.contextmanager
def interrupts() -> Iterator[list[signal.Signals]]:
    """The signals that came so far; a second one of a kind does what it did before.

    Those that are ignored stay so, as under nohup. Other threads than the main one get no signals.
    """
    caught: list[signal.Signals] = []
    before: dict[int, Any] = {}

    def handle(number: int, _: FrameType | None) -> None:
        caught.append(signal.Signals(number))
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(one)
            if handler not in (signal.SIG_IGN, None):  # None: not set from Python, which could not set it again
                before[one] = handler
                signal.signal(one, handle)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
