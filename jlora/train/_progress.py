"""The progress bar of a run."""

import contextlib

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} steps/s")


class _MetricsColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        shown = task.fields["shown"]
        return Text("  ".join(f"{name} {shown[name]:.3f}" for name in ("loss", "accuracy") if name in shown))


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
