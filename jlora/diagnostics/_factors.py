"""Norms and singular values from A and B on the host, in float64, the delta never built; and how numbers are shown."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jlora.adapter import is_entry, matrices_of
from jlora.config import LoraConfig
from jlora.contraction import Factorization
from jlora.errors import AdapterError, TargetError, listed
from jlora.paths import leaves_by_path
from jlora.tree import batch_dims_of

Arrays = Mapping[str, Any]
Factors = tuple[np.ndarray, np.ndarray]

_BLOCK = 1 << 20
_ROWS = 256


def entries_of(adapters: Any, what: str = "adapters") -> dict[str, Arrays]:
    """The entries of a tree of adapters by path; a TargetError names every leaf that is none."""
    found = leaves_by_path(adapters, is_leaf=is_entry)
    wrong = [f"{path or 'the root'} ({type(leaf).__name__})" for path, leaf in found.items() if not is_entry(leaf)]
    if wrong:
        raise TargetError(f"{what}: {listed(wrong)}: wanted an adapter {{'A', 'B'}} or None at each leaf")
    return found


def factors_of(path: str, update: Arrays, config: LoraConfig, split: Factorization | None = None) -> Factors:
    """A (n, in, r) and B (n, r, out) of the n matrices of a stack, in float64; `split` is that of the weight, if known.

    Raises:
      TargetError: A and B do not fit each other, or in two ways.
    """
    try:
        batch = batch_dims_of(path, update, config) if split is None else len(split.axes("b"))
    except AdapterError as error:
        raise TargetError(f"{path or 'the root'}: {error}") from None
    return matrices_of(update, batch)


def singular_values(factors: Factors) -> np.ndarray:
    """The singular values of each A@B, (n, min(in, r, out)), largest first; nan where a matrix is not finite.

    A = Q_a R_a and B^T = Q_b R_b, so that A@B has the singular values of R_a R_b^T.
    """
    a, b = factors
    values = np.zeros((len(a), min(a.shape[1], a.shape[2], b.shape[2])))
    if values.size:
        for row, one_a, one_b in zip(values, a, b, strict=True):
            core = triangle(one_a) @ triangle(one_b.T).T
            row[:] = np.linalg.svd(core, compute_uv=False)[: len(row)] if np.isfinite(core).all() else np.nan
    return values


def triangle(tall: np.ndarray) -> np.ndarray:
    """R of the QR of a matrix (m, r), (min(m, r), r); nan where the matrix is not finite.

    By blocks of rows, and then of their R, which stay in the cache: Demmel et al. 2012, "Communication-optimal parallel
    and sequential QR and LU factorizations", arXiv 0808.2664.
    """
    rows, rank = tall.shape
    size = max(_ROWS, 4 * rank)
    if not rank or not rows:
        return np.zeros((min(rows, rank), rank))
    with np.errstate(all="ignore"):
        if not np.isfinite(tall).all():
            return np.full((min(rows, rank), rank), np.nan)
        if rows >= 2 * size:
            whole = rows // size * size
            heads = np.asarray(np.linalg.qr(tall[:whole].reshape(-1, size, rank), mode="r"))
            tall = np.concatenate([heads.reshape(-1, rank), tall[whole:]])
        return np.asarray(np.linalg.qr(tall, mode="r"))


def effective_rank(values: np.ndarray) -> float:
    """exp(entropy of the singular values over their sum), the mean over a stack (n, k); 0 for a zero matrix.

    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO.
    """
    if not values.size:
        return 0.0
    ranks = []
    for row in values:
        total = row.sum()
        shares = row[row > 0] / total if total else row[:0]
        entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)))
        ranks.append(float("nan") if np.isnan(total) else float(np.exp(entropy)) if total else 0.0)
    return float(np.mean(ranks))


def norm_of(array: Any, other: Any = None) -> float:
    """The Frobenius norm of an array, or of its difference to another of its shape; blocks at a time in float64."""
    with np.errstate(all="ignore"):
        return math.sqrt(sum(float(np.vdot(block, block)) for block in _differences(array, other)))


def is_finite(array: Any) -> bool:
    """Whether an array holds neither NaN nor infinity."""
    with np.errstate(all="ignore"):
        return all(np.isfinite(block).all() for block in _differences(array, None))


def largest_difference(left: Any, right: Any) -> float:
    """The largest absolute difference of two arrays of one shape; 0 where their bytes are the same."""
    if is_same(left, right):
        return 0.0
    with np.errstate(all="ignore"):
        return max((float(np.max(np.abs(block))) for block in _differences(left, right)), default=0.0)


def _differences(left: Any, right: Any) -> Iterator[np.ndarray]:
    flat = np.asarray(left).reshape(-1)
    other = None if right is None else np.asarray(right).reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK].astype(np.float64)
        yield block if other is None else block - other[start : start + _BLOCK].astype(np.float64)


def is_same(left: Any, right: Any) -> bool:
    """Whether two arrays have one dtype, one shape and the same bytes."""
    x, y = np.asarray(left), np.asarray(right)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def short(number: float | None) -> str:
    """Three significant digits; - for what there is not."""
    return "-" if number is None else f"{number:.3g}"


def count(number: int, one: str, many: str = "") -> str:
    """`1 adapter`, `1,234 adapters`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def sized(shape: Sequence[int] | None) -> str:
    """`5x7`."""
    return "-" if shape is None else "x".join(map(str, shape)) or "scalar"
