"""Two trees of adapters: what is in one only, and how far the updates lie apart."""

import dataclasses
import html
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from jlora.config import LoraConfig, field_names
from jlora.diagnostics._factors import (
    Arrays,
    Factors,
    count,
    entries_of,
    factors_of,
    is_same,
    largest_difference,
    short,
    singular_values,
    triangle,
)
from jlora.errors import AdapterError, shortened
from jlora.tables import html_table, text_table
from jlora.tree import check_config

_COLUMNS = ("path", "status", "rank", "alpha", "|left|", "|right|", "|difference|", "cosine")
STATUSES = ("identical", "changed", "only left", "only right")

Pair = tuple[Any, LoraConfig]

_MOST = 200  # characters of a field's value


@dataclasses.dataclass(frozen=True)
class EntryDifference:
    """How one entry differs; None for what a side, or an entry of these parts, does not have.

    Attributes:
      path: of the weight.
      status: "identical" (the same bytes and the same scaling), "changed", "only left" or "only right".
      is_same_bytes: whether all parts are bitwise equal, whatever the scaling.
      ranks, alphas: left and right.
      norms: ||delta||_F, left and right.
      distance: ||delta_left - delta_right||_F.
      cosine: of the angle between the two deltas.
      parts: of the parts beside A and B, the name and the largest absolute difference; None where one side has no
        such part, or the shapes differ.
    """

    path: str
    status: str
    is_same_bytes: bool = False
    ranks: tuple[int | None, int | None] = (None, None)
    alphas: tuple[float | None, float | None] = (None, None)
    norms: tuple[float | None, float | None] = (None, None)
    distance: float | None = None
    cosine: float | None = None
    parts: tuple[tuple[str, float | None], ...] = ()

    def row(self) -> tuple[str, ...]:
        """The cells of the table."""
        shown = tuple(f"{name} {'differs in shape' if d is None else short(d)}" for name, d in self.parts)
        return (
            self.path or "the root",
            ", ".join((self.status, *shown)),
            _both([None if rank is None else str(rank) for rank in self.ranks]),
            _both([None if alpha is None else f"{alpha:g}" for alpha in self.alphas]),
            *map(short, self.norms),
            short(self.distance),
            "-" if self.cosine is None else f"{self.cosine:.4f}",
        )


@dataclasses.dataclass(frozen=True)
class Difference:
    """What `diff` found; `str` is a table for a terminal, a notebook shows it as HTML.

    Attributes:
      entries: one for each path of either side, those of the left first.
      config: the fields of the configurations that differ, with both values.
    """

    entries: tuple[EntryDifference, ...]
    config: tuple[tuple[str, Any, Any], ...]

    @property
    def is_identical(self) -> bool:
        """Whether the two sides have the same entries, bytes and scalings; the rest of the configuration may differ."""
        return all(entry.status == "identical" for entry in self.entries)

    def counts(self) -> dict[str, int]:
        """How many entries have each status."""
        return {status: sum(entry.status == status for entry in self.entries) for status in STATUSES}

    def _footer(self) -> tuple[str, ...]:
        distance = math.hypot(*(e.distance for e in self.entries if e.distance is not None))
        return (count(len(self.entries), "entry", "entries"), "", "", "", "", "", short(distance), "")

    def _lines(self) -> list[str]:
        counts = ", ".join(f"{n:,} {status}" for status, n in self.counts().items() if n)
        fields = [
            f"config.{name}: {shortened(left, _MOST)} in the left, {shortened(right, _MOST)} in the right"
            for name, left, right in self.config
        ]
        return [*([counts] if counts else []), *fields]

    def __str__(self) -> str:
        table = text_table(_COLUMNS, [entry.row() for entry in self.entries], self._footer(), left=2)
        return "\n".join([table, *self._lines()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in self._lines())
        table = html_table(_COLUMNS, [entry.row() for entry in self.entries], self._footer())
        return table + (f"<ul>{items}</ul>" if items else "")


def diff(left: Pair, right: Pair, *, names: Mapping[str, str] | None = None) -> Difference:
    """How two trees of adapters differ, entry by entry, without any delta being built.

    The distance of two deltas is the norm of the product of the stacked factors [A_l, A_r] and [s_l B_l; -s_r B_r], by
    the QR of both, in float64 on the host.

    Args:
      left, right: `(adapters, config)` each; the ranks may differ.
      names: the right's path of entries that the left has at another one, by the left's.

    Returns:
      A `Difference`: print it, or read its `entries` and `config`.

    Raises:
      TargetError: a leaf that is no adapter, an A and a B that do not fit each other or in two ways.

    >>> a, config = np.ones((3, 1)), LoraConfig(rank=1, alpha=1)
    >>> left, right = ({'up': {'A': a, 'B': np.full((1, 3), b)}} for b in (1.0, 3.0))
    >>> found = diff((left, config), (right, config)).entries[0]
    >>> round(found.distance, 6), round(found.cosine, 6)
    (6.0, 1.0)
    """
    sides = [_side(side, name) for side, name in ((left, "left"), (right, "right"))]
    (lefts, left_config), (rights, right_config) = sides
    configs = (left_config, right_config)
    pairs = {path: (names or {}).get(path, path) for path in lefts}
    paired = set(pairs.values())
    alone = [path for path in rights if path not in paired]
    with threadpool_limits(limits=1, user_api="blas"):  # the QR of small blocks is ten times slower with two threads
        entries = [
            _difference((path, other), (lefts[path], rights.get(other)), configs) for path, other in pairs.items()
        ]
        entries += [_difference((path, path), (None, rights[path]), configs) for path in alone]
    fields = ((name, getattr(left_config, name), getattr(right_config, name)) for name in field_names(LoraConfig))
    return Difference(tuple(entries), tuple((name, x, y) for name, x, y in fields if x != y))


def _side(side: Any, name: str) -> tuple[dict[str, Arrays], LoraConfig]:
    if not isinstance(side, tuple | list) or len(side) != 2:
        raise AdapterError(f"{name}: found {type(side).__name__}, wanted (adapters, config)")
    check_config(side[1])
    return entries_of(side[0], name), side[1]


def _difference(
    paths: tuple[str, str],
    updates: tuple[Arrays | None, Arrays | None],
    configs: tuple[LoraConfig, LoraConfig],
) -> EntryDifference:
    left, right = (_End(*each) for each in zip(paths, updates, configs, strict=True))
    same, status = False, "only right" if updates[0] is None else "only left"
    if updates[0] is not None and updates[1] is not None:
        same = _is_same(updates[0], updates[1])
        status = "identical" if same and left.scaling == right.scaling else "changed"
    norms, distance, cosine = _apart(left.factors, right.factors, status == "identical")
    return EntryDifference(
        paths[0],
        status,
        same,
        ranks=(left.rank, right.rank),
        alphas=(left.alpha, right.alpha),
        norms=norms,
        distance=distance,
        cosine=cosine,
        parts=_parts(*updates),
    )


class _End:
    """One side of an entry: its numbers, and A and the scaled B as stacks of matrices in float64."""

    def __init__(self, path: str, update: Arrays | None, config: LoraConfig) -> None:
        self.rank: int | None = None
        self.alpha: float | None = None
        self.scaling: float | None = None
        self.factors: Factors | None = None
        if update is None or not update.keys() & {"A", "offset"}:
            return
        self.alpha = config.alpha_of(path)
        self.scaling = config.scaling_of(path)
        if "A" in update:
            a, b = factors_of(path, update, config)
            self.rank, self.factors = a.shape[2], (a, self.scaling * b)


def _apart(
    left: Factors | None, right: Factors | None, same: bool
) -> tuple[tuple[float | None, float | None], float | None, float | None]:
    """The norms of two updates, their distance and their cosine; None where one is missing, or the sizes differ.

    The triangles of [A_l, A_r] and of [B_l; B_r]^T hold those of both sides, in one basis: all follows from the small
    products of these.
    """
    if (
        left is None
        or right is None
        or left[0].shape[:2] != right[0].shape[:2]
        or left[1].shape[2] != right[1].shape[2]
    ):
        return (_norm(left), _norm(right)), None, None
    dots = np.zeros((2, 2))
    squares = 0.0
    with np.errstate(all="ignore"):
        for a_left, b_left, a_right, b_right in zip(*left, *right, strict=True):
            rank = a_left.shape[1]
            r_a, r_b = triangle(np.concatenate([a_left, a_right], 1)), triangle(np.concatenate([b_left, b_right]).T)
            cores = [r_a[:, part] @ r_b[:, part].T for part in (slice(rank), slice(rank, None))]
            dots += [[float(np.vdot(x, y)) for y in cores] for x in cores]
            squares += float(np.sum((cores[0] - cores[1]) ** 2))
        if not np.isfinite(dots).all():
            return (_norm(left), _norm(right)), math.nan, math.nan
        norms = float(np.sqrt(dots[0, 0])), float(np.sqrt(dots[1, 1]))
    cosine = min(1.0, max(-1.0, dots[0, 1] / (norms[0] * norms[1]))) if norms[0] * norms[1] else None
    return norms, 0.0 if same else math.sqrt(squares), cosine


def _norm(factors: Factors | None) -> float | None:
    return None if factors is None else float(np.sqrt(np.sum(singular_values(factors) ** 2)))


def _is_same(left: Arrays, right: Arrays) -> bool:
    return left.keys() == right.keys() and all(is_same(left[name], right[name]) for name in left)


def _parts(left: Arrays | None, right: Arrays | None) -> tuple[tuple[str, float | None], ...]:
    """The largest difference of each part beside A and B that both sides could have."""
    if left is None or right is None:
        return ()
    names = sorted((left.keys() | right.keys()) - {"A", "B"})
    comparable = {n for n in names if n in left and n in right and left[n].shape == right[n].shape}
    return tuple((name, largest_difference(left[name], right[name]) if name in comparable else None) for name in names)


def _both(texts: list[str | None]) -> str:
    """`8`, `8 | 16` where the sides differ."""
    known = [text for text in texts if text is not None]
    return "-" if not known else known[0] if len(set(known)) == 1 else " | ".join(known)
