"""Checkpoints: one safetensors file, or a folder of them with an index."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.disk._formats import found_instead
from jlora.disk._open import changed, identity, reason
from jlora.disk._safetensors import TensorEntry, TensorFile
from jlora.disk._small import read_json
from jlora.errors import DataError, listed, shortened

INDEX = "model.safetensors.index.json"
INDEXES = ".safetensors.index.json"
"""The end of the names of indexes; those of diffusers are called after the model's class."""
_SINGLE = "model.safetensors"


class Checkpoint:
    """The tensors of a folder in the layout of Hugging Face, or of one file; nothing is read but the headers.

    Attributes:
      folder: where the files lie.
      shards: the names of the files that hold tensors, in order.
      entries: tensor -> TensorEntry.
      shard_of: tensor -> the file that holds it.
      index: the contents of the index file, None where there is none.
      index_name: the name of that file, or the one that it would have.
      identities: shard -> what changes when somebody replaces the file or writes to it.

    Raises:
      DataError: no such checkpoint, files that are missing or damaged, an index that does not fit its files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.folder, self.shards, self.index, self.index_name = _files(self.path)
        self.entries: dict[str, TensorEntry] = {}
        self.shard_of: dict[str, str] = {}
        self.identities: dict[str, tuple[int, ...]] = {}
        for shard in self.shards:
            with self.open(shard) as file:
                if twice := self.entries.keys() & file.entries.keys():
                    raise DataError(
                        f"{self.folder / shard}: {shortened(min(twice))} is in another file of the checkpoint too"
                    )
                self.entries |= file.entries
                self.shard_of |= dict.fromkeys(file.entries, shard)
        if self.index is not None:
            _check_index(self.folder / self.index_name, self.index["weight_map"], self.shard_of)

    def open(self, shard: str) -> TensorFile:
        """One of the files, for reading.

        Raises:
          DataError: it is not the file that it was at first.
        """
        file = TensorFile(self.folder / shard)
        found = file.identity()
        if self.identities.setdefault(shard, found) != found:
            file.close()
            raise changed(file.path)
        return file

    def check_unchanged(self) -> None:
        """Raises a DataError where a file was replaced, or written to, since the headers were read."""
        for shard, before in self.identities.items():
            path = self.folder / shard
            try:
                found = identity(os.stat(path))
            except OSError:
                raise changed(path) from None
            if found != before:
                raise changed(path)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """One tensor, in memory of its own."""
        if name not in self.shard_of:
            raise DataError(f"{self.path}: no tensor {shortened(name)}")
        with self.open(self.shard_of[name]) as file:
            return file.read(name)


def _files(path: Path) -> tuple[Path, list[str], dict[str, Any] | None, str]:
    """The folder of a checkpoint, the names of its files, its index, and the name of that."""
    if os.path.isfile(path):
        return path.parent, [path.name], None, INDEX
    if not os.path.isdir(path):
        raise DataError(f"{path}: no such file or folder")
    index = _index_in(path)
    if index is not None:
        return path, *_indexed(path / index), index
    found = [name for name in _names(path) if name.endswith(".safetensors")]
    if _SINGLE in found:
        found = [_SINGLE]
    if len(found) != 1:
        if not found and (instead := found_instead(path, ".safetensors")):
            raise DataError(f"{path}: no safetensors file; {instead}")
        what = f"{len(found)} safetensors files and no {INDEX}" if found else "no safetensors file"
        raise DataError(f"{path}: {what}: wanted a checkpoint: one file, or several with an index")
    return path, found, None, INDEX


def _index_in(folder: Path) -> str | None:
    """The name of the index of a folder; None where there is none that counts."""
    names = [name for name in _names(folder) if name.endswith(INDEXES) and os.path.isfile(folder / name)]
    if INDEX in names:
        return None if _is_passed_over(folder) else INDEX
    fewest = min((name.count(".") for name in names), default=0)  # a variant has a dot more: x.fp16.safetensors
    plain = [name for name in names if name.count(".") == fewest]
    if len(plain) > 1:
        raise DataError(f"{folder}: several indexes: {listed(plain)}; wanted the folder of one model")
    return plain[0] if plain else None


def _is_passed_over(folder: Path) -> bool:
    """Whether an index is of other files than the one that transformers loads where it is there."""
    if not os.path.isfile(folder / _SINGLE):
        return False
    try:
        return _indexed(folder / INDEX)[0] != [_SINGLE]
    except DataError:
        return True


def _indexed(path: Path) -> tuple[list[str], dict[str, Any]]:
    """The names of the files in an index, and the index."""
    folder, index = path.parent, read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise DataError(f"{path}: wanted a weight_map from tensors to files")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if not name or "\0" in name or Path(name).name != name]:
        raise DataError(f"{path}: {shortened(outside[0])} is no file name of this folder")
    if missing := [name for name in names if not os.path.isfile(folder / name)]:
        raise DataError(
            f"{folder}: {len(missing)} files of the index are missing: {listed(map(shortened, missing), 3)}"
        )
    return names, index


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {reason(error)}") from None


def _check_index(path: Path, weight_map: Mapping[str, str], shard_of: Mapping[str, str]) -> None:
    wrong = [name for name in weight_map.keys() | shard_of.keys() if weight_map.get(name) != shard_of.get(name)]
    if wrong:
        name = min(wrong)
        raise DataError(
            f"{path}: the index and the files differ in {len(wrong)} tensors, such as {shortened(name)}: "
            f"by the index in {weight_map.get(name)}, found in {shard_of.get(name)}"
        )
