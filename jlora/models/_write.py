"""The params of a decoder as the folder of a model again."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora.disk import (
    Checkpoint,
    Workplace,
    beside,
    can_store,
    check_can_hold,
    dump_json,
    file_written_whole,
    header_bytes,
    read_json,
    reason,
    tensor_bytes,
    workplace,
    write_whole,
)
from jlora.errors import DataError, raise_all
from jlora.models._config import DecoderConfig
from jlora.models._names import Piece
from jlora.models._source import Source
from jlora.paths import leaves_by_path
from jlora.pytrees import leaves
from jlora.storage import unreachable, write_once

_CONFIG = "config.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")
_OWN = "jlora_"  # the beginning of the names of notes about other numbers
_SPARE = 1 << 20


def write_model(folder: str | Path, params: Any, config: DecoderConfig, source: str | Path) -> None:
    """Writes params as a folder that transformers, or `read_params`, loads.

    It has the files of the folder that the params were read from, each tensor under the same name in a file of the same
    name, with the numbers of `params`; config.json, tokenizer and all else that belongs to the model are copied. It is
    written whole or not at all.

    Args:
      folder: a place where nothing is, or an empty folder.
      params: as `read_params` gives them, such as `jlora.merge_params` returns; arrays of JAX or NumPy.
      config: of the model.
      source: the folder that the params were read from.

    Raises:
      DataError: params that are not the model's, a source of another model, a folder that holds something, a disk that
        is too small or refuses.
    """
    origin = Source(source, config)
    raise_all(origin.problems(), DataError, str(source))
    arrays = leaves_by_path(params)
    raise_all(_problems(arrays, origin), DataError, "params")
    target = Path(folder).resolve()

    def check() -> None:
        _check_target(target, origin)
        check_can_hold(target.parent)

    def write() -> None:
        try:
            _check_target(target, origin)
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_room(target.parent, origin, arrays)
            with workplace(target, lambda _: False) as place:
                _write_files(place, origin, arrays)
                place.publish()
                place.remove()
        except OSError as error:
            raise DataError(f"{target}: cannot be written: {reason(error)}") from None

    write_once(leaves(params), write, check)


def _problems(arrays: Mapping[str, Any], origin: Source) -> list[str]:
    """What keeps the params from being those of the model."""
    found = [f"{path}: the model has no such param" for path in arrays if path not in origin.shapes]
    for path, wanted in origin.shapes.items():
        array = arrays.get(path)
        if array is None:
            found.append(f"{path}: is missing")
        elif not hasattr(array, "shape") or tuple(array.shape) != wanted.shape:
            shape = list(getattr(array, "shape", ()))
            found.append(f"{path}: found {type(array).__name__} {shape}, wanted an array {list(wanted.shape)}")
        elif not can_store(array.dtype):
            found.append(f"{path}: {array.dtype} has no place in a safetensors file")
        elif problem := unreachable(array):
            found.append(f"{path}: {problem}")
    return found


def _check_target(target: Path, origin: Source) -> None:
    read = origin.folder.resolve()
    if target in (read, *read.parents):
        raise DataError(f"{target}: the output would replace {read}, which is read; give another folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: is there already; give another folder, or empty this one")


def _check_room(parent: Path, origin: Source, arrays: Mapping[str, Any]) -> None:
    copied = sum((origin.checkpoint.folder / name).stat().st_size for name in beside(origin.checkpoint).files)
    wanted = copied + sum(int(array.size) * int(array.dtype.itemsize) for array in arrays.values()) + _SPARE
    free = shutil.disk_usage(parent).free
    if free < wanted:
        raise DataError(f"{parent}: {wanted / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free")


def _write_files(place: Workplace, origin: Source, arrays: Mapping[str, Any]) -> None:
    """Writes all that the folder of a model holds into the workplace."""
    checkpoint = origin.checkpoint
    pieces = {piece.name: (path, piece) for path, own in origin.pieces.items() for piece in own}
    for name in checkpoint.entries.keys() & origin.tied - pieces.keys():  # the copy of a tied weight
        pieces[name] = next(iter(pieces[other] for other in origin.tied - {name}))
    sizes = [_write_shard(place.new / shard, shard, checkpoint, pieces, arrays) for shard in checkpoint.shards]
    for name in beside(checkpoint).files:
        if not name.startswith(_OWN):
            (place.new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.folder / name, place.new / name)
    if checkpoint.index is not None:
        metadata = {**(checkpoint.index.get("metadata") or {}), "total_size": sum(sizes)}
        _rewrite(place.new / checkpoint.index_name, {**checkpoint.index, "metadata": metadata})
    settings = read_json(origin.folder / _CONFIG)
    dtypes = {str(array.dtype) for array in arrays.values()}
    if len(dtypes) == 1:
        settings |= {key: min(dtypes) for key in _DTYPE_KEYS if key in settings}
    _rewrite(place.new / _CONFIG, settings)


def _rewrite(file: Path, data: dict[str, Any]) -> None:
    """Writes a JSON file that was copied anew where it is to say something else."""
    if read_json(file) != data:
        write_whole(file, dump_json(data, sort_keys=False))


def _write_shard(
    file: Path,
    shard: str,
    checkpoint: Checkpoint,
    pieces: Mapping[str, tuple[str, Piece]],
    arrays: Mapping[str, Any],
) -> int:
    """Writes one file of tensors, one at a time; returns the bytes of the tensors."""
    names = [name for name in checkpoint.entries if checkpoint.shard_of[name] == shard]
    layout: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for name in names:
        entry = checkpoint.entries[name]
        layout[name] = (arrays[pieces[name][0]].dtype if name in pieces else entry.dtype, entry.shape)
    size = 0
    with checkpoint.open(shard) as source, file_written_whole(file) as output:
        output.write(header_bytes(layout, source.metadata))
        for name in names:
            if name in pieces:
                path, piece = pieces[name]
                array = _on_host(arrays[path], piece)
            else:
                array = source.read(name)
            size += array.nbytes
            output.write(tensor_bytes(array))
    return size


def _on_host(array: Any, piece: Piece) -> np.ndarray[Any, Any]:
    """One tensor of a param, of which no more than this comes to the host."""
    numbers = [at for at in piece.index if not isinstance(at, slice)]
    inner = tuple(at for at in piece.index if isinstance(at, slice))
    if isinstance(array, np.ndarray):
        return array[piece.index]
    local = array if array.is_fully_addressable else array.addressable_data(0)  # all of it is in each process
    return np.asarray(_element(local, np.asarray(numbers, np.int32)) if numbers else local)[inner]


@jax.jit
def _element(array: jax.Array, numbers: jax.Array) -> jax.Array:
    """What the array has at these places of its first axes; compiled once for all places."""
    for axis in range(numbers.shape[0]):
        array = jax.lax.dynamic_index_in_dim(array, numbers[axis], keepdims=False)
    return array
