"""Adapters from a folder, and the tensors of a checkpoint that they change."""

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jlora.adapter import Entry
from jlora.arrays import ShapeDtype
from jlora.checkpoints._forms import read_entries, shapes_of
from jlora.checkpoints._layouts import with_layouts
from jlora.checkpoints._memory import settings_of
from jlora.checkpoints._quantized import Quantized
from jlora.checkpoints._single_experts import stacked
from jlora.checkpoints._tied import stored_as, tie_of, weight_shapes
from jlora.checkpoints._vocabulary import other_rows
from jlora.config import LoraConfig
from jlora.contraction import Factorization
from jlora.disk import Checkpoint
from jlora.errors import DataError, JloraError, listed, raise_all
from jlora.interop.peft import Mapping, paths_of_name
from jlora.interop.transformers import RENAMED, facts_of
from jlora.paths import nearest
from jlora.tree import bind

Entries = dict[str, dict[str, Any]]
Shapes = dict[str, tuple[int, ...]]

_FUSED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
_MOST_SHOWN = 12
_SAMPLE, _MOST_PREFIXES = 100, 1000


def read_adapter(path: str | Path, checkpoint: Checkpoint) -> tuple[Entries, LoraConfig]:
    """The entries for a checkpoint by path, of arrays that are read when asked for, and the configuration."""
    return read_entries(path, lazy=True, shapes=shapes_of(checkpoint))


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A tensor that an entry changes: its weight, or the part of it that belongs to one of several experts.

    Attributes:
      tensor: its name in the checkpoint.
      path: of the entry.
      expert: the number of the expert; None where the tensor is the whole weight.
      part, parts: the matrix of an expert has that many parts, one upon the other, each a tensor; this is which.
    """

    tensor: str
    path: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


@dataclasses.dataclass(frozen=True)
class Located:
    """Where the entries of an adapter belong in a checkpoint.

    Attributes:
      pieces: the tensors of each entry, by path; none of an entry that the checkpoint has no tensor for.
      problems: entries without a tensor, and tensors that two entries change.
      quantized: why nothing can be added to the weight of an entry, by path: it is packed or in other units.
    """

    pieces: dict[str, list[_Piece]]
    problems: list[str]
    quantized: dict[str, str]

    def shapes(self, shapes: Shapes) -> Shapes:
        """The shapes of the weights by path, from those of the tensors; of packed weights they are not known."""
        return {path: _whole_shape(found, shapes) for path, found in self.pieces.items() if path not in self.quantized}


def locate(entries: Entries, checkpoint: Checkpoint, mapping: Mapping = ()) -> Located:
    """The tensors of a checkpoint that entries are for.

    Paths and tensors meet where they are the same but for dots and slashes, a prefix that all have or lack, and what
    `mapping` or transformers renames. Experts that an adapter holds as one array are taken apart where the checkpoint
    has them one by one. Packed weights are found too, by the names that they would have.

    Raises:
      DataError: entries that fit several parts of the checkpoint.
    """
    tie, quantized = tie_of(checkpoint), Quantized(checkpoint)
    shapes = weight_shapes(checkpoint, tie)
    names = {name.replace("/", "."): name for name in shapes}
    rows = (*mapping, *facts_of(settings_of(checkpoint)).renamed, *RENAMED)
    pieces = _pieces(entries, quantized.weights | names, rows)
    problems = _missing(entries, pieces, shapes)
    taken: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for piece in (piece for found in pieces.values() for piece in found):
        if taken.setdefault(piece.tensor, piece.path) != piece.path:
            problems.append(f"{piece.tensor}: both {taken[piece.tensor]} and {piece.path} change it")
        value = entries[piece.path].get("value") if set(entries[piece.path]) == {"value"} else None
        reason = quantized.problem(stored_as(tie, piece.tensor), None if value is None else value.dtype)
        if reason:
            reasons.setdefault(piece.path, reason)
    return Located(pieces, problems, reasons)


def same_weights(entries: Entries, others: Iterable[str], mapping: Mapping = ()) -> dict[str, str]:
    """Of the paths `others` that which means the same weight as an entry, by the entry's path, found as by `locate`.

    Raises:
      DataError: entries that fit several parts of the others.
    """
    pieces = _pieces(entries, {path.replace("/", "."): path for path in others}, (*mapping, *RENAMED))
    by_other: dict[str, str] = {}
    for path, own in pieces.items():
        if own[0].expert is None:
            by_other.setdefault(own[0].tensor, path)
    return {path: other for other, path in by_other.items()}


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

    They are found as by `locate`, single experts in the array that holds them. `transposed_experts` says how a model
    lies that the file and config.json leave open.

    Raises:
      DataError: every entry without a tensor, or that does not fit its tensor, at once; two entries for one tensor;
        entries that fit several parts of the checkpoint; square experts of which nothing says how they lie.
    """
    changes: dict[str, Entry] = {}
    for own, own_config in stacked(entries, config, checkpoint, transposed_experts):
        found = _changes_of(own, own_config, weight, checkpoint, mapping, transposed_experts, resize_vocabulary)
        if twice := changes.keys() & found.keys():
            raise DataError(f"{min(twice)}: an adapter of it as a whole and some of its experts change it")
        changes |= found
    return changes


def _changes_of(
    entries: Entries,
    config: LoraConfig,
    weight: float,
    checkpoint: Checkpoint,
    mapping: Mapping,
    transposed_experts: bool | None,
    resize_vocabulary: bool,
) -> dict[str, Entry]:
    """The change of each tensor that has an entry of its own."""
    located = locate(entries, checkpoint, mapping)
    problems = [*located.problems, *located.quantized.values()]
    for path in located.pieces:
        if weight != 1 and {"value", "magnitude"} & set(entries[path]):
            problems.append(f"{path}: a whole value or a magnitude has no weight {weight:g}")
    weights, settings = located.shapes(weight_shapes(checkpoint, tie_of(checkpoint))), settings_of(checkpoint)
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
    for path, found in located.pieces.items():
        entry = dataclasses.replace(bound[path], scaling=weight * bound[path].scaling)
        for piece in found:
            changes[piece.tensor] = entry if piece.expert is None else _of_expert(entry, piece)
    return changes


def _of_expert(entry: Entry, piece: _Piece) -> Entry:
    """The part of a change of stacked experts that belongs to one tensor of one of them."""
    assert entry.split is not None
    roles = entry.split.roles.removeprefix("b")
    a, b = entry.parts["A"][piece.expert], entry.parts["B"][piece.expert]  # (in, r), (r, out)
    rows = b.shape[1] if roles == "oi" else a.shape[0]
    width = rows // piece.parts
    own = slice(piece.part * width, (piece.part + 1) * width)
    parts = {"A": a, "B": b[:, own]} if roles == "oi" else {"A": a[own], "B": b}
    return Entry(parts, entry.scaling, Factorization(roles))


def _pieces(entries: Entries, names: dict[str, str], mapping: Mapping) -> dict[str, list[_Piece]]:
    """The pieces of each entry, by path; none where none of the tensors, given by dotted name, is for it.

    Raises:
      DataError: all entries fit under one prefix and under another too.
    """
    if not entries:
        return {}
    dotted = {path: path.replace("/", ".") for path in entries}
    some = list(entries)[:: max(1, len(entries) // _SAMPLE)]
    whole: dict[str, list[_Piece]] = {}
    fitting: list[str] = []
    best, most = ("", ""), 0

    def pieces_under(prefix: tuple[str, str], path: str) -> list[_Piece]:
        strip, add = prefix
        if not dotted[path].startswith(strip):
            return []
        return _renamed_pieces(path, add + dotted[path].removeprefix(strip), entries[path], names, mapping)

    for prefix in itertools.islice(_prefixes(list(dotted.values()), names), _MOST_PREFIXES):
        count = sum(bool(pieces_under(prefix, path)) for path in some)
        if count > most:
            best, most = prefix, count
        if count < len(some):
            continue  # of tens of thousands of names only some are tried
        found = _until_one_lacks((path, pieces_under(prefix, path)) for path in entries)
        if len(found) == len(entries):
            fitting.append(found[next(iter(found))][0].tensor)
            whole = whole or found
            if prefix == ("", ""):
                return whole
    if len(fitting) > 1:
        raise DataError(
            f"the adapters fit several parts of the checkpoint: {next(iter(entries))} may be any of {listed(fitting)}"
        )
    return whole or {path: pieces for path in entries if (pieces := pieces_under(best, path))}


def _until_one_lacks(pieces: Iterable[tuple[str, list[_Piece]]]) -> dict[str, list[_Piece]]:
    return dict(itertools.takewhile(lambda found: found[1], pieces))


def _prefixes(paths: list[str], names: Iterable[str]) -> Iterable[tuple[str, str]]:
    """What may have to be taken from the paths, or put before them, to meet the names; nothing at first."""
    yield "", ""
    segments = paths[0].split(".")
    for depth in range(1, len(segments) - 1):
        yield ".".join(segments[:depth]) + ".", ""
    stem = paths[0].rpartition(".")[0] or paths[0]
    yield from dict.fromkeys(
        ("", name[: f"{name}.".index(f".{stem}.") + 1]) for name in names if f".{stem}." in f"{name}."
    )


def _renamed_pieces(
    path: str, name: str, parts: dict[str, Any], names: dict[str, str], mapping: Mapping
) -> list[_Piece]:
    """The pieces by the entry's own name, or else by the first of its other names that is there."""
    if own := _pieces_of(path, name, parts, names):
        return own
    renamed = (_pieces_of(path, other, parts, names) for other in paths_of_name(mapping, name))
    return next((pieces for pieces in renamed if pieces), [])


def _pieces_of(path: str, name: str, parts: dict[str, Any], names: dict[str, str]) -> list[_Piece]:
    if name in names:
        return [_Piece(names[name], path)]
    module, _, last = name.rpartition(".")
    if set(parts) != {"A", "B"} or parts["A"].ndim != 3 or parts["B"].ndim != 3:
        return []
    count = parts["A"].shape[0]
    for group in _FUSED.get(last, ()):
        if f"{module}.{count}.{group[0]}.weight" in names:
            continue
        pieces = []
        for expert in range(count):
            for number, part in enumerate(group):
                tensor = names.get(f"{module}.{expert}.{part}.weight")
                pieces += [] if tensor is None else [_Piece(tensor, path, expert, number, len(group))]
        if len(pieces) == count * len(group):
            return pieces
    return []


def _whole_shape(pieces: list[_Piece], shapes: Shapes) -> tuple[int, ...]:
    """The shape of the weight that an entry is for; of experts one by one, as if they were one array.

    Raises:
      DataError: experts that differ in shape.
    """
    first = shapes[pieces[0].tensor]
    if pieces[0].expert is None:
        return first
    if other := next((piece.tensor for piece in pieces if shapes[piece.tensor] != first), None):
        raise DataError(f"{other} {shapes[other]}: {pieces[0].path} is for experts of the shape {first}")
    count, parts = len(pieces) // pieces[0].parts, pieces[0].parts
    return (count, first[0] * parts, *first[1:])


def _missing(entries: Entries, pieces: dict[str, Any], shapes: Shapes) -> list[str]:
    missing = [path for path in entries if path not in pieces]
    shown = []
    for path in missing[:_MOST_SHOWN]:
        near = ", ".join(nearest(path.replace("/", "."), shapes))
        shown.append(f"{path}: the checkpoint has no such tensor; nearest: {near}")
    return [*shown, *missing[_MOST_SHOWN:]]
