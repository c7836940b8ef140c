"""Adapters from a folder, and how they change the tensors of a checkpoint."""

import dataclasses
from pathlib import Path

import numpy as np

from jlora.adapter import Entry
from jlora.arrays import ShapeDtype
from jlora.checkpoints._forms import read_entries, shapes_of
from jlora.checkpoints._layouts import with_layouts
from jlora.checkpoints._locate import locate
from jlora.checkpoints._memory import settings_of
from jlora.checkpoints._single_experts import Entries, Slot, joined, part_of
from jlora.checkpoints._tied import ties_of, weight_shapes
from jlora.checkpoints._vocabulary import other_rows
from jlora.config import LoraConfig
from jlora.contraction import Factorization
from jlora.disk import Checkpoint
from jlora.errors import DataError, JloraError, raise_all
from jlora.interop.peft import Mapping
from jlora.tree import bind


def read_adapter(path: str | Path, checkpoint: Checkpoint) -> tuple[Entries, LoraConfig]:
    """The entries for a checkpoint by path, of arrays that are read when asked for, and the configuration."""
    return read_entries(path, lazy=True, shapes=shapes_of(checkpoint))


def changes_of(
    entries: Entries,
    config: LoraConfig,
    weight: float,
    checkpoint: Checkpoint,
    mapping: Mapping = (),
    transposed_experts: bool | None = None,
    resize_vocabulary: bool = False,
) -> dict[str, Entry]:
    """The change of each tensor of the checkpoint that the adapters make, each scaled by `weight`.

    They are found as by `locate`. `transposed_experts` says how a model lies that the file and config.json leave open.

    Raises:
      DataError: every entry without a tensor, or that does not fit its tensor, at once; two entries for one tensor;
        entries that fit several parts of the checkpoint; square experts of which nothing says how they lie.
    """
    located = locate(entries, checkpoint, mapping, transposed_experts)
    problems = [*located.problems, *located.quantized.values()]
    for path in located.pieces:
        if weight != 1 and {"value", "magnitude"} & set(entries[path]):
            problems.append(f"{path}: a whole value or a magnitude has no weight {weight:g}")
    shapes, settings = weight_shapes(checkpoint, ties_of(checkpoint)), settings_of(checkpoint)
    weights = located.shapes(shapes)
    for path, shape in weights.items():
        other = other_rows(entries[path], shape, settings)
        if other is not None and resize_vocabulary:
            weights[path] = other
        elif other is not None:
            problems.append(
                f"{path}: has {other[0]:,} rows, the checkpoint {shape[0]:,}: another vocabulary; give "
                "resize_vocabulary (--resize-vocabulary) to take it over"
            )
    raise_all(problems, DataError, "the adapters do not fit the checkpoint")
    tree = {path: ShapeDtype(shape, np.dtype(np.float32)) for path, shape in weights.items()}
    try:
        bound = bind(tree, entries, with_layouts(config, entries, weights, settings, transposed_experts))
    except JloraError as error:
        raise DataError(f"the adapters do not fit the checkpoint: {error}") from None
    changes: dict[str, Entry] = {}
    inside: dict[str, list[tuple[Slot, Entry]]] = {}
    turned = set()
    for path, found in located.pieces.items():
        entry = dataclasses.replace(bound[path], scaling=weight * bound[path].scaling)
        for piece in found:
            if piece.slot is None:
                changes[piece.tensor] = entry
            elif piece.inside:
                inside.setdefault(piece.tensor, []).append((piece.slot, entry))
                turned |= {piece.tensor} if piece.turned else set()
            else:
                changes[piece.tensor] = _of_expert(entry, piece.slot)
    return changes | {name: joined(own, shapes[name], name in turned) for name, own in inside.items()}


def _of_expert(entry: Entry, slot: Slot) -> Entry:
    """The part of a change of stacked experts that belongs to one tensor of one of them."""
    assert entry.split is not None
    roles = entry.split.roles.removeprefix("b")
    return Entry(part_of(entry.parts, slot.expert, slot.part, slot.parts, roles), entry.scaling, Factorization(roles))
