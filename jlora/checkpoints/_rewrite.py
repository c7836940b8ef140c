"""A checkpoint folder written anew with some tensors changed, a shard at a time, and resumable.

A shard of the output has the header of its source, so that every tensor keeps its place: the file is a copy in which
the bytes of the changed tensors are others. Finished shards are noted in a journal; a run that was killed goes on
behind the last.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from jlora.checkpoints._residuals import RESIDUALS
from jlora.disk import (
    Checkpoint,
    TensorEntry,
    TensorFile,
    Workplace,
    beside,
    bring_back,
    check_can_hold,
    dump_json,
    is_dry_run,
    left_places,
    read_json,
    there_already,
    workplace,
    write_whole,
)
from jlora.errors import DataError, listed, shortened

RECORD = "jlora_merge.json"
_OWN = (RECORD, RESIDUALS)
_FOLDERS = "folders"
_JOURNAL = "journal.json"
_COPY = 64 << 20
_SPARE = 64 << 20

Progress = Callable[[int, int], None]
Rewrite = Callable[[str, TensorFile, "ShardWriter"], None]


class ShardWriter:
    """A shard of the output, of which tensors are written by ranges; a context manager.

    Ranges are those of the source; in the output they lie `shift` bytes further on.
    """

    def __init__(
        self, path: Path, source: TensorFile, advance: Callable[[int], None], workers: int, shift: int = 0
    ) -> None:
        self.path, self.source, self.advance, self._shift = path, source, advance, shift
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._pool, self._running, self._most = ThreadPoolExecutor(workers), set[Future[None]](), 2 * workers

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)
            if kind is None:
                self._collect(self._running)
        finally:
            os.close(self._handle)

    def run(self, task: Callable[..., None], *args: Any) -> None:
        """Runs a task beside others; waits where too many are under way."""
        if len(self._running) >= self._most:
            done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
            self._collect(done)
        self._running.add(self._pool.submit(task, *args))

    def finish(self) -> None:
        """Waits for all tasks."""
        running, self._running = self._running, set()
        self._collect(running)

    def put(self, start: int, array: np.ndarray[Any, Any]) -> None:
        """Writes the bytes of an array from byte `start` on."""
        left = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        while left.nbytes:
            count = os.pwrite(self._handle, left, start + self._shift)
            left, start = left[count:], start + count
        self.advance(array.nbytes)

    def copy(self, start: int, stop: int) -> None:
        """Copies a range of the source, in the kernel where it can."""
        while start < stop:
            count = min(_COPY, stop - start)
            copied = _copy_range(self.source.fileno(), self._handle, start, start + self._shift, count)
            if not copied:
                raise DataError(f"{self.source.path}: cut short at byte {start:,} while it was copied")
            start += copied
            self.advance(copied)

    @staticmethod
    def _collect(futures: Iterable[Future[None]]) -> None:
        for future in futures:
            future.result()


class Rewritten(NamedTuple):
    """How many shards an earlier run had written, the notes of all, that run's too, and what was not copied.

    A dry run has no notes.
    """

    resumed: int
    notes: list[Any] | None
    left_out: tuple[str, ...]


def rewrite_checkpoint(
    source: Checkpoint,
    out: str | Path,
    changed: Iterable[str],
    rewrite: Rewrite,
    record: Mapping[str, Any],
    *,
    inputs: Iterable[Path] = (),
    extra_bytes: int = 0,
    force: bool = False,
    on_progress: Progress | None = None,
    note: Callable[[], Any] = lambda: None,
    is_note: Callable[[Any], bool] = lambda found: found is None,
    finish: Callable[[Path], None] | None = None,
    workers: int | None = None,
) -> Rewritten:
    """Writes the checkpoint `source` to the folder `out`, the tensors `changed` by `rewrite`.

    Args:
      source: what is read.
      out: a folder that is not there, or is replaced with `force`.
      changed: the tensors that `rewrite` writes; all other bytes are copied.
      rewrite: called with (tensor, the shard's source, the shard's writer).
      record: what is done, for `jlora_merge.json` in the output; a run that was killed resumes where it is the same.
      inputs: folders that are read beside the source; `out` may not hold them.
      extra_bytes: what is written beside the checkpoint at most.
      force: whether a folder that is there is replaced, when all is written.
      on_progress: called with (bytes done, bytes in all).
      note: called after each shard; what it returns, plain data, is kept with the shard.
      is_note: whether what a journal says can be a note.
      finish: called with the folder of the output when all shards and side files are in it; it has a note too.
      workers: threads; as many as processors by default, eight at most.

    Raises:
      DataError: `out` is there, or holds what is read; the disk is too small; a file cannot be read or written.
    """
    target = Path(out).resolve()
    _check_names(source)
    others = beside(source)
    files = [name for name in others.files if name.partition("/")[0] not in _OWN]
    record = {**record, _FOLDERS: [name for name in files if "/" in name]}
    journal: _Journal | None = None
    try:
        total = sum((source.folder / shard).stat().st_size for shard in source.shards)
        room = total + sum((source.folder / name).stat().st_size for name in files) + extra_bytes
        left_out = tuple(name for name in others.left_out if name.partition(" with ")[0] not in _OWN)
        if is_dry_run():
            _check_as_if_written(target, [source.folder, *inputs], room, force)
            return Rewritten(0, None, left_out)
        bring_back(target)
        _check_target(target, [source.folder, *inputs], force)
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
        with (
            workplace(target, lambda path: _Journal(path, record, source).is_of_this_run()) as place,
            threadpool_limits(limits=1, user_api="blas"),
        ):
            journal = _Journal(place.path, record, source)
            done = journal.begin(place.new, is_note)
            _check_room(target.parent, room, [place.new])
            progress = _Progress(on_progress, total)
            for shard in source.shards:
                if shard in done:
                    progress.advance((source.folder / shard).stat().st_size)
                    continue
                _write_shard(source, place.new / shard, shard, set(changed), rewrite, progress, workers)
                journal.finished(place.new, shard, note())
            source.check_unchanged()
            for name in files:
                (place.new / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source.folder / name, place.new / name)
            more = []
            if finish is not None:
                finish(place.new)
                more = [note()]
            write_whole(place.new / RECORD, dump_json(record), sync=False)
            _put_in_place(place, journal, force)
            place.remove()
    except OSError as error:
        way_out = "; the same command resumes" if journal is not None and journal.digests else ""
        raise DataError(f"{error.filename or target}: {error.strerror}{way_out}") from None
    return Rewritten(len(done), [*(journal.notes[shard] for shard in source.shards), *more], left_out)


def _put_in_place(place: Workplace, journal: "_Journal", force: bool) -> None:
    """Gives the output its place, which may hold something by now."""
    if force and place.target.is_dir() and any(place.target.iterdir()):
        _check_replaceable(place.target)
        journal.forget()  # what the workplace holds afterwards is the old output
        place.replace()
    else:
        place.publish()


def _write_shard(
    source: Checkpoint,
    path: Path,
    shard: str,
    changed: set[str],
    rewrite: Rewrite,
    progress: "_Progress",
    workers: int | None,
) -> None:
    count = workers or min(8, os.cpu_count() or 1)
    with source.open(shard) as file, ShardWriter(path, file, progress.advance, count) as writer:
        start = 0
        for name, entry in file.entries.items():
            if name in changed:
                _copy_in_pieces(writer, start, entry.start)
                rewrite(name, file, writer)
                start = entry.stop
        _copy_in_pieces(writer, start, os.fstat(file.fileno()).st_size)


def _copy_in_pieces(writer: ShardWriter, start: int, stop: int) -> None:
    for piece in range(start, stop, _COPY):
        writer.run(writer.copy, piece, min(piece + _COPY, stop))


class _Journal:
    """Which shards of a run are finished, each with its hash and a note, and of which run they are.

    The last shard has no hash: behind it there is nothing to go on with, and a checkpoint of one file costs no hashing.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any], source: Checkpoint) -> None:
        self.path, self.source = folder / _JOURNAL, source
        job = {"job": record, "machine": _machine(), "files": source.identities}
        self.job = json.loads(json.dumps(job))  # as it is read again
        self.digests: dict[str, str] = {}
        self.notes: dict[str, Any] = {}

    def is_of_this_run(self) -> bool:
        """Whether there is one, and an earlier run of the same wrote it on this machine since it was started."""
        return self._found() is not None

    def begin(self, folder: Path, is_note: Callable[[Any], bool]) -> set[str]:
        """The shards in the folder that an earlier run has finished, and that are as it left them."""
        for shard, found in (self._found() or {}).items():
            digest, note = found if isinstance(found, list) and len(found) == 2 else ("", None)
            if digest and shard in self.source.shards and is_note(note) and digest == _digest(folder, shard):
                self.digests[shard], self.notes[shard] = digest, note
        self._keep()
        return set(self.digests)

    def finished(self, folder: Path, shard: str, note: Any) -> None:
        self.notes[shard] = note
        if shard != self.source.shards[-1]:
            self.digests[shard] = _digest(folder, shard)
            self._keep()

    def forget(self) -> None:
        """Takes the journal away: nothing can be resumed any more."""
        self.path.unlink()
        self.digests = {}

    def _found(self) -> dict[str, Any] | None:
        try:
            data = read_json(self.path)
        except DataError:
            return None
        done = data.pop("done", None)
        return done if data == self.job and isinstance(done, dict) else None

    def _keep(self) -> None:
        # No fsync: it would wait for the shards, which a copy does not either.
        done = {shard: [digest, self.notes[shard]] for shard, digest in self.digests.items()}
        write_whole(self.path, dump_json(self.job | {"done": done}), sync=False)


def _digest(folder: Path, shard: str) -> str:
    """The SHA-256 of a shard and of the residuals of its tensors; "" where one of them is no regular file."""
    digest = hashlib.sha256()
    residuals = folder / RESIDUALS / shard
    for path in [folder / shard, *(sorted(residuals.iterdir()) if residuals.is_dir() else ())]:
        if not stat.S_ISREG(_mode(path)):
            return ""
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def _mode(path: Path) -> int:
    try:
        return os.lstat(path).st_mode
    except OSError:
        return 0


class _Progress:
    def __init__(self, report: Progress | None, total: int) -> None:
        self._report, self._total, self._done, self._lock = report, total, 0, threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._report is not None:
                self._report(min(self._done, self._total), self._total)


def blocks_of(entry: TensorEntry, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """For each range of rows: its start and stop, the byte where it begins in the file, and its shape."""
    rows = entry.shape[0] if entry.shape else 1
    width = (entry.stop - entry.start) // max(1, rows)
    for start, stop in ranges:
        yield start, stop, entry.start + start * width, (stop - start, *entry.shape[1:]) if entry.shape else ()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(source: Checkpoint) -> dict[str, Any]:
    """What tells whether the files of a checkpoint are still the same: their sizes and times."""
    found = {shard: (source.folder / shard).stat() for shard in source.shards}
    return {shard: [status.st_size, status.st_mtime_ns] for shard, status in found.items()}


def _check_target(target: Path, inputs: Iterable[Path], force: bool) -> None:
    for folder in (folder.resolve() for folder in inputs):
        if target in (folder, *folder.parents):
            raise DataError(f"{target}: the output would replace {folder}, which is read; give another folder")
    if target.exists() and not target.is_dir():
        raise DataError(f"{target}: is a file; give a folder")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise there_already(target)
        _check_replaceable(target)


def _check_as_if_written(target: Path, inputs: Iterable[Path], room: int, force: bool) -> None:
    """Refuses what writing would refuse, and changes nothing."""
    _check_target(target, inputs, force)
    left = left_places(target)
    if not os.path.lexists(target) and any((path / "old").is_dir() for path in left) and not force:
        raise there_already(target)  # a run was killed as it replaced it: the next one brings it back
    check_can_hold(target.parent)
    existing = next(folder for folder in target.parents if folder.is_dir())
    _check_room(existing, room, left)


def _check_replaceable(target: Path) -> None:
    """Refuses to take away what belongs to no checkpoint."""
    names = sorted(os.listdir(target))
    if not any(name == RECORD or name.endswith(".safetensors") for name in names):
        found = listed(map(shortened, names), 3)
        raise DataError(f"{target}: holds no checkpoint, but {found}; give another folder, or empty this one")
    ours = _copied_folders(target)
    foreign = [name for name in names if name not in _OWN and not _is_ours(target, name, ours)]
    if foreign:
        raise DataError(
            f"{target}: would be replaced with {listed(map(shortened, foreign), 3)} in it, which is no part of a "
            "checkpoint; move it away, or give another folder"
        )


def _copied_folders(target: Path) -> set[str]:
    """The files in folders of an output that were copied there, as its record says."""
    try:
        found = read_json(target / RECORD).get(_FOLDERS)
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


def _check_names(source: Checkpoint) -> None:
    """Refuses shards that have the names of files that jlora itself writes beside them."""
    if taken := sorted({RECORD, RESIDUALS} & set(source.shards)):
        raise DataError(
            f"{source.folder / taken[0]}: jlora writes a file of this name; rename the shard, and in the index too"
        )


def _check_room(folder: Path, wanted: int, left: Iterable[Path]) -> None:
    """Refuses a disk that is too small, what earlier runs `left` set aside, which is kept or taken away."""
    there = sum(file.stat().st_size for place in left for file in place.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if free + there < wanted + _SPARE:
        raise DataError(f"{folder}: {(wanted - there) / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free")


def _copy_range(source: int, target: int, start: int, at: int, count: int) -> int:
    if hasattr(os, "copy_file_range"):
        with contextlib.suppress(OSError):
            return os.copy_file_range(source, target, count, start, at)
    data = os.pread(source, min(count, 1 << 20), start)
    return os.pwrite(target, data, at) if data else 0


def _machine() -> str:
    """The boot of this machine: what was written before a power cut may not have reached the disk."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
