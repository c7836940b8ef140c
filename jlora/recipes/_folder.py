"""The output folder of a job: what may be written there, what is, and the trained model that is read from it."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jlora import variants
from jlora.adapter import is_entry
from jlora.config import LoraConfig
from jlora.disk import remove_leftovers, write_whole
from jlora.errors import ConfigError, DataError, listed
from jlora.models import write_adapter
from jlora.paths import leaves_by_path
from jlora.recipes._card import model_card
from jlora.recipes._config import JobConfig
from jlora.recipes._learned import Learned
from jlora.recipes._model import Model, call_model
from jlora.recipes._plot import write_curve
from jlora.recipes._results import Result, peak_memory, results_table
from jlora.storage import load_adapters, load_arrays, read_metadata, save_adapters
from jlora.train import MetricsLog, TrainState
from jlora.transform import lora

_WRITTEN = (  # beside config.toml
    "adapter",
    "adapters",
    "answers.jsonl",
    "checkpoints",
    "curve.png",
    "metrics.jsonl",
    "model_state",
    "results.json",
    "tensorboard",
    "variant",
)
_SPARE = 1 << 24
EXTENDED = ("train.steps", "optimizer.learning_rate", "optimizer.schedule", "optimizer.warmup_steps")


class Trained(NamedTuple):
    """A run that is done, from `load_run`.

    Attributes:
      model: `model(inputs)` gives the outputs of the trained model, the adapters factored, without dropout.
      params: the base.
      adapters, config: as `jlora.load_adapters` gives them: `jlora.merge_params(params, adapters, config)`.
      state: what else the model keeps, as training left it, such as Linen's collections; None where there is nothing.
    """

    model: Callable[[Any], Any]
    params: Any
    adapters: Any
    config: LoraConfig
    state: Any


def load_run(folder: str | Path) -> Trained:
    """The trained model that the output folder of a job holds: its base, its adapters and its state.

    The base comes from the model function of the folder's `config.toml`, which is imported and called: load the folders
    of people that you would run code of.

    Raises:
      DataError: no run, one that is not done, or files that do not fit the model or each other.
    """
    folder = Path(folder)
    if not (folder / "config.toml").exists():
        raise DataError(f"{folder}: holds no run: wanted the output folder of jlora train")
    if not (folder / "adapters").is_dir():
        raise DataError(f"{folder}: holds a run that is not done: jlora train --resume finishes it")
    job = JobConfig.read(folder / "config.toml")
    model = call_model(job, Console(quiet=True))
    adapters, config = load_adapters(folder / "adapters", params=model.params)
    state = _read_state(folder, model.state)
    adapted = lora(model.fn, config)
    return Trained(
        lambda inputs: adapted(model.params, adapters, inputs, state, None)[0], model.params, adapters, config, state
    )


def check_folder(folder: Path, job: JobConfig, resume: bool, extend: bool, force: bool) -> list[str]:
    """What an extended run changes of the configuration that the folder holds, one line for each key.

    Raises:
      DataError, ConfigError: the folder is not one that this run may write.
    """
    written = folder / "config.toml"
    remove_leftovers(written)
    if resume:
        if not written.exists():
            raise DataError(f"{folder}: nothing to resume: it holds no run")
        return _check_changes(folder, _changes(JobConfig.read(written), job), extend)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; give output.folder another path")
    if folder.exists() and any(folder.iterdir()) and not (force and written.exists()):
        way_out = "--resume goes on with it, --force begins anew" if written.exists() else "it holds no run of jlora"
        raise DataError(f"{folder}: is not empty: {way_out}; or give another folder with output.folder=...")
    return []


def prepare_folder(folder: Path, job: JobConfig, resume: bool, changed: list[str], room: int) -> None:
    """Makes the folder, empty of what an older run wrote, with the configuration; one that is resumed stays.

    `room` are the bytes that its files will have.

    The older configuration goes last and at once: a folder that held a run holds one at every moment.
    """
    try:
        if not resume:
            folder.mkdir(parents=True, exist_ok=True)
            for name in _WRITTEN:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if changed or not resume:
            _check_disk(folder, room)
            job.write(folder / "config.toml")
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}; give output.folder another path") from None


def _check_disk(folder: Path, room: int) -> None:
    """Raises a DataError where the files of a run would not fit."""
    free = shutil.disk_usage(folder).free
    if free < room + _SPARE:
        raise DataError(
            f"{folder}: {room / 1e9:.2f} GB are to be written, most of it checkpoints, and {free / 1e9:.2f} GB are "
            "free; give output.folder a path on a larger disk"
        )


def write_trained(
    folder: Path, job: JobConfig, model: Model, learned: Learned, state: TrainState, results: list[Result]
) -> list[str]:
    """Writes the adapters, and what the model changed of its state beside them; returns the paths of that.

    Of VeRA and LoRA-XS the smaller tree is written too, in `variant/`.

    Those of a language model are written in PEFT's format too, in `adapter/`, with a model card.
    """
    changed = jax.tree.map(lambda old, new: None if _same(old, new) else {"value": new}, model.state, state.model_state)
    paths = list(leaves_by_path(changed, is_leaf=is_entry))
    metrics = {name: value if math.isfinite(value) else None for name, value in results[-1].metrics.items()}
    metadata = {"model": job.model.function, "steps": int(state.step), "metrics": metrics, "model_state": len(paths)}
    if model.language is not None:
        metadata["base"] = str(model.language.folder)
    config, adapters = learned.config_of_adapters, learned.adapters(state.trained, learned.frozen, model.params)
    if learned.frozen is not None:
        variants.save(folder / "variant", state.trained, learned.frozen, model.params, learned.config)
    save_adapters(folder / "adapters", adapters, config, metadata=metadata)
    if paths:
        save_adapters(folder / "model_state", changed, LoraConfig(), metadata={"steps": int(state.step)})
    if model.language is not None:
        language, peft = model.language, folder / "adapter"
        write_adapter(peft, adapters, config, language.config, base=str(language.folder))
        write_whole(peft / "README.md", model_card(job, language, config, results).encode())
    return paths


def report(folder: Path, results: list[Result], changed_state: list[str], console: Console) -> None:
    """Prints the table of results and writes it, with the curve, to the folder."""
    rows = [dataclasses.asdict(result) for result in results]
    write_whole(folder / "results.json", (json.dumps(rows, indent=2) + "\n").encode("utf-8"))
    write_curve(folder / "curve.png", MetricsLog.read_file(folder / "metrics.jsonl"))
    console.out(results_table(results), highlight=False)
    console.out(f"peak memory: {peak_memory() / 1e9:.2f} GB", highlight=False)
    console.out(f"written to {folder}: {listed(sorted(path.name for path in folder.iterdir()), 20)}", highlight=False)
    if changed_state:
        console.out(
            f"the model changed {len(changed_state)} arrays of its own, {listed(changed_state, 3)}: they are in "
            f"{folder / 'model_state'}, and without them the adapters do not give these results; "
            "jlora.recipes.load_run reads both",
            highlight=False,
        )


def _changes(before: JobConfig, after: JobConfig) -> dict[str, tuple[Any, Any]]:
    """The keys outside of [output] that differ, each with both values."""
    old, new = before.to_dict(), after.to_dict()
    keys = [(section, key) for section in new if section != "output" for key in {**old[section], **new[section]}]
    values = {f"{section}.{key}": (old[section].get(key), new[section].get(key)) for section, key in keys}
    return {key: pair for key, pair in sorted(values.items()) if pair[0] != pair[1]}


def _check_changes(folder: Path, changed: dict[str, tuple[Any, Any]], extend: bool) -> list[str]:
    allowed = [key for key in changed if key in EXTENDED]
    refused = [key for key in changed if key not in EXTENDED]
    if changed and not extend:
        way_out = "" if refused else "; --extend goes on with them changed"
        raise ConfigError(f"{folder}: to resume, give the same configuration; changed: {listed(changed)}{way_out}")
    if refused:
        raise ConfigError(f"{folder}: --extend changes {', '.join(EXTENDED)} alone; changed: {listed(refused)}")
    before, after = changed.get("train.steps", (0, 0))
    if after < before:
        raise ConfigError(f"{folder}: train.steps = {after}: wanted {before} or more, to extend the run of {before}")
    return [f"{key} was {changed[key][0]!r}, is {changed[key][1]!r}" for key in allowed]


def _same(old: Any, new: Any) -> bool:
    """Whether two arrays are the same, bit by bit."""
    old, new = np.asarray(old), np.asarray(new)
    return (old.dtype, old.shape, old.tobytes()) == (new.dtype, new.shape, new.tobytes())


def _read_state(folder: Path, base: Any) -> Any:
    """The state of the base with what training changed of it."""
    written = read_metadata(folder / "adapters")
    if not written.get("model_state"):
        return base
    stored = folder / "model_state"
    if read_metadata(stored).get("steps") != written.get("steps"):
        raise DataError(f"{stored}: is not of the same step as the adapters: jlora train --resume writes both")
    changed, _ = load_arrays(stored)
    leaves = leaves_by_path(base)
    for path, entry in changed.items():
        found, wanted = entry["value"], leaves.get(path)
        if wanted is None or (tuple(found.shape), found.dtype) != (wanted.shape, wanted.dtype):
            kept = "keeps no such array" if wanted is None else f"keeps {wanted.dtype}{list(wanted.shape)} there"
            raise DataError(f"{stored}: {path}: found {found.dtype}{list(found.shape)}, the model {kept}")
    arrays = [jnp.asarray(np.asarray(changed[path]["value"])) if path in changed else leaves[path] for path in leaves]
    return jax.tree.unflatten(jax.tree.structure(base), arrays)
