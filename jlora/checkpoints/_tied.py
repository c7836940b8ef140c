"""Weights of a model that are one tensor of its checkpoint: an embedding, the output head, those of other parts.

An adapter changes one of them. Written apart, each has its own tensor, and config.json says that they are no longer
tied.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.adapter import Entry
from jlora.checkpoints._forms import shapes_of
from jlora.checkpoints._memory import settings_of
from jlora.checkpoints._shards import ShardWriter
from jlora.checkpoints._tensors import Tally, merge_tensor
from jlora.disk import RESIDUALS, Checkpoint, bytes_of, dump_json, header_bytes, read_json, write_whole
from jlora.errors import DataError, listed
from jlora.interop.peft import paths_of_name
from jlora.interop.transformers import Facts, facts_of, is_known, task_of

Changes = dict[str, list[Entry]]

_CONFIG, _KEY = "config.json", "tie_word_embeddings"
_HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
_FILE = "model-head.safetensors"
_SPLIT = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclasses.dataclass(frozen=True)
class Tie:
    """The names on the disk of weights that are one tensor.

    Attributes:
      embedding: the tensor.
      others: the weights that it is too, for which the checkpoint has no tensor.
      copies: tensors of the checkpoint that hold the same, as far as config.json says.
      beside: pairs of a weight that the checkpoint does not have, and the tensor that it is where the others are tied.
      keeps_key: whether config.json cannot say that they are not tied; transformers sees it by tensors that differ.
    """

    embedding: str
    others: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    beside: tuple[tuple[str, str], ...] = ()
    keeps_key: bool = False


def ties_of(checkpoint: Checkpoint) -> tuple[Tie, ...]:
    """What is tied in the model of a checkpoint; nothing where config.json says so."""
    settings = settings_of(checkpoint)
    facts, tied = facts_of(settings), settings.get(_KEY, _of_text(settings).get(_KEY))
    if tied is False and not facts.keeps_tie:
        return ()
    groups: dict[str, list[str]] = {}
    for other, embedding in facts.tied:
        if (found := _on_disk(embedding, facts, checkpoint)) is not None:
            groups.setdefault(found, []).append(other)
    beside = [(_first_name(name, facts), _on_disk(of, facts, checkpoint)) for name, of in facts.tied_beside]
    missing = tuple((name, of) for name, of in beside if of is not None and name not in checkpoint.entries)
    ties = []
    for embedding, names in groups.items():
        there = {name: _on_disk(name, facts, checkpoint, exactly=True) for name in names}
        others = tuple(_first_name(name, facts) for name, found in there.items() if found is None)
        copies = tuple(found for found in there.values() if found is not None) if tied else ()
        if others or copies:
            ties.append(Tie(embedding, others, copies, missing, facts.keeps_tie))
    is_own = task_of(settings) == "CAUSAL_LM" and not is_known(settings)
    if is_own and tied and _HEAD not in checkpoint.entries:
        names = [name for name in checkpoint.entries if name.endswith(EMBEDDINGS)]
        ties = [Tie(name, (_HEAD,)) for name in names] if len(names) == 1 else []
    return tuple(ties)


def _first_name(memory: str, facts: Facts) -> str:
    """The name on the disk of a weight in memory."""
    return [*paths_of_name(facts.renamed, memory), memory][0]


def _on_disk(memory: str, facts: Facts, checkpoint: Checkpoint, *, exactly: bool = False) -> str | None:
    """The tensor of a checkpoint that a weight in memory is."""
    names: Iterable[str] = [*paths_of_name(facts.renamed, memory), memory]
    found = next((name for name in names if name in checkpoint.entries), None)
    if found is None and not exactly:
        # The first models of transformers were saved without the name of their body.
        found = next((name for name in checkpoint.entries if memory.endswith(f".{name}")), None)
    return found


def weight_shapes(checkpoint: Checkpoint, ties: Sequence[Tie]) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's weights by name, those too that are another's tensor."""
    shapes = shapes_of(checkpoint)
    return shapes | {other: shapes[tie.embedding] for tie in ties for other in tie.others}


def stored_as(ties: Sequence[Tie], name: str) -> str:
    """The tensor that holds a weight."""
    return next((tie.embedding for tie in ties if name in tie.others), name)


def parted(ties: Sequence[Tie], changes: Changes, tied: bool) -> tuple[Changes, tuple[Tie, ...]]:
    """The changes of the tensors, and the ties of which each weight gets a tensor of its own.

    Raises:
      DataError: several are changed, and are to stay one.
    """
    changes, apart = dict(changes), []
    for tie in ties:
        every = (*tie.others, tie.embedding, *tie.copies)
        own = {name: changes[name] for name in every if name in changes}
        if not own:
            continue
        first = next(iter(own))
        are_one = all(_are_one(own[first], other) for other in own.values())
        if are_one and len(own) == len(every):
            changes = {name: found for name, found in changes.items() if name not in tie.others}
        elif not tied:
            apart.append(tie)
        elif not are_one:
            names = " and ".join(own)
            raise DataError(f"{names}: the adapters change both, which cannot stay one tensor")
        else:
            changes = {name: found for name, found in changes.items() if name not in every}
            changes |= dict.fromkeys((tie.embedding, *tie.copies), own[first])
    return changes, tuple(apart)


def bytes_apart(source: Checkpoint, apart: Sequence[Tie]) -> int:
    """How many bytes an output has more."""
    return sum(source.entries[of].stop - source.entries[of].start for _, of in _new_tensors(apart))


def _new_tensors(apart: Sequence[Tie]) -> Iterator[tuple[str, str]]:
    """Each weight that gets a tensor, and the one that it was."""
    new = {other: tie.embedding for tie in apart for other in tie.others}
    new |= {name: of for tie in apart if not tie.keeps_key for name, of in tie.beside}
    yield from new.items()


def write_apart(
    source: Checkpoint, apart: Sequence[Tie], changes: Changes, new: Path, tally: Tally, keep_residual: bool
) -> None:
    """Writes the weights beside the shards of an output, in the index, and out of the ties of config.json."""
    tensors = list(_new_tensors(apart))
    if tensors:
        _write_file(source, tensors, changes, new, tally, keep_residual)
    settings = dict(read_json(new / _CONFIG))
    if not any(tie.keeps_key for tie in apart):
        settings[_KEY] = False
        if isinstance(settings.get("text_config"), dict):
            settings["text_config"] = {**settings["text_config"], _KEY: False}
        write_whole(new / _CONFIG, dump_json(settings, sort_keys=False), sync=False)


def _write_file(
    source: Checkpoint,
    tensors: Sequence[tuple[str, str]],
    changes: Changes,
    new: Path,
    tally: Tally,
    keep_residual: bool,
) -> None:
    """Writes a shard of the tensors, each from the one that it was, and the index with it."""
    renamed, file_of_new = {shard: shard for shard in source.shards}, _FILE
    if len(source.shards) == 1:  # transformers takes a model.safetensors for the whole model
        (only,) = source.shards
        renamed, file_of_new = {only: _SPLIT[0]}, _SPLIT[1]
        _rename(new, only, _SPLIT[0])
    shapes = {name: _shape_of(changes.get(name, []), source.entries[of].shape) for name, of in tensors}
    layout = {name: (source.entries[of].dtype, shapes[name]) for name, of in tensors}
    header = header_bytes(layout, {"format": "pt"})
    workers = min(8, os.cpu_count() or 1)
    with (
        source.open(source.shard_of[tensors[0][1]]) as first,
        ShardWriter(new / file_of_new, first, lambda _: None, workers) as writer,
    ):
        writer.put(0, np.frombuffer(header, np.uint8))
        start = len(header)
        for name, of in tensors:
            entry, own = source.entries[of], changes.get(name)
            with source.open(source.shard_of[of]) as file:
                at = writer.moved(start - entry.start, file)
                if own:
                    merge_tensor(name, entry, list(own), file, at, tally, keep_residual, shapes[name])
                else:
                    at.copy(entry.start, entry.stop)
                writer.finish()
            start += bytes_of(shapes[name], entry.dtype)
    weight_map = {name: renamed[shard] for name, shard in source.shard_of.items()}
    weight_map |= dict.fromkeys(layout, file_of_new)
    metadata = dict(source.index.get("metadata") or {}) if source.index is not None else {}
    metadata["total_size"] = sum(entry.stop - entry.start for entry in source.entries.values()) + sum(
        bytes_of(shape, dtype) for dtype, shape in layout.values()
    )
    write_whole(new / source.index_name, dump_json({"metadata": metadata, "weight_map": weight_map}), sync=False)


def _shape_of(changes: Sequence[Entry], shape: tuple[int, ...]) -> tuple[int, ...]:
    value = changes[0].parts.get("value") if changes else None
    return shape if value is None else tuple(value.shape)


def check_apart(source: Checkpoint, apart: Sequence[Tie]) -> None:
    """Refuses a checkpoint that is one file, whose config.json is not written."""
    if apart and (os.path.isfile(source.path) or not (source.folder / _CONFIG).is_file()):
        tie = apart[0]
        raise DataError(
            f"{source.path}: {listed((*tie.others, *tie.copies))} is {tie.embedding} in this model, and an adapter "
            "changes one of them: give the folder with config.json, where tying is switched off, or change both by "
            "tied (--tied)"
        )


def _of_text(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    text = settings.get("text_config")
    return text if isinstance(text, Mapping) else {}


def _rename(new: Path, old: str, name: str) -> None:
    os.rename(new / old, new / name)
    if (new / RESIDUALS / old).is_dir():
        os.rename(new / RESIDUALS / old, new / RESIDUALS / name)


def _are_one(one: Sequence[Entry], other: Sequence[Entry]) -> bool:
    """Whether two weights that are one tensor change alike."""
    return len(one) == len(other) and all(map(_is_same, one, other))


def _is_same(one: Entry, other: Entry) -> bool:
    if one is other:
        return True
    left, right = ({name: np.asarray(part) for name, part in each.parts.items()} for each in (one, other))
    if left.keys() != right.keys() or not left.keys() <= {"A", "B", "value"}:
        return False
    if "A" in left:
        if one.scaling != other.scaling:
            return False
        if one.split != other.split:
            # A (dim, r), B (r, vocabulary) of a head; A (vocabulary, r), B (r, dim) of an embedding
            right |= {"A": right["B"].T, "B": right["A"].T}
    return all(np.array_equal(left[name], right[name]) for name in left)
