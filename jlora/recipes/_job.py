"""A whole job: a base, adapters trained on a dataset, and full fine-tuning to compare with."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from jlora.config import LoraConfig
from jlora.errors import ConfigError, DataError
from jlora.optim import freeze_parts
from jlora.recipes._answers import AnswersLog, Asked
from jlora.recipes._config import FunctionConfig, JobConfig, OptimizerConfig
from jlora.recipes._evaluator import Forward, evaluator, value_and_metrics
from jlora.recipes._folder import Result, check_folder, prepare_folder, report, write_trained
from jlora.recipes._language import LanguageModel
from jlora.recipes._learned import Learned, learned
from jlora.recipes._model import Model, call_model, read_model
from jlora.text import Question
from jlora.train import (
    Batches,
    Checkpoints,
    Examples,
    Interrupted,
    Logger,
    Metrics,
    MetricsLog,
    TensorBoardLog,
    TrainState,
    count_examples,
    fit,
    has_tensorboard,
    init_state,
    make_train_step,
)
from jlora.tree import count_params, lora_labels

_CHECKPOINTS = 3  # the two that are kept, and the one that is written


@dataclasses.dataclass(frozen=True)
class _Task:
    """The loaded parts of a job."""

    job: JobConfig
    model: Model
    learned: Learned
    train: Examples | Sequence[Examples]
    test: Examples
    loss: Callable[[Any, Examples], tuple[jax.Array, Metrics]]
    asked: Asked | None
    log: Callable[[dict[str, Any]], object] | None


def run_job(
    job: JobConfig, *, resume: bool = False, extend: bool = False, force: bool = False, console: Console | None = None
) -> list[Result]:
    """Runs a job and writes its output folder.

    The folder holds `adapters/`, which `jlora.load_adapters` and every command on adapters reads, `model_state/` where
    the model changed arrays of its own (batch statistics), `checkpoints/` (Orbax) to resume from, `config.toml`,
    `metrics.jsonl`, `curve.png`, `results.json`, and `tensorboard/` where tensorboardX is installed; `load_run` reads
    it. The same seed gives the same numbers on the same machine; times are in `results.json` and `tensorboard/` alone.
    Of a language model it holds `adapter/` too, in PEFT's format with a model card, and `answers.jsonl`, what it
    answered to the prompts of [generate]; with `kind = "vera"` or "xs" in [lora] `variant/`, the smaller tree that was
    trained, which `jlora.variants.load` reads.

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
    prepare_folder(folder, job, resume or extend, changed, _room(task))
    for line in changed:
        console.out(f"extended: {line}", highlight=False)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        try:
            return _run(task, folder, checkpoints, console, resume or extend)
        except Interrupted:
            raise
        except KeyboardInterrupt as error:  # between the steps, or a second signal
            raise Interrupted(checkpoints.latest_step or 0, *error.args[:1]) from None


def _run(task: _Task, folder: Path, checkpoints: Checkpoints, console: Console, resume: bool) -> list[Result]:
    job, model, start = task.job, task.model, task.learned.trained
    console.out(str(task.learned.report), highlight=False)
    forward, frozen = _adapted(task), (model.params, task.learned.frozen)
    evaluate = evaluator(forward, task.loss, task.test, frozen)
    show = _shower(task, folder, checkpoints, console, resume)

    base = evaluate(start, model.state)  # B is zero: bitwise the base, by the program that trains
    results = [Result("frozen base", base | _matches(task, start), 0, 0, 0.0)]
    if checkpoints.latest_step is None and show is not None:
        show(0, start)
    config = task.learned.config
    way = _Way(task.learned.name, forward, start, frozen, job.optimizer, evaluate, config)
    state, result = _train(task, way, console, checkpoints, folder, show)
    results.append(dataclasses.replace(result, metrics=result.metrics | _matches(task, state.trained)))
    changed_state = write_trained(folder, job, model, task.learned, state, results)
    if job.full.enabled:
        optimizer = dataclasses.replace(job.optimizer, learning_rate=job.full.learning_rate)
        full = _base(task)
        way = _Way("full fine-tuning", full, model.params, None, optimizer, evaluator(full, task.loss, task.test, None))
        results.append(_train(task, way, console)[1])
    report(folder, results, changed_state, console)
    return results


def _adapters(task: _Task, trained: Any) -> Any:
    return task.learned.adapters(trained, task.learned.frozen, task.model.params)


def _matches(task: _Task, trained: Any) -> dict[str, float]:
    return {} if task.asked is None else task.asked.exact_match(_adapters(task, trained))


def _shower(
    task: _Task, folder: Path, checkpoints: Checkpoints, console: Console, resume: bool
) -> Callable[[int, Any], None] | None:
    """A function of (step, trained) that shows what the model answers; None where it is asked nothing."""
    asked = task.asked
    if asked is None or not asked.has_prompts:
        return None
    log = AnswersLog(folder / "answers.jsonl", (checkpoints.latest_step or 0) if resume else 0)
    return lambda step, trained: asked.show(step, _adapters(task, trained), log, console)


def _load(job: JobConfig, console: Console) -> _Task:
    loss = FunctionConfig(function=job.train.loss).load("train.loss")
    log = FunctionConfig(function=job.output.log).load("output.log") if job.output.log else None
    language = _language(job, console)
    train, test, questions = _data(job, language, console)
    Batches(train, job.train.batch_size, job.train.seed)
    model = call_model(job, console) if language is None else read_model(language, _where(job))
    one = train if isinstance(train, Mapping) else train[0]
    first = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array[:1].shape, array.dtype), one["inputs"])
    found = learned(model.fn, job.lora, model.params, first, model.state, None)
    task = _Task(job, model, found, train, test, loss, _asked(job, model, found, questions), log)
    try:
        jax.eval_shape(lambda batch: loss(model.fn(model.params, batch["inputs"], model.state, None)[0], batch), test)
    except KeyError as error:
        raise DataError(f"{job.train.loss} needs {error}; {job.data.function} gives {', '.join(test)}") from None
    return task


def _where(job: JobConfig) -> str:
    return f"model.function = {job.model.function!r}"


def _language(job: JobConfig, console: Console) -> LanguageModel | None:
    """The language model, its params not read, where the data are made with its tokenizer.

    Raises:
      ConfigError: the data need one, and the model is another.
    """
    job.model.load("model.function")
    if not job.data.takes("data.function", "language"):
        return None
    found = job.model.call("model.function", console=console)
    if not isinstance(found, LanguageModel):
        raise ConfigError(
            f"data.function = {job.data.function!r} is for a language model, and {_where(job)} returned "
            f"{type(found).__name__}: give [model] folder = the folder of one"
        )
    return found


def _data(job: JobConfig, language: LanguageModel | None, console: Console) -> tuple[Any, Examples, Sequence[Question]]:
    """The training set, or several of them, the test set, and the questions that come with it."""
    offered = {"console": console, "language": language, "batch_size": job.train.batch_size}
    parts = job.data.call("data.function", **offered)
    if not isinstance(parts, tuple) or len(parts) not in (2, 3):
        raise ConfigError(f"data.function = {job.data.function!r}: wanted it to return (train, test)")
    train, test, questions = (*parts, ())[:3]
    several = isinstance(train, Sequence) and bool(train)
    groups = [_checked(job, part, "training") for part in (train if several else [train])]
    return groups if several else groups[0], _checked(job, test, "test"), questions


def _checked(job: JobConfig, part: Any, name: str) -> Examples:
    """A mapping of arrays, with inputs.

    Raises:
      DataError: what is none.
    """
    if not isinstance(part, Mapping) or not all(np.ndim(array) for array in jax.tree.leaves(dict(part))):
        raise DataError(f"{job.data.function}: wanted the {name} set as a mapping of arrays")
    if "inputs" not in part:
        raise DataError(f"{job.data.function}: the {name} set has no 'inputs', found {', '.join(part) or 'nothing'}")
    count_examples(part, f"the {name} set")
    return jax.tree.map(np.asarray, dict(part))


def _asked(job: JobConfig, model: Model, found: Learned, questions: Sequence[Question]) -> Asked | None:
    """What the job asks its model.

    Raises:
      ConfigError: it asks a model that is no language model, or for matches with data that have no completions.
    """
    generate = job.generate
    if not generate.is_asked:
        return None
    if model.language is None:
        raise ConfigError(f"[generate]: {_where(job)} is no language model: give [model] folder, or no prompts")
    if generate.exact_match and not questions:
        raise ConfigError(
            f"generate.exact_match = {generate.exact_match}: the evaluation data have no prompts with completions to "
            "compare with; 0 asks for none"
        )
    return Asked(generate, model.language, found.config, model.params, questions)


def _room(task: _Task) -> int:
    """The bytes of the checkpoints of a run, and of its adapters in two formats."""
    trained, frozen, config = task.learned.trained, task.learned.frozen, task.learned.config
    optimizer = task.job.optimizer.make(task.job.train.steps, config)
    state = jax.eval_shape(lambda trained: (trained, optimizer.init(trained)), trained)
    adapters = jax.eval_shape(task.learned.adapters, trained, frozen, task.model.params)
    written = _bytes(adapters) + (0 if frozen is None else _bytes((trained, frozen)))
    return _CHECKPOINTS * _bytes((state, task.model.state)) + 2 * written


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _base(task: _Task) -> Forward:
    """The model alone, all of it trained."""
    return lambda trained, frozen, inputs, state, key: task.model.fn(trained, inputs, state, key)


def _adapted(task: _Task) -> Forward:
    def forward(trained: Any, given: tuple[Any, Any], inputs: Any, state: Any, key: Any) -> tuple[Any, Any]:
        params, frozen = given
        own, dropout = (None, None) if key is None else jax.random.split(key)
        adapters = task.learned.adapters(trained, frozen, params)
        if task.job.optimizer.freeze_a:
            adapters = freeze_parts(adapters, "A")
        return task.learned.model(params, adapters, inputs, state, own, dropout_key=dropout)

    return forward


@dataclasses.dataclass(frozen=True)
class _Way:
    """A way of adapting: what is trained over what is frozen, by which program and optimizer.

    `config` is that of the adapters, where they are what is trained.
    """

    name: str
    forward: Forward
    trained: Any
    frozen: Any
    optimizer: OptimizerConfig
    evaluate: Callable[..., dict[str, float]]
    config: LoraConfig | None = None


def _train(
    task: _Task,
    way: _Way,
    console: Console,
    checkpoints: Checkpoints | None = None,
    folder: Path | None = None,
    on_eval: Callable[[int, Any], None] | None = None,
) -> tuple[TrainState, Result]:
    """Trains one tree over another that is frozen, from the last checkpoint where there is one."""
    train, optimizer = task.job.train, way.optimizer

    def loss(trained: Any, frozen: Any, batch: Examples, key: jax.Array, *state: Any) -> Any:
        outputs, after = way.forward(trained, frozen, batch["inputs"], *(state or (None,)), key)
        value, metrics = value_and_metrics(task.loss(outputs, batch))
        return (value, metrics, after) if state else (value, metrics)

    gradient_transform = optimizer.make(train.steps, way.config)
    step = make_train_step(
        loss, gradient_transform, accumulate=train.accumulate, clip_norm=optimizer.clip_norm or None, seed=train.seed
    )
    state = init_state(way.trained, gradient_transform, task.model.state)
    if checkpoints is not None and checkpoints.latest_step is not None:
        state = checkpoints.restore(state)
    began = time.perf_counter()
    state = fit(
        step,
        state,
        way.frozen,
        Batches(task.train, train.batch_size, train.seed),
        steps=train.steps,
        evaluate=way.evaluate,
        log=[] if folder is None else _logs(task, folder, int(state.step)),
        checkpoints=checkpoints,
        log_every=train.log_every,
        eval_every=train.eval_every,
        checkpoint_every=train.checkpoint_every,
        on_eval=on_eval,
        count=None if task.model.language is None else _count_tokens,
        title=way.name,
        console=console,
    )
    seconds = time.perf_counter() - began
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    metrics = way.evaluate(state.trained, state.model_state)
    return state, Result(way.name, metrics, _count_trained(way), size, seconds)


@dataclasses.dataclass(frozen=True)
class _Called:
    """A function of each row of metrics as a logger."""

    write: Callable[[dict[str, Any]], object]


def _logs(task: _Task, folder: Path, step: int) -> list[Logger]:
    """Where the metrics of a run that starts from a step go; to TensorBoard too where tensorboardX is installed."""
    logs: list[Logger] = [MetricsLog(folder / "metrics.jsonl", step)]
    if has_tensorboard():
        logs.append(TensorBoardLog(folder / "tensorboard", step))
    if task.log is not None:
        logs.append(_Called(task.log))
    return logs


def _count_trained(way: _Way) -> int:
    """The numbers that are trained, without A where it stays as it began."""
    if way.config is None or not way.optimizer.freeze_a:
        return count_params(way.trained)
    parts = zip(jax.tree.leaves(way.trained), jax.tree.leaves(lora_labels(way.trained, by="part")), strict=True)
    return sum(array.size for array, part in parts if part != "A")


def _count_tokens(batch: Examples) -> int:
    """The tokens of a batch, without padding where segments say what that is."""
    inputs = batch["inputs"]
    return int(np.count_nonzero(inputs["segments"])) if "segments" in inputs else inputs["tokens"].size
