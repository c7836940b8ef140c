"""The choices that cost or save time, made while tracing from static shapes: small, and replaceable.

A product of x `(rows, ins)` with a weight `(ins, outs)` and its adapter can be computed as x@W + (x@A)@B, which passes
over rows x outs numbers more, or as x@(W + A@B), which passes over ins x outs numbers more. Its backward pass needs
g@(W + A@B).T, as g@W.T + (g@B.T)@A.T or with the merged weight, if that is kept. The gradients of A and B are products
of rank-sized arrays either way.

Figures, of a train step over adapters divided by the same step without any: 2 CPU cores with AVX-512, JAX 0.10.2,
float32, rank 8, transformers of 1024 tokens; medians of 15 rounds, interleaved:

                                        width 512       hidden 2048     temporaries
    factored                            1.10                            342 MB
    merged forward from rows = 2 ins    1.08                            309 MB
    the merged weight kept too          1.07                            335 MB

With 4096 tokens and width 256 (rows = 16 outs) keeping it is 3 % faster, and it is small beside the activations.

Tokens in several axes (batch, time) make gradients of A and B that are contracted over several axes: on CPU these are
transposed copies of whole activations, and the step takes twice as long. Elsewhere the axes stay as they are, since
joining them can move data between devices where they are sharded.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["CostModel"]


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Decides, while tracing, how each product of an adapted weight is computed.

    Attributes:
      merge_from: the weight is merged for the forward pass where the rows are at least so many times its in axes;
        `float("inf")` for never.
      keep_from: a merged weight is kept for the backward pass where the rows are at least so many times its out axes.
      flatten: whether the axes of an input that are not contracted are joined to one; None for on CPU only.
    """

    merge_from: float = 1.5
    keep_from: float = 6.0
    flatten: bool | None = None

    def merges(self, rows: float, ins: int, dtype: Any) -> bool:
        """Whether to merge; never where the sum would be rounded to less than float32 and the update lost in it."""
        return jnp.dtype(dtype).itemsize >= 4 and rows >= self.merge_from * ins

    def keeps(self, rows: float, outs: int) -> bool:
        """Whether to use the merged weight in the backward pass too."""
        return rows >= self.keep_from * outs

    def flattens(self) -> bool:
        """Whether to join the axes of the tokens."""
        return jax.default_backend() == "cpu" if self.flatten is None else self.flatten
