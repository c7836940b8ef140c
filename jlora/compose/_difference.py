"""The difference of two weights as matrices, its norm, and what an adapter leaves of it."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from jlora.arrays import is_floating
from jlora.contraction import Factorization
from jlora.errors import AdapterError

_BLOCK = 1 << 22


def difference_of(base: Any, tuned: Any, split: Factorization) -> np.ndarray:
    """tuned - base as a stack of matrices (n, in, out), in float32, or in float64 where one of the two is."""
    leaves = [np.asarray(base), np.asarray(tuned)]
    for leaf in leaves:
        if not is_floating(leaf.dtype):
            raise AdapterError(f"dtype {leaf.dtype} is not floating; cast or dequantize the weight first")
    wide = np.float64 if any(leaf.dtype == np.float64 for leaf in leaves) else np.float32
    sizes = [math.prod(split.sizes(leaves[0].shape, role)) for role in "bio"]
    before, after = (leaf.transpose(split.order) for leaf in leaves)  # (*batch, *in, *out)
    difference = np.array(after, dtype=wide, order="C")
    with np.errstate(invalid="ignore", over="ignore"):
        np.subtract(difference, before.astype(wide, copy=False), out=difference)
    return difference.reshape(sizes)  # (n, in, out)


def squared_norm(difference: np.ndarray) -> float:
    """||D||_F^2, summed in float64."""
    total = 0.0
    for matrix in difference:
        for rows in _rows(matrix):
            total += _square(matrix[rows].astype(np.float64))
    return total


def squared_residual(difference: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """||D - A@B||_F^2 by blocks of rows in float64; as ||D||^2 - sum s^2 it would cancel where it is small."""
    total = 0.0
    for matrix, one_a, one_b in zip(difference, a, b, strict=True):
        for rows in _rows(matrix):
            total += _square(matrix[rows].astype(np.float64) - one_a[rows] @ one_b)
    return total


def _rows(matrix: np.ndarray) -> Iterator[slice]:
    """Blocks of rows of a few megabytes each."""
    count = max(1, _BLOCK // matrix.shape[1])
    return (slice(start, start + count) for start in range(0, len(matrix), count))


def _square(block: np.ndarray) -> float:
    return float(np.vdot(block, block))
