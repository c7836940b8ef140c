"""Adapters and their configuration out of a folder."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import jax

from jlora.adapter import is_entry
from jlora.config import LoraConfig
from jlora.disk import CONFIG, TENSORS, TensorFile, parse_json_value
from jlora.errors import DataError, JloraError, listed, raise_all, shortened
from jlora.storage._checks import check_fit, not_finite
from jlora.storage._folder import check_seal, opened_folder
from jlora.storage._report import LoadReport, compare
from jlora.storage._structure import MOST_LEVELS, Entries, is_name_of, put_together
from jlora.tree import adapter_shardings, in_structure


class _Stored(NamedTuple):
    """What a folder holds: the adapters as NumPy arrays in their structure, and by name."""

    adapters: Any
    entries: Entries
    config: LoraConfig


@overload
def load_adapters(
    path: str | Path, *, params: Any = None, sharding: Any = None, strict: Literal[True] = True
) -> tuple[Any, LoraConfig]: ...


@overload
def load_adapters(
    path: str | Path, *, params: Any = None, sharding: Any = None, strict: Literal[False]
) -> tuple[Any, LoraConfig, LoadReport]: ...


def load_adapters(path: str | Path, *, params: Any = None, sharding: Any = None, strict: bool = True) -> Any:
    """The adapters and the configuration that `save_adapters` wrote, bit by bit, or an error that says what is wrong.

    Args:
      path: the folder.
      params: the params that the adapters are for, arrays or `jax.ShapeDtypeStruct`: every path and shape is checked,
        and the adapters come in the structure of the params, `None` where there is none. Without it they come in the
        structure in which they were saved.
      sharding: a `jax.sharding.Sharding`, or a tree of them that is a prefix of the adapters; by default the arrays go
        where params say, as `jlora.adapter_shardings` reads them, and else to JAX's default device.
      strict: True; with False this is `load_fitting_adapters`.

    Returns:
      `(adapters, config)`, of JAX arrays.

    Raises:
      DataError: no such folder, files that are damaged or do not belong together, another kind of folder, values that
        are not finite, dtypes that JAX would narrow, adapters that do not fit the params.

    >>> import tempfile, jax.numpy as jnp
    >>> from jlora.storage import save_adapters
    >>> adapters = {'up': {'kernel': {'A': jnp.ones((5, 2)), 'B': jnp.ones((2, 7))}}}
    >>> folder = tempfile.TemporaryDirectory()
    >>> save_adapters(folder.name, adapters, LoraConfig(rank=2, target_modules='up'))
    >>> loaded, config = load_adapters(folder.name)
    >>> config, loaded['up']['kernel']['B'].shape
    (LoraConfig(rank=2, target_modules=('up',)), (2, 7))
    >>> folder.cleanup()
    """
    if not strict and params is not None:
        return load_fitting_adapters(path, params, sharding=sharding)
    folder = Path(path)
    stored = _read(folder)
    _check_narrow(folder, stored.entries)
    report = LoadReport(tuple(path for path, _ in stored.entries.values()))
    adapters = stored.adapters
    if params is not None:
        adapters, report = _fitting(folder, stored, params)
    if not report.fits:
        raise DataError(f"{folder}: {report}")
    placed = _placed(folder, adapters, sharding, params, stored.config)
    return (placed, stored.config) if strict else (placed, stored.config, report)


def load_fitting_adapters(path: str | Path, params: Any, *, sharding: Any = None) -> tuple[Any, LoraConfig, LoadReport]:
    """The adapters of a folder that fit the params, the configuration, and a report of what does not fit.

    Args:
      path: the folder.
      params: arrays or `jax.ShapeDtypeStruct`.
      sharding: as for `load_adapters`.

    Returns:
      `(adapters, config, report)`, the adapters in the structure of the params, `None` where there is none.

    Raises:
      DataError: as `load_adapters`, but for adapters that do not fit the params.

    >>> import tempfile, jax.numpy as jnp
    >>> from jlora.storage import save_adapters
    >>> adapters = {'up': {'kernel': {'A': jnp.ones((5, 2)), 'B': jnp.ones((2, 7))}}}
    >>> folder = tempfile.TemporaryDirectory()
    >>> save_adapters(folder.name, adapters, LoraConfig(rank=2, target_modules='up'))
    >>> params = {'up': {'kernel': jax.ShapeDtypeStruct((5, 11), 'float32')}, 'down': jnp.ones((11, 5))}
    >>> print(load_fitting_adapters(folder.name, params)[2])
    0 of 1 adapters fit the params
      wrong shape: up/kernel: found A (5, 2), B (2, 7), wanted A (5, 2), B (2, 11) for the weight (5, 11)
    >>> folder.cleanup()
    """
    folder = Path(path)
    stored = _read(folder)
    _check_narrow(folder, stored.entries)
    adapters, report = _fitting(folder, stored, params)
    return _placed(folder, adapters, sharding, params, stored.config), stored.config, report


def _fitting(folder: Path, stored: _Stored, params: Any) -> tuple[Any, LoadReport]:
    """What fits the params, in their structure, and the report."""
    _check_paths_once(folder, stored.entries)
    report = compare(stored.entries, stored.config, params)
    entries = dict(stored.entries.values())
    return in_structure(params, {path: entries[path] for path in report.matched}, stored.config), report


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that was passed to `save_adapters`; the tensors are not read.

    Raises:
      DataError: no folder of adapters, or a configuration that was changed after it was written.
    """
    with opened_folder(Path(path)) as (_, data):
        return _metadata(Path(path), data)


def load_arrays(path: str | Path) -> tuple[dict[str, dict[str, Any]], LoraConfig]:
    """The entries by path, of arrays that are read when their numbers are asked for, and the configuration.

    Everything is checked as by `load_adapters`, one array at a time in memory; no dtype is too wide.

    Raises:
      DataError: as `load_adapters`; two entries have the same path.
    """
    folder = Path(path)
    stored = _read(folder, lazy=True)
    _check_paths_once(folder, stored.entries)
    return dict(stored.entries.values()), stored.config


def _read(folder: Path, *, lazy: bool = False) -> _Stored:
    with opened_folder(folder) as (file, data):
        arrays: dict[str, Any] = {name: file.lazy(name) if lazy else file.read(name) for name in file.entries}
        check_seal(file, arrays)
        structure = _structure(file)
    _metadata(folder, data)
    try:
        config = LoraConfig.from_dict({name: value for name, value in data.items() if name != "metadata"})
    except JloraError as error:
        raise DataError(f"{folder / CONFIG}: {error}") from None
    try:
        adapters, entries = _entries(structure, arrays)
        check_fit(entries, config)
    except JloraError as error:
        raise DataError(f"{folder / TENSORS}: {error}") from None
    raise_all((f"{place}: holds a NaN or an infinity" for place in not_finite(entries)), DataError, str(folder))
    return _Stored(adapters, entries, config)


def _metadata(folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    metadata = data.get("metadata", {})
    if not isinstance(metadata, dict):
        raise DataError(f"{folder / CONFIG}: found metadata of {type(metadata).__name__}, wanted an object")
    return metadata


def _structure(file: TensorFile) -> Any:
    try:
        return parse_json_value(file.metadata["structure"].encode("utf-8"), levels=4 * MOST_LEVELS)
    except (KeyError, ValueError):
        raise DataError(f"{file.path}: its structure is missing, or no JSON") from None


def _entries(structure: Any, arrays: Mapping[str, Any]) -> tuple[Any, Entries]:
    """The tree, and name -> (path, entry).

    Raises:
      DataError: an entry without its tensors, a tensor without its entry, a name that is not of its path.
    """
    entries: Entries = {}
    updates: dict[str, dict[str, Any]] = {}
    for tensor, array in arrays.items():
        part = tensor.rpartition("/")[2]
        updates.setdefault(tensor.removesuffix(part), {})[part] = array

    def entry(name: str, path: str) -> Any:
        if not is_name_of(name, path):
            raise DataError(f"its structure has the name {shortened(name)} at {shortened(path)}")
        update = updates.pop(f"{name}/" if name else "", {})
        if not is_entry(update):
            found = listed(map(shortened, sorted(update))) or "nothing, or twice the same"
            raise DataError(f"{shortened(name)}: wanted A and B, or other parts of an adapter, found {found}")
        entries[name] = path, update
        return update

    adapters = put_together(structure, entry)
    if updates:
        left = sorted(prefix + part for prefix, update in updates.items() for part in update)
        raise DataError(f"tensors that are not in its structure: {listed(map(shortened, left))}")
    if not entries:
        raise DataError("holds no adapters")
    return adapters, entries


def _check_narrow(folder: Path, entries: Entries) -> None:
    arrays = [array for _, update in entries.values() for array in update.values()]
    narrowed = {array.dtype.name for array in arrays if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype}
    if narrowed:
        raise DataError(
            f"{folder}: holds {', '.join(sorted(narrowed))}, which JAX would narrow: "
            "jax.config.update('jax_enable_x64', True) before loading keeps it"
        )


def _check_paths_once(folder: Path, entries: Entries) -> None:
    path, count = Counter(path for path, _ in entries.values()).most_common(1)[0]
    if count > 1:
        raise DataError(f"{folder}: {count} adapters have the path {path!r}: load without params")


def _placed(folder: Path, adapters: Any, sharding: Any, params: Any, config: LoraConfig) -> Any:
    if sharding is None and params is not None:
        sharding = adapter_shardings(params, config, adapters=adapters)
    try:
        return jax.device_put(adapters, sharding)
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder}: the adapters cannot be placed with this sharding: {error}") from None
