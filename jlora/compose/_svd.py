"""The leading singular triples of a dense matrix: exact where it is small, from a random sketch where it is large."""

from collections.abc import Sequence

import numpy as np

from jlora.compose._difference import squared_residual

EXACT_SIDE = 512
OVERSAMPLES = 16
POWER_ITERATIONS = 4
_FIRST_COUNT = 32

Triples = tuple[np.ndarray, np.ndarray, np.ndarray]


def is_exact(shape: Sequence[int], count: int) -> bool:
    """Whether this many triples of a matrix of this shape are computed exactly."""
    side = min(shape)
    return side <= EXACT_SIDE or 4 * (count + OVERSAMPLES) >= side


def leading_triples(matrix: np.ndarray, count: int, stream: np.random.Generator) -> Triples:
    """U (m, k), s (k,) and V^H (k, n) of the k >= count largest singular values, largest first; all where it is exact.

    The sketch is of k = count + OVERSAMPLES random directions, sharpened by POWER_ITERATIONS rounds of the power
    iteration with an orthonormal basis in every round: Halko, Martinsson and Tropp 2011, "Finding structure with
    randomness", arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    if is_exact(matrix.shape, count):
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        return u, s, vh
    size = (matrix.shape[1], count + OVERSAMPLES)
    basis = np.linalg.qr(matrix @ stream.standard_normal(size).astype(matrix.dtype)).Q
    for _ in range(POWER_ITERATIONS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vh = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh


def cut(triples: Triples, count: int) -> Triples:
    """The first of the triples."""
    u, s, vh = triples
    return u[:, :count], s[:count], vh[:count]


def stacked_triples(matrices: np.ndarray, most: int, energy: float | None, stream: Sequence[int]) -> list[Triples]:
    """The leading triples of each matrix of a stack (k, m, n), the same number for all.

    `most` of them, or with `energy` as few as have this share of the squared Frobenius norm of the stack; the sketch
    grows until they have it.
    """
    shape = matrices.shape[1:]
    count = most if energy is None or min(shape) <= EXACT_SIDE else min(most, _FIRST_COUNT)
    while True:
        triples = [
            leading_triples(matrix, count, np.random.default_rng([*stream, entry]))
            for entry, matrix in enumerate(matrices)
        ]
        if energy is None:
            return [cut(one, most) for one in triples]
        enough = np.flatnonzero(_left(matrices, triples)[:count] <= 1 - energy + _uncertain(matrices))
        if enough.size or count == most:
            rank = int(enough[0]) + 1 if enough.size else most
            return [cut(one, rank) for one in triples]
        count = min(most, 2 * count)
        count = most if is_exact(shape, count) else count


def _left(matrices: np.ndarray, triples: Sequence[Triples]) -> np.ndarray:
    """The share of the energy beyond the first, the first two, ... triples.

    Summed from the smallest, and what a sketch does not see taken from its residual: in float32 one minus the share
    that is kept would be wrong from the seventh digit on.
    """
    squares = np.sum([s.astype(np.float64) ** 2 for _, s, _ in triples], axis=0)
    unseen = 0.0
    if len(squares) < min(matrices.shape[1:]):
        unseen = sum(
            squared_residual(m[None], (u * s)[None], vh[None]) for m, (u, s, vh) in zip(matrices, triples, strict=True)
        )
    beyond = unseen + np.append(np.cumsum(squares[::-1])[::-1][1:], 0.0)
    total = unseen + float(np.sum(squares))
    return beyond / total if total else beyond


def _uncertain(matrices: np.ndarray) -> float:
    """The share of the energy that rounding alone can give to singular values that are zero."""
    return min(matrices.shape[1:]) * float(np.finfo(matrices.dtype).eps) ** 2
