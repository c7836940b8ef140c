"""A whole job: a base, adapters trained on a dataset, and full fine-tuning to compare with."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jlora.errors import ConfigError, DataError
from jlora.recipes._config import FunctionConfig, JobConfig, OptimizerConfig
from jlora.recipes._folder import Result, check_folder, prepare_folder, report, write_trained
from jlora.recipes._model import Model, call_model
from jlora.train import (
    Batches,
    Checkpoints,
    Examples,
    Interrupted,
    Mean,
    Metrics,
    MetricsLog,
    Sum,
    TrainState,
    count_examples,
    fit,
    init_state,
    make_train_step,
)
from jlora.transform import Adapted, adapt
from jlora.tree import count_params

Forward = Callable[..., tuple[Any, Any]]  # forward(trained, frozen, inputs, state, key) -> (outputs, state)
_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class _Task:
    """The loaded parts of a job."""

    job: JobConfig
    model: Model
    adapted: Adapted
    train: Examples
    test: Examples
    loss: Callable[[Any, Examples], tuple[jax.Array, Metrics]]


def run_job(
    job: JobConfig, *, resume: bool = False, extend: bool = False, force: bool = False, console: Console | None = None
) -> list[Result]:
    """Runs a job and writes its output folder.

    The folder holds `adapters/`, which `jlora.load_adapters` and every command on adapters reads, `model_state/` where
    the model changed arrays of its own (batch statistics), `checkpoints/` (Orbax) to resume from, `config.toml`,
    `metrics.jsonl`, `curve.png` and `results.json`; `load_run` reads it. The same seed gives the same numbers on the
    same machine; times are in `results.json` alone.

    Args:
      job: the configuration.
      resume: go on from the last checkpoint of the folder.
      extend: go on although `train.steps`, or the learning rate, its schedule or its warm-up, are others than before.
      force: begin anew where the folder holds another run; what else lies there is left alone.
      console: where tables and progress go.

    Raises:
      ConfigError, TargetError, DataError: before anything is written.
      Interrupted: on Ctrl-C, SIGTERM or SIGHUP; `resume` goes on from there.
    """
    console = console or Console()
    folder = Path(job.output.folder)
    changed = check_folder(folder, job, resume or extend, extend, force)
    try:
        task = _load(job, console)
    except Interrupted as error:  # training of its own, of which the folder of this run knows nothing
        raise KeyboardInterrupt(error.signal) from None
    prepare_folder(folder, job, resume or extend, changed)
    for line in changed:
        console.out(f"extended: {line}", highlight=False)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        try:
            return _run(task, folder, checkpoints, console)
        except Interrupted:
            raise
        except KeyboardInterrupt as error:  # between the steps, or a second signal
            raise Interrupted(checkpoints.latest_step or 0, *error.args[:1]) from None


def _run(task: _Task, folder: Path, checkpoints: Checkpoints, console: Console) -> list[Result]:
    job, model, adapted = task.job, task.model, task.adapted
    console.out(str(adapted.report), highlight=False)

    results = [Result("frozen base", _evaluator(task, _base(task), model.params)(None, model.state), 0, 0, 0.0)]
    log_file = folder / "metrics.jsonl"
    state, result = _train(
        task, "LoRA", _adapted(task), adapted.adapters, model.params, job.optimizer, console, checkpoints, log_file
    )
    results.append(result)
    changed_state = write_trained(folder, job, adapted.config, state, model.state, result)
    if job.full.enabled:
        optimizer = dataclasses.replace(job.optimizer, learning_rate=job.full.learning_rate)
        results.append(_train(task, "full fine-tuning", _base(task), model.params, None, optimizer, console)[1])
    report(folder, results, changed_state, console)
    return results


def _load(job: JobConfig, console: Console) -> _Task:
    loss = FunctionConfig(function=job.train.loss).load("train.loss")
    job.model.load("model.function")
    parts = job.data.call("data.function", console=console)
    if not isinstance(parts, tuple) or len(parts) != 2:
        raise ConfigError(f"data.function = {job.data.function!r}: wanted it to return (train, test)")
    for name, part in zip(("training", "test"), parts, strict=True):
        if not isinstance(part, Mapping) or not all(np.ndim(array) for array in part.values()):
            raise DataError(f"{job.data.function}: wanted the {name} set as a mapping of arrays")
        if "inputs" not in part:
            raise DataError(
                f"{job.data.function}: the {name} set has no 'inputs', found {', '.join(part) or 'nothing'}"
            )
        count_examples(part, f"the {name} set")
    train, test = ({key: np.asarray(array) for key, array in part.items()} for part in parts)
    Batches(train, job.train.batch_size, job.train.seed)
    model = call_model(job, console)
    first = jax.ShapeDtypeStruct(train["inputs"][:1].shape, train["inputs"].dtype)
    adapted = adapt(model.fn, job.lora, model.params, first, model.state, None)
    task = _Task(job, model, adapted, train, test, loss)
    try:
        jax.eval_shape(lambda batch: loss(model.fn(model.params, batch["inputs"], model.state, None)[0], batch), test)
    except KeyError as error:
        raise DataError(f"{job.train.loss} needs {error}; {job.data.function} gives {', '.join(test)}") from None
    return task


def _base(task: _Task) -> Forward:
    """The base alone: nothing trained, or all of it."""
    return lambda trained, frozen, inputs, state, key: task.model.fn(
        frozen if trained is None else trained, inputs, state, key
    )


def _adapted(task: _Task) -> Forward:
    def forward(adapters: Any, params: Any, inputs: Any, state: Any, key: Any) -> tuple[Any, Any]:
        own, dropout = (None, None) if key is None else jax.random.split(key)
        return task.adapted.model(params, adapters, inputs, state, own, dropout_key=dropout)

    return forward


def _evaluator(task: _Task, forward: Forward, frozen: Any) -> Callable[..., dict[str, float]]:
    """The metrics on the test set, in chunks, each by its kind: a plain number is weighed by the chunk's length."""

    @jax.jit
    def chunk_metrics(trained: Any, frozen: Any, state: Any, chunk: Examples) -> dict[str, Any]:
        outputs, _ = forward(trained, frozen, chunk["inputs"], state, None)
        loss, metrics = _value_and_metrics(task.loss(outputs, chunk))
        return {"loss": loss, **metrics}

    def evaluate(trained: Any, state: Any = None) -> dict[str, float]:
        sums: dict[str, list[float]] = {}
        for start in range(0, count_examples(task.test), _CHUNK):
            chunk = {name: array[start : start + _CHUNK] for name, array in task.test.items()}
            for name, value in chunk_metrics(trained, frozen, state, chunk).items():
                count = count_examples(chunk)
                kind = value if isinstance(value, Mean | Sum) else Mean(float(value) * count, count)
                before = sums.get(name, [0.0] * len(kind))
                sums[name] = [old + float(new) for old, new in zip(before, kind, strict=True)]
        return {name: _over(*found) for name, found in sums.items()}

    return evaluate


def _value_and_metrics(returned: Any) -> tuple[Any, Metrics]:
    return returned if type(returned) is tuple else (returned, {})


def _over(total: float, weight: float = 1.0) -> float:
    return total / weight if weight else math.nan


def _train(
    task: _Task,
    name: str,
    forward: Forward,
    trained: Any,
    frozen: Any,
    optimizer: OptimizerConfig,
    console: Console,
    checkpoints: Checkpoints | None = None,
    log_file: Path | None = None,
) -> tuple[TrainState, Result]:
    """Trains one tree over another that is frozen, from the last checkpoint where there is one."""
    train = task.job.train

    def loss(trained: Any, frozen: Any, batch: Examples, key: jax.Array, *state: Any) -> Any:
        outputs, after = forward(trained, frozen, batch["inputs"], *(state or (None,)), key)
        value, metrics = _value_and_metrics(task.loss(outputs, batch))
        return (value, metrics, after) if state else (value, metrics)

    gradient_transform = optimizer.make(train.steps)
    step = make_train_step(
        loss, gradient_transform, accumulate=train.accumulate, clip_norm=optimizer.clip_norm or None, seed=train.seed
    )
    state = init_state(trained, gradient_transform, task.model.state)
    if checkpoints is not None and checkpoints.latest_step is not None:
        state = checkpoints.restore(state)
    evaluate = _evaluator(task, forward, frozen)
    began = time.perf_counter()
    state = fit(
        step,
        state,
        frozen,
        Batches(task.train, train.batch_size, train.seed),
        steps=train.steps,
        evaluate=evaluate,
        log=None if log_file is None else MetricsLog(log_file, int(state.step)),
        checkpoints=checkpoints,
        log_every=train.log_every,
        eval_every=train.eval_every,
        checkpoint_every=train.checkpoint_every,
        title=name,
        console=console,
    )
    seconds = time.perf_counter() - began
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    metrics = evaluate(state.trained, state.model_state)
    return state, Result(name, metrics, count_params(trained), size, seconds)
