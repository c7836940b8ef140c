"""Checkpoints: one safetensors file, or a folder of them with an index."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.disk._json import read_json
from jlora.disk._safetensors import TensorEntry, TensorFile
from jlora.errors import DataError

INDEX = "model.safetensors.index.json"
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".gguf", ".onnx", ".pkl", ".safetensors")


class Checkpoint:
    """The tensors of a folder in the layout of Hugging Face, or of one file; nothing is read but the headers.

    Attributes:
      folder: where the files lie.
      shards: the names of the files that hold tensors, in order.
      entries: tensor -> TensorEntry.
      shard_of: tensor -> the file that holds it.
      index: the contents of the index file, None where there is none.

    Raises:
      DataError: no such checkpoint, files that are missing or damaged, an index that does not fit its files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.folder, self.shards, self.index = _files(self.path)
        self.entries: dict[str, TensorEntry] = {}
        self.shard_of: dict[str, str] = {}
        for shard in self.shards:
            with self.open(shard) as file:
                if twice := self.entries.keys() & file.entries.keys():
                    raise DataError(f"{self.folder / shard}: {min(twice)!r} is in another file of the checkpoint too")
                self.entries |= file.entries
                self.shard_of |= dict.fromkeys(file.entries, shard)
        if self.index is not None:
            _check_index(self.folder / INDEX, self.index["weight_map"], self.shard_of)

    def open(self, shard: str) -> TensorFile:
        """One of the files, for reading."""
        return TensorFile(self.folder / shard)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """One tensor, in memory of its own."""
        with self.open(self.shard_of[name]) as file:
            return file.read(name)

    def side_files(self) -> list[Path]:
        """What else belongs to the model, such as configuration and tokenizer; no weights of other formats."""
        if self.path.is_file():
            return []
        return [
            path
            for path in sorted(self.folder.iterdir())
            if path.is_file() and not path.name.startswith(".") and path.suffix not in _OTHER_WEIGHTS
        ]


def _files(path: Path) -> tuple[Path, list[str], dict[str, Any] | None]:
    """The folder of a checkpoint, the names of its files, and its index."""
    if path.is_file():
        return path.parent, [path.name], None
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    if (path / INDEX).is_file():
        index = read_json(path / INDEX)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise DataError(f"{path / INDEX}: wanted a weight_map from tensors to files")
        names = sorted(set(map(str, weight_map.values())))
        if outside := [name for name in names if Path(name).name != name]:
            raise DataError(f"{path / INDEX}: {outside[0]!r} is no file name of this folder")
        if missing := [name for name in names if not (path / name).is_file()]:
            raise DataError(f"{path}: {len(missing)} files of the index are missing: {', '.join(missing[:3])}")
        return path, names, index
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if "model.safetensors" in found:
        found = ["model.safetensors"]
    if len(found) != 1:
        what = f"{len(found)} safetensors files and no {INDEX}" if found else "no safetensors file"
        raise DataError(f"{path}: {what}: wanted a checkpoint: one file, or several with an index")
    return path, found, None


def _check_index(path: Path, weight_map: Mapping[str, str], shard_of: Mapping[str, str]) -> None:
    wrong = [name for name in weight_map.keys() | shard_of.keys() if weight_map.get(name) != shard_of.get(name)]
    if wrong:
        name = min(wrong)
        raise DataError(
            f"{path}: the index and the files differ in {len(wrong)} tensors, such as {name!r}: "
            f"by the index in {weight_map.get(name)}, found in {shard_of.get(name)}"
        )
