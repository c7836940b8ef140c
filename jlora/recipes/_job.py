"""A whole job: a base, adapters trained on a dataset, and full fine-tuning to compare with."""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from rich.console import Console

from jlora.config import LoraConfig
from jlora.errors import ConfigError, DataError
from jlora.linen import LoRA, resolve_config
from jlora.recipes._config import FunctionConfig, JobConfig, OptimizerConfig
from jlora.recipes._plot import write_curve
from jlora.storage import save_adapters
from jlora.tables import text_table
from jlora.train import (
    Batches,
    Checkpoints,
    Examples,
    Interrupted,
    Metrics,
    MetricsLog,
    count_examples,
    fit,
    init_state,
    make_train_step,
)
from jlora.tree import combine_params, count_params, init_lora, summary

Forward = Callable[..., Any]  # forward(trained, frozen, inputs, **kwargs of apply)
_CHUNK = 1024
_WRITTEN = ("adapters", "checkpoints", "config.toml", "curve.png", "metrics.jsonl", "results.json")


@dataclasses.dataclass(frozen=True)
class Result:
    """How one way of adapting did on the test set.

    Attributes:
      name: of the way.
      metrics: of the loss on the test set.
      parameters: the scalars that were trained.
      optimizer_bytes: the bytes of the optimizer's state.
      seconds: of training, compilation included.
    """

    name: str
    metrics: dict[str, float]
    parameters: int
    optimizer_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Task:
    """The loaded parts of a job."""

    job: JobConfig
    module: nn.Module
    params: Any
    config: LoraConfig
    train: Examples
    test: Examples
    loss: Callable[[Any, Examples], tuple[jax.Array, Metrics]]


def run_job(
    job: JobConfig, *, resume: bool = False, force: bool = False, console: Console | None = None
) -> list[Result]:
    """Runs a job and writes its output folder.

    The folder holds `adapters/`, which `jlora.load_adapters` and every command on adapters reads, `checkpoints/`
    (Orbax) to resume from, `config.toml`, `metrics.jsonl`, `curve.png` and `results.json`. The same seed gives the same
    numbers on the same machine; times are in `results.json` alone.

    Args:
      job: the configuration.
      resume: go on from the last checkpoint of the folder.
      force: begin anew where the folder holds another run; what else lies there is left alone.
      console: where tables and progress go.

    Raises:
      ConfigError, TargetError, DataError: before anything is written.
      Interrupted: on Ctrl-C; `resume` goes on from there.
    """
    console = console or Console()
    folder = Path(job.output.folder)
    _check_folder(folder, job, resume, force)
    try:
        task = _load(job, console)
    except Interrupted:  # training of its own, of which the folder of this run knows nothing
        raise KeyboardInterrupt from None
    adapters = init_lora(None, task.params, task.config)
    _prepare_folder(folder, job, resume)
    console.out(str(summary(task.params, adapters, task.config)), highlight=False)

    results = [Result("frozen base", _evaluator(task, _base(task), task.params)(None), 0, 0, 0.0)]
    with Checkpoints(folder / "checkpoints") as checkpoints:
        trained, result = _train(
            task,
            "LoRA",
            _adapted(task),
            adapters,
            task.params,
            job.optimizer,
            console,
            checkpoints,
            folder / "metrics.jsonl",
        )
    save_adapters(folder / "adapters", trained, task.config, metadata=_metadata(job, result))
    results.append(result)
    if job.full.enabled:
        optimizer = dataclasses.replace(job.optimizer, learning_rate=job.full.learning_rate)
        results.append(_train(task, "full fine-tuning", _base(task), task.params, None, optimizer, console)[1])
    _report(folder, results, console)
    return results


def _check_folder(folder: Path, job: JobConfig, resume: bool, force: bool) -> None:
    written = folder / "config.toml"
    if resume:
        if not written.exists():
            raise DataError(f"{folder}: nothing to resume: it holds no run")
        before = JobConfig.read(written).to_dict()
        after = job.to_dict()
        changed = [
            f"{section}.{key}"
            for section in after
            for key in after[section].keys() | before[section].keys()
            if after[section].get(key) != before[section].get(key) and section != "output"
        ]
        if changed:
            raise ConfigError(
                f"{folder}: to resume, give the same configuration; changed: {', '.join(sorted(changed))}"
            )
    elif folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; give output.folder another path")
    elif folder.exists() and any(folder.iterdir()) and not (force and written.exists()):
        way_out = "--resume goes on with it, --force begins anew" if written.exists() else "it holds no run of jlora"
        raise DataError(f"{folder}: is not empty: {way_out}; or give another folder with output.folder=...")


def _prepare_folder(folder: Path, job: JobConfig, resume: bool) -> None:
    if resume:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _WRITTEN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}; give output.folder another path") from None
    job.write(folder / "config.toml")


def _load(job: JobConfig, console: Console) -> _Task:
    loss = FunctionConfig(function=job.train.loss).load("train.loss")
    job.model.load("model.function")
    parts = _pair(job.data, "data.function", "(train, test)", console)
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
    module, params = _pair(job.model, "model.function", "(module, params)", console)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{job.model.function}: wanted a Linen module, found {type(module).__name__}")
    config = resolve_config(module, job.lora, jax.ShapeDtypeStruct(train["inputs"][:1].shape, train["inputs"].dtype))
    task = _Task(job, module, params, config, train, test, loss)
    try:
        jax.eval_shape(lambda batch: loss(_base(task)(None, params, batch["inputs"]), batch), dict(test))
    except KeyError as error:
        raise DataError(f"{job.train.loss} needs {error}; {job.data.function} gives {', '.join(test)}") from None
    return task


def _pair(function: FunctionConfig, field: str, wanted: str, console: Console) -> tuple[Any, Any]:
    found = function.call(field, console=console)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ConfigError(f"{field} = {function.function!r}: wanted it to return {wanted}")
    return found


def _base(task: _Task) -> Forward:
    """The base alone: nothing trained, or all of it."""
    return lambda trained, frozen, inputs, **kwargs: task.module.apply(
        {"params": frozen if trained is None else trained}, inputs, **kwargs
    )


def _adapted(task: _Task) -> Forward:
    model = LoRA(task.module, task.config)
    return lambda adapters, params, inputs, **kwargs: model.apply(
        {"params": combine_params(params, adapters)}, inputs, **kwargs
    )


def _evaluator(task: _Task, forward: Forward, frozen: Any) -> Callable[[Any], dict[str, float]]:
    """The metrics on the test set, in chunks, each weighed by its length."""

    @jax.jit
    def chunk_metrics(trained: Any, frozen: Any, chunk: Examples) -> Metrics:
        loss, metrics = task.loss(forward(trained, frozen, chunk["inputs"]), chunk)
        return {"loss": loss, **metrics}

    total = count_examples(task.test)

    def evaluate(trained: Any) -> dict[str, float]:
        sums: dict[str, float] = {}
        for start in range(0, total, _CHUNK):
            chunk = {name: array[start : start + _CHUNK] for name, array in task.test.items()}
            for name, value in chunk_metrics(trained, frozen, chunk).items():
                sums[name] = sums.get(name, 0.0) + float(value) * count_examples(chunk)
        return {name: value / total for name, value in sums.items()}

    return evaluate


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
) -> tuple[Any, Result]:
    """Trains one tree over another that is frozen, from the last checkpoint where there is one."""
    train = task.job.train

    def loss(trained: Any, frozen: Any, batch: Examples, key: jax.Array) -> tuple[jax.Array, Metrics]:
        return task.loss(forward(trained, frozen, batch["inputs"], rngs={"dropout": key}), batch)

    gradient_transform = optimizer.make(train.steps)
    step = make_train_step(
        loss, gradient_transform, accumulate=train.accumulate, clip_norm=optimizer.clip_norm or None, seed=train.seed
    )
    state = init_state(trained, gradient_transform)
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
    return state.trained, Result(name, evaluate(state.trained), count_params(trained), size, seconds)


def _metadata(job: JobConfig, result: Result) -> dict[str, Any]:
    """What is kept beside the adapters: of which model they are, how long they were trained, how they do."""
    metrics = {name: value if math.isfinite(value) else None for name, value in result.metrics.items()}
    return {"model": job.model.function, "steps": job.train.steps, "metrics": metrics}


def _report(folder: Path, results: list[Result], console: Console) -> None:
    """Prints the table of results and writes it, with the curve, to the folder."""
    rows = [dataclasses.asdict(result) for result in results]
    (folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    write_curve(folder / "curve.png", MetricsLog.read_file(folder / "metrics.jsonl"))
    metrics = [name for name in results[0].metrics if name != "loss"] or ["loss"]
    header = ("on the test set", *metrics, "trained parameters", "optimizer state", "seconds")
    table = [
        (
            result.name,
            *(
                f"{result.metrics[name]:.1%}" if name == "accuracy" else f"{result.metrics[name]:.4g}"
                for name in metrics
            ),
            f"{result.parameters:,}",
            f"{result.optimizer_bytes:,} B",
            f"{result.seconds:.1f}",
        )
        for result in results
    ]
    console.out(text_table(header, table), highlight=False)
    console.out(f"written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}", highlight=False)
