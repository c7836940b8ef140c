"""What lies beside the tensors of a checkpoint: what belongs to the model, and what does not."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jlora.disk._checkpoint import INDEXES, Checkpoint
from jlora.disk._open import read_bytes, reason
from jlora.disk._small import MOST_BYTES, parse_json_value
from jlora.errors import DataError

WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".gguf", ".onnx", ".pkl", ".safetensors")
"""The ends of the names of files that hold weights."""
_MODULES = "modules.json"


class Beside(NamedTuple):
    """Names relative to the checkpoint's folder.

    Attributes:
      files: what belongs to the model: configuration, tokenizer, code, the modules of sentence-transformers.
      left_out: weights of other formats, folders that hold such, what is no file.
    """

    files: tuple[str, ...]
    left_out: tuple[str, ...]


def beside(checkpoint: Checkpoint) -> Beside:
    """What lies in the folder of a checkpoint beside its tensors, hidden files aside; nothing for a single file."""
    files: list[str] = []
    left_out: list[str] = []
    if os.path.isfile(checkpoint.path):
        return Beside((), ())
    modules = _modules(checkpoint.folder)
    for name in _listed(checkpoint.folder):
        path = checkpoint.folder / name
        if name in checkpoint.shards:
            continue
        if os.path.isdir(path):
            inner = list(_inner(checkpoint.folder, name))
            others = [file for file, is_file in inner if not is_file or file.endswith(WEIGHTS)]
            if others and name not in modules:
                left_out.append(f"{name} with {others[0]}")
            else:
                files += [file for file, is_file in inner if is_file]
                left_out += [file for file, is_file in inner if not is_file]
        elif not os.path.isfile(path) or name.endswith(WEIGHTS) or _is_of_others(checkpoint, name):
            left_out.append(name)
        else:
            files.append(name)
    return Beside(tuple(files), tuple(left_out))


def _is_of_others(checkpoint: Checkpoint, name: str) -> bool:
    """Whether this is an index of other files than those of the checkpoint."""
    return name.endswith(INDEXES) and (checkpoint.index is None or name != checkpoint.index_name)


def _inner(root: Path, folder: str) -> Iterator[tuple[str, bool]]:
    """What lies in a folder at any depth, and whether it is a file; links to folders are not followed."""
    for name in _listed(root / folder):
        inner = f"{folder}/{name}"
        if os.path.isdir(root / inner) and not os.path.islink(root / inner):
            yield from _inner(root, inner)
        else:
            yield inner, os.path.isfile(root / inner)


def _modules(folder: Path) -> set[str]:
    """The folders of the modules that a model of sentence-transformers is made of."""
    try:
        found = parse_json_value(read_bytes(folder / _MODULES, MOST_BYTES))
    except (DataError, ValueError):
        return set()
    listed = found if isinstance(found, list) else []
    return {str(each.get("path")) for each in listed if isinstance(each, dict)}


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name[0] != ".")
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {reason(error)}") from None
