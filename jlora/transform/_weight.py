"""A weight as the transform follows it: its value, the factors whose product is its update, and its gains.

    weight = gain * (value + sum over r of the product of the factors)

A factor has some of the weight's axes, then the rank: A has the batch and in axes, B the batch and out axes. A gain,
the m / ||V|| of DoRA, has the batch and out axes, and a rank of 1. What a program does to the axes of a weight it does
to each of these parts that has them; a contraction of the weight is one of a factor first and of the other then, and a
gain multiplies the result, or the input where the program contracts its axes.

What is added to a weight, or joined with it, leaves the factors as they are. But only a sum with what follows from
params alone is a weight; `Plain` marks such values. A sum with what depends on the arguments is an activation, as
tokens plus positions are: the weight is merged there, as one that is only added.
"""

import dataclasses
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.contraction import Factorization, common_dtype, spec_of
from jlora.transform._lazy import dense, is_followed

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """An array `(*sizes of axes, r)`, r = 1 for a gain; `axes` are axes of the weight, in ascending order.

    In a probe, `origin` holds the axes that the factor began with, each with the path of its weight in params, and
    `looked_up` says that an index chose among them. `product_dtype` is the dtype that the factor brings into a product;
    None for the array's.
    """

    array: jax.Array
    axes: tuple[int, ...]
    origin: tuple[tuple[str, int], ...] = ()
    looked_up: bool = False
    product_dtype: Any = None

    @property
    def rank(self) -> int:
        return self.array.shape[-1]

    def changed(self, array: jax.Array, axes: Sequence[int] | None = None) -> "Factor":
        """The factor with another array, and the numbers of its axes in any order."""
        if axes is None:
            return dataclasses.replace(self, array=array)
        order = sorted(range(len(axes)), key=axes.__getitem__)
        if order != list(range(len(axes))):
            array = array.transpose([*order, len(axes)])
        return dataclasses.replace(self, array=array, axes=tuple(sorted(axes)))

    def scaled(self, operation: Any, by: Any) -> "Factor":
        """Multiplied or divided by numbers, in float32 at least and not rounded until it takes part in a product."""
        wide = common_dtype(self.array.dtype, jnp.float32)
        array = operation(self.array.astype(wide), jnp.asarray(by, wide))
        return dataclasses.replace(self, array=array, product_dtype=self.product_dtype or self.array.dtype)

    def cast(self, dtype: Any) -> "Factor":
        return dataclasses.replace(self, array=self.array.astype(dtype), product_dtype=None)

    def renumbered(self, new: Mapping[int, int]) -> "Factor":
        """The factor of a weight whose axis `a` has become axis `new[a]`."""
        return self.changed(self.array, [new[axis] for axis in self.axes])

    def without(self, axes: Sequence[int]) -> "Factor":
        """The factor without these axes, which have the size 1."""
        places = tuple(place for place, axis in enumerate(self.axes) if axis in axes)
        kept = [axis for axis in self.axes if axis not in axes]
        return self.changed(lax.squeeze(self.array, places), kept)

    def spread_over(self, axes: Sequence[int]) -> jax.Array:
        """The array of a gain with these axes of the weight in this order, of size 1 where it has none of them."""
        array = lax.squeeze(self.array, [len(self.axes)]).transpose(
            [self.axes.index(axis) for axis in axes if axis in self.axes]
        )
        return lax.expand_dims(array, [place for place, axis in enumerate(axes) if axis not in self.axes])

    def ordered(self, axes: Sequence[int], rank_at: int) -> jax.Array:
        """The array with its axes in the order `axes`, the rank at position `rank_at`."""
        places = [self.axes.index(axis) for axis in axes]
        places.insert(rank_at, len(self.axes))
        return self.array.transpose(places)


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A weight and its parts: a pytree, so that it passes into jit, cond and checkpoint as it is.

    `paths` are those of the weights in params that it is made of; `of_data` says that it depends on the arguments of
    the function too, as a row that was looked up. A probe has one factor of rank 1 for each axis; it
    shows how a program uses the axes.
    """

    paths: tuple[str, ...]
    value: Any  # an array, or a lazy base
    factors: tuple[Factor, ...]
    gains: tuple[Factor, ...] = ()
    probe: bool = False
    of_data: bool = False

    @property
    def path(self) -> str:
        """The paths as one word, for messages."""
        return " with ".join(self.paths)

    @property
    def shape(self) -> Shape:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    @property
    def rank(self) -> int:
        return self.factors[0].rank

    @property
    def parts(self) -> tuple[Factor, ...]:
        """The factors, then the gains."""
        return (*self.factors, *self.gains)

    @property
    def shared(self) -> tuple[int, ...]:
        """The axes that every factor has."""
        return tuple(axis for axis in range(len(self.shape)) if all(axis in factor.axes for factor in self.factors))

    @property
    def is_matrix(self) -> bool:
        """Whether two factors at least have axes of their own."""
        return sum(bool(self.own(factor)) for factor in self.factors) > 1

    @property
    def looked_up(self) -> bool:
        """Whether this is a probe of which rows were looked up."""
        return self.probe and any(factor.looked_up for factor in self.factors)

    @property
    def spec(self) -> tuple[Any, ...]:
        """For each axis those of an explicit mesh that the value is split over."""
        return () if is_followed(self.value) else spec_of(self.value)

    def own(self, factor: Factor) -> tuple[int, ...]:
        """The axes of this factor that not every factor has."""
        return tuple(axis for axis in factor.axes if axis not in self.shared)

    def size(self, axes: Sequence[int]) -> int:
        return math.prod(self.shape[axis] for axis in axes)

    def with_parts(self, value: jax.Array, parts: Sequence[Factor], **changes: Any) -> "Weight":
        """The weight with another value, and other parts in the order of `parts`."""
        count = len(parts) - len(self.gains)
        factors, gains = tuple(parts[:count]), tuple(parts[count:])
        return dataclasses.replace(self, value=value, factors=factors, gains=gains, **changes)

    def with_arrays(self, value: jax.Array, arrays: Sequence[jax.Array]) -> "Weight":
        """The same weight with another value and other arrays in its parts."""
        return self.with_parts(value, [part.changed(array) for part, array in zip(self.parts, arrays, strict=True)])

    def dense(self) -> jax.Array:
        """The merged weight: what the weight is as a lazy base."""
        return self.merged()

    def without_gains(self) -> "Weight":
        return dataclasses.replace(self, gains=())

    def delta(self) -> jax.Array:
        """The dense update, float32 at least; both factors are matrices in the product."""
        first, second = self.factors
        batch = self.shared
        dtype = common_dtype(first.array.dtype, second.array.dtype, jnp.float32)
        if any(any(spec_of(array)) for array in (self.value, first.array, second.array)):
            return self._split_delta(dtype)
        sizes = [self.shape[axis] for axis in batch]
        left, right = (
            factor.ordered((*batch, *self.own(factor)), len(factor.axes))
            .astype(dtype)
            .reshape(*sizes, self.size(self.own(factor)), self.rank)
            for factor in (first, second)
        )
        product = jnp.matmul(left, right.mT, precision=lax.Precision.HIGHEST)
        axes = (*batch, *self.own(first), *self.own(second))
        product = product.reshape([self.shape[axis] for axis in axes])
        return product.transpose([axes.index(axis) for axis in range(len(axes))])

    def _split_delta(self, dtype: Any) -> jax.Array:
        """The dense update in a mesh of explicit axes, in which none are joined, split as the value is."""
        letters, (first, second) = string.ascii_lowercase[: len(self.shape)], self.factors
        one, two = ("".join(letters[axis] for axis in factor.axes) + "R" for factor in (first, second))
        return jnp.einsum(
            f"{one},{two}->{letters}",
            first.array.astype(dtype),
            second.array.astype(dtype),
            precision=lax.Precision.HIGHEST,
            out_sharding=jax.typeof(self.value).sharding,
        )

    def merged(self) -> jax.Array:
        """The value with the update added, times the gains: in float32 at least, rounded once."""
        if is_followed(self.value):
            return dataclasses.replace(self, value=dense(self.value)).merged()
        if self.probe:
            return self.value
        delta = self.delta()
        dtype = common_dtype(delta.dtype, self.value.dtype)
        total = self.value.astype(dtype) + delta.astype(dtype)
        for gain in self.gains:
            total = total * gain.spread_over(range(len(self.shape))).astype(dtype)
        return total.astype(self.value.dtype)


def adapted(
    path: str,
    value: jax.Array,
    a: jax.Array,
    b: jax.Array,
    split: Factorization,
    scale: float,
    gain: jax.Array | None = None,
) -> Weight:
    """A weight with its adapter A `(*batch, *in, r)`, B `(*batch, r, *out)`, of which B is scaled.

    The gain has the batch and out axes in the order of the weight's.
    """
    batch, ins, outs = (split.axes(role) for role in "bio")
    b = jnp.moveaxis(b, len(batch), -1)  # (*batch, *out, r)
    first, second = Factor(a, ()).changed(a, (*batch, *ins)), Factor(b, ()).changed(b, (*batch, *outs))
    gains = []
    if gain is not None:
        gains.append(Factor(gain[..., None], tuple(sorted((*batch, *outs)))))
    return Weight((path,), value, (first, second.scaled(lax.mul, scale)), tuple(gains))


def probe(path: str, value: jax.Array) -> Weight:
    """A weight of which every axis is a factor."""
    factors = (
        Factor(jnp.zeros((size, 1), value.dtype), (axis,), ((path, axis),)) for axis, size in enumerate(value.shape)
    )
    return Weight((path,), value, tuple(factors), probe=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Plain:
    """A value without an update that follows from params and from what the program itself makes of nothing.

    The sum of a weight and such a value is a weight. The sum of a weight and anything else, as of a table of positions
    and a token, is an activation, and nothing to follow.
    """

    value: jax.Array


def _flatten(weight: Weight) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    arrays = (weight.value, *(part.array for part in weight.parts))
    marks = tuple((part.axes, part.origin, part.looked_up, part.product_dtype) for part in weight.parts)
    return arrays, (weight.paths, weight.probe, weight.of_data, len(weight.factors), marks)


def _unflatten(static: tuple[Any, ...], arrays: Sequence[Any]) -> Weight:
    paths, is_probe, of_data, count, marks = static
    value, *rest = arrays
    parts = tuple(Factor(array, *mark) for array, mark in zip(rest, marks, strict=True))
    return Weight(paths, value, parts[:count], parts[count:], is_probe, of_data)


jax.tree_util.register_pytree_node(Weight, _flatten, _unflatten)
jax.tree_util.register_pytree_node(Plain, lambda plain: ((plain.value,), None), lambda _, values: Plain(*values))


def is_weight(node: Any) -> bool:
    return isinstance(node, Weight)


def is_marked(node: Any) -> bool:
    return isinstance(node, Weight | Plain)


def of_params(node: Any) -> bool:
    """Whether a value follows from params alone, with an update or without."""
    return isinstance(node, Plain) or (isinstance(node, Weight) and not node.of_data)


def bare(node: Any) -> Any:
    """The value without its mark, if it has no update; a weight as it is."""
    return node.value if isinstance(node, Plain) else node


def base_of(node: Any) -> Any:
    """The value without the update."""
    return node.value if is_marked(node) else node
