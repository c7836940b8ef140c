"""The progress bar of a run."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

_SHOWN = ("loss", "accuracy", "token_accuracy")


class Speed:
    """Tokens a second since the first step was done, whose time is mostly that of the compilation."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._tokens = 0

    def add(self, tokens: int) -> None:
        """Notes the tokens of a step that was done."""
        if self._began is None:
            self._began = time.monotonic()
        else:
            self._tokens += tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not of a step, such as of an evaluation, and does not count."""
        began = time.monotonic()
        yield
        if self._began is not None:
            self._began += time.monotonic() - began

    def __str__(self) -> str:
        """Nothing before the second step."""
        seconds = 0.0 if self._began is None else time.monotonic() - self._began
        return f"{self._tokens / seconds:,.0f} tokens/s" if self._tokens and seconds else ""


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        tokens = str(task.fields["speed"])
        speed = task.finished_speed or task.speed
        return Text(tokens or ("" if speed is None else f"{speed:.1f} steps/s"))


class _MetricsColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        shown = task.fields["shown"]
        return Text("  ".join(f"{name.replace('_', ' ')} {shown[name]:.3f}" for name in _SHOWN if name in shown))


class _Bar(Progress):
    def stop(self) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed, which is no reason to lose the state
            super().stop()


def progress_bar(console: Console | None) -> Progress:
    """Steps, the loss and accuracy, the speed; nothing on a quiet console."""
    return _Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _MetricsColumn(Column(no_wrap=True)),
        _SpeedColumn(Column(no_wrap=True)),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )
