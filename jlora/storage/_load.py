"""Adapters and their configuration out of a folder, as arrays of JAX."""

from pathlib import Path
from typing import Any, Literal, overload

import jax

from jlora.config import LoraConfig
from jlora.errors import DataError
from jlora.storage._read import Entries, Stored, check_paths_once, read_stored
from jlora.storage._report import LoadReport, compare
from jlora.tree import adapter_shardings, in_structure


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
    stored = read_stored(folder)
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
    stored = read_stored(folder)
    _check_narrow(folder, stored.entries)
    adapters, report = _fitting(folder, stored, params)
    return _placed(folder, adapters, sharding, params, stored.config), stored.config, report


def _fitting(folder: Path, stored: Stored, params: Any) -> tuple[Any, LoadReport]:
    """What fits the params, in their structure, and the report."""
    check_paths_once(folder, stored.entries)
    report = compare(stored.entries, stored.config, params)
    entries = dict(stored.entries.values())
    return in_structure(params, {path: entries[path] for path in report.matched}, stored.config), report


def _check_narrow(folder: Path, entries: Entries) -> None:
    arrays = [array for _, update in entries.values() for array in update.values()]
    narrowed = {array.dtype.name for array in arrays if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype}
    if narrowed:
        raise DataError(
            f"{folder}: holds {', '.join(sorted(narrowed))}, which JAX would narrow: "
            "jax.config.update('jax_enable_x64', True) before loading keeps it"
        )


def _placed(folder: Path, adapters: Any, sharding: Any, params: Any, config: LoraConfig) -> Any:
    if sharding is None and params is not None:
        sharding = adapter_shardings(params, config, adapters=adapters)
    try:
        return jax.device_put(adapters, sharding)
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder}: the adapters cannot be placed with this sharding: {error}") from None
