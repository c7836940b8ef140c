"""What primitives that make one weight of several operands do to the factors and the gains.

The operands that a rule is called with are weights, values without an update that follow from params alone (`Plain`),
and scalars. It returns the factors of the result, then its gains, or the reason why the weights have to be merged.

A sum has the factors of every weight in it, side by side along the rank. So has a concatenation along an axis that A
alone has, or B alone: the factors with the axis stand in blocks, and operands that share the other factor share one.
Along a batch axis, as that of a stack, both factors are concatenated, and smaller ranks filled up with zeros. Gains are
concatenated along an axis that they have, with ones for what has none; a sum has no gain.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.products import common_dtype
from jlora.transform._jax import varied, varying_axes
from jlora.transform._lazy import dense, densified
from jlora.transform._structure import broadcast_in_dim
from jlora.transform._weight import Factor, Parts, Plain, Shape, Weight, base_of, is_marked, is_weight, of_params

APART = "the weights split into in and out axes in different ways"
WIDE = "the ranks together are no smaller than the weight"
SPREAD = "a scalar of the weight is spread over another operand"
ELEMENTS = "which weight it takes differs from element to element"
GAINS = "what a magnitude (DoRA) scales is one part of it, and not the whole"
WITHIN = "a part of it is replaced by an adapted weight"


def add(operands: Sequence[Any], shape: Shape, **_: Any) -> Parts:
    return _sum(operands, shape)


def sub(operands: Sequence[Any], shape: Shape, **_: Any) -> Parts:
    first, second = operands
    return _sum([first, _negated(second)], shape)


def scatter_add(operands: Sequence[Any], shape: Shape, *_: Any, **__: Any) -> Parts:
    """Something is added at some places, or taken off."""
    weight, other = operands
    return WITHIN if is_weight(other) else _sum([weight], shape)


def concatenate(operands: Sequence[Any], shape: Shape, *, dimension: int) -> Parts:
    weights = [operand for operand in operands if is_weight(operand)]
    return weights[0].joined(weights, shape, functools.partial(_concatenated, operands, dimension))


def _concatenated(operands: Sequence[Any], dimension: int, weights: Sequence[Weight], shape: Shape) -> Parts:
    found = _aligned(weights)
    if found is None:
        return APART
    gains = _joined_gains(operands, dimension)
    rows = iter(found)
    of_operands = [next(rows) if is_weight(operand) else None for operand in operands]
    having = [place for place, factor in enumerate(found[0]) if dimension in factor.axes]
    if len(having) == len(found[0]):
        rank = max(weight.rank for weight in weights)
        factors = [
            _concatenated_factors(operands, of_operands, place, dimension, [0] * len(operands), rank)
            for place in having
        ]
        return GAINS if gains is None else [*factors, *gains]
    (place,) = having
    starts, others = _blocks(of_operands, 1 - place)
    rank = sum(array.shape[-1] for array in others)
    if len(others) > 1 and rank >= _smaller_side(found[0], shape):
        return WIDE
    joined = _concatenated_factors(operands, of_operands, place, dimension, starts, rank)
    other = _of_dtypes([row[1 - place] for row in found], _along_rank(others))
    factors = [joined, other] if place == 0 else [other, joined]
    return GAINS if gains is None else [*factors, *gains]


def stack(operands: Sequence[Any], shape: Shape, *, axis: int) -> Parts:
    """The new axis is a batch axis."""
    kept = [other for other in range(len(shape)) if other != axis]

    def expanded(operand: Any) -> Any:
        value = jnp.expand_dims(dense(base_of(operand)), axis)
        if not is_weight(operand):
            return Plain(value)
        return operand.with_parts(value, broadcast_in_dim(operand, shape=value.shape, broadcast_dimensions=kept) or ())

    return concatenate([expanded(operand) for operand in operands], shape, dimension=axis)


def select_n(operands: Sequence[Any], shape: Shape, which: Any, **_: Any) -> Parts:
    """One of several weights, chosen as a whole: one of each of their parts."""
    if jnp.shape(which) != ():
        return ELEMENTS
    frame = common_frame(operands)
    if frame is None:
        return APART
    sides = zip(*(fitted(operand, frame).parts for operand in operands), strict=True)
    return [side[0].changed(lax.select_n(which, *(part.array for part in side))) for side in sides]


def common_frame(operands: Sequence[Any]) -> Weight | None:
    """A weight of shapes alone that each of these weights and values of params can be written as."""
    weights = [operand for operand in operands if is_weight(operand)]
    if not weights or not all(map(is_marked, operands)) or len({operand.value.shape for operand in operands}) > 1:
        return None
    value = operands[0].value
    parts = weights[0].joined(weights, value.shape, _common_parts)
    if isinstance(parts, str):
        return None
    like = next((weight for weight in weights if weight.gains), weights[0])
    paths = tuple(dict.fromkeys(path for weight in weights for path in weight.paths))
    return like.with_parts(value, parts, paths=paths, of_data=not all(map(of_params, operands)))


def _common_parts(weights: Sequence[Weight], _: Shape) -> Parts:
    """The shapes that hold the parts of each of these weights."""
    found = _aligned(weights)
    if found is None:
        return APART
    rank = max(weight.rank for weight in weights)
    factors = []
    for side in zip(*found, strict=True):
        dtype = common_dtype(*(factor.array.dtype for factor in side))
        shape = (*side[0].array.shape[:-1], rank)
        factors.append(_of_dtypes(side, jax.ShapeDtypeStruct(shape, dtype)))
    gains: list[Factor] = []
    if scaling := [gain for weight in weights for gain in weight.gains]:
        dtype = common_dtype(*(gain.array.dtype for gain in scaling))
        array: Any = jax.ShapeDtypeStruct(scaling[0].array.shape, dtype)
        gains.append(scaling[0].changed(array))
    return [*factors, *gains]


def fitted(operand: Weight | Plain, frame: Weight) -> Weight:
    """The same weight with the paths, the axes, the rank and the dtypes of the frame; a gain that it lacks is one."""
    operand = densified(operand)
    arrays = [jnp.zeros(factor.array.shape, factor.array.dtype) for factor in frame.factors]
    arrays += [jnp.ones(gain.array.shape, gain.array.dtype) for gain in frame.gains]
    if isinstance(operand, Weight):
        found = _aligned([frame, operand])
        for place, factor in enumerate(found[1] if found else ()):
            missing = frame.rank - operand.rank
            array = jnp.pad(factor.array, [(0, 0)] * len(factor.axes) + [(0, missing)]) if missing else factor.array
            arrays[place] = array.astype(arrays[place].dtype)
        for gain in operand.gains:
            arrays[-1] = gain.array.astype(arrays[-1].dtype)
    arrays = [varied(array, varying_axes(operand.value)) for array in arrays]
    return frame.with_arrays(operand.value, arrays)


def _sum(operands: Sequence[Any], shape: Shape) -> Parts:
    weights = [operand for operand in operands if is_weight(operand)]
    if any(weight.gains for weight in weights):
        return GAINS
    if any(len(weight.shape) != len(shape) for weight in weights):
        return SPREAD
    return weights[0].joined([_spread(weight, shape) for weight in weights], shape, _summed)


def _summed(weights: Sequence[Weight], shape: Shape) -> Parts:
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
    return dataclasses.replace(weight, value=jnp.broadcast_to(dense(weight.value), shape), factors=tuple(factors or ()))


def _negated(operand: Any) -> Any:
    if not is_weight(operand):
        return operand
    *others, last = operand.factors
    return dataclasses.replace(operand, factors=(*others, last.changed(-last.array)))


def _aligned(weights: Sequence[Weight]) -> list[tuple[Factor, ...]] | None:
    """The factors of every weight in the order of the first one's, if all have factors and gains of the same axes."""
    if len({gain.axes for weight in weights for gain in weight.gains}) > 1:
        return None
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


def _blocks(of_operands: Sequence[Sequence[Factor] | None], other: int) -> tuple[list[int], list[jax.Array]]:
    """Where in the rank each operand begins, and the other factors: one for all operands that have the same."""
    others: list[jax.Array] = []
    starts = []
    for of_operand in of_operands:
        array = None if of_operand is None else of_operand[other].array
        if array is not None and not any(array is known for known in others):
            others.append(array)
        before = 0
        for known in others:
            if array is None or known is array:
                break
            before += known.shape[-1]
        starts.append(before)
    return starts, others


def _concatenated_factors(
    operands: Sequence[Any], of_operands: Sequence[Any], place: int, dimension: int, starts: Sequence[int], rank: int
) -> Factor:
    """The factors at a place, concatenated along an axis of the weight, each in its block of the rank."""
    side = [of_operand[place] for of_operand in of_operands if of_operand is not None]
    like = side[0]
    arrays = [
        _in_block(operand, of_operand, like, place, start, rank)
        for operand, of_operand, start in zip(operands, of_operands, starts, strict=True)
    ]
    return _of_dtypes(side, jnp.concatenate(_alike(arrays), axis=like.axes.index(dimension)))


def _in_block(operand: Any, of_operand: Any, like: Factor, place: int, start: int, rank: int) -> jax.Array:
    """The factor of an operand from `start` on in a rank of this size, zeros beside it and for what has no update."""
    if of_operand is None:
        shape = jnp.shape(base_of(operand))
        return jnp.zeros([*(shape[axis] for axis in like.axes), rank], like.array.dtype)
    array = of_operand[place].array
    after = rank - start - array.shape[-1]
    return jnp.pad(array, [(0, 0)] * len(like.axes) + [(start, after)]) if start or after else array


def _joined_gains(operands: Sequence[Any], dimension: int) -> list[Factor] | None:
    """The gain of operands that are concatenated; None where they have not all the same along an axis it lacks."""
    gains = [gain for operand in operands if is_weight(operand) for gain in operand.gains]
    if not gains:
        return []
    like = gains[0]
    if dimension not in like.axes:
        are_same = len(gains) == len(operands) and all(gain.array is like.array for gain in gains)
        return [like] if are_same else None
    arrays = []
    for operand in operands:
        shape = jnp.shape(base_of(operand))
        own = operand.gains if is_weight(operand) else ()
        arrays.append(own[0].array if own else jnp.ones([*(shape[axis] for axis in like.axes), 1], like.array.dtype))
    return [like.changed(jnp.concatenate(_alike(arrays), axis=like.axes.index(dimension)))]
