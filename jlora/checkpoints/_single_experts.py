"""Adapters of single experts and of all experts in one array: how the names meet, and one in the place of the other."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.adapter import Entry
from jlora.config import LoraConfig
from jlora.contraction import Factorization
from jlora.disk import LazyArray
from jlora.paths import literal_pattern

Entries = dict[str, dict[str, Any]]

_NAMES = (
    re.compile(r"(?P<module>(?:.*\.)?experts)\.(?P<expert>\d+)\.(?P<name>\w+)\.weight"),
    re.compile(r"(?P<module>(?:.*\.)?experts)\.(?P<name>\w+)s\.(?P<expert>\d+)\.weight"),  # as unsloth splits GPT-OSS
)
_BY_NUMBER, _BY_NAME = "{module}.{expert}.{name}.weight", "{module}.{name}s.{expert}.weight"
# The matrices of an expert that are one in an array, one upon the other, and how their names are formed.
_GROUPS = {
    "gate_up_proj": (
        (("gate_proj", "up_proj"), _BY_NUMBER),
        (("w1", "w3"), _BY_NUMBER),
        (("gate_up_proj",), _BY_NUMBER),
        (("gate_up_proj",), _BY_NAME),
    ),
    "down_proj": ((("down_proj",), _BY_NUMBER), (("w2",), _BY_NUMBER), (("down_proj",), _BY_NAME)),
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of a matrix of an expert in an array.

    Attributes:
      array: the name of the array.
      expert: the number of the expert.
      part, parts: the array has that many matrices of each expert, one upon the other; this is which.
    """

    array: str
    expert: int
    part: int
    parts: int


def slot_of(name: str) -> Slot | None:
    """Where the matrix that has this dotted name is, were the experts one array; None for other names."""
    match = next((found for pattern in _NAMES if (found := pattern.fullmatch(name))), None)
    if match is None:
        return None
    for array, groups in _GROUPS.items():
        for group, _ in groups:
            if match["name"] in group:
                part = group.index(match["name"])
                return Slot(f"{match['module']}.{array}", int(match["expert"]), part, len(group))
    return None


def names_of(array: str, count: int) -> Iterable[list[list[str]]]:
    """The names that the matrices of an array may have one by one, for each expert those of its parts; several ways."""
    module, _, last = array.rpartition(".")
    for group, form in _GROUPS.get(last, ()):
        yield [[form.format(module=module, expert=expert, name=name) for name in group] for expert in range(count)]


def is_stack(entry: Mapping[str, Any]) -> bool:
    """Whether an entry is for experts in one array: A (experts, in, r), B (experts, r, out)."""
    return set(entry) == {"A", "B"} and entry["A"].ndim == entry["B"].ndim == 3


def part_of(entry: Mapping[str, Any], expert: int, part: int, parts: int, roles: str = "oi") -> dict[str, Any]:
    """A (in, r) and B (r, out) of one matrix of an entry of stacked experts, whose parts split the first axis."""
    a, b = entry["A"][expert], entry["B"][expert]  # (in, r), (r, out)
    width = (b.shape[1] if roles == "oi" else a.shape[0]) // parts
    own = slice(part * width, (part + 1) * width)
    return {"A": a, "B": b[:, own]} if roles == "oi" else {"A": a[own], "B": b}


def joined(matrices: Sequence[tuple[Slot, Entry]], shape: tuple[int, ...], turned: bool) -> Entry:
    """A (experts, in, rank) and B (experts, rank, out) of matrices of an array, their scalings in B.

    Parts one upon the other have ranks of their own: A = [A1, A2], B = [[B1, 0], [0, B2]]. What has no adapter is zero.
    `turned` says that the array is (experts, in, out).
    """
    ins, outs = shape[1:] if turned else shape[:0:-1]
    ranks: dict[int, int] = {}
    for slot, entry in matrices:
        ranks[slot.part] = max(ranks.get(slot.part, 0), entry.parts["A"].shape[-1])
    starts = {part: sum(rank for other, rank in ranks.items() if other < part) for part in ranks}
    rank = sum(ranks.values())
    is_wide = any(entry.parts[name].dtype == np.float64 for _, entry in matrices for name in "AB")
    dtype = np.dtype(np.float64 if is_wide else np.float32)

    def load_a() -> np.ndarray[Any, Any]:
        a = np.zeros((shape[0], ins, rank), dtype)
        for slot, entry in matrices:
            own = np.asarray(entry.parts["A"])  # (in, r)
            a[slot.expert, :, starts[slot.part] : starts[slot.part] + own.shape[1]] = own
        return a

    def load_b() -> np.ndarray[Any, Any]:
        b = np.zeros((shape[0], rank, outs), dtype)
        for slot, entry in matrices:
            own = entry.scaling * np.asarray(entry.parts["B"]).astype(np.float64)  # (r, out)
            rows, width = slice(starts[slot.part], starts[slot.part] + own.shape[0]), outs // slot.parts
            b[slot.expert, rows, slot.part * width : (slot.part + 1) * width] = own
        return b

    parts = {
        "A": LazyArray((shape[0], ins, rank), dtype, load_a),
        "B": LazyArray((shape[0], rank, outs), dtype, load_b),
    }
    return Entry(parts, 1.0, Factorization("bio" if turned else "boi"))


def one_by_one(entries: Entries, config: LoraConfig, others: Iterable[str]) -> tuple[Entries, LoraConfig]:
    """Entries of stacked experts as entries of their matrices, where `others` are paths that name these one by one.

    In an array (experts, in, out) the rows of gate and up alternate, so that these stay one.
    """
    there = {pair for other in others if (pair := _form_of(other.replace("/", ".")))}
    found: Entries = {}
    alphas: dict[str, float] = {}
    ranks: dict[str, int] = {}
    for path, entry in entries.items():
        array = path.replace("/", ".")
        last = array.rpartition(".")[2]
        groups = [group for group in _GROUPS.get(last, ()) if {(name, group[1]) for name in group[0]} & there]
        turned = any(roles == "bio" for _, roles in config.matches("factorizations", path)[:1])
        if not is_stack(entry) or not groups or (turned and len(groups[0][0]) > 1):
            found[path] = entry
            continue
        group, form = groups[0]
        for expert in range(entry["A"].shape[0]):
            for part, name in enumerate(group):
                own = form.format(module=array.rpartition(".")[0], expert=expert, name=name)
                own = own.replace(".", "/") if "/" in path else own
                found[own] = part_of(entry, expert, part, len(group))
                alphas[literal_pattern(own)], ranks[literal_pattern(own)] = config.alpha_of(path), config.rank_of(path)
    return found, config.replace(
        factorizations={**dict.fromkeys(alphas, "oi"), **dict(config.factorizations)},
        alpha_pattern={**alphas, **dict(config.alpha_pattern)},
        rank_pattern={**ranks, **dict(config.rank_pattern)},
    )


def _form_of(name: str) -> tuple[str, str] | None:
    """The name of an expert's matrix, and how it is formed; None for other names."""
    for pattern, form in zip(_NAMES, (_BY_NUMBER, _BY_NAME), strict=True):
        if match := pattern.fullmatch(name):
            return match["name"], form
    return None
