"""Adapters of single experts, for a checkpoint that keeps the experts of a layer in one array."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.checkpoints._layouts import open_experts
from jlora.checkpoints._memory import settings_of
from jlora.config import LoraConfig
from jlora.disk import Checkpoint
from jlora.errors import DataError
from jlora.interop.transformers import has_transposed_experts
from jlora.paths import literal_pattern

Entries = dict[str, dict[str, Any]]
Slot = tuple[str, int, int]  # the path of the array, the expert, which of the matrices one upon the other

_NAMES = (
    re.compile(r"(?P<module>(?:.*\.)?experts)\.(?P<expert>\d+)\.(?P<name>\w+)\.weight"),
    re.compile(r"(?P<module>(?:.*\.)?experts)\.(?P<name>\w+)s\.(?P<expert>\d+)\.weight"),  # as unsloth splits GPT-OSS
)
# The name of a matrix -> that of the array, which of its parts it is, and how many there are.
_PLACES = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "w1": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "w3": ("gate_up_proj", 1, 2),
    "gate_up_proj": ("gate_up_proj", 0, 1),
    "down_proj": ("down_proj", 0, 1),
    "w2": ("down_proj", 0, 1),
}
_ARRAYS = ("gate_up_proj", "down_proj")


def stacked(
    entries: Entries, config: LoraConfig, checkpoint: Checkpoint, transposed_experts: bool | None
) -> list[tuple[Entries, LoraConfig]]:
    """The entries and their configuration, those of single experts apart, as entries of the arrays that hold them.

    Raises:
      DataError: an expert that the checkpoint does not have; gate and up for an array in which they alternate; square
        experts of which nothing says how they lie.
    """
    arrays = {array: _shape_in(checkpoint, array) for array in _ARRAYS}
    slots = {path: slot for path, entry in entries.items() if (slot := _slot(path, entry, arrays)) is not None}
    if not slots:
        return [(entries, config)]
    if transposed_experts is None:
        transposed_experts = has_transposed_experts(settings_of(checkpoint))
    rank = max(_parts_of(path) * entries[path]["A"].shape[-1] for path in slots)
    grouped: dict[str, list[str]] = {}
    for path, (array, _, _) in slots.items():
        grouped.setdefault(array, []).append(path)
    found: Entries = {}
    roles: dict[str, str] = {}
    for array, paths in grouped.items():
        if transposed_experts and any(_parts_of(path) > 1 for path in paths):
            raise DataError(f"{paths[0]}: gate and up alternate in {array}, where an adapter of one has no place")
        shape = arrays[array.rpartition(".")[2]]
        assert shape is not None
        matrices = {slots[path]: (entries[path], config.scaling_of(path)) for path in paths}
        found[array] = _joined(matrices, paths, shape, rank)
        roles[array] = _roles(array, found[array], shape, transposed_experts)
    patterns = {literal_pattern(path) for path in slots}
    others = {path: entry for path, entry in entries.items() if path not in slots}
    own = LoraConfig(
        rank=rank,
        alpha=rank,
        target_modules=tuple(literal_pattern(array) for array in found),
        factorizations={literal_pattern(array): letters for array, letters in roles.items()},
    )
    return [*([(others, _without(config, patterns))] if others else []), (found, own)]


def _shape_in(checkpoint: Checkpoint, array: str) -> tuple[int, ...] | None:
    """The shape of the arrays of this name; None where there are none, or single experts beside them."""
    if any(re.search(r"(^|\.)experts\.\d+\.", name.replace("/", ".")) for name in checkpoint.entries):
        return None
    ends = (f"experts.{array}", f"experts/{array}")
    return next((entry.shape for name, entry in checkpoint.entries.items() if name.endswith(ends)), None)


def _slot(path: str, entry: Mapping[str, Any], arrays: Mapping[str, tuple[int, ...] | None]) -> Slot | None:
    """Where the matrix of an entry lies in an array of the checkpoint."""
    name = path.replace("/", ".")
    match = next((found for pattern in _NAMES if (found := pattern.fullmatch(name))), None)
    if match is None or set(entry) != {"A", "B"} or match["name"] not in _PLACES:
        return None
    array, part, _ = _PLACES[match["name"]]
    return None if arrays[array] is None else (f"{match['module']}.{array}", int(match["expert"]), part)


def _parts_of(path: str) -> int:
    names = path.replace("/", ".").split(".")
    last = names[-2] if not names[-2].isdigit() else names[-3].removesuffix("s")
    return _PLACES[last][2]


def _joined(
    matrices: Mapping[Slot, tuple[Mapping[str, Any], float]], paths: list[str], shape: tuple[int, ...], rank: int
) -> dict[str, Any]:
    """A (experts, in, rank) and B (experts, rank, out) of all matrices of an array, their scalings in B.

    Parts one upon the other have ranks of their own: A = [A1, A2], B = [[B1, 0], [0, B2]]. What has no adapter is zero.
    """
    parts = max(map(_parts_of, paths))
    first = next(iter(matrices.values()))[0]
    (ins, _), width = first["A"].shape, first["B"].shape[1]
    is_wide = any(entry[name].dtype == np.float64 for entry, _ in matrices.values() for name in "AB")
    dtype = np.float64 if is_wide else np.float32
    a = np.zeros((shape[0], ins, rank), dtype)
    b = np.zeros((shape[0], rank, parts * width), dtype)
    for (array, expert, part), (entry, scaling) in matrices.items():
        if expert >= shape[0]:
            raise DataError(f"{array} {shape}: there is no expert {expert}")
        own_a, own_b = np.asarray(entry["A"]), np.asarray(entry["B"])  # (in, r), (r, out)
        if own_a.shape[0] != ins or own_b.shape[1] != width:
            raise DataError(f"{array}: A {own_a.shape} and B {own_b.shape} of expert {expert} do not fit the others")
        rows = slice(part * (rank // parts), part * (rank // parts) + own_a.shape[1])
        a[expert, :, rows] = own_a
        b[expert, rows, part * width : (part + 1) * width] = scaling * own_b.astype(np.float64)
    return {"A": a, "B": b}


def _roles(array: str, entry: Mapping[str, Any], shape: tuple[int, ...], transposed: bool | None) -> str:
    """How the axes of the array lie, by its shape, or else by the model."""
    ins, outs = entry["A"].shape[1], entry["B"].shape[2]
    if ins != outs:
        return "bio" if shape[1:] == (ins, outs) else "boi"
    if transposed is None:
        raise DataError(open_experts(array, shape))
    return "bio" if transposed else "boi"


def _without(config: LoraConfig, patterns: set[str]) -> LoraConfig:
    """A configuration without what it says of some paths, given by their patterns."""

    def kept(pairs: Any) -> dict[str, Any]:
        return {pattern: value for pattern, value in pairs if pattern not in patterns}

    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    return config.replace(
        target_modules=tuple(pattern for pattern in targets if pattern not in patterns),
        rank_pattern=kept(config.rank_pattern),
        alpha_pattern=kept(config.alpha_pattern),
        factorizations=kept(config.factorizations),
    )
