"""A checkpoint written tensor by tensor, in one file, or in several with an index."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jlora.disk._checkpoint import INDEX
from jlora.disk._safetensors import bytes_of, header_bytes, tensor_bytes
from jlora.disk._small import dump_json

MOST_OF_A_SHARD = 5_000_000_000
"""Bytes of a file at most, unless one tensor is larger."""

Layout = Mapping[str, tuple[Any, tuple[int, ...]]]


def write_checkpoint(
    folder: Path,
    layout: Layout,
    read: Callable[[str], Any],
    *,
    most: int = MOST_OF_A_SHARD,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes tensors to a new folder in the layout of Hugging Face; one of them is in memory at a time.

    Args:
      folder: that is there, such as the one that `write_folder` gives.
      layout: tensor -> (dtype, shape), in the order in which they are written.
      read: called with the name of a tensor; returns an array of the dtype and shape that `layout` says.
      most: bytes of the tensors in a file, unless one is larger.
      advance: called with the count of bytes after each tensor.
    """
    shards = list(_shards(layout, most))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        shard = _name(number, len(shards))
        weight_map |= dict.fromkeys(names, shard)
        with (folder / shard).open("wb") as file:
            file.write(header_bytes({name: layout[name] for name in names}, {"format": "pt"}))
            for name in names:
                dtype, shape = layout[name]
                array = read(name)
                assert (array.dtype, array.shape) == (dtype, shape), (name, array.dtype, array.shape)
                file.write(tensor_bytes(array))
                advance(bytes_of(shape, dtype))
    if len(shards) > 1:
        total = sum(bytes_of(shape, dtype) for dtype, shape in layout.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_bytes(dump_json(index))


def _shards(layout: Layout, most: int) -> Iterator[list[str]]:
    """The names of the tensors of each file."""
    names: list[str] = []
    size = 0
    for name, (dtype, shape) in layout.items():
        count = bytes_of(shape, dtype)
        if names and size + count > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += count
    yield names


def _name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
