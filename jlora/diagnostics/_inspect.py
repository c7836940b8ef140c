"""One tree of adapters: a row of numbers for each entry, and whatever looks wrong."""

import dataclasses
import html
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from jlora.config import LoraConfig
from jlora.contraction import Factorization
from jlora.diagnostics._factors import (
    Arrays,
    count,
    effective_rank,
    entries_of,
    factors_of,
    is_finite,
    norm_of,
    short,
    singular_values,
    sized,
)
from jlora.diagnostics._warnings import warnings_of
from jlora.paths import leaves_by_path
from jlora.tables import html_table, text_table
from jlora.tree import bind, check_config, count_params, given_split

_USED = 1e-6  # of the largest singular value, below which float32 has no digits


@dataclasses.dataclass(frozen=True)
class InspectedEntry:
    """The numbers of one entry of the adapters; None for what an entry of these parts does not have.

    Attributes:
      path: of the weight.
      parts: what the entry holds, such as "A+B", "A+B+magnitude", "value" or "offset".
      factorization: one letter per axis of the weight; "-" where neither params nor the configuration tell.
      a_shape, b_shape: of A and B.
      dtype: of the parts, "A's/B's" where they differ.
      rank: of A.
      alpha, scaling: by the configuration; the update is scaling * A@B.
      a_norm, b_norm: Frobenius norms over the whole stack.
      norm: ||scaling * A@B||_F, a magnitude aside; of an entry without A and B, of what it adds to its weight (None for
        a value without params).
      largest: the largest singular value of scaling * A@B in the stack.
      effective_rank: exp(entropy of the singular values over their sum), the mean over the stack.
      used_rank: how many singular values exceed 1e-6 of the largest, the least in the stack.
      side: the smaller side of the matrix, beyond which a rank has no use.
      matrices: how many matrices the stack has; zero_a and zero_b: in how many of them A and B are all zero.
      not_finite: the parts that hold NaN or infinity.
      parameters: the number of scalars.
      configured_rank: the rank that the configuration gives.
      relative: norm / ||W||_F, with params of numbers.
      share: parameters over those of all params.
    """

    path: str
    parts: str
    factorization: str
    a_shape: tuple[int, ...] | None
    b_shape: tuple[int, ...] | None
    dtype: str
    rank: int | None
    alpha: float | None
    scaling: float | None
    a_norm: float | None
    b_norm: float | None
    norm: float | None
    largest: float | None
    effective_rank: float | None
    used_rank: int | None
    side: int | None
    matrices: int
    zero_a: int
    zero_b: int
    not_finite: tuple[str, ...]
    parameters: int
    configured_rank: int
    relative: float | None = None
    share: float | None = None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` found; `str` is a table and the warnings for a terminal, a notebook shows it as HTML.

    Attributes:
      entries: one for each entry, in the order of the adapters.
      warnings: a sentence for whatever looks wrong.
      total: the number of scalars of params, where they were given and can be counted.
    """

    entries: tuple[InspectedEntry, ...]
    warnings: tuple[str, ...]
    total: int | None = None

    @property
    def norm(self) -> float:
        """The Frobenius norm of all updates together."""
        return math.hypot(*(entry.norm for entry in self.entries if entry.norm is not None))

    @property
    def parameters(self) -> int:
        """The number of scalars of all entries."""
        return sum(entry.parameters for entry in self.entries)

    def table(self) -> tuple[list[str], list[list[str]], list[str], int]:
        """The titles, the rows, the footer and how many columns lean left; columns that say nothing are left out."""
        columns = [column for column in _COLUMNS if column.is_shown(self)]
        rows = [[column.cell(entry) for column in columns] for entry in self.entries]
        sums = {"path": count(len(rows), "entry", "entries"), "update": short(self.norm)}
        sums["parameters"] = f"{self.parameters:,}"
        sums["share"] = f"{self.parameters / self.total:.2%}" if self.total else "-"
        titles = [column.title for column in columns]
        return titles, rows, [sums.get(title, "") for title in titles], sum(column.is_left for column in columns)

    def __str__(self) -> str:
        titles, rows, footer, left = self.table()
        return "\n".join([text_table(titles, rows, footer, left=left), *(f"warning: {text}" for text in self.warnings)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        titles, rows, footer, _ = self.table()
        items = "".join(f"<li>{html.escape(text)}</li>" for text in self.warnings)
        return html_table(titles, rows, footer) + (f"<ul>{items}</ul>" if items else "")


@dataclasses.dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[InspectedEntry], str]
    is_left: bool = False
    is_shown: Callable[[Inspection], bool] = lambda _: True


_COLUMNS = (
    _Column("path", lambda e: e.path or "the root", True),
    _Column("parts", lambda e: e.parts, True, lambda i: any(e.parts != "A+B" for e in i.entries)),
    _Column("axes", lambda e: e.factorization, True, lambda i: any(e.factorization != "-" for e in i.entries)),
    _Column("A", lambda e: sized(e.a_shape), True),
    _Column("B", lambda e: sized(e.b_shape), True),
    _Column("dtype", lambda e: e.dtype, True),
    _Column("rank", lambda e: "-" if e.rank is None else str(e.rank)),
    _Column("alpha", lambda e: "-" if e.alpha is None else f"{e.alpha:g}"),
    _Column("scaling", lambda e: short(e.scaling)),
    _Column("|A|", lambda e: short(e.a_norm)),
    _Column("|B|", lambda e: short(e.b_norm)),
    _Column("update", lambda e: short(e.norm)),
    _Column("largest", lambda e: short(e.largest)),
    _Column("eff. rank", lambda e: "-" if e.effective_rank is None else f"{e.effective_rank:.2f}"),
    _Column("parameters", lambda e: f"{e.parameters:,}"),
    _Column(
        "update/W",
        lambda e: short(e.relative),
        False,
        lambda i: i.total is not None or any(e.relative is not None for e in i.entries),
    ),
    _Column("share", lambda e: "-" if e.share is None else f"{e.share:.2%}", False, lambda i: i.total is not None),
)


def inspect(adapters: Any, config: LoraConfig, *, params: Any = None) -> Inspection:
    """Norms, ranks and sizes of every adapter, and warnings for whatever looks wrong.

    Everything is computed on the host in float64 from A and B; with A = Q_a R_a and B^T = Q_b R_b the update has the
    singular values of scaling * R_a R_b^T, and no delta is built. The effective rank is exp(H), H the entropy of the
    singular values over their sum; norms are over the whole stack, the effective rank is the mean over it.

    Args:
      adapters: a pytree of adapters, JAX or NumPy arrays of any floating dtype, `None` where nothing is adapted.
      config: the configuration that they were made with.
      params: the base, arrays or shapes: adds the factorizations, the relative sizes of the updates (arrays only) and
        the shares of the parameters.

    Returns:
      An `Inspection`: print it, or read its `entries` and `warnings`. Numbers that are not finite give nan and a
      warning, never an error.

    Raises:
      TargetError: a leaf that is no adapter, an A and a B that do not fit each other or in two ways; with params,
        adapters that do not fit them.

    >>> adapters = {'up': {'A': np.ones((3, 2)), 'B': np.zeros((2, 5))}}
    >>> print(inspect(adapters, LoraConfig(rank=2, alpha=4)).warnings[0])
    1 of 1 adapters is untrained, B is all zero: up

    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO.
    """
    check_config(config)
    updates = entries_of(adapters)
    bound = {} if params is None else bind(params, adapters, config)
    weights = {} if params is None else leaves_by_path(params)
    total = None if params is None else count_params(params)
    entries = []
    with threadpool_limits(limits=1, user_api="blas"):  # the QR of small blocks is ten times slower with two threads
        for path, update in updates.items():
            split = bound[path].split if bound else None
            entry = _inspected(path, update, config, split, weights.get(path))
            entries.append(dataclasses.replace(entry, share=entry.parameters / total) if total else entry)
    return Inspection(tuple(entries), tuple(warnings_of(entries)), total)


def _inspected(
    path: str, update: Arrays, config: LoraConfig, split: Factorization | None, weight: Any
) -> InspectedEntry:
    scaling = config.scaling_of(path)
    dtypes = dict.fromkeys(np.dtype(part.dtype).name for part in update.values())
    has_scaling = bool(update.keys() & {"A", "offset"})
    fields: dict[str, Any] = {"a_shape": None, "b_shape": None, "rank": None, "a_norm": None, "b_norm": None}
    fields |= {"largest": None, "effective_rank": None, "used_rank": None, "side": None}
    fields |= {"factorization": "-", "matrices": 1, "zero_a": 0, "zero_b": 0}
    fields |= (
        _numbers(path, update, config, split, scaling) if "A" in update else {"norm": _dense(update, scaling, weight)}
    )
    return InspectedEntry(
        path=path,
        parts="+".join(sorted(update, key=lambda name: (name not in "AB", name))),
        dtype="/".join(dtypes),
        alpha=config.alpha_of(path) if has_scaling else None,
        scaling=scaling if has_scaling else None,
        not_finite=tuple(name for name, part in update.items() if not is_finite(part)),
        parameters=sum(math.prod(part.shape) for part in update.values()),
        configured_rank=config.rank_of(path),
        relative=_relative(fields["norm"], weight),
        **fields,
    )


def _numbers(
    path: str, update: Arrays, config: LoraConfig, split: Factorization | None, scaling: float
) -> dict[str, Any]:
    """What A and B say."""
    a, b = factors_of(path, update, config, split)
    split = split or given_split(path, update, config)
    with np.errstate(all="ignore"):
        values = abs(scaling) * singular_values((a, b))
        norm = float(np.sqrt(np.sum(values**2)))
    used = (values > _USED * values[:, :1]).sum(1) if values.size else np.zeros(1, int)
    return {
        "factorization": split.roles if split else "-",
        "a_shape": tuple(update["A"].shape),
        "b_shape": tuple(update["B"].shape),
        "rank": a.shape[2],
        "a_norm": norm_of(a),
        "b_norm": norm_of(b),
        "norm": norm,
        "largest": float(np.max(values, initial=0.0)),
        "effective_rank": effective_rank(values),
        "used_rank": int(used.min(initial=a.shape[2])),
        "side": min(a.shape[1], b.shape[2]),
        "matrices": len(a),
        "zero_a": int((~a.any((1, 2))).sum()),
        "zero_b": int((~b.any((1, 2))).sum()),
    }


def _dense(update: Arrays, scaling: float, weight: Any) -> float | None:
    """The norm of what an entry without A and B adds to its weight."""
    if "value" not in update:
        return abs(scaling) * norm_of(update["offset"])
    return norm_of(update["value"], weight) if hasattr(weight, "__array__") else None


def _relative(norm: float | None, weight: Any) -> float | None:
    if norm is None or not hasattr(weight, "__array__"):
        return None
    whole = norm_of(weight)
    return norm / whole if whole else math.inf if norm else 0.0
