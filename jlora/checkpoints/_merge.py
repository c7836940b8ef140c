"""`merge` and `unmerge`: adapters into a checkpoint folder and out of it, in bounded memory."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jlora.adapter import Entry
from jlora.checkpoints._arithmetic import Weight
from jlora.checkpoints._memory import settings_of
from jlora.checkpoints._record import check_last_merged, check_not_merged, merges_in, record_of
from jlora.checkpoints._residuals import ResidualReader, check_names, residual_file
from jlora.checkpoints._rewrite import Progress, rewrite_checkpoint
from jlora.checkpoints._rounding import Rounding, roundings, warnings_of_rounding
from jlora.checkpoints._shards import ShardWriter
from jlora.checkpoints._tensors import Tally, is_tally, merge_tensor, restore_tensor, unmerge_tensor
from jlora.checkpoints._tied import bytes_apart, check_apart, parted, ties_of, write_apart
from jlora.checkpoints._updates import changes_of, read_adapter
from jlora.checkpoints._vocabulary import bytes_more, resized_by, write_vocabulary
from jlora.checkpoints._warnings import warnings_of, warnings_of_the_same
from jlora.disk import RESIDUALS, Checkpoint, TensorFile
from jlora.errors import DataError, listed
from jlora.fields import number
from jlora.interop.mlx import check_base_of_mlx
from jlora.interop.peft import Mapping


@dataclasses.dataclass(frozen=True)
class Merged:
    """What `merge` did.

    Attributes:
      out: the folder that was written.
      changed: the tensors that are others now; in a dry run those that the adapters are for.
      numbers: how many numbers of theirs are others; None in a dry run, which adds nothing.
      same: the tensors that the adapters are for and that came out as they were: the update is zero, or is lost to
        rounding.
      copied: how many tensors in all are the same, byte by byte.
      rounding: of each tensor, what rounding to its dtype leaves of the update; see `Rounding`. None in a dry run.
      size: of the checkpoint, in bytes.
      left_out: what lies beside the checkpoint and was not copied, such as weights in other formats.
      resumed: how many shards an earlier run had written.
      warnings: what may surprise.
    """

    out: Path
    changed: tuple[str, ...]
    numbers: int | None
    same: tuple[str, ...]
    copied: int
    rounding: tuple[Rounding, ...] | None
    size: int
    left_out: tuple[str, ...]
    resumed: int
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        resumed = f", {self.resumed} shards of them by an earlier run" if self.resumed else ""
        numbers = "" if self.numbers is None else f" ({self.numbers:,} numbers)"
        tensors = f"{len(self.changed):,} tensors changed{numbers} and {self.copied:,} copied"
        text = f"{tensors}, {self.size / 1e9:.2f} GB{resumed}: {self.out}"
        kept = [str(whole) for whole in (self.rounding or ())[:1] if whole.is_worth_telling]
        lines = [text, *kept, *_not_copied(self.left_out), *(f"warning: {line}" for line in self.warnings)]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Unmerged:
    """What `unmerge` did.

    Attributes:
      out: the folder that was written.
      changed: the tensors that are others now.
      same: the tensors that the adapters are for and that came out as they were.
      left_out: as of `Merged`.
      exact: whether every bit is known to be the base's; in a dry run, whether it would be checked by its hash.
      uncertain: how many numbers rounding leaves open, of `numbers` in the tensors that the adapters are for; None in
        a dry run.
      largest: by how much one of them may be off at most; None in a dry run.
    """

    out: Path
    changed: tuple[str, ...]
    same: tuple[str, ...]
    left_out: tuple[str, ...]
    exact: bool
    uncertain: int | None
    numbers: int
    largest: float | None

    def __str__(self) -> str:
        text = "\n".join([f"{len(self.changed):,} tensors unmerged: {self.out}", *_not_copied(self.left_out)])
        if self.uncertain is None:
            known = "a residual is there, by which every bit comes back, checked by its hash"
            return f"{text}\n{known if self.exact else 'numbers that merging rounded may be off: no residual was kept'}"
        if self.exact:
            return f"{text}\nevery bit is the base's, checked by its hash"
        assert self.largest is not None
        share = self.uncertain / max(1, self.numbers)
        return (
            f"{text}\nup to {self.uncertain:,} of {self.numbers:,} numbers ({share:.2%}) may be off, "
            f"by {self.largest:.3g} at most: merging rounded them, and no residual was kept. Keep the base, or merge "
            "with --keep-residual"
        )


def merge(
    checkpoint: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    mapping: Mapping = (),
    transposed_experts: bool | None = None,
    tied: bool = False,
    resize_vocabulary: bool = False,
    keep_residual: bool = False,
    force: bool = False,
    on_progress: Progress | None = None,
) -> Merged:
    """Merges adapters into a checkpoint: W + sum of weight * scaling * A@B, the sum in float32, rounded once.

    The checkpoint is worked through block by block: whatever its size, memory holds the adapters and a few MiB. The
    output has the same shards, names, metadata and side files; tensors without an adapter are copied byte by byte. A
    run that is killed goes on where it stopped when it is called again with the same arguments.

    Args:
      checkpoint: a folder of safetensors in the layout of Hugging Face, sharded or not, or one file.
      adapters: folders of adapters, jlora's own, PEFT's or mlx-lm's, one or several.
      out: the folder to write.
      weights: of the adapters, 1 by default; may be negative.
      mapping: rows of `jlora.interop.peft.Row` from the adapters' names to the checkpoint's, where these are others;
        what transformers 5 renames is known.
      transposed_experts: whether the model keeps stacked experts as (experts, in, out), as GPT-OSS does, and not as
        (experts, out, in); by default config.json's model type says it, or the shapes.
      tied: whether weights that are one tensor, such as the embedding and the output head, stay that, so that an
        adapter of one of them acts on all; by default each gets a tensor of its own where the adapters change one, and
        config.json says so, or where it cannot the report does.
      resize_vocabulary: whether an embedding and a head that the adapters hold as a whole may have other rows than the
        checkpoint's; config.json's vocab_size becomes theirs, and the tokenizer and the chat template are those that
        lie in the adapters' folders.
      keep_residual: whether to keep beside the output what `unmerge` needs to bring the base back to the bit.
      force: whether to replace `out` where it is there; it is replaced when all is written.
      on_progress: called with (bytes done, bytes in all).

    Raises:
      DataError: a checkpoint or an adapter that cannot be read, adapters that do not fit it, `out` is there or holds
        what is read, the disk is too small, a sum that the dtype cannot hold.

    >>> import tempfile
    >>> import numpy as np
    >>> from jlora import LoraConfig, save_adapters
    >>> from jlora.disk import write_tensors
    >>> temporary = tempfile.TemporaryDirectory()
    >>> folder = Path(temporary.name)
    >>> with (folder / "base.safetensors").open("wb") as file:
    ...     write_tensors(file, {"up": np.zeros((2, 3), np.float32)})
    >>> entry = {"A": np.ones((2, 1), np.float32), "B": np.ones((1, 3), np.float32)}
    >>> save_adapters(folder / "adapter", {"up": entry}, LoraConfig(rank=1, alpha=2))
    >>> merge(folder / "base.safetensors", folder / "adapter", folder / "merged").changed
    ('up',)
    >>> Checkpoint(folder / "merged").read("up").tolist()
    [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    >>> temporary.cleanup()
    """
    source = Checkpoint(checkpoint)
    found = _changes(source, adapters, weights, mapping, transposed_experts, resize_vocabulary)
    changes, apart = parted(ties_of(source), found, tied)
    resized = resized_by(source, changes)
    if resized and keep_residual:
        raise DataError(f"{next(iter(resized))}: no residual brings other rows back; keep the base")
    earlier = merges_in(source) or []
    options = {
        "mapping": [dataclasses.astuple(row) for row in mapping] or None,
        "transposed_experts": transposed_experts,
        "tied": tied or None,
        "resize_vocabulary": resize_vocabulary or None,
        "residual": keep_residual or None,
    }
    record = record_of("merge", source, _listed(adapters), weights, earlier, **options)
    check_not_merged(source.folder, earlier, record)
    if keep_residual:
        check_names(changes)
    tally = Tally()

    def rewrite(name: str, file: TensorFile, writer: ShardWriter) -> None:
        merge_tensor(name, file.entries[name], changes[name], file, writer, tally, keep_residual, resized.get(name))

    def finish(new: Path) -> None:
        if apart:
            write_apart(source, apart, changes, new, tally, keep_residual)
        if resized:
            write_vocabulary(source, resized, _listed(adapters), new)

    check_apart(source, apart)
    sizes = {name: entry.stop - entry.start for name, entry in source.entries.items()}
    size_of_changes = sum(sizes[name] for name in changes if name in sizes)
    size_of_new = bytes_apart(source, apart)
    written = rewrite_checkpoint(
        source,
        out,
        changes,
        rewrite,
        record,
        inputs=_listed(adapters),
        extra_bytes=size_of_new + max(0, bytes_more(source, resized)) + (size_of_changes if keep_residual else 0),
        force=force,
        on_progress=on_progress,
        note=tally.take,
        is_note=is_tally,
        finish=finish,
        resized=resized,
    )
    size = sum((source.folder / shard).stat().st_size for shard in source.shards)
    counts = None if written.notes is None else _counts(written.notes)
    changed, same = _parted(changes, counts)
    rounding = None if written.notes is None else roundings(note[3] for note in written.notes if len(note) > 3)
    return Merged(
        out=Path(out),
        changed=changed,
        numbers=None if counts is None else sum(counts.values()),
        same=same,
        copied=len(source.entries.keys() - set(changed)),
        rounding=rounding,
        size=size,
        left_out=written.left_out,
        resumed=written.resumed,
        warnings=(
            *warnings_of(source, _listed(adapters), changes, apart),
            *warnings_of_the_same(changed, same),
            *warnings_of_rounding(rounding or (), same, source),
        ),
    )


def unmerge(
    merged: str | Path,
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    mapping: Mapping = (),
    transposed_experts: bool | None = None,
    tied: bool = False,
    unrecorded: bool = False,
    force: bool = False,
    on_progress: Progress | None = None,
) -> Unmerged:
    """Takes adapters out of a checkpoint that they were merged into, by the same arithmetic backwards.

    Where `merge` kept the residual, every bit of the base comes back, and a hash proves it. Without it, rounding leaves
    some numbers open; the report says how many at most, and by how much.

    Args:
      merged: the folder that `merge` wrote.
      adapters, weights, mapping, transposed_experts, tied: those that were merged.
      out: the folder to write.
      unrecorded: whether to take the adapters out of a checkpoint that has no record of a merge, such as one that
        another program merged them into.
      force, on_progress: as for `merge`.

    Raises:
      DataError: as for `merge`; adapters that are not those that were merged last, no record of a merge, an update that
        cannot be taken out without a residual, a residual that does not lead back to the base.
    """
    source = Checkpoint(merged)
    changes, apart = parted(ties_of(source), _changes(source, adapters, weights, mapping, transposed_experts), tied)
    if one := next((tie for tie in apart if tie.others), None):
        raise DataError(
            f"{source.folder}: {listed(one.others)} is {one.embedding} here, so that the adapters were merged into "
            "all: give tied (--tied)"
        )
    merges = merges_in(source)
    rows = [dataclasses.astuple(row) for row in mapping]
    options = {"mapping": rows or None, "transposed_experts": transposed_experts, "tied": tied or None}
    record = record_of("unmerge", source, _listed(adapters), weights, (merges or [])[:-1], **options)
    check_last_merged(source.folder, merges, record, unrecorded)
    exact = (source.folder / RESIDUALS).is_dir()
    if not exact and (lost := [name for name, found in changes.items() if not all(c.is_reversible for c in found)]):
        raise DataError(f"{lost[0]}: a value or a norm that is lost cannot be taken out; keep the base, or a residual")
    for name in changes if exact else ():
        ResidualReader(residual_file(source.folder, source.shard_of[name], name)).close()
    tally = Tally()

    def rewrite(name: str, file: TensorFile, writer: ShardWriter) -> None:
        weight = Weight(file.entries[name].shape, file.entries[name].dtype, changes[name])
        if exact:
            restore_tensor(name, weight, file, writer, tally, source.folder)
        else:
            unmerge_tensor(name, weight, file, writer, tally)

    written = rewrite_checkpoint(
        source,
        out,
        changes,
        rewrite,
        record,
        inputs=_listed(adapters),
        force=force,
        on_progress=on_progress,
        note=tally.take,
        is_note=is_tally,
    )
    numbers = sum(math.prod(source.entries[name].shape) for name in changes)
    notes, left_out = written.notes, written.left_out
    if notes is None:
        return Unmerged(Path(out), tuple(changes), (), left_out, exact, None, numbers, None)
    uncertain, largest = sum(note[1] for note in notes), max(note[2] for note in notes)
    changed, same = _parted(changes, _counts(notes))
    return Unmerged(Path(out), changed, same, left_out, exact, uncertain, numbers, largest)


def _not_copied(left_out: Sequence[str]) -> list[str]:
    """The line of a report on what was left out."""
    return [f"not copied: {listed(left_out, 5)}"] if left_out else []


def _counts(notes: Sequence[Any]) -> dict[str, int]:
    """How many numbers of each tensor are others, from the notes of all shards."""
    return {name: count for changed, *_ in notes for name, count in changed.items()}


def _parted(changes: Iterable[str], counts: dict[str, int] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tensors that are others now, and those that are as they were; uncounted, all may be others."""
    names = list(changes)
    if counts is None:
        return tuple(names), ()
    changed = tuple(name for name in names if counts.get(name))
    return changed, tuple(name for name in names if not counts.get(name))


def _changes(
    source: Checkpoint,
    adapters: str | Path | Sequence[str | Path],
    weights: Sequence[float] | None,
    mapping: Mapping,
    transposed_experts: bool | None,
    resize_vocabulary: bool = False,
) -> dict[str, list[Entry]]:
    """The changes of each tensor, in the order of the checkpoint's bytes."""
    folders = _listed(adapters)
    factors = [1.0] * len(folders) if weights is None else [number("weights", weight) for weight in weights]
    if len(factors) != len(folders):
        raise DataError(f"{len(folders)} adapters and {len(factors)} weights: give one weight for each")
    found: dict[str, list[Entry]] = {}
    for folder, factor in zip(folders, factors, strict=True):
        entries, config = read_adapter(folder, source)
        try:
            check_base_of_mlx(config, settings_of(source).get("model_type"))
            for name, change in changes_of(
                entries, config, factor, source, mapping, transposed_experts, resize_vocabulary
            ).items():
                found.setdefault(name, []).append(change)
        except DataError as error:
            raise DataError(f"{folder}: {error}") from None
    changes = {name: found.pop(name) for name in source.entries if name in found} | found
    if alone := [name for name, own in changes.items() if len(own) > 1 and not all(c.is_reversible for c in own)]:
        raise DataError(f"{alone[0]}: an update with a magnitude or a whole value goes alone; merge one by one")
    return changes


def _listed(adapters: str | Path | Sequence[str | Path]) -> list[Path]:
    folders = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    if not folders:
        raise DataError("no adapters are given")
    return [Path(folder) for folder in folders]
