"""The loop around the step: progress, metrics, checkpoints, and a stop that loses nothing."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jlora.errors import DataError
from jlora.fields import integer
from jlora.train._checkpoint import Checkpoints
from jlora.train._log import Logger
from jlora.train._progress import Speed, progress_bar
from jlora.train._signals import Interrupted, interrupts
from jlora.train._step import Step, TrainState
from jlora.train._watch import Watch


def fit(
    step: Step,
    state: TrainState,
    frozen: Any,
    batches: Callable[[int], Any] | Iterable[Any],
    *,
    steps: int,
    evaluate: Callable[[Any], dict[str, Any]] | None = None,
    log: Logger | Sequence[Logger] | None = None,
    checkpoints: Checkpoints | None = None,
    log_every: int = 10,
    eval_every: int = 100,
    checkpoint_every: int = 100,
    stop_at_nan: bool = True,
    on_eval: Callable[[int, Any], object] | None = None,
    count: Callable[[Any], int] | None = None,
    title: str = "training",
    console: Console | None = None,
) -> TrainState:
    """Trains until `steps` steps are done in all, with a live progress bar.

    Args:
      step: from `make_train_step`.
      state: from `init_state`, or from a checkpoint, where the run goes on bitwise as if it had not stopped.
      frozen: what is passed to the loss beside the trained tree.
      batches: `batches(step)` gives the batch of a step, counted from 0, as `Batches` does; or an iterable of them
        from the first on: of a run that is resumed, those of the steps that are done are drawn and dropped. An
        iterator that stands where the run goes on is given as `lambda step: next(iterator)`.
      evaluate: `evaluate(trained)` gives metrics, logged as `test_...` every `eval_every` steps and after the last.
        Where the state has a model state it is called as `evaluate(trained, model_state)`.
      log: where the metrics go every `log_every` steps, and at every evaluation: a `MetricsLog`, any object with
        `write(row)`, or several of them.
      checkpoints: where the state goes every `checkpoint_every` steps, at the end, and where the run is stopped.
      stop_at_nan: stop where the loss or a gradient is not finite; `False` where the optimizer itself skips such
        steps, as `optax.apply_if_finite` does.
      on_eval: called as `on_eval(step, trained)` after each evaluation, to look at the model itself, such as at what it
        writes; where the trained tree is needed later, it is copied.
      count: `count(batch)` gives the tokens of a batch, for the progress bar to show tokens a second.
      console: where the progress bar goes; one that is quiet shows none.

    Raises:
      Interrupted: on Ctrl-C, SIGTERM or SIGHUP, after the step at hand and its checkpoint; a second signal of the same
        kind stops at once. Signals that are ignored, as under nohup, stay so.
      DivergedError: the loss, a gradient or what is trained is not finite. It names the first such step and its batch;
        nothing of it is logged or saved. Losses are looked at where they are logged, and before anything is saved.
      DataError: the folder of the checkpoints holds those of another run; the batches ended early, after the state was
        saved.
    """
    for name, every in (("log_every", log_every), ("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
        integer(name, every, 1)
    done = int(state.step)
    _check_folder(checkpoints, done)
    source = batches if callable(batches) else _Following(batches)
    loggers: Sequence[Logger] = () if log is None else [log] if isinstance(log, Logger) else log
    watch = Watch(stop_at_nan)
    shown: dict[str, float] = {}
    speed = Speed()

    def save() -> None:
        watch.check()
        if checkpoints is not None:
            watch.check_trained(done, state.trained)
            checkpoints.save(done, state)

    with interrupts() as caught, progress_bar(console) as progress:
        task = progress.add_task(title, total=steps, completed=done, shown=shown, speed=speed)
        while done < steps and not caught:
            try:
                batch = source(done)
            except StopIteration:
                save()
                raise DataError(
                    f"the batches ended after step {done} of {steps}: give as many, or steps={done}; "
                    "for more than one epoch, an iterable that goes on (itertools.chain, or batches(step))"
                ) from None
            state, metrics = step(state, frozen, batch)
            done += 1
            if count is not None:
                speed.add(count(batch))
            watch.note(done, metrics)
            tested = evaluate is not None and (done % eval_every == 0 or done == steps)
            if tested or done % log_every == 0 or done == steps:
                watch.check()
                row = _row(metrics)
                if evaluate is not None and tested:
                    model_state = () if state.model_state is None else (state.model_state,)
                    with speed.paused():
                        row |= _row(evaluate(state.trained, *model_state), "test_")
                shown |= row
                for logger in loggers:
                    logger.write({"step": done, **row})
                if on_eval is not None and tested:
                    with speed.paused():
                        on_eval(done, state.trained)
            progress.update(task, completed=done, shown=shown)
            if done % checkpoint_every == 0 or done == steps:
                with speed.paused():
                    save()
    if caught:
        save()
        raise Interrupted(done, caught[0])
    return jax.block_until_ready(state)


class _Following:
    """The batches of an iterable, asked for by their step."""

    def __init__(self, batches: Iterable[Any]) -> None:
        if isinstance(batches, Mapping | str | bytes) or hasattr(batches, "shape") or not hasattr(batches, "__iter__"):
            raise DataError(f"batches: wanted batches(step) or an iterable of batches, found {type(batches).__name__}")
        self._iterator = iter(batches)
        self._drawn = 0

    def __call__(self, step: int) -> Any:
        while self._drawn < step:
            next(self._iterator)
            self._drawn += 1
        self._drawn += 1
        return next(self._iterator)


def _check_folder(checkpoints: Checkpoints | None, done: int) -> None:
    newest = None if checkpoints is None else checkpoints.latest_step
    if checkpoints is not None and newest not in (None, done):
        raise DataError(
            f"{checkpoints.folder}: holds the checkpoint of step {newest}, and the state is at step {done}: go on from "
            "it with state = checkpoints.restore(state), or give an empty folder"
        )


def _row(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    for name, value in metrics.items():
        if np.ndim(value):
            raise DataError(f"the metric {name!r} has shape {np.shape(value)}: wanted a scalar to log")
    return {prefix + name: float(value) for name, value in metrics.items()}
