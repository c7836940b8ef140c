"""A checkpoint folder written anew with some tensors changed, a shard at a time, and resumable.

A shard of the output has the header of its source, so that every tensor keeps its place: the file is a copy in which
the bytes of the changed tensors are others. Finished shards are noted in a journal; a run that was killed goes on
behind the last.
"""

import hashlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from jlora.checkpoints._shards import ShardWriter
from jlora.disk import (
    FOLDERS,
    OWN,
    RECORD,
    RESIDUALS,
    Checkpoint,
    TensorFile,
    beside,
    bring_back,
    bytes_of,
    check_as_if_written,
    check_room,
    check_target,
    dump_json,
    header_bytes,
    is_dry_run,
    put_in_place,
    read_json,
    workplace,
    write_whole,
)
from jlora.errors import DataError

_JOURNAL = "journal.json"

Progress = Callable[[int, int], None]
Rewrite = Callable[[str, TensorFile, "ShardWriter"], None]


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
    resized: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
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
      resized: the shapes of those of the changed tensors that have another than before.
      workers: threads; as many as processors by default, eight at most.

    Raises:
      DataError: `out` is there, or holds what is read; the disk is too small; a file cannot be read or written.
    """
    target = Path(out).resolve()
    _check_names(source)
    others = beside(source)
    files = [name for name in others.files if name.partition("/")[0] not in OWN]
    if inner := [name for name in files if "/" in name]:
        record = {**record, FOLDERS: inner}
    journal: _Journal | None = None
    try:
        total = sum((source.folder / shard).stat().st_size for shard in source.shards)
        room = total + sum((source.folder / name).stat().st_size for name in files) + extra_bytes
        left_out = tuple(name for name in others.left_out if name.partition(" with ")[0] not in OWN)
        if is_dry_run():
            check_as_if_written(target, [source.folder, *inputs], room, force)
            return Rewritten(0, None, left_out)
        bring_back(target)
        check_target(target, [source.folder, *inputs], force)
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True)
        with (
            workplace(target, lambda path: _Journal(path, record, source).is_of_this_run()) as place,
            threadpool_limits(limits=1, user_api="blas"),
        ):
            journal = _Journal(place.path, record, source)
            done = journal.begin(place.new, is_note)
            check_room(target.parent, room, [place.new])
            progress = _Progress(on_progress, total)
            for shard in source.shards:
                if shard in done:
                    progress.advance((source.folder / shard).stat().st_size)
                    continue
                _write_shard(source, place.new / shard, shard, set(changed), rewrite, progress, workers, resized)
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
            put_in_place(place, force, journal.forget)  # what the workplace holds afterwards is the old output
            place.remove()
    except OSError as error:
        way_out = "; the same command resumes" if journal is not None and journal.digests else ""
        raise DataError(f"{error.filename or target}: {error.strerror}{way_out}") from None
    return Rewritten(len(done), [*(journal.notes[shard] for shard in source.shards), *more], left_out)


def _write_shard(
    source: Checkpoint,
    path: Path,
    shard: str,
    changed: set[str],
    rewrite: Rewrite,
    progress: "_Progress",
    workers: int | None,
    resized: Mapping[str, tuple[int, ...]],
) -> None:
    count = workers or min(8, os.cpu_count() or 1)
    with source.open(shard) as file, ShardWriter(path, file, progress.advance, count) as writer:
        if not resized.keys().isdisjoint(file.entries):
            _write_anew(file, changed, rewrite, writer, resized)
            return
        start = 0
        for name, entry in file.entries.items():
            if name in changed:
                writer.copy_in_pieces(start, entry.start)
                rewrite(name, file, writer)
                start = entry.stop
        writer.copy_in_pieces(start, os.fstat(file.fileno()).st_size)


def _write_anew(
    file: TensorFile, changed: set[str], rewrite: Rewrite, writer: ShardWriter, resized: Mapping[str, tuple[int, ...]]
) -> None:
    """Writes a shard in which tensors have other shapes, so that what lies behind them has other places."""
    entries = dict(sorted(file.entries.items(), key=lambda pair: pair[1].start))
    layout = {name: (entry.dtype, resized.get(name, entry.shape)) for name, entry in entries.items()}
    header = header_bytes(layout, file.metadata)
    writer.put(0, np.frombuffer(header, np.uint8))
    place = len(header)
    for name, entry in entries.items():
        moved = writer.moved(place - entry.start)
        if name in changed:
            rewrite(name, file, moved)
        else:
            moved.copy_in_pieces(entry.start, entry.stop)
        dtype, shape = layout[name]
        place += bytes_of(shape, dtype) if name in resized else entry.stop - entry.start


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


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(source: Checkpoint) -> dict[str, Any]:
    """What tells whether the files of a checkpoint are still the same: their sizes and times."""
    found = {shard: (source.folder / shard).stat() for shard in source.shards}
    return {shard: [status.st_size, status.st_mtime_ns] for shard, status in found.items()}


def _check_names(source: Checkpoint) -> None:
    """Refuses shards that have the names of files that jlora itself writes beside them."""
    if taken := sorted({RECORD, RESIDUALS} & set(source.shards)):
        raise DataError(
            f"{source.folder / taken[0]}: jlora writes a file of this name; rename the shard, and in the index too"
        )


def _machine() -> str:
    """The boot of this machine: what was written before a power cut may not have reached the disk."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
