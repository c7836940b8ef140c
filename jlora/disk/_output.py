"""The folder of a checkpoint as an output: where it may be written, what it may replace, and how it takes its place."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from jlora.disk._dry import check_can_hold, is_dry_run
from jlora.disk._small import read_json
from jlora.disk._workplace import Workplace, bring_back, left_places, there_already, workplace
from jlora.errors import DataError, listed, shortened

RECORD, RESIDUALS = "jlora_merge.json", "jlora_residual"
"""What merging writes beside the tensors: a record, and a folder of what unmerging needs to be exact."""
OWN = (RECORD, RESIDUALS)
FOLDERS = "folders"
"""The key of a record under which the files are that were copied in folders."""
_SPARE = 64 << 20


def write_folder(
    out: str | Path, write: Callable[[Path], None], *, inputs: Iterable[Path] = (), room: int = 0, force: bool = False
) -> None:
    """Writes the folder of a checkpoint whole or not at all, and leaves nothing beside it; in a dry run only checks.

    Args:
      out: a folder that is not there or is empty, or with `force` one that holds a checkpoint.
      write: called with a new folder, which takes the place of `out` when it returns.
      inputs: files and folders that are read; `out` may not hold them.
      room: how many bytes are written.

    Raises:
      DataError: `out` is there, or holds what is read; the disk is too small, or refuses.
    """
    target = Path(out).resolve()
    try:
        if is_dry_run():
            check_as_if_written(target, inputs, room, force)
            return
        bring_back(target)
        check_target(target, inputs, force)
        target.parent.mkdir(parents=True, exist_ok=True)
        with workplace(target, lambda path: False) as place:
            try:
                check_room(target.parent, room, [])
                write(place.new)
                put_in_place(place, force)
            finally:
                place.remove()
    except OSError as error:
        raise DataError(f"{error.filename or target}: {error.strerror}") from None


def put_in_place(place: Workplace, force: bool, before: Callable[[], None] = lambda: None) -> None:
    """Gives a new folder its place, which may hold something by now; `before` is called where that is replaced."""
    if force and place.target.is_dir() and any(place.target.iterdir()):
        check_replaceable(place.target)
        before()
        place.replace()
    else:
        place.publish()


def check_target(target: Path, inputs: Iterable[Path], force: bool) -> None:
    """Refuses a place that holds what is read, is a file, or holds what is not to be replaced."""
    for folder in (folder.resolve() for folder in inputs):
        if target in (folder, *folder.parents):
            raise DataError(f"{target}: the output would replace {folder}, which is read; give another folder")
    if target.exists() and not target.is_dir():
        raise DataError(f"{target}: is a file; give a folder")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise there_already(target)
        check_replaceable(target)


def check_as_if_written(target: Path, inputs: Iterable[Path], room: int, force: bool) -> None:
    """Refuses what writing would refuse, and changes nothing."""
    check_target(target, inputs, force)
    left = left_places(target)
    if not os.path.lexists(target) and any((path / "old").is_dir() for path in left) and not force:
        raise there_already(target)  # a run was killed as it replaced it: the next one brings it back
    check_can_hold(target.parent)
    existing = next(folder for folder in target.parents if folder.is_dir())
    check_room(existing, room, left)


def check_replaceable(target: Path) -> None:
    """Refuses to take away what belongs to no checkpoint."""
    names = sorted(os.listdir(target))
    if not any(name == RECORD or name.endswith(".safetensors") for name in names):
        found = listed(map(shortened, names), 3)
        raise DataError(f"{target}: holds no checkpoint, but {found}; give another folder, or empty this one")
    ours = _copied_folders(target)
    foreign = [name for name in names if name not in OWN and not _is_ours(target, name, ours)]
    if foreign:
        raise DataError(
            f"{target}: would be replaced with {listed(map(shortened, foreign), 3)} in it, which is no part of a "
            "checkpoint; move it away, or give another folder"
        )


def _copied_folders(target: Path) -> set[str]:
    """The files in folders of an output that were copied there, as its record says."""
    try:
        found = read_json(target / RECORD).get(FOLDERS)
    except DataError:
        return set()
    return {name for name in found if isinstance(name, str)} if isinstance(found, list) else set()


def _is_ours(target: Path, name: str, ours: set[str]) -> bool:
    """Whether this is a file, or a folder that holds nothing but what was copied there."""
    path = target / name
    if path.is_symlink() or not path.is_dir():
        return path.is_file()
    inner = [inner for inner in path.rglob("*") if not inner.is_dir()]
    return bool(inner) and all(str(each.relative_to(target)) in ours for each in inner)


def check_room(folder: Path, wanted: int, left: Iterable[Path]) -> None:
    """Refuses a disk that is too small, what earlier runs `left` set aside, which is kept or taken away."""
    there = sum(file.stat().st_size for place in left for file in place.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if free + there < wanted + _SPARE:
        raise DataError(f"{folder}: {(wanted - there) / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free")
