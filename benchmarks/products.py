"""The products that a model is made of, and the ways to write each: every model is expressed once, over these.

A model calls `products.linear(x, weight)` and its siblings. What a weight is depends on the form: an array in the
base, an `Adapted` in the forms written by hand, a layer of some framework in `benchmarks.rivals`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

RANK = 8
ALPHA = 16.0
SCALE = ALPHA / RANK


class Adapted(NamedTuple):
    """A weight with its adapter; a pytree, so that a stack of them passes through scan."""

    weight: jax.Array
    a: jax.Array
    b: jax.Array


def bind(params: Any, adapters: Any) -> Any:
    """The params with an `Adapted` in place of each weight that has an adapter."""

    def bound(weight: jax.Array, adapter: Any) -> Any:
        return weight if adapter is None else Adapted(weight, adapter["A"], adapter["B"])

    return jax.tree.map(bound, params, adapters)


class Plain:
    """The products as everybody writes them; this is what `jlora.lora` gets to see."""

    def linear(self, x: jax.Array, weight: Any) -> jax.Array:
        return x @ weight

    def conv(self, x: jax.Array, kernel: Any, stride: int = 1) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def take(self, table: Any, ids: jax.Array) -> jax.Array:
        return jnp.take(table, ids, axis=0)

    def project(self, x: jax.Array, table: Any) -> jax.Array:
        """The logits of a head that is tied to an embedding table."""
        return x @ table.T

    def scan(self, block: Callable[..., jax.Array], x: jax.Array, layers: Any) -> jax.Array:
        """`block(products, layer, x)` for each layer of a stack, nothing but its input kept for the backward pass."""
        one = jax.checkpoint(lambda x, layer: block(self, layer, x))
        return lax.scan(lambda x, layer: (one(x, layer), None), x, layers)[0]


class Flat(Plain):
    """Every axis but the features flattened to one before each product, which the CPU's backward pass likes."""

    def linear(self, x: jax.Array, weight: Any) -> jax.Array:
        return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], weight.shape[-1])

    def project(self, x: jax.Array, table: Any) -> jax.Array:
        return self.linear(x, table.T)


class Hand(Plain):
    """LoRA as one writes it by hand, `x@W + s*(x@A)@B`, over plain or flat products."""

    def __init__(self, base: Plain) -> None:
        self.base = base

    def linear(self, x: jax.Array, weight: Any) -> jax.Array:
        base = self.base
        if not isinstance(weight, Adapted):
            return base.linear(x, weight)
        return base.linear(x, weight.weight) + SCALE * base.linear(base.linear(x, weight.a), weight.b)

    def conv(self, x: jax.Array, kernel: Any, stride: int = 1) -> jax.Array:
        base = self.base
        if not isinstance(kernel, Adapted):
            return base.conv(x, kernel, stride)
        return base.conv(x, kernel.weight, stride) + SCALE * base.linear(base.conv(x, kernel.a, stride), kernel.b)

    def take(self, table: Any, ids: jax.Array) -> jax.Array:
        base = self.base
        if not isinstance(table, Adapted):
            return base.take(table, ids)
        return base.take(table.weight, ids) + SCALE * base.linear(base.take(table.a, ids), table.b)

    def project(self, x: jax.Array, table: Any) -> jax.Array:
        base = self.base
        if not isinstance(table, Adapted):
            return base.project(x, table)
        return base.project(x, table.weight) + SCALE * base.project(base.project(x, table.b), table.a)


class Merged(Plain):
    """`x@(W + s*A@B)`: the dense update is built in every step. Every other form is checked against this one."""

    def linear(self, x: jax.Array, weight: Any) -> jax.Array:
        return super().linear(x, merged(weight))

    def conv(self, x: jax.Array, kernel: Any, stride: int = 1) -> jax.Array:
        return super().conv(x, merged(kernel), stride)

    def take(self, table: Any, ids: jax.Array) -> jax.Array:
        return super().take(merged(table), ids)

    def project(self, x: jax.Array, table: Any) -> jax.Array:
        return super().project(x, merged(table))


def merged(weight: Any) -> jax.Array:
    """The dense weight; A and B of a convolution, or of a stack, are batches of matrices."""
    return weight.weight + SCALE * (weight.a @ weight.b) if isinstance(weight, Adapted) else weight


PLAIN = Plain()
FLAT = Flat()
