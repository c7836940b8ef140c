"""The choices that cost or save time, made while tracing from static shapes: small, and replaceable.

Figures, of a train step over adapters divided by the same step without any (2 CPU cores with AVX-512, JAX 0.10.2,
float32, rank 8, transformers of n tokens whose weights are d x d and d x 4d; medians, interleaved):

                       n = 1024, d = 512    n = 1024, d = 1024    n = 4096, d = 256
    factored           1.05                 1.02                  0.98
    merged forward     1.08                 1.04                  0.95

The backward products of A and B are those of the factored form either way. The FLOPs of (x@A)@B over those of A@B are
4, 2 and 32 for the square weights. Merging keeps the merged weight for the backward pass, which is less than the
activations it saves only where the tokens are many; hence the threshold in between.

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
      merge_from: the product is computed with the merged weight where the factored form has at least so many times
        the FLOPs of merging; `float("inf")` for never.
      flatten: whether the axes of an input that are not contracted are joined to one; None for on CPU only.
    """

    merge_from: float = 12.0
    flatten: bool | None = None

    def merges(self, factored_flops: float, merged_flops: float, dtype: Any) -> bool:
        """Whether to merge; never where the sum would be rounded to less than float32 and the update lost in it."""
        exact = jnp.dtype(dtype).itemsize >= 4
        return exact and factored_flops >= self.merge_from * merged_flops

    def flattens(self) -> bool:
        """Whether to join the axes of the tokens."""
        return jax.default_backend() == "cpu" if self.flatten is None else self.flatten
