"""A manifest of the files of a folder, written last: a folder without it is not whole, one that differs damaged."""

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

from jlora.disk import dump_json, read_json, reason, write_whole
from jlora.errors import DataError, shortened

MANIFEST = "jlora_manifest.json"
_FORMAT = 1


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """Writes down every file of a folder by its size and SHA-256, and what there is to know about it."""
    files = {name: _fingerprint(folder / name) for name in _names(folder)}
    said = {"format": _FORMAT, "about": about, "files": files}
    write_whole(folder / MANIFEST, dump_json(said | {"seal": _seal(said)}))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder says about it.

    Raises:
      DataError: there is none, or a file is not as it was written; nothing but the manifest and hashes was read.
    """
    said = read_json(folder / MANIFEST)
    seal = said.pop("seal", None)
    if seal != _seal(said):
        raise DataError(f"{folder / MANIFEST}: is not as it was written")
    if said.get("format") != _FORMAT:
        raise DataError(f"{folder / MANIFEST}: format {shortened(said.get('format'))}: wanted {_FORMAT}")
    about, files = said.get("about"), said.get("files")
    if not isinstance(about, dict) or not isinstance(files, dict):
        raise DataError(f"{folder / MANIFEST}: wanted objects 'about' and 'files'")
    names = _names(folder)
    for name in sorted(files.keys() | names):
        if name not in names:
            raise DataError(f"{folder / name}: is missing")
        if name not in files:
            raise DataError(f"{folder / name}: was not there when the checkpoint was written")
        if _fingerprint(folder / name) != files[name]:
            raise DataError(f"{folder / name}: is not as it was written")
    return about


def _names(folder: Path) -> list[str]:
    """Everything in a folder that is no folder, but the manifest."""
    paths = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return sorted(path.relative_to(folder).as_posix() for path in paths if path != folder / MANIFEST)


def _fingerprint(path: Path) -> dict[str, Any]:
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a link lead elsewhere
            raise DataError(f"{path}: is no regular file")
        with path.open("rb") as file:
            return {"bytes": found.st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}") from None


def _seal(said: dict[str, Any]) -> str:
    return hashlib.sha256(dump_json(said)).hexdigest()
