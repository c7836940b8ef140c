"""What primitives that make one weight of several operands do to the factors.

The parts that a rule is called with are weights, values without an update that follow from params alone (`Plain`), and
scalars. It returns the factors of the result, or the reason why the weights have to be merged.

A sum has the factors of every weight in it, side by side along the rank. So has a concatenation along an axis that A
alone has, or B alone: the factors with the axis stand in blocks, and parts that share the other factor share a block.
Along a batch axis, as that of a stack, both factors are concatenated, and smaller ranks filled up with zeros.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.contraction import common_dtype
from jlora.transform._jax import varied, varying_axes
from jlora.transform._structure import broadcast_in_dim
from jlora.transform._weight import Factor, Plain, Shape, Weight, base_of, is_marked, is_weight, of_params

Factors = Sequence[Factor] | str

APART = "the weights split into in and out axes in different ways"
WIDE = "the ranks together are no smaller than the weight"
SPREAD = "a scalar of the weight is spread over another operand"
ELEMENTS = "which weight it takes differs from element to element"
WITHIN = "a part of it is replaced by an adapted weight"


def add(parts: Sequence[Any], shape: Shape, **_: Any) -> Factors:
    return _sum(parts, shape)


def sub(parts: Sequence[Any], shape: Shape, **_: Any) -> Factors:
    first, second = parts
    return _sum([first, _negated(second)], shape)


def scatter_add(parts: Sequence[Any], shape: Shape, *_: Any, **__: Any) -> Factors:
    """Something is added at some places, or taken off."""
    weight, other = parts
    return WITHIN if is_weight(other) else _sum([weight], shape)


def concatenate(parts: Sequence[Any], shape: Shape, *, dimension: int) -> Factors:
    weights = [part for part in parts if is_weight(part)]
    if weights[0].probe:
        return _one_probe(weights, shape)
    found = _aligned(weights)
    if found is None:
        return APART
    rows = iter(found)
    of_parts = [next(rows) if is_weight(part) else None for part in parts]
    having = [place for place, factor in enumerate(found[0]) if dimension in factor.axes]
    if len(having) == len(found[0]):
        rank = max(weight.rank for weight in weights)
        return [_joined(parts, of_parts, place, dimension, [0] * len(parts), rank) for place in having]
    (place,) = having
    starts, others = _blocks(of_parts, 1 - place)
    rank = sum(array.shape[-1] for array in others)
    if len(others) > 1 and rank >= _smaller_side(found[0], shape):
        return WIDE
    joined = _joined(parts, of_parts, place, dimension, starts, rank)
    other = _of_dtypes([row[1 - place] for row in found], _along_rank(others))
    return [joined, other] if place == 0 else [other, joined]


def stack(parts: Sequence[Any], shape: Shape, *, axis: int) -> Factors:
    """The new axis is a batch axis."""
    kept = [other for other in range(len(shape)) if other != axis]

    def expanded(part: Any) -> Any:
        value = jnp.expand_dims(base_of(part), axis)
        if not is_weight(part):
            return Plain(value)
        factors = broadcast_in_dim(part, shape=value.shape, broadcast_dimensions=kept)
        return dataclasses.replace(part, value=value, factors=tuple(factors or ()))

    return concatenate([expanded(part) for part in parts], shape, dimension=axis)


def select_n(parts: Sequence[Any], shape: Shape, which: Any, **_: Any) -> Factors:
    """One of several weights, chosen as a whole: one of their factors."""
    if jnp.shape(which) != ():
        return ELEMENTS
    frame = common_frame(parts)
    if frame is None:
        return APART
    sides = zip(*(fitted(part, frame).factors for part in parts), strict=True)
    return [side[0].changed(lax.select_n(which, *(factor.array for factor in side))) for side in sides]


def common_frame(parts: Sequence[Any]) -> Weight | None:
    """A weight of shapes alone that each of these weights and values of params can be written as."""
    weights = [part for part in parts if is_weight(part)]
    if not weights or not all(map(is_marked, parts)) or len({part.value.shape for part in parts}) > 1:
        return None
    value = parts[0].value
    first = dataclasses.replace(weights[0], of_data=not all(map(of_params, parts)))
    paths = tuple(dict.fromkeys(path for weight in weights for path in weight.paths))
    if first.probe:
        return dataclasses.replace(first, paths=paths, factors=tuple(_one_probe(weights, value.shape)))
    found = _aligned(weights)
    if found is None:
        return None
    rank = max(weight.rank for weight in weights)
    factors = []
    for side in zip(*found, strict=True):
        dtype = common_dtype(*(factor.array.dtype for factor in side))
        shape = (*side[0].array.shape[:-1], rank)
        factors.append(_of_dtypes(side, jax.ShapeDtypeStruct(shape, dtype)))
    return dataclasses.replace(first, paths=paths, factors=tuple(factors))


def fitted(part: Weight | Plain, frame: Weight) -> Weight:
    """The same weight with the paths, the axes, the rank and the dtypes of the frame."""
    arrays = [jnp.zeros(factor.array.shape, factor.array.dtype) for factor in frame.factors]
    if isinstance(part, Weight) and not frame.probe:
        found = _aligned([frame, part])
        for place, factor in enumerate(found[1] if found else ()):
            missing = frame.rank - part.rank
            array = jnp.pad(factor.array, [(0, 0)] * len(factor.axes) + [(0, missing)]) if missing else factor.array
            arrays[place] = array.astype(arrays[place].dtype)
    arrays = [varied(array, varying_axes(part.value)) for array in arrays]
    return frame.with_arrays(part.value, arrays)


def _sum(parts: Sequence[Any], shape: Shape) -> Factors:
    weights = [part for part in parts if is_weight(part)]
    if any(len(weight.shape) != len(shape) for weight in weights):
        return SPREAD
    weights = [_spread(weight, shape) for weight in weights]
    if weights[0].probe:
        return _one_probe(weights, shape)
    found = _aligned(weights)
    if found is None:
        return APART
    if len(found) > 1 and sum(weight.rank for weight in weights) >= _smaller_side(found[0], shape):
        return WIDE
    sides = zip(*found, strict=True)
    return [_of_dtypes(side, _along_rank([factor.array for factor in side])) for side in sides]


def _spread(weight: Weight, shape: Shape) -> Weight:
    """The weight in a larger shape, repeated along axes of size 1."""
    if weight.shape == shape:
        return weight
    places = range(len(shape))
    factors = broadcast_in_dim(weight, shape=shape, broadcast_dimensions=places)
    return dataclasses.replace(weight, value=jnp.broadcast_to(weight.value, shape), factors=tuple(factors or ()))


def _negated(part: Any) -> Any:
    if not is_weight(part):
        return part
    *others, last = part.factors
    return dataclasses.replace(part, factors=(*others, last.changed(-last.array)))


def _aligned(weights: Sequence[Weight]) -> list[tuple[Factor, ...]] | None:
    """The factors of every weight in the order in which their axes are those of the first one's."""
    wanted = [factor.axes for factor in weights[0].factors]
    rows = []
    for weight in weights:
        orders = (weight.factors, weight.factors[::-1])
        row = next((order for order in orders if [factor.axes for factor in order] == wanted), None)
        if row is None:
            return None
        rows.append(row)
    return rows


def _smaller_side(factors: Sequence[Factor], shape: Shape) -> int:
    """The smaller side of the matrix that a weight of this shape with these factors is."""
    one, other = (set(factor.axes) for factor in factors)
    return min(math.prod(shape[axis] for axis in own) for own in (one - other, other - one))


def _alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays in a dtype that holds all of them."""
    dtype = common_dtype(*(array.dtype for array in arrays))
    return [array.astype(dtype) for array in arrays]


def _of_dtypes(factors: Sequence[Factor], array: Any) -> Factor:
    """A factor of these, with a new array, that brings the dtype of all of them into a product."""
    dtype = common_dtype(*(factor.product_dtype or factor.array.dtype for factor in factors))
    return dataclasses.replace(factors[0], array=array, product_dtype=dtype)


def _along_rank(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(_alike(arrays), axis=-1) if len(arrays) > 1 else arrays[0]


def _blocks(of_parts: Sequence[Sequence[Factor] | None], other: int) -> tuple[list[int], list[jax.Array]]:
    """Where in the rank each part begins, and the other factors: one for all parts that have the same."""
    others: list[jax.Array] = []
    starts = []
    for of_part in of_parts:
        array = None if of_part is None else of_part[other].array
        if array is not None and not any(array is known for known in others):
            others.append(array)
        before = 0
        for known in others:
            if array is None or known is array:
                break
            before += known.shape[-1]
        starts.append(before)
    return starts, others


def _joined(
    parts: Sequence[Any], of_parts: Sequence[Any], place: int, dimension: int, starts: Sequence[int], rank: int
) -> Factor:
    """The factors at a place, concatenated along an axis of the weight, each in its block of the rank."""
    side = [of_part[place] for of_part in of_parts if of_part is not None]
    like = side[0]
    arrays = [
        _in_block(part, of_part, like, place, start, rank)
        for part, of_part, start in zip(parts, of_parts, starts, strict=True)
    ]
    return _of_dtypes(side, jnp.concatenate(_alike(arrays), axis=like.axes.index(dimension)))


def _in_block(part: Any, of_part: Any, like: Factor, place: int, start: int, rank: int) -> jax.Array:
    """The factor of a part from `start` on in a rank of this size, zeros beside it; zeros for one without an update."""
    if of_part is None:
        shape = jnp.shape(base_of(part))
        return jnp.zeros([*(shape[axis] for axis in like.axes), rank], like.array.dtype)
    array = of_part[place].array
    after = rank - start - array.shape[-1]
    return jnp.pad(array, [(0, 0)] * len(like.axes) + [(start, after)]) if start or after else array


def _one_probe(weights: Sequence[Weight], shape: Shape) -> list[Factor]:
    """The factors of a probe of several weights: those that have an axis in common become one.

    An axis in params that is met twice, as in w + w.T, counts where it is first met.
    """
    first: dict[tuple[str, int], Factor] = {}
    groups: list[tuple[set[int], list[Factor]]] = []
    for weight in weights:
        for factor in weight.factors:
            for start in factor.origin:
                first.setdefault(start, factor)
            axes, members = set(weight.own(factor)), [factor]
            for group in [group for group in groups if group[0] & axes]:
                groups.remove(group)
                axes, members = axes | group[0], [*group[1], *members]
            groups.append((axes, members))
    own = set().union(*(axes for axes, _ in groups))
    shared = set(range(len(shape))) - own
    factors = []
    for axes, members in groups:
        places = tuple(sorted(axes | shared))
        array = jnp.zeros([*(shape[axis] for axis in places), 1], members[0].array.dtype)
        origin = [start for factor in members for start in factor.origin if first[start] is factor]
        factors.append(Factor(array, places, tuple(origin), any(factor.looked_up for factor in members)))
    return factors
