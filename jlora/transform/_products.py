"""Primitives that are linear in a weight: how each uses its axes, and its product with the factors.

A rule is called with the weight, the other operand and the parameters of the primitive. It returns a `Product`, or
the reason why there is none.
"""

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.products import factored_product, spec_of, spec_of_sharding
from jlora.transform._weight import Factor, Weight

Update = Callable[[jax.Array, Weight], jax.Array]


@dataclasses.dataclass(frozen=True)
class Product:
    """A product that can be computed from the factors.

    Attributes:
      roles: one letter for each axis of the weight as it is used here: b, i or o.
      update: the product of the input with the factors, from the input and the weight.
      along_y: the array of a gain, to be multiplied with the output.
      along_x: the same for the input, of a gain whose axes are contracted; None where that is not the same.
      base: the product with a value of the weight, where it is not the primitive as it stands.
      mergeable: whether the merged form may be chosen where it is cheaper.
    """

    roles: str
    update: Update
    along_y: Callable[[Factor], jax.Array]
    along_x: Callable[[Factor], jax.Array] | None = None
    base: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    mergeable: bool = True


@dataclasses.dataclass(frozen=True)
class _Dot:
    """A dot_general as letters, one for each axis of the input, the weight and the output.

    `contracted` has those of the contracted axes in the order of the equation, in which they are summed.
    """

    x: str
    weight: str
    y: str
    contracted: str

    @property
    def rest(self) -> str:
        """The axes that only the input has, in the order of both input and output."""
        return "".join(c for c in self.x if c not in self.weight)

    @property
    def roles(self) -> str:
        return "".join("o" if c not in self.x else "b" if c in self.y else "i" for c in self.weight)

    def flattened(self) -> "_Dot":
        """The same with one letter in place of the axes that only the input has."""
        rest = self.rest
        return dataclasses.replace(self, x=self.x.replace(rest, rest[0]), y=self.y.replace(rest, rest[0]))

    def numbers(self, *, weight_first: bool) -> Any:
        """The dimension numbers that give the output in its order."""
        batch = "".join(c for c in self.y if c in self.x and c in self.weight)
        sides = (self.weight, self.x) if weight_first else (self.x, self.weight)
        contracting, of_batch = ([[*map(side.index, group)] for side in sides] for group in (self.contracted, batch))
        return contracting, of_batch


def _letters(weight: Weight, x: jax.Array, dimension_numbers: Any, weight_first: bool) -> _Dot:
    contracting, batch = dimension_numbers
    (x_in, w_in), (x_batch, w_batch) = (pair[::-1] if weight_first else pair for pair in (contracting, batch))
    w = string.ascii_letters[: len(weight.shape)]
    free = iter(string.ascii_letters[len(w) :])
    shared = {axis: w[of] for axis, of in zip((*x_in, *x_batch), (*w_in, *w_batch), strict=True)}
    xs = "".join(shared[axis] if axis in shared else next(free) for axis in range(x.ndim))
    rest = "".join(c for c in xs if c not in w)
    outs = "".join(c for c in w if c not in xs)
    batched = "".join(w[axis] for axis in w_batch)
    y = batched + (outs + rest if weight_first else rest + outs)
    return _Dot(xs, w, y, "".join(w[axis] for axis in w_in))


def dot_general(
    weight: Weight,
    x: jax.Array,
    *,
    weight_first: bool,
    flatten: bool,
    dimension_numbers: Any,
    precision: Any,
    preferred_element_type: Any,
    out_sharding: Any = None,
    **_: Any,
) -> Product | str:
    """Any batch, contracting and free axes, the weight on either side."""
    whole = _letters(weight, x, dimension_numbers, weight_first)
    explicit = out_sharding is not None or any(spec_of(x)) or any(weight.spec)
    flatten = flatten and not explicit and len(whole.rest) > 1 and whole.rest in whole.x
    dot = whole.flattened() if flatten else whole
    order = weight.order(dot.roles)
    if order is None and not _narrows(weight, dot.roles):
        return "it contracts no in or out axis of the adapter; with what it contracts as an in axis it is factored"
    sizes = dict(zip(whole.x + whole.weight, x.shape + weight.shape, strict=True))
    y_shape = [sizes[c] for c in whole.y]
    if flatten:
        sizes[dot.rest] = math.prod(sizes[c] for c in whole.rest)
    x_shape = [sizes[c] for c in dot.x]

    def base(x: jax.Array, value: jax.Array) -> jax.Array:
        sides = (value, x.reshape(x_shape)) if weight_first else (x.reshape(x_shape), value)
        y = lax.dot_general(
            *sides,
            dot.numbers(weight_first=weight_first),
            precision=precision,
            preferred_element_type=preferred_element_type,
            **({} if out_sharding is None else {"out_sharding": out_sharding}),
        )
        return y.reshape(y_shape)

    def update(x: jax.Array, weight: Weight) -> jax.Array:
        form = functools.partial(_in_axes_first, order=order or (0, 1))
        if order is None or explicit:
            form = functools.partial(_larger_contraction_first, out_sharding=out_sharding)
        return form(x.reshape(x_shape), weight, dot, precision=precision).reshape(y_shape)

    return Product(dot.roles, update, along(whole.weight, whole.y), along(whole.weight, whole.x), base)


def along(weight: str, letters: str) -> Callable[[Factor], jax.Array]:
    """Spreads a gain over axes with these letters, from the letters of the weight's axes."""
    return lambda gain: gain.spread_over([weight.find(c) for c in letters])


def _in_axes_first(x: jax.Array, weight: Weight, dot: _Dot, *, order: tuple[int, int], precision: Any) -> jax.Array:
    """The product with the factor that has the in axes, then with the one that has the out axes."""
    first, second = (weight.factors[n] for n in order)
    shared, ins, outs = weight.shared, weight.own(first), weight.own(second)
    batch = "".join(dot.weight[axis] for axis in shared)
    placed = batch + "".join(c for c in dot.x if c not in batch)
    product = factored_product(
        x.transpose([dot.x.index(c) for c in placed]),
        first.transposed((*shared, *ins), len(first.axes)),
        second.transposed((*shared, *outs), len(shared)),
        [placed.index(dot.weight[axis]) for axis in ins],
        len(shared),
        precision=precision,
        flatten=False,
    )
    found = batch + dot.rest + "".join(dot.weight[axis] for axis in outs)
    return product.transpose([found.index(c) for c in dot.y])


def _narrows(weight: Weight, roles: str) -> bool:
    """Whether a product with one factor leaves the rank in place of an axis."""
    return any(roles[axis] == "i" for factor in weight.factors for axis in weight.own(factor))


def _larger_contraction_first(
    x: jax.Array, weight: Weight, dot: _Dot, *, precision: Any, out_sharding: Any = None
) -> jax.Array:
    """The product with the factor that has more of what is contracted, then with the other one.

    In an explicit mesh no axes are joined, and what has the sharding of the output has it in between too.
    """

    def contracted(factor: Factor) -> int:
        return weight.size([axis for axis in weight.own(factor) if dot.roles[axis] == "i"])

    first, second = sorted(weight.factors, key=contracted, reverse=True)
    r = string.ascii_letters[-1]
    one, two = ("".join(dot.weight[axis] for axis in factor.axes) + r for factor in (first, second))
    kept = "".join(dict.fromkeys(c for c in dot.x + one if c in dot.y + two))
    of_y = spec_of_sharding(out_sharding, len(dot.y))
    split = dict(zip(dot.x, spec_of(x), strict=True)) | dict(zip(dot.y, of_y, strict=True))
    inner, outer = (_to(out_sharding, spec) for spec in (map(split.get, kept), of_y))
    hidden = jnp.einsum(f"{dot.x},{one}->{kept}", x, first.array, precision=precision, **inner)
    return jnp.einsum(f"{kept},{two}->{dot.y}", hidden, second.array, precision=precision, **outer)


def _to(out_sharding: Any, spec: Iterable[Any]) -> dict[str, Any]:
    """What tells a product to split its result so, where the equation says how its own one is split."""
    return {} if out_sharding is None else {"out_sharding": NamedSharding(out_sharding.mesh, PartitionSpec(*spec))}


def ragged_dot_general(
    weight: Weight,
    x: jax.Array,
    group_sizes: jax.Array,
    *,
    weight_first: bool,
    ragged_dot_dimension_numbers: lax.RaggedDotDimensionNumbers,
    precision: Any,
    group_offset: Any,
    out_sharding: Any = None,
    **_: Any,
) -> Product | str:
    """Rows sorted by expert: x `(m, k)`, weight `(experts, k, n)`."""
    numbers: Any = ragged_dot_dimension_numbers
    (x_in, w_in), (x_batch, _) = numbers.dot_dimension_numbers
    groups: tuple[int, ...] = tuple(numbers.rhs_group_dimensions)
    if (
        weight_first
        or x_batch
        or len(groups) != 1
        or len(x_in) != 1
        or len(weight.shape) != 3
        or group_offset is not None
    ):
        return "a form of ragged_dot that is not rows times (experts, in, out)"
    roles = "".join("b" if d in groups else "i" if d in w_in else "o" for d in range(3))
    order = weight.order(roles)
    if order is None:
        return "the groups are not the batch axis of the adapter"

    def update(x: jax.Array, weight: Weight) -> jax.Array:
        first, second = (weight.factors[n] for n in order)
        a = first.transposed((*groups, *w_in), 2)
        b = second.transposed((*groups, roles.index("o")), 1)
        rows = jnp.moveaxis(x, x_in[0], -1)
        of_rows, of_features = spec_of_sharding(out_sharding, 2)
        inner, outer = (_to(out_sharding, (of_rows, last)) for last in (None, of_features))
        hidden = lax.ragged_dot(rows, a, group_sizes, precision=precision, **inner)
        return lax.ragged_dot(hidden, b, group_sizes, precision=precision, **outer)

    def of_rows(gain: Factor, axis: int) -> jax.Array:
        """For each row the gain of its group along an axis of the weight."""
        array = gain.spread_over((*groups, axis))  # (experts, n)
        return jnp.repeat(array, group_sizes, 0, total_repeat_length=x.shape[1 - x_in[0]])  # (m, n)

    return Product(
        roles,
        update,
        lambda gain: of_rows(gain, roles.index("o")),
        lambda gain: jnp.moveaxis(of_rows(gain, w_in[0]), 1, x_in[0]),
        mergeable=False,
    )


def conv_general_dilated(
    weight: Weight,
    x: jax.Array,
    *,
    weight_first: bool,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    batch_group_count: int,
    out_sharding: Any = None,
    **params: Any,
) -> Product | str:
    """A convolution with A, whose features are the rank, then a product with B at every place.

    With groups, A is repeated for each group of outputs, and the rank of every group meets its part of B.
    """
    out_axis, groups = dimension_numbers.rhs_spec[0], feature_group_count
    if weight_first or batch_group_count != 1:
        return "the weight is not the kernel of the convolution"
    roles = "".join("o" if d == out_axis else "i" for d in range(len(weight.shape)))
    order = weight.order(roles)
    if order is None:
        return "the features of the convolution are not the out axis of the adapter"
    explicit = out_sharding is not None or any(spec_of(x)) or any(weight.spec)
    if explicit and groups > 1:
        return "a convolution with groups in a mesh of explicit axes"

    def update(x: jax.Array, weight: Weight) -> jax.Array:
        first, second = (weight.factors[n] for n in order)
        rank, features = weight.rank, weight.shape[out_axis]
        a = first.transposed(weight.own(first), out_axis)
        channel = dimension_numbers.out_spec[1]
        of_places = list(spec_of_sharding(out_sharding, x.ndim))
        of_features = of_places.pop(channel)
        inner = _to(out_sharding, (*of_places[:channel], None, *of_places[channel:]))
        outer = _to(out_sharding, (*of_places, of_features))
        hidden = lax.conv_general_dilated(
            x,
            jnp.concatenate([a] * groups, out_axis) if groups > 1 else a,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            dimension_numbers,
            feature_group_count=groups,
            precision=params["precision"],
            **inner,
        )
        hidden = jnp.moveaxis(hidden, channel, -1)
        places = hidden.shape[:-1]
        if explicit:  # in which no axes are joined
            y = jnp.einsum("...r,or->...o", hidden, second.array, precision=params["precision"], **outer)
            return jnp.moveaxis(y, -1, channel)
        b = second.array.reshape(groups, features // groups, rank)
        rows = hidden.reshape(math.prod(places), groups, rank)
        y = jnp.einsum("ngr,gor->ngo", rows, b, precision=params["precision"])
        return jnp.moveaxis(y.reshape(*places, features), -1, channel)

    def along_features(gain: Factor) -> jax.Array:
        axes = [-1] * x.ndim
        axes[dimension_numbers.out_spec[1]] = out_axis
        return gain.spread_over(axes)

    return Product(roles, update, along_features)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a product costs: the rows of the input for each batch element, the sizes of the weight, and FLOPs."""

    rows: float
    ins: int
    outs: int
    base: float
    factored: float
    merged: float


def known(size: Any) -> float:
    """A number of elements; not a number where an axis is symbolic, so that what depends on it is never chosen."""
    return size if isinstance(size, int) else math.nan


def cost(weight: Weight, roles: str, outputs: float) -> Cost:
    """The cost of a product with `outputs` numbers; merging alone is `merged`."""
    batch, ins, outs = (weight.size([axis for axis, found in enumerate(roles) if found == role]) for role in "bio")
    every = outputs / outs
    return Cost(
        rows=every / batch,
        ins=ins,
        outs=outs,
        base=2.0 * outputs * ins,
        factored=2.0 * every * weight.rank * (ins + outs),
        merged=2.0 * weight.rank * math.prod(weight.shape),
    )
