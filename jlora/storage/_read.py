"""Adapters and their configuration out of a folder, as arrays of NumPy."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora.adapter import is_entry
from jlora.config import LoraConfig
from jlora.disk import CONFIG, TENSORS, TensorFile, parse_json_value
from jlora.errors import DataError, JloraError, listed, raise_all, shortened
from jlora.storage._checks import check_fit, not_finite
from jlora.storage._folder import check_seal, opened_folder
from jlora.storage._structure import MOST_LEVELS, Entries, is_name_of, put_together


class Stored(NamedTuple):
    """What a folder holds: the adapters as NumPy arrays in their structure, and by name."""

    adapters: Any
    entries: Entries
    config: LoraConfig


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that was passed to `save_adapters`; the tensors are not read.

    Raises:
      DataError: no folder of adapters, or a configuration that was changed after it was written.
    """
    with opened_folder(Path(path)) as (_, data):
        return _metadata(Path(path), data)


def load_on_host(path: str | Path) -> tuple[Any, LoraConfig]:
    """`load_adapters` with NumPy arrays, in the structure in which they were saved; no dtype is too wide."""
    stored = read_stored(Path(path))
    return stored.adapters, stored.config


def load_arrays(path: str | Path) -> tuple[dict[str, dict[str, Any]], LoraConfig]:
    """The entries by path, of arrays that are read when their numbers are asked for, and the configuration.

    Everything is checked as by `load_adapters`, one array at a time in memory; no dtype is too wide.

    Raises:
      DataError: as `load_adapters`; two entries have the same path.
    """
    folder = Path(path)
    stored = read_stored(folder, lazy=True)
    check_paths_once(folder, stored.entries)
    return dict(stored.entries.values()), stored.config


def read_stored(folder: Path, *, lazy: bool = False) -> Stored:
    """What a folder holds, everything checked but whether JAX and some params have a place for it."""
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
    return Stored(adapters, entries, config)


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


def check_paths_once(folder: Path, entries: Entries) -> None:
    path, count = Counter(path for path, _ in entries.values()).most_common(1)[0]
    if count > 1:
        raise DataError(f"{folder}: {count} adapters have the path {path!r}: load without params")
