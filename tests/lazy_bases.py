"""A lazy base for tests: int8 numbers with scales."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.tree_util.register_dataclass, data_fields=["numbers", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Int8:
    """`numbers * scale`, with a scale for every column; layers in a stack have scales of their own."""

    numbers: jax.Array  # (*batch, in, out)
    scale: jax.Array  # (*batch, 1, out)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.numbers.shape)

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    @property
    def batch_dims(self) -> int:
        return len(self.shape) - 2

    def dense(self) -> jax.Array:
        return self.numbers.astype(self.dtype) * self.scale


def packed(seed: int, *shape: int, dtype: Any = "float32", exact: bool = False) -> Int8:
    """Random numbers and scales.

    With `exact` the scales are powers of two: numbers * scale is then the same however XLA rounds it, as where it makes
    numbers * scale + update one loop and rounds it once.
    """
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.002, 0.01, (*shape[:-2], 1, shape[-1]))
    if exact:
        scale = np.exp2(np.round(np.log2(scale)))
    return Int8(jnp.asarray(rng.integers(-127, 128, shape), jnp.int8), jnp.asarray(scale, dtype))


def is_int8(node: Any) -> bool:
    return isinstance(node, Int8)


def densified(params: Any) -> Any:
    """The same params with ordinary arrays."""
    return jax.tree.map(lambda node: node.dense() if is_int8(node) else node, params, is_leaf=is_int8)
