"""The loop around the step: progress, metrics, checkpoints, and an interrupt that loses nothing."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from jlora.fields import whole
from jlora.train._checkpoint import Checkpoints
from jlora.train._step import Step, TrainState


class Interrupted(KeyboardInterrupt):
    """Training was interrupted after the step `step`, and is saved where there are checkpoints."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted after step {step}")
        self.step = step


class MetricsLog:
    """Metrics as JSON lines, `{"step": 10, "loss": 0.5}`; nothing in it depends on the clock.

    Args:
      path: the file; lines of steps after `step` are dropped, as a resumed run writes them again.
      step: the step that the run starts from.
    """

    def __init__(self, path: str | Path, step: int = 0) -> None:
        self.path = Path(path)
        kept = [row for row in self.read_file(path) if row["step"] <= step] if step else []
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @staticmethod
    def read_file(path: str | Path) -> list[dict[str, Any]]:
        """The lines of a file; a last one that a killed run left half written is dropped."""
        rows = []
        for line in Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows


def fit(
    step: Step,
    state: TrainState,
    frozen: Any,
    batches: Callable[[int], Any],
    *,
    steps: int,
    evaluate: Callable[[Any], dict[str, Any]] | None = None,
    log: MetricsLog | None = None,
    checkpoints: Checkpoints | None = None,
    log_every: int = 10,
    eval_every: int = 100,
    checkpoint_every: int = 100,
    title: str = "training",
    console: Console | None = None,
) -> TrainState:
    """Trains until `steps` steps are done in all, with a live progress bar.

    Args:
      step: from `make_train_step`.
      state: from `init_state`, or from a checkpoint, where the run goes on bitwise as if it had not stopped.
      frozen: what is passed to the loss beside the trained tree.
      batches: `batches(step)` gives the batch of a step, as `Batches` does.
      evaluate: `evaluate(trained)` gives metrics, logged as `test_...` every `eval_every` steps and after the last.
      log: where the metrics go every `log_every` steps, and at every evaluation.
      checkpoints: where the state goes every `checkpoint_every` steps, at the end, and on Ctrl-C.
      console: where the progress bar goes; one that is quiet shows none.

    Raises:
      Interrupted: on Ctrl-C, after the step at hand and its checkpoint.
    """
    for name, every in (("log_every", log_every), ("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
        whole(name, every, 1)
    shown: dict[str, float] = {}
    with _interrupts() as interrupted, _progress(console) as progress:
        task = progress.add_task(title, total=steps, completed=(done := int(state.step)), shown=shown)
        while done < steps and not interrupted.is_set():
            state, metrics = step(state, frozen, batches(done))
            done += 1
            tested = evaluate is not None and (done % eval_every == 0 or done == steps)
            if tested or done % log_every == 0 or done == steps:
                row = {name: float(value) for name, value in metrics.items()}
                if evaluate is not None and tested:
                    row |= {f"test_{name}": float(value) for name, value in evaluate(state.trained).items()}
                shown |= row
                if log is not None:
                    log.write({"step": done, **row})
            progress.update(task, completed=done, shown=shown)
            if checkpoints is not None and (done % checkpoint_every == 0 or done == steps):
                checkpoints.save(done, state)
    if interrupted.is_set():
        if checkpoints is not None:
            checkpoints.save(done, state)
        raise Interrupted(done)
    return jax.block_until_ready(state)


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets; a second Ctrl-C interrupts at once. Other threads than the main one get no signals."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} steps/s")


class _MetricsColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        shown = task.fields["shown"]
        return Text("  ".join(f"{name} {shown[name]:.3f}" for name in ("loss", "accuracy") if name in shown))


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        _MetricsColumn(Column(no_wrap=True)),
        _SpeedColumn(Column(no_wrap=True)),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )
