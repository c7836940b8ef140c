"""What was read from a file as arrays of JAX, for those who train or merge it in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.arrays import on_device
from jlora.errors import DataError


def placed(folder: str | Path, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries, by path, as arrays of JAX; a DataError where it would narrow one."""
    found: dict[str, dict[str, Any]] = {}
    for path, parts in entries.items():
        found[path] = {name: on_device(part) for name, part in parts.items()}
        for name, part in found[path].items():
            if part is None:
                raise DataError(f"{folder}: {path} has the dtype {parts[name].dtype}: set jax_enable_x64")
    return found
