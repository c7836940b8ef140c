"""The tensors of a checkpoint that adapters are for: one lookup for all commands."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jlora.checkpoints._layouts import open_experts
from jlora.checkpoints._memory import settings_of
from jlora.checkpoints._quantized import Quantized
from jlora.checkpoints._single_experts import Entries, Slot, is_stack, names_of, slot_of
from jlora.checkpoints._tied import stored_as, ties_of, weight_shapes
from jlora.disk import NOT_GATHERED, Checkpoint
from jlora.errors import DataError, listed
from jlora.interop.peft import Mapping as Rows
from jlora.interop.peft import paths_of_name
from jlora.interop.transformers import RENAMED, facts_of, has_transposed_experts, names_in_memory
from jlora.paths import nearest

Shapes = Mapping[str, tuple[int, ...]]
Prefix = tuple[str, str]  # what is taken from names, and what is put before them

_MOST_SHOWN = 12
_SAMPLE, _MOST_PREFIXES = 100, 1000


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor that an entry changes: its weight, a part of its weight, or an array that holds the weight.

    Attributes:
      tensor: its name in the checkpoint.
      path: of the entry.
      slot: of stacked experts that the checkpoint has one by one, which of them the tensor is; with `inside`, which of
        the matrices in the tensor the weight is. None where the tensor is the weight.
      inside: whether the tensor holds the weight among others.
      turned: whether this tensor is (experts, in, out).
    """

    tensor: str
    path: str
    slot: Slot | None = None
    inside: bool = False
    turned: bool = False


@dataclasses.dataclass(frozen=True)
class Located:
    """Where the entries of an adapter belong in a checkpoint.

    Attributes:
      pieces: the tensors of each entry, by path; none of an entry that the checkpoint has no tensor for.
      problems: entries without a tensor, tensors that two entries change, experts that have no place in their array.
      quantized: why nothing can be added to the weight of an entry, by path: it is packed or in other units.
    """

    pieces: dict[str, list[Piece]]
    problems: list[str]
    quantized: dict[str, str]

    def shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights by path, from those of the tensors; of packed weights they are not known."""
        return {path: _whole_shape(found, shapes) for path, found in self.pieces.items() if path not in self.quantized}


def locate(
    entries: Entries, checkpoint: Checkpoint, mapping: Rows = (), transposed_experts: bool | None = None
) -> Located:
    """The tensors of a checkpoint that entries are for.

    Paths and tensors meet where they are the same but for dots and slashes, a prefix that all have or lack, and what
    `mapping` or transformers renames. Experts that an adapter holds as one array are taken apart where the checkpoint
    has them one by one, and single experts are found in the array that holds them; `transposed_experts` says how this
    lies where nothing else does. Packed weights are found too, by the names that they would have.

    Raises:
      DataError: entries that fit several parts of the checkpoint.
    """
    settings, ties, quantized = settings_of(checkpoint), ties_of(checkpoint), Quantized(checkpoint)
    shapes = weight_shapes(checkpoint, ties)
    names = quantized.weights | {name.replace("/", "."): name for name in shapes}
    rows = (*mapping, *facts_of(settings).renamed, *RENAMED)
    sizes = {tensor: math.prod(shape) for tensor, shape in shapes.items()}
    pieces = _pieces(entries, names, rows, sizes, lambda name: names_in_memory(settings, name))
    reasons: dict[str, str] = {}
    for piece in _each(pieces):
        value = entries[piece.path].get("value") if set(entries[piece.path]) == {"value"} else None
        reason = quantized.problem(stored_as(ties, piece.tensor), None if value is None else value.dtype)
        if reason:
            reasons.setdefault(piece.path, reason)
    problems = [
        *_missing(entries, pieces, shapes),
        *_changed_twice(_each(pieces)),
        *_without_numbers(entries, pieces, sizes),
    ]
    if transposed_experts is None:
        transposed_experts = has_transposed_experts(settings)
    for path, found in pieces.items():
        if found[0].inside and path not in reasons:
            shape = shapes[found[0].tensor]
            pieces[path] = [_as_it_lies(found[0], entries[path], shape, transposed_experts)]
            problems += _without_a_place(pieces[path][0], entries[path], shape, transposed_experts)
    return Located(pieces, problems, reasons)


def same_weights(entries: Entries, others: Entries, mapping: Rows = ()) -> dict[str, str]:
    """Of the paths of `others` that which means the same weight as an entry, by the entry's path, found as by `locate`.

    Raises:
      DataError: entries that fit several parts of the others.
    """
    rows = (*mapping, *RENAMED)
    sizes = {path: size for path, entry in others.items() if (size := _size_of(entry)) is not None}
    names = {path.replace("/", "."): path for path in others}
    pieces = _pieces(entries, names, rows, sizes, lambda name: names_in_memory({}, name))
    by_other: dict[str, str] = {}
    for path, own in pieces.items():
        if own[0].slot is None:
            by_other.setdefault(own[0].tensor, path)
    return {path: other for other, path in by_other.items()}


def _each(pieces: Mapping[str, Sequence[Piece]]) -> Iterator[Piece]:
    return itertools.chain.from_iterable(pieces.values())


def _pieces(
    entries: Entries,
    names: Mapping[str, str],
    rows: Rows,
    sizes: Mapping[str, int],
    in_memory: Callable[[str], list[str]],
) -> dict[str, list[Piece]]:
    """The pieces of each entry, by path; none where none of the tensors, given by dotted name, is for it.

    Prefixes are tried in steps, and the first step counts in which one fits all entries: none at all; one to take away
    or one to put before the names; both, and before names that a tensor has in memory.

    Raises:
      DataError: all entries fit under one prefix and under another too.
    """
    if not entries:
        return {}
    dotted = {path: path.replace("/", ".") for path in entries}
    some = list(entries)[:: max(1, len(entries) // _SAMPLE)]
    deepest = max(dotted.values(), key=lambda name: name.count("."))  # lm_head has no prefix where the layers have one
    best, most = ("", ""), 0

    def under(prefix: Prefix, path: str) -> list[Piece]:
        strip, add = prefix
        name = dotted[path]
        if name.startswith(strip) and prefix != ("", ""):
            own = _renamed_pieces(path, add + name.removeprefix(strip), entries[path], names, rows)
            if own:
                return own
        return _renamed_pieces(path, name, entries[path], names, rows)

    for step in _steps(deepest, names, in_memory):
        fitting: dict[tuple[str, ...], dict[str, list[Piece]]] = {}
        for prefix in itertools.islice(step, _MOST_PREFIXES):
            count = sum(bool(under(prefix, path)) for path in some)
            if count > most:
                best, most = prefix, count
            if count < len(some):
                continue  # of tens of thousands of names only some are tried
            found = _until_one_lacks((path, under(prefix, path)) for path in entries)
            if len(found) == len(entries):
                fitting.setdefault(tuple(piece.tensor for piece in _each(found)), found)
        if fitting:
            return _the_one(entries, list(fitting.values()), sizes)
    return {path: pieces for path in entries if (pieces := under(best, path))}


def _the_one(
    entries: Entries, fitting: list[dict[str, list[Piece]]], sizes: Mapping[str, int]
) -> dict[str, list[Piece]]:
    """Of several parts of a checkpoint that have the names of all entries the one that has their sizes too."""
    of_size = [found for found in fitting if all(_has_size(entries[path], own, sizes) for path, own in found.items())]
    left = of_size or fitting
    if len(left) > 1:
        first = next(iter(entries))
        tensors = listed(found[first][0].tensor for found in left)
        raise DataError(f"the adapters fit several parts of the checkpoint: {first} may be any of {tensors}")
    return left[0]


def _has_size(entry: Mapping[str, Any], pieces: Sequence[Piece], sizes: Mapping[str, int]) -> bool:
    size, found = _size_of(entry), sizes.get(pieces[0].tensor)
    return size is None or found is None or pieces[0].slot is not None or size == found


def _size_of(entry: Mapping[str, Any]) -> int | None:
    """How many numbers the weight of an entry has; None where the entry alone does not say it."""
    if "value" in entry:
        return math.prod(entry["value"].shape)
    if "A" not in entry or entry["A"].ndim != 2 or entry["B"].ndim != 2:
        return None
    return int(entry["A"].shape[0] * entry["B"].shape[1])


def _until_one_lacks(pieces: Iterable[tuple[str, list[Piece]]]) -> dict[str, list[Piece]]:
    return dict(itertools.takewhile(lambda found: found[1], pieces))


def _steps(path: str, names: Iterable[str], in_memory: Callable[[str], list[str]]) -> Iterator[Iterable[Prefix]]:
    """The prefixes of each step, found by the name of one entry."""
    segments = path.split(".")
    stem = segments[: segments.index("experts") + 1] if "experts" in segments else segments[:-1] or segments
    yield [("", "")]
    taken = [(".".join(segments[:depth]) + ".", "") for depth in range(1, len(segments) - 1)]
    yield itertools.chain(taken, _before(stem, 0, names))
    # What is put in the place of another prefix leaves the name of the numbered layer, and what follows, as it is.
    layer = next((place - 1 for place, segment in enumerate(stem) if segment.isdecimal()), len(stem) - 1)
    every = [*names, *(other for name in names for other in in_memory(name))]
    for depth in range(max(0, layer) + 1):
        yield _before(stem, depth, every)


def _before(stem: Sequence[str], depth: int, names: Iterable[str]) -> Iterator[Prefix]:
    """What may have to be put before a stem without its first `depth` segments to meet the names."""
    strip, rest = "".join(f"{segment}." for segment in stem[:depth]), f".{'.'.join(stem[depth:])}."
    found = (name[: f".{name}.".index(rest)] for name in names if rest in f".{name}.")
    yield from dict.fromkeys((strip, add) for add in found)


def _renamed_pieces(
    path: str, name: str, parts: Mapping[str, Any], names: Mapping[str, str], rows: Rows
) -> list[Piece]:
    """The pieces by the entry's own name, or else by the first of its other names that is there."""
    if own := _pieces_of(path, name, parts, names):
        return own
    renamed = (_pieces_of(path, other, parts, names) for other in paths_of_name(rows, name))
    return next((pieces for pieces in renamed if pieces), [])


def _pieces_of(path: str, name: str, parts: Mapping[str, Any], names: Mapping[str, str]) -> list[Piece]:
    if name in names:
        return [Piece(names[name], path)]
    if is_stack(parts):
        count = parts["A"].shape[0]
        for experts in names_of(name, count + 1):
            *tensors, more = [[names.get(matrix, "") for matrix in expert] for expert in experts]
            if all(all(expert) for expert in tensors) and not any(more):
                return [
                    Piece(tensor, path, Slot(name, number, part, len(expert)))
                    for number, expert in enumerate(tensors)
                    for part, tensor in enumerate(expert)
                ]
        return []
    slot = slot_of(name)
    return [Piece(names[slot.array], path, slot, inside=True)] if slot is not None and slot.array in names else []


def _as_it_lies(piece: Piece, entry: Mapping[str, Any], shape: tuple[int, ...], transposed: bool | None) -> Piece:
    """The piece of a matrix in an array, told how the array lies: by its shape, or else by the model."""
    assert piece.slot is not None
    fitting = [turned for turned in (False, True) if _shape_of(piece.slot, shape, turned) == _sides_of(entry)]
    return dataclasses.replace(piece, turned=fitting[0] if len(fitting) == 1 else bool(transposed))


def _without_a_place(
    piece: Piece, entry: Mapping[str, Any], shape: tuple[int, ...], transposed: bool | None
) -> list[str]:
    """What keeps a matrix out of its array."""
    slot = piece.slot
    assert slot is not None
    if set(entry) != {"A", "B"}:
        beside = ", ".join(sorted(set(entry) - {"A", "B"}))
        return [f"{piece.path}: has a {beside}, which has no place in {piece.tensor}, where the experts are one array"]
    if slot.expert >= shape[0]:
        return [f"{piece.path}: {piece.tensor} {shape} has no expert {slot.expert}"]
    if transposed and slot.parts > 1:
        return [f"{piece.path}: gate and up alternate in {piece.tensor}, where an adapter of one has no place"]
    if transposed is None and all(_shape_of(slot, shape, turned) == _sides_of(entry) for turned in (False, True)):
        return [open_experts(piece.tensor, shape)]
    return []


def _sides_of(entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape (out, in) of the matrix of an entry; None where it is none."""
    is_matrix = "A" in entry and entry["A"].ndim == entry["B"].ndim == 2
    return (entry["B"].shape[1], entry["A"].shape[0]) if is_matrix else None


def _shape_of(slot: Slot, shape: tuple[int, ...], turned: bool) -> tuple[int, ...] | None:
    """The shape (out, in) of a matrix in an array of this shape."""
    if len(shape) != 3:
        return None
    outs, ins = shape[:0:-1] if turned else shape[1:]
    return (outs // slot.parts, ins)


def _whole_shape(pieces: Sequence[Piece], shapes: Shapes) -> tuple[int, ...]:
    """The shape of the weight that an entry is for; of experts one by one, as if they were one array.

    Raises:
      DataError: experts that differ in shape.
    """
    first, slot = shapes[pieces[0].tensor], pieces[0].slot
    if slot is None:
        return first
    if pieces[0].inside:
        return _shape_of(slot, first, pieces[0].turned) or first
    if other := next((piece.tensor for piece in pieces if shapes[piece.tensor] != first), None):
        raise DataError(f"{other} {shapes[other]}: {pieces[0].path} is for experts of the shape {first}")
    return (len(pieces) // slot.parts, first[0] * slot.parts, *first[1:])


def _changed_twice(pieces: Iterable[Piece]) -> Iterator[str]:
    """A problem for each tensor, or matrix in one, that two entries change."""
    taken: dict[str, dict[tuple[int, int] | None, str]] = {}
    for piece in pieces:
        own = taken.setdefault(piece.tensor, {})
        slot = piece.slot
        if slot is None or not piece.inside:
            places: list[tuple[int, int] | None] = [None]
        else:  # an array has two matrices of each expert at most
            places = [(slot.expert, half) for half in range(2) if slot.parts == 1 or half == slot.part]
        others = list(own.values()) if None in places else [own[place] for place in (None, *places) if place in own]
        if other := next((other for other in others if other != piece.path), None):
            yield f"{piece.tensor}: both {other} and {piece.path} change it"
        own |= {place: own.get(place, piece.path) for place in places}


def _without_numbers(entries: Entries, pieces: Mapping[str, Sequence[Piece]], sizes: Mapping[str, int]) -> list[str]:
    """The tensors of size 0 that A and B are for; a whole value may be as empty as the tensor."""
    low_rank = [piece for piece in _each(pieces) if "A" in entries[piece.path]]
    tensors = dict.fromkeys(piece.tensor for piece in low_rank if not sizes[piece.tensor])
    return [f"{tensor} holds no numbers: {NOT_GATHERED}" for tensor in tensors]


def _missing(entries: Entries, pieces: Mapping[str, Any], shapes: Shapes) -> list[str]:
    missing = [path for path in entries if path not in pieces]
    shown = []
    for path in missing[:_MOST_SHOWN]:
        near = ", ".join(nearest(path.replace("/", "."), shapes))
        shown.append(f"{path}: the checkpoint has no such tensor; nearest: {near}")
    return [*shown, *missing[_MOST_SHOWN:]]
