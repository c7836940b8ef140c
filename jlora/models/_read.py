"""The params of a decoder, read from its folder a tensor at a time, each straight into its place."""

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora.arrays import is_floating
from jlora.disk import Checkpoint, TensorFile
from jlora.errors import ConfigError, DataError, raise_all
from jlora.models._config import read_config
from jlora.models._names import Piece
from jlora.models._shapes import param_shapes
from jlora.models._source import BLOCK, Source
from jlora.paths import leaves_by_path, nest

_WORKERS = 2
_ALIGNED = 64  # bytes; JAX on a CPU takes over such memory without a copy

Slices = tuple[slice, ...]


def read_params(folder: str | Path, *, dtype: Any = None, sharding: Any = None) -> dict[str, Any]:
    """The params of the model in a Hugging Face folder, for `decoder`.

    Every tensor is read straight into its place among the layers. The memory never holds more than the params and the
    largest of their arrays, and no device more than its own part.

    Args:
      folder: with config.json, and safetensors in one file or in several with an index.
      dtype: of the params; None for that of the files.
      sharding: a `jax.sharding.Sharding` for all params, or a tree of them that is a prefix of the params, None in it
        for JAX's default device. Take meshes with `AxisType.Auto`: `decoder` leaves it to the compiler how activations
        lie.

    Returns:
      nested dicts by the names of transformers; arrays below `model/layers` have all layers on the first axis.

    Raises:
      ConfigError: a config.json that `read_config` refuses, shardings that are no prefix of the params.
      DataError: tensors that are missing, that the model does not have, that have another shape or no floating numbers
        (as quantised ones), numbers that `dtype` cannot hold, axes that a sharding does not divide: all in one error.
        Files that are cut short or missing.
    """
    config = read_config(folder)
    source = Source(folder, config)
    shardings = _shardings(param_shapes(config), sharding)
    dtypes = _checked(source, dtype, shardings)
    params = {}
    with source.opened() as files, ThreadPoolExecutor(_WORKERS) as pool:
        for path, leaf in source.shapes.items():
            reader = _Reader(source.pieces[path], source.checkpoint, files, pool)
            params[path] = reader.array(leaf.shape, dtypes[path], shardings[path])
    return nest(params)


def _checked(source: Source, dtype: Any, shardings: Mapping[str, Any]) -> dict[str, np.dtype[Any]]:
    """The dtype of each param; a DataError with all that keeps them from being read."""
    if dtype is not None and not is_floating(dtype):
        raise ConfigError(f"dtype = {dtype}: wanted a floating one, such as bfloat16")
    problems = source.problems()
    for path, leaf in source.shapes.items():
        problems += _problems_of_sharding(path, leaf.shape, shardings[path])
    dtypes = {}
    for path in source.shapes:
        own = source.dtypes_of(path) if dtype is None else {np.dtype(dtype)}
        problems += _problems_of_dtypes(path, own)
        dtypes[path] = min(own, key=str, default=np.dtype(np.float32))
    raise_all(problems, DataError, str(source.folder))
    return dtypes


def _problems_of_dtypes(path: str, found: set[np.dtype[Any]]) -> list[str]:
    if len(found) > 1:
        names = " and ".join(sorted(str(dtype) for dtype in found))
        return [f"{path}: its layers have the dtypes {names}, and one array holds them: give dtype"]
    narrowed = [dtype for dtype in found if jax.dtypes.canonicalize_dtype(dtype) != dtype]
    return [f"{path}: {dtype} needs jax_enable_x64, or give dtype" for dtype in narrowed]


def _problems_of_sharding(path: str, shape: tuple[int, ...], sharding: Any) -> list[str]:
    try:
        sharding.shard_shape(shape)
    except (ValueError, IndexError) as error:  # the latter where it has more axes than the param
        return [f"{path} {list(shape)}: the sharding {sharding} does not fit: {error}"]
    return []


def _shardings(shapes: Any, sharding: Any) -> dict[str, Any]:
    """The sharding of each param by path."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def spread(own: Any, subtree: Any) -> Any:
        return jax.tree.map(lambda _: default if own is None else own, subtree)

    try:
        tree = jax.tree.map(spread, sharding, shapes, is_leaf=lambda node: node is None)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"sharding: it is no sharding, nor a tree of them that begins as params do: {error}"
        ) from None
    found = leaves_by_path(tree)
    if wrong := [path for path, own in found.items() if not isinstance(own, jax.sharding.Sharding)]:
        raise ConfigError(f"sharding: at {wrong[0]} found {found[wrong[0]]!r}, wanted a jax.sharding.Sharding or None")
    return found


class _Reader:
    """The reading of one param."""

    def __init__(
        self, pieces: Iterable[Piece], checkpoint: Checkpoint, files: Mapping[str, TensorFile], pool: ThreadPoolExecutor
    ) -> None:
        self.pieces, self.checkpoint, self.files, self.pool = list(pieces), checkpoint, files, pool

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any], sharding: Any) -> jax.Array:
        """The param on its devices; each part of it is read once for all devices that have it."""
        parts: dict[Any, np.ndarray[Any, Any]] = {}
        placed = []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            slices = tuple(slice(*own.indices(size)[:2]) for own, size in zip(index, shape, strict=True))
            key = tuple((own.start, own.stop) for own in slices)
            is_first = key not in parts  # the one device that may have this memory for its own
            if is_first:
                parts[key] = self._part(slices, dtype)
            on_device = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            placed.append(jax.device_put(parts[key], on_device, may_alias=is_first))
        return jax.block_until_ready(jax.make_array_from_single_device_arrays(shape, sharding, placed))

    def _part(self, slices: Slices, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """The part of the param within these slices."""
        part = _empty(tuple(own.stop - own.start for own in slices), dtype)
        list(self.pool.map(lambda piece: self._read_piece(piece, slices, part), self.pieces))
        return part

    def _read_piece(self, piece: Piece, slices: Slices, part: np.ndarray[Any, Any]) -> None:
        """Reads what a part has of one tensor into it."""
        place: list[int | slice] = []  # in the part
        own: list[slice] = []  # in the tensor
        for at, bounds in zip(piece.index, slices, strict=True):
            start, stop = (at.start, at.stop) if isinstance(at, slice) else (at, at + 1)
            first, last = max(start, bounds.start), min(stop, bounds.stop)
            if first >= last:
                return
            if isinstance(at, slice):
                place.append(slice(first - bounds.start, last - bounds.start))
                own.append(slice(first - start, last - start))
            else:
                place.append(first - bounds.start)
        self._read_rows(piece, own, part[tuple(place)])

    def _read_rows(self, piece: Piece, own: list[slice], target: np.ndarray[Any, Any]) -> None:
        """Reads a part of a tensor, given by slices, into an array of its shape."""
        entry = self.checkpoint.entries[piece.name]
        file = self.files[self.checkpoint.shard_of[piece.name]]
        rows, columns = own[0], tuple(own[1:])
        width = (entry.stop - entry.start) // piece.shape[0]
        start = entry.start + rows.start * width
        is_whole = target.shape[1:] == piece.shape[1:]
        if is_whole and target.dtype == entry.dtype and target.flags.c_contiguous:
            file.read_into(start, target)
            return
        step = max(1, BLOCK // width)
        for first in range(0, target.shape[0], step):
            count = min(step, target.shape[0] - first)
            block = np.empty((count, *piece.shape[1:]), entry.dtype)
            file.read_into(start + first * width, block)
            _cast(block[(slice(None), *columns)], target[first : first + count], piece.name)


def _cast(source: np.ndarray[Any, Any], target: np.ndarray[Any, Any], name: str) -> None:
    """Copies numbers into an array of another dtype."""
    if source.dtype.name == "bfloat16" and target.dtype == np.float32:
        # The upper half of the bits; ml_dtypes takes twenty times as long.
        bits = target.view(np.uint32)
        bits[...] = source.view(np.uint16)
        np.left_shift(bits, 16, out=bits)
        return
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(target, source, casting="unsafe")
    if target.dtype == np.float16 and (np.isinf(target) & (np.abs(source.astype(np.float64)) < np.inf)).any():
        raise DataError(f"{name}: numbers above 65,504, which float16 cannot hold: give bfloat16 or float32")


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Memory for an array, which begins where JAX takes it over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)
