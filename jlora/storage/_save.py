"""Adapters and their configuration into a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.config import LoraConfig
from jlora.disk import CONFIG, MOST_CONFIG, bytes_of_all, dump_json, parse_json
from jlora.errors import AdapterError, DataError, raise_all
from jlora.storage._checks import check_arrays, check_fit, not_finite
from jlora.storage._folder import FORMAT, check_folder_to_write, write_folder
from jlora.storage._processes import write_once
from jlora.storage._structure import take_apart
from jlora.tree import check_config


def save_adapters(
    path: str | Path, adapters: Any, config: LoraConfig, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into a folder, both or neither.

    A crash, a kill or a full disk leaves the adapters that were there before, or the new ones; readers never see a mix.
    In a program of several processes, adapters with arrays of all of them, each with all the numbers, are saved by a
    call in every process: the first one writes, the others wait, and all see an error.

    Args:
      path: the folder; made where there is none, with those above it.
      adapters: entries `{'A': (*batch, *in, r), 'B': (*batch, r, *out)}` in dicts, lists and tuples, `None` elsewhere;
        these come back exactly. Other pytree nodes, such as FrozenDicts, dataclasses and nnx States, are saved as
        dicts by the keys of their paths; `load_adapters` with `params` gives them the structure of the params. Arrays
        of NumPy or JAX, sharded ones too.
      config: the configuration that the adapters were made with.
      metadata: what else to keep beside the configuration: name -> None, bool, int, float, str, or lists and dicts of
        these.

    Raises:
      AdapterError: with every problem at once: a leaf that is no entry, an array that is not at hand or not finite, a
        rank that is not the configuration's.
      TargetError: a pattern of the configuration that matches no entry.
      ConfigError: no LoraConfig, or one of adapters whose start changed the base.
      DataError: metadata that JSON cannot hold, or a folder that cannot be written.

    >>> import tempfile, jax.numpy as jnp
    >>> adapters = {'up': {'kernel': {'A': jnp.ones((5, 2)), 'B': jnp.ones((2, 7))}, 'bias': None}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_adapters(folder, adapters, LoraConfig(rank=2), metadata={'steps': 300})
    ...     sorted(file.name for file in Path(folder).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_config(config)
    config.check_portable()
    structure, entries = take_apart(adapters)
    check_arrays(entries)
    check_fit(entries, config)
    raise_all((f"{place}: holds a NaN or an infinity" for place in not_finite(entries)), AdapterError)
    tensors = {
        f"{name}/{part}" if name else part: array
        for name, (_, update) in entries.items()
        for part, array in update.items()
    }
    folder, text = Path(path), _config_text(config, metadata)
    if len(text) > MOST_CONFIG:
        raise DataError(
            f"{folder / CONFIG}: {len(text):,} bytes of configuration and metadata, more than {MOST_CONFIG:,}"
        )
    write_once(
        tensors.values(),
        lambda: write_folder(folder, text, tensors, structure),
        lambda: check_folder_to_write(folder, bytes_of_all(tensors)),
    )


def _config_text(config: LoraConfig, metadata: Mapping[str, Any] | None) -> bytes:
    """The configuration as JSON, in the order of its fields and patterns: of patterns the first that matches wins."""
    plain = _plain_metadata({} if metadata is None else metadata)
    data = {"format": FORMAT} | config.to_dict() | ({"metadata": plain} if plain else {})
    text = dump_json(data, sort_keys=False)
    try:
        parse_json(text)
    except ValueError as error:
        raise DataError(f"{CONFIG}: could not be read again: {error}") from None
    return text


def _plain_metadata(metadata: Any) -> dict[str, Any]:
    if not isinstance(metadata, Mapping):
        raise DataError(f"metadata: found {type(metadata).__name__}, wanted a mapping from names to plain data")
    try:
        problem = _problem(dict(metadata), "metadata")
    except RecursionError:
        problem = "metadata: nested too deeply"
    if problem is not None:
        raise DataError(problem)
    return dict(metadata)


def _problem(data: Any, at: str) -> str | None:
    """What keeps a value from coming back from JSON as it is."""
    if type(data) is dict:
        for key in data:
            if type(key) is not str:
                return f"{at}: found the key {key!r}, wanted a string"
        return next((p for key, item in data.items() if (p := _problem(item, f"{at}[{key!r}]"))), None)
    if type(data) is list:
        return next((p for i, item in enumerate(data) if (p := _problem(item, f"{at}[{i}]"))), None)
    if data is None or type(data) in (bool, int, float, str):
        return None
    return f"{at}: found {type(data).__name__}, wanted None, bool, int, float, str, or lists and dicts of these"
