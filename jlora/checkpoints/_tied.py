"""An output head that is the embedding too: one tensor in the checkpoint, two weights of the model.

An adapter changes one of the two. Written apart, each has its own tensor, and config.json says that they are no longer
tied.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.adapter import Entry
from jlora.checkpoints._forms import shapes_of
from jlora.checkpoints._memory import settings_of
from jlora.checkpoints._shards import ShardWriter
from jlora.checkpoints._tensors import Tally, merge_tensor
from jlora.disk import RESIDUALS, Checkpoint, bytes_of, dump_json, header_bytes, read_json, write_whole
from jlora.errors import DataError
from jlora.interop.peft import paths_of_name
from jlora.interop.transformers import facts_of, is_known, task_of

Changes = dict[str, list[Entry]]

_CONFIG, _KEY = "config.json", "tie_word_embeddings"
_HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
_FILE = "model-head.safetensors"
_SPLIT = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@dataclasses.dataclass(frozen=True)
class Tie:
    """The names on the disk of a head that a checkpoint does not have, and of the embedding that it is."""

    head: str
    embedding: str


def tie_of(checkpoint: Checkpoint) -> Tie | None:
    """The head of a language model that is its embedding; None where there is none, or several weights are tied."""
    settings = settings_of(checkpoint)
    tied = settings.get(_KEY, _of_text(settings).get(_KEY))
    if tied is False:
        return None
    facts = facts_of(settings)
    found = []
    for head, embedding in facts.tied:
        heads, embeddings = ([*paths_of_name(facts.renamed, name), name] for name in (head, embedding))
        there = [name for name in embeddings if name in checkpoint.entries]
        # The first models of transformers were saved without the name of their body.
        there += [name for name in checkpoint.entries if embedding.endswith(f".{name}")]
        if there and not any(name in checkpoint.entries for name in heads):
            found.append(Tie(heads[0], there[0]))
    is_own = task_of(settings) == "CAUSAL_LM" and not is_known(settings)
    if is_own and tied and _HEAD not in checkpoint.entries:
        found = [Tie(_HEAD, name) for name in checkpoint.entries if name.endswith(EMBEDDINGS)]
    return found[0] if len(found) == 1 else None


def weight_shapes(checkpoint: Checkpoint, tie: Tie | None) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's weights by name, that of a tied head too."""
    shapes = shapes_of(checkpoint)
    return shapes if tie is None else shapes | {tie.head: shapes[tie.embedding]}


def stored_as(tie: Tie | None, name: str) -> str:
    """The tensor that holds a weight."""
    return name if tie is None or name != tie.head else tie.embedding


def parted(tie: Tie | None, changes: Changes, tied: bool) -> tuple[Changes, Tie | None]:
    """The changes of the tensors, and the tie where the head gets a tensor of its own.

    Raises:
      DataError: both are changed, and are to stay one.
    """
    if tie is None:
        return changes, None
    head, embedding = changes.get(tie.head), changes.get(tie.embedding)
    if head and embedding and _are_one(head, embedding):
        return {name: own for name, own in changes.items() if name != tie.head}, None
    if not tied:
        return changes, tie if head or embedding else None
    if head and embedding:
        raise DataError(f"{tie.head} and {tie.embedding}: the adapters change both, which cannot stay one tensor")
    return {tie.embedding if name == tie.head else name: own for name, own in changes.items()}, None


def write_apart(
    source: Checkpoint, tie: Tie, changes: Sequence[Entry], new: Path, tally: Tally, keep_residual: bool
) -> None:
    """Writes the head beside the shards of an output, in the index, and out of the ties of config.json."""
    entry = source.entries[tie.embedding]
    value = changes[0].parts.get("value") if changes else None
    shape = entry.shape if value is None else tuple(value.shape)
    renamed, file_of_head = {shard: shard for shard in source.shards}, _FILE
    if len(source.shards) == 1:  # transformers takes a model.safetensors for the whole model
        (only,) = source.shards
        renamed, file_of_head = {only: _SPLIT[0]}, _SPLIT[1]
        _rename(new, only, _SPLIT[0])
    header = header_bytes({tie.head: (entry.dtype, shape)}, {"format": "pt"})
    shift = len(header) - entry.start
    with (
        source.open(source.shard_of[tie.embedding]) as file,
        ShardWriter(new / file_of_head, file, lambda _: None, min(8, os.cpu_count() or 1), shift) as writer,
    ):
        writer.put(-shift, np.frombuffer(header, np.uint8))
        if changes:
            merge_tensor(tie.head, entry, list(changes), file, writer, tally, keep_residual, shape)
        else:
            writer.copy(entry.start, entry.stop)
    weight_map = {name: renamed[shard] for name, shard in source.shard_of.items()} | {tie.head: file_of_head}
    metadata = dict(source.index.get("metadata") or {}) if source.index is not None else {}
    metadata["total_size"] = sum(e.stop - e.start for e in source.entries.values()) + bytes_of(shape, entry.dtype)
    write_whole(new / source.index_name, dump_json({"metadata": metadata, "weight_map": weight_map}), sync=False)
    settings = dict(read_json(source.folder / _CONFIG))
    settings[_KEY] = False
    if isinstance(settings.get("text_config"), dict):
        settings["text_config"] = {**settings["text_config"], _KEY: False}
    write_whole(new / _CONFIG, dump_json(settings, sort_keys=False), sync=False)


def check_apart(source: Checkpoint, tie: Tie) -> None:
    """Refuses a checkpoint that is one file, whose config.json is not written."""
    if os.path.isfile(source.path) or not (source.folder / _CONFIG).is_file():
        raise DataError(
            f"{source.path}: {tie.head} is {tie.embedding} in this model, and an adapter changes one of them: give the "
            "folder with config.json, where tying is switched off, or change both by tied (--tied)"
        )


def _of_text(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    text = settings.get("text_config")
    return text if isinstance(text, Mapping) else {}


def _rename(new: Path, old: str, name: str) -> None:
    os.rename(new / old, new / name)
    if (new / RESIDUALS / old).is_dir():
        os.rename(new / RESIDUALS / old, new / RESIDUALS / name)


def _are_one(head: Sequence[Entry], embedding: Sequence[Entry]) -> bool:
    """Whether two weights that are one tensor change alike."""
    return len(head) == len(embedding) and all(map(_is_same, head, embedding))


def _is_same(head: Entry, embedding: Entry) -> bool:
    one, other = ({name: np.asarray(part) for name, part in each.parts.items()} for each in (head, embedding))
    if one.keys() != other.keys() or not one.keys() <= {"A", "B", "value"}:
        return False
    if "A" in one:
        # A (dim, r), B (r, vocabulary) of a head; A (vocabulary, r), B (r, dim) of an embedding
        swapped = {"A": other["B"].T, "B": other["A"].T}
        if head.scaling != embedding.scaling or not all(np.array_equal(one[name], swapped[name]) for name in "AB"):
            return False
    return "value" not in one or np.array_equal(one["value"], other["value"])
