"""How A and B of one matrix begin."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jlora.errors import AdapterError

Array = np.ndarray[Any, Any]


class Begin(NamedTuple):
    """A start of one matrix W (in, out).

    Attributes:
      a: (in, r).
      b: (r, out).
      taken: whether scaling * A @ B is taken out of W, so that the model begins unchanged.
    """

    a: Array
    b: Array
    taken: bool


MatrixStart = Callable[[np.random.Generator, Array, int, float], Begin]
"""`(random numbers, W (in, out) in float32, rank, scaling) -> Begin`."""


def pissa(stream: np.random.Generator, weight: Array, rank: int, scaling: float) -> Begin:
    """A = U sqrt(S / scaling) and B = sqrt(S / scaling) V of the largest singular triples of W = U S V.

    Meng, Wang and Zhang 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
    Models", arXiv 2404.02948. They are exact up to a side of 512, and beyond from a random sketch that is sharpened in
    four rounds, as of PEFT's "pissa_niter_4".
    """
    from jlora.compose import leading_triples

    if not scaling > 0:
        raise AdapterError(f"scaling {scaling:g}: PiSSA divides singular values by it; give an alpha above 0")
    u, s, vh = leading_triples(weight, rank, stream)
    root = np.sqrt(s[:rank] / scaling)
    return Begin(u[:, :rank] * root, root[:, None] * vh[:rank], True)


def olora(stream: np.random.Generator, weight: Array, rank: int, scaling: float) -> Begin:
    """B has the first r columns of Q, A the first r rows of R, of W^T = Q R.

    Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775.
    """
    q, r = np.linalg.qr(weight.T)  # (out, k), (k, in)
    return Begin(r[:rank].T, q[:, :rank].T, True)


def mica(stream: np.random.Generator, weight: Array, rank: int, scaling: float) -> Begin:
    """B has the right singular vectors (r, out) of the smallest singular values of W, A is zero.

    "Minor Component Adaptation", arXiv 2604.01694. B stays there: train A alone, by `jlora.optim.freeze_parts(adapters,
    "B")`.
    """
    _, _, vh = np.linalg.svd(weight, full_matrices=False)
    return Begin(np.zeros((weight.shape[0], rank), weight.dtype), vh[-rank:], False)


def orthogonal(stream: np.random.Generator, weight: Array, rank: int, scaling: float) -> Begin:
    """A = X Q1 / 10 and B = (Y Q2)^T / 10 of random X and Y, with the odd and the even rows of an orthogonal matrix.

    So A @ B is zero, and neither factor is (D. Datta, "Rethinking LoRA initialisation", as in PEFT).
    """
    if rank % 2:
        raise AdapterError(f"rank {rank}: an orthogonal start gives each factor half of the rank: give an even one")
    q, _ = np.linalg.qr(stream.standard_normal((rank, rank)))
    ins, outs = weight.shape
    a = stream.standard_normal((ins, rank // 2)) @ q[0::2] / 10
    b = (stream.standard_normal((outs, rank // 2)) @ q[1::2]).T / 10
    return Begin(a.astype(weight.dtype), b.astype(weight.dtype), False)


STARTS: dict[str, MatrixStart] = {"pissa": pissa, "olora": olora, "mica": mica, "orthogonal": orthogonal}


def check_begin(begin: Begin, shape: tuple[int, int], rank: int) -> None:
    """Refuses what a start of a user's own returned, if it does not fit."""
    wanted = ((shape[0], rank), (rank, shape[1]))
    found = tuple(np.shape(begin.a)), tuple(np.shape(begin.b))
    if found != wanted:
        raise AdapterError(f"the start returned A {found[0]} and B {found[1]}: wanted A {wanted[0]} and B {wanted[1]}")
    if not all(math.isfinite(float(np.abs(part).max(initial=0))) for part in (begin.a, begin.b)):
        raise AdapterError("the start returned a NaN or an infinity")
