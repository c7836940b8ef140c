"""`inspect` and `diff` for what lies on the disk."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from jlora import diagnostics
from jlora.adapter import is_entry
from jlora.arrays import ShapeDtype
from jlora.checkpoints._adapter_files import read_adapters
from jlora.checkpoints._forms import is_adapters, shapes_of
from jlora.checkpoints._layouts import with_layouts
from jlora.checkpoints._lazy import lazy_row, lazy_tree
from jlora.checkpoints._locate import Located, Piece, locate, same_weights
from jlora.checkpoints._memory import settings_of, stack_of
from jlora.checkpoints._params import read_params
from jlora.checkpoints._rewrite import Progress
from jlora.checkpoints._single_experts import Entries, one_by_one
from jlora.checkpoints._tied import stored_as, ties_of, weight_shapes
from jlora.config import LoraConfig
from jlora.disk import Checkpoint, LazyArray
from jlora.errors import DataError, listed, raise_all
from jlora.interop.peft import Mapping, paths_of_name
from jlora.paths import leaves_by_path
from jlora.tree import batch_dims_of, given_split


def inspect(
    adapters: str | Path,
    *,
    base: str | Path | None = None,
    mapping: Mapping = (),
    transposed_experts: bool | None = None,
    names: str | None = None,
    alpha: float | None = None,
) -> diagnostics.Inspection:
    """The table of what a folder of adapters holds, and what looks wrong; see `jlora.diagnostics.inspect`.

    With the checkpoint `base`, also the sizes of the updates beside their weights, and shares of the parameters. The
    weights are those that `merge` would change, found in the same way; beside one that is packed or in other units than
    the model's there is no size, and of a checkpoint with such weights no share.

    Args:
      adapters: a folder of adapters, jlora's own, PEFT's or mlx-lm's, or a LoRA file of a diffusion model.
      base: a folder of safetensors in the layout of Hugging Face, or one file.
      mapping, transposed_experts: as for `merge`; they say something of the base alone.
      names, alpha: as for `convert`: params that hold another library's LoRA are read. `base` is then for the shapes
        of weights that are not among them, and may be Orbax's.

    Raises:
      DataError: files that cannot be read, adapters that do not fit the base, a mapping without a base.
    """
    if names is not None:
        if mapping:
            raise DataError("params are inspected by their own names: convert them with the mapping")
        return diagnostics.inspect(*read_params(adapters, names, alpha, base))
    if base is None:
        if mapping:
            raise DataError("a mapping leads to the names of a checkpoint: give it as base (--base)")
        tree, config, _ = read_adapters(adapters, transposed_experts=transposed_experts)
        return diagnostics.inspect(tree, config)
    checkpoint = Checkpoint(base)
    tree, config, _ = read_adapters(adapters, base=checkpoint)
    entries = leaves_by_path(tree, is_leaf=is_entry)
    located = locate(entries, checkpoint, mapping, transposed_experts)
    raise_all(located.problems, DataError, f"{adapters}: the adapters do not fit the checkpoint")
    shapes = located.shapes(weight_shapes(checkpoint, ties_of(checkpoint)))
    config = with_layouts(config, entries, shapes, settings_of(checkpoint), transposed_experts)
    weights = _weights(checkpoint, located, entries, config)
    return _beside(diagnostics.inspect(tree, config, params=weights), checkpoint, located)


def diff(
    left: str | Path,
    right: str | Path,
    *,
    base: str | Path | None = None,
    mapping: Mapping = (),
    on_progress: Progress | None = None,
) -> diagnostics.Difference | diagnostics.CheckpointDifference:
    """How two folders of adapters, or two checkpoints, differ.

    Entries of adapters meet where their names are the same but for dots and slashes, a prefix that all have or lack,
    and what transformers renames; with `base` where they are for the same tensor of that checkpoint, as `merge` finds
    it. Where one side has the experts of a layer in one array and the other one by one, they are compared one by one.
    Tensors of checkpoints meet where they have one name.

    Args:
      left, right: both adapters, or both checkpoints.
      base: a checkpoint that both adapters are for.
      mapping: rows of `jlora.interop.peft.Row` from the left's names to the right's, or with `base` from those of both
        to the checkpoint's, where these are others.
      on_progress: called with (bytes done, bytes in all), of checkpoints.

    Raises:
      DataError: what cannot be read, one of each kind, adapters of which one fits several parts of the other, or that
        do not fit the base; a base for checkpoints.
    """
    if is_adapters(left) or is_adapters(right):
        checkpoint = None if base is None else Checkpoint(base)
        (one, first, _), (other, second, _) = (read_adapters(path, base=checkpoint) for path in (left, right))
        lefts, rights = (leaves_by_path(tree, is_leaf=is_entry) for tree in (one, other))
        (lefts, first), (rights, second) = one_by_one(lefts, first, rights), one_by_one(rights, second, lefts)
        if checkpoint is None:
            names = _same_weights(left, lefts, right, rights, mapping)
        else:
            paths = {place: path for path, place in _places(right, rights, checkpoint, mapping).items()}
            places = _places(left, lefts, checkpoint, mapping)
            names = {path: paths[place] for path, place in places.items() if place in paths}
        return diagnostics.diff((lefts, first), (rights, second), names=names)
    if base is not None:
        raise DataError(f"{base}: a base says which weights adapters are for; {left} and {right} are checkpoints")
    there = Checkpoint(right).entries
    renamed = {}
    for name in Checkpoint(left).entries:
        found = [path for path in paths_of_name(mapping, name) if path in there]
        if name not in there and found:
            renamed[name] = found[0]
    return diagnostics.diff_checkpoints(left, right, names=renamed, on_progress=on_progress)


def _same_weights(
    left: str | Path, lefts: Entries, right: str | Path, rights: Entries, mapping: Mapping
) -> dict[str, str]:
    """The right's path of each entry of the left that both have, by the names alone."""
    try:
        names = same_weights(lefts, rights, mapping)
        if not names:  # the left's first entry, by which a prefix is sought, may be the one that the right lacks
            names = {path: other for other, path in same_weights(rights, lefts).items()}
    except DataError as error:
        raise DataError(
            f"{left} and {right}: {error}; the base of both (--base) or a mapping (--mapping) says which"
        ) from None
    return names


def _places(path: str | Path, entries: Entries, checkpoint: Checkpoint, mapping: Mapping) -> dict[str, Any]:
    """What of a checkpoint each entry is for, by its path."""
    try:
        located = locate(entries, checkpoint, mapping, transposed_experts=False)  # which says nothing of the place
        raise_all(located.problems, DataError, "the adapters do not fit the checkpoint")
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return {
        own: tuple((piece.tensor, piece.slot if piece.inside else None) for piece in pieces)
        for own, pieces in located.pieces.items()
    }


def _weights(checkpoint: Checkpoint, located: Located, entries: Entries, config: LoraConfig) -> dict[str, Any]:
    """The weights of all entries by path, read when they are asked for; of quantized ones the shape alone."""
    tensors, ties = lazy_tree(checkpoint, lambda _: None), ties_of(checkpoint)
    weights: dict[str, Any] = {}
    for path, found in located.pieces.items():
        if path in located.quantized:
            weights[path] = ShapeDtype(_shape_of(path, entries[path], config), np.dtype(np.float32))
            continue
        own, slot = [tensors[stored_as(ties, piece.tensor).replace(".", "/")] for piece in found], found[0].slot
        if slot is None:
            weights[path] = own[0]
        elif found[0].inside:
            weights[path] = _matrix(checkpoint, found[0])
        else:
            weights[path] = stack_of([own[start : start + slot.parts] for start in range(0, len(own), slot.parts)])
    return weights


def _matrix(checkpoint: Checkpoint, piece: Piece) -> LazyArray:
    """A matrix (out, in) of one expert in an array of all."""
    slot = piece.slot
    assert slot is not None
    matrix = lazy_row(checkpoint, piece.tensor, slot.expert)
    matrix = matrix.T if piece.turned else matrix
    rows = matrix.shape[0] // slot.parts
    return matrix[slot.part * rows : (slot.part + 1) * rows]


def _shape_of(path: str, entry: Any, config: LoraConfig) -> tuple[int, ...]:
    """The shape of the weight that an entry is for, as the entry itself says it."""
    if "A" not in entry:
        return tuple(next(iter(entry.values())).shape)
    split, batch = given_split(path, entry, config), batch_dims_of(path, entry, config)
    a, b = entry["A"].shape[:-1], entry["B"].shape[batch + 1 :]
    roles = "b" * batch + "i" * (len(a) - batch) + "o" * len(b) if split is None else split.roles
    sizes = {"b": iter(a[:batch]), "i": iter(a[batch:]), "o": iter(b)}
    return tuple(next(sizes[role]) for role in roles)


def _beside(found: diagnostics.Inspection, checkpoint: Checkpoint, located: Located) -> diagnostics.Inspection:
    """What was found, with shares of all of a checkpoint, and a warning for what is not compared."""
    is_quantized = bool(located.quantized)
    total = None if is_quantized else sum(math.prod(shape) for shape in shapes_of(checkpoint).values())
    entries = tuple(
        dataclasses.replace(entry, share=entry.parameters / total if total else None) for entry in found.entries
    )
    warnings = found.warnings
    if is_quantized:
        few = listed([reason.partition(";")[0] for reason in located.quantized.values()], 3)
        warnings += (f"not compared, {len(located.quantized):,} of {len(entries):,} weights: {few}",)
    return dataclasses.replace(found, entries=entries, warnings=warnings, total=total)
