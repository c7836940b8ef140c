"""The two files of a folder of adapters, and how both change as one.

The tensors' file names the SHA-256 of the configuration that belongs to it. A save writes the new configuration beside
the old one, then puts the new tensors in place, which makes it valid, then lets the new configuration take the name of
the old one. A reader takes whichever of the two the tensors name: at every moment there is one.

The tensors' file also names the SHA-256 of itself, with zeros in the place of that number.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jlora.disk import (
    CONFIG,
    MOST_CONFIG,
    TENSORS,
    Pair,
    TensorFile,
    check_can_hold,
    file_written_whole,
    locked_folder,
    parse_json,
    read_bytes,
    reason,
    remove_leftovers,
    sync_folder,
    tensor_bytes,
    write_tensors,
    write_whole,
)
from jlora.errors import DataError, JloraError
from jlora.storage._other_folders import OF_VARIANT, PEFT, VARIANT, is_peft, what_it_is

FORMAT, VERSION = "jlora adapters", "1"
NEW_CONFIG = f".{CONFIG}.new"

_MARK, _ZEROS = b'"sha256":"', "0" * 64
_TRIES = 20


def write_folder(folder: Path, config: bytes, tensors: Mapping[str, Any], structure: Any) -> None:
    """Writes both files, or neither.

    Raises:
      DataError: the system refuses, or another process is writing here; what was there before is still there.
    """
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "config_sha256": hashlib.sha256(config).hexdigest(),
        "sha256": _ZEROS,
        "structure": json.dumps(structure, separators=(",", ":"), ensure_ascii=False),
    }
    with folder_to_write(folder):
        try:
            write_whole(folder / NEW_CONFIG, config, like=folder / CONFIG)
            with file_written_whole(folder / TENSORS) as file:
                _write_sealed(file, tensors, metadata)
            os.replace(folder / NEW_CONFIG, folder / CONFIG)
        except OSError as error:
            raise DataError(f"{folder / CONFIG}: cannot be written: {reason(error)}") from None
        finally:
            _settle(folder)
        sync_folder(folder)


@contextlib.contextmanager
def folder_to_write(folder: Path, tensors: str = TENSORS) -> Iterator[None]:
    """Makes a folder where there is none, keeps other writers out of it, and ends what a killed one left half done.

    `tensors` is the name of the file that is about to be written.

    Raises:
      DataError: the system refuses, or another process is writing here.
    """
    _made(folder, tensors, lambda: folder.mkdir(parents=True, exist_ok=True))
    with locked_folder(folder):
        for name in dict.fromkeys((TENSORS, tensors)):
            Pair(folder, name).settle()
        _settle(folder)
        for name in (NEW_CONFIG, CONFIG, tensors):
            remove_leftovers(folder / name)
        yield


def check_folder_to_write(folder: Path, room: int, tensors: str = TENSORS) -> None:
    """Refuses what `folder_to_write`, and writing `room` bytes there, would refuse, and changes nothing.

    Raises:
      DataError: the system would refuse, or another process is writing here.
    """
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"{folder}: cannot be written: {os.strerror(errno.EACCES)}")
    _made(folder, tensors, lambda: check_can_hold(folder, room))
    if folder.is_dir():
        with locked_folder(folder):
            pass


@contextlib.contextmanager
def opened_folder(folder: Path) -> Iterator[tuple[TensorFile, dict[str, Any]]]:
    """The tensors' file and the contents of the configuration that belongs to it.

    Raises:
      DataError: no adapters, files that do not belong together, another format or version.
    """
    for _ in range(_TRIES):
        file = _open_tensors(folder)
        with file:
            text = _config_of(folder, file.metadata)
            if text is not None:
                yield file, _parsed(folder, text)
                return
            if not _was_replaced(file, folder / TENSORS):
                raise DataError(
                    f"{folder / CONFIG} was changed after it was written, or is missing: bring it back, or save the "
                    "adapters again with the configuration that you want"
                )
    raise DataError(f"{folder}: was written again and again while it was read")


def check_seal(file: TensorFile, arrays: Mapping[str, Any]) -> None:
    """Raises a DataError where the bytes of the file, whose tensors are `arrays`, are not those that were written."""
    header = np.empty(file.data_start, np.uint8)
    file.read_into(0, header)
    before, mark, after = header.tobytes().partition(_MARK)
    seal = after[: len(_ZEROS)]
    digest = hashlib.sha256(before + mark + _ZEROS.encode() + after[len(_ZEROS) :])
    for name in file.entries:
        digest.update(tensor_bytes(arrays[name]))
    if digest.hexdigest().encode() != seal:
        raise DataError(f"{file.path}: its SHA-256 is not the one it states: damaged, or changed after it was written")


def is_adapters_folder(path: str | Path) -> bool:
    """Whether a folder looks like one that `save_adapters` wrote, by its header; nothing is verified.

    >>> is_adapters_folder("no/such/folder")
    False
    """
    try:
        _open_tensors(Path(path)).close()
    except JloraError:
        return False
    return True


def _write_sealed(file: BinaryIO, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes the tensors, and the hash of the whole in its place in the header."""
    digest = hashlib.sha256()

    class Hashed:
        def write(self, data: Any) -> None:
            digest.update(data)
            file.write(data)

    write_tensors(Hashed(), tensors, metadata)
    file.seek(0)
    header = file.read(int.from_bytes(file.read(8), "little"))
    file.seek(8 + header.index(_MARK) + len(_MARK))
    file.write(digest.hexdigest().encode())


def _made(folder: Path, tensors: str, make: Callable[[], None]) -> None:
    """A folder made by `make`, in which nothing stands in the way of both files."""
    try:
        make()
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{folder}: is a file, or lies in one: wanted a folder") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{str(folder)!r}: cannot be made: {reason(error)}") from None
    for path in (folder / CONFIG, folder / tensors):
        if path.is_dir() and not path.is_symlink():
            raise DataError(f"{path}: is a folder: wanted a file, or nothing")


def _settle(folder: Path) -> None:
    """Ends a save that was cut off: its configuration takes its place if its tensors did, and goes away if not."""
    new = folder / NEW_CONFIG
    if not os.path.lexists(new):
        return
    try:
        if os.path.lexists(folder / TENSORS):
            with TensorFile(folder / TENSORS) as file:
                stated = file.metadata.get("config_sha256")
            if _has_hash(new, stated):
                os.replace(new, folder / CONFIG)
                sync_folder(folder)
                return
        new.unlink()
    except DataError:  # tensors that cannot be read may be its own
        return
    except OSError as error:
        raise DataError(f"{new}: cannot be put in its place: {reason(error)}") from None


def _has_hash(path: Path, stated: str | None) -> bool:
    try:
        return hashlib.sha256(read_bytes(path, MOST_CONFIG)).hexdigest() == stated
    except DataError:
        return False


def _open_tensors(folder: Path) -> TensorFile:
    if not os.path.isfile(folder / TENSORS):
        raise DataError(f"{folder}: {what_it_is(folder)}")
    file = TensorFile(folder / TENSORS)
    found, version = (file.metadata.get(name) for name in ("format", "version"))
    if found == FORMAT and version == VERSION:
        return file
    file.close()
    if is_peft(folder):
        raise DataError(f"{folder}: {PEFT}")
    if found == VARIANT:
        raise DataError(f"{folder}: {OF_VARIANT}")
    if found != FORMAT:
        missing = "" if os.path.lexists(folder / CONFIG) else f"; if it is PEFT's, {CONFIG} is missing beside it"
        raise DataError(f"{file.path}: found the format {str(found)[:40]!r}, wanted {FORMAT!r}{missing}")
    raise DataError(f"{file.path}: found version {str(version)[:40]!r}, wanted {VERSION!r}: a newer jlora wrote it")


def _config_of(folder: Path, metadata: Mapping[str, str]) -> bytes | None:
    # The last is where it lies while an adapter of PEFT's takes the place of this one.
    for path in (folder / NEW_CONFIG, folder / CONFIG, Pair(folder).old_config):
        with contextlib.suppress(DataError):
            text = read_bytes(path, MOST_CONFIG)
            if hashlib.sha256(text).hexdigest() == metadata.get("config_sha256"):
                return text
    return None


def _parsed(folder: Path, text: bytes) -> dict[str, Any]:
    try:
        data = parse_json(text)
    except ValueError as error:
        raise DataError(f"{folder / CONFIG}: not valid JSON: {error}") from None
    if data.pop("format", None) != FORMAT:
        raise DataError(f"{folder / CONFIG}: does not name the format {FORMAT!r}")
    return data


def _was_replaced(file: TensorFile, path: Path) -> bool:
    try:
        return not os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return True
