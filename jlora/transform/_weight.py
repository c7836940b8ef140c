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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.contraction import Factorization
from jlora.products import common_dtype, spec_of
from jlora.transform._jax import varying_axes
from jlora.transform._lazy import dense, is_packed

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """An array `(*sizes of axes, r)`, r = 1 for a gain; `axes` are axes of the weight, in ascending order.

    `product_dtype` is the dtype that the factor brings into a product; None for the array's.
    """

    array: jax.Array
    axes: tuple[int, ...]
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

    def after_lookup(self) -> "Factor":
        """The factor when an index has chosen along its axes."""
        return self

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

    def transposed(self, axes: Sequence[int], rank_at: int) -> jax.Array:
        """The array with its axes in the order `axes`, the rank at position `rank_at`."""
        places = [self.axes.index(axis) for axis in axes]
        places.insert(rank_at, len(self.axes))
        return self.array.transpose(places)


Parts = Sequence[Factor] | str  # the factors and the gains, or why there are none


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """A weight and its parts: a pytree, so that it passes into jit, cond and checkpoint as it is.

    `paths` are those of the weights in params that it is made of; `of_data` says that it depends on the arguments of
    the function too, as a row that was looked up.
    """

    paths: tuple[str, ...]
    value: Any  # an array, or a lazy base
    factors: tuple[Factor, ...]
    gains: tuple[Factor, ...] = ()
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
        """Whether it is rows that were looked up; only a `Probe` goes on with them as a weight."""
        return False

    @property
    def spec(self) -> tuple[Any, ...]:
        """For each axis those of an explicit mesh that the value is split over."""
        return () if is_packed(self.value) else spec_of(self.value)

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

    def together(self, groups: Sequence[Sequence[int]]) -> "Weight":
        """The weight before the axes of each group become one."""
        return self

    def joined(self, weights: Sequence["Weight"], shape: Shape, rule: Callable[..., Parts]) -> Parts:
        """The parts of what this weight, the first of several, becomes with the others, by a rule."""
        return rule(weights, shape)

    def order(self, roles: str) -> tuple[int, int] | None:
        """The order of the factors in which the first has the in axes, the second the out axes, both the batch axes."""
        used = {role: tuple(axis for axis, found in enumerate(roles) if found == role) for role in "bio"}
        if self.shared != used["b"]:
            return None
        owns = [self.own(factor) for factor in self.factors]
        return next((order for order in ((0, 1), (1, 0)) if [used["i"], used["o"]] == [owns[n] for n in order]), None)

    def product(self, update: Callable[[jax.Array, "Weight"], jax.Array], x: jax.Array) -> Any:
        """The product of the input with the factors, in their common dtype, as matrix products take them."""
        dtypes = [jnp.dtype(factor.product_dtype or factor.array.dtype) for factor in self.factors]
        dtypes.append(x.dtype)
        small = any(dtype.itemsize < 2 for dtype in dtypes)
        dtype = jnp.dtype(jnp.float32) if small else common_dtype(*dtypes)
        arrays = [factor.array.astype(dtype) for factor in self.factors]
        return update(x.astype(dtype), self.with_arrays(self.value, arrays))

    def differs(self, parts: Sequence[Factor], names: Sequence[str]) -> bool:
        """Whether these parts may differ between devices along these axes of the mesh."""
        return any(differs(part, names) for part in parts)

    def reading(self, path: str, primitive: str, roles: str) -> tuple[str, str]:
        """The primitive and the roles under which its use in this one is noted for the weight at `path`."""
        return primitive, roles

    def delta(self) -> jax.Array:
        """The dense update, float32 at least; both factors are matrices in the product."""
        first, second = self.factors
        batch = self.shared
        dtype = common_dtype(first.array.dtype, second.array.dtype, jnp.float32)
        if any(any(spec_of(array)) for array in (self.value, first.array, second.array)):
            return self._split_delta(dtype)
        sizes = [self.shape[axis] for axis in batch]
        left, right = (
            factor.transposed((*batch, *self.own(factor)), len(factor.axes))
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
        if is_packed(self.value):
            return dataclasses.replace(self, value=dense(self.value)).merged()
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


def differs(part: Factor, names: Sequence[str]) -> bool:
    """Whether a part may differ along these axes of the mesh; without check_vma nothing says that it does not."""
    checked = bool(varying_axes(lax.axis_index(tuple(names))))
    return not checked or bool(set(names) & set(varying_axes(part.array)))


@dataclasses.dataclass(frozen=True, eq=False)
class Plain:
    """A value without an update that follows from params and from what the program itself makes of nothing.

    The sum of a weight and such a value is a weight. The sum of a weight and anything else, as of a table of positions
    and a token, is an activation, and nothing to follow.
    """

    value: jax.Array


jax.tree_util.register_dataclass(Factor, ["array"], ["axes", "product_dtype"])
jax.tree_util.register_dataclass(Weight, ["value", "factors", "gains"], ["paths", "of_data"])
jax.tree_util.register_dataclass(Plain, ["value"], [])


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
