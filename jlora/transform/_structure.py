"""What primitives that only move a weight about do to its factors.

A rule is called with the weight, the other operands and the parameters of the primitive, and returns the factors of
the result, or None where the result is no product of factors.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.transform._weight import Factor, Shape, Weight

Factors = Sequence[Factor] | None


def same(weight: Weight, *_: Any, **__: Any) -> Factors:
    """The value is placed or constrained, or varies over more axes of a mesh; the factors stay.

    They vary where they meet what varies, and not before: what does not vary is known to be the same on all devices.
    """
    return weight.factors


def convert_element_type(weight: Weight, *, new_dtype: Any, **_: Any) -> Factors:
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return None
    return [factor.cast(new_dtype) for factor in weight.factors]


def stop_gradient(weight: Weight, **_: Any) -> Factors:
    return [factor.changed(lax.stop_gradient(factor.array)) for factor in weight.factors]


def neg(weight: Weight, **_: Any) -> Factors:
    *others, last = weight.factors
    return [*others, last.changed(-last.array)]


def mul(weight: Weight, other: Any, **_: Any) -> Factors:
    return _scaled(weight, other, lax.mul)


def div(weight: Weight, other: Any, **_: Any) -> Factors:
    return _scaled(weight, other, lax.div)


def _scaled(weight: Weight, other: Any, operation: Any) -> Factors:
    """A matrix times or over a scalar, or what has no axes but those of one factor, as a scale for each channel.

    A row alone, as one that was looked up, has no scale but a scalar: times anything else it is an activation.
    """
    sizes = jnp.shape(other) or (1,) * len(weight.shape)
    wide = [axis for axis, size in enumerate(sizes) if size != 1]
    if any(sizes[axis] != weight.shape[axis] for axis in wide) or (wide and not weight.is_matrix):
        return None
    place = next((n for n in (-1, *range(len(weight.factors))) if set(wide) <= set(weight.factors[n].axes)), None)
    if place is None:
        return None
    factors = list(weight.factors)
    axes = factors[place].axes
    scale = jnp.expand_dims(jnp.reshape(other, [sizes[axis] for axis in axes]), -1) if jnp.ndim(other) else other
    factors[place] = factors[place].scaled(operation, scale)
    return factors


def transpose(weight: Weight, *, permutation: Sequence[int]) -> Factors:
    new = {old: position for position, old in enumerate(permutation)}
    return [factor.renumbered(new) for factor in weight.factors]


def squeeze(weight: Weight, *, dimensions: Sequence[int]) -> Factors:
    kept = [axis for axis in range(len(weight.shape)) if axis not in dimensions]
    new = {axis: position for position, axis in enumerate(kept)}
    return [factor.without(dimensions).renumbered(new) for factor in weight.factors]


def rev(weight: Weight, *, dimensions: Sequence[int]) -> Factors:
    return [
        factor.changed(lax.rev(factor.array, [place for place, axis in enumerate(factor.axes) if axis in dimensions]))
        for factor in weight.factors
    ]


def pad(weight: Weight, _: Any, *, padding_config: Sequence[tuple[int, int, int]]) -> Factors:
    """The padding is one of the value; that of the factors is zero."""

    def padded(factor: Factor) -> Factor:
        zero = jnp.zeros((), factor.array.dtype)
        return factor.changed(lax.pad(factor.array, zero, [*(padding_config[axis] for axis in factor.axes), (0, 0, 0)]))

    return [padded(factor) for factor in weight.factors]


def tile(weight: Weight, *, reps: Sequence[int]) -> Factors:
    return [
        factor.changed(jnp.tile(factor.array, [*(reps[axis] for axis in factor.axes), 1])) for factor in weight.factors
    ]


def unstack(weight: Weight, *, axis: int, **_: Any) -> Sequence[Sequence[Factor]]:
    """The factors of every element."""
    size = weight.shape[axis]
    one = dataclasses.replace(weight, value=lax.index_in_dim(weight.value, 0, axis))
    parts = split(weight, sizes=[1] * size, axis=axis)
    elements = [squeeze(dataclasses.replace(one, factors=tuple(part)), dimensions=[axis]) for part in parts]
    return [element for element in elements if element is not None]


def broadcast_in_dim(weight: Weight, *_: Any, shape: Shape, broadcast_dimensions: Sequence[int], **__: Any) -> Factors:
    """Axes of size 1 are spread in the factors that have them; new axes are batch axes, in every factor."""
    new = [axis for axis in range(len(shape)) if axis not in broadcast_dimensions]
    moved = [factor.renumbered(dict(enumerate(broadcast_dimensions))) for factor in weight.factors]
    return [_spread(factor, shape, new) for factor in moved]


def _spread(factor: Factor, shape: Shape, new: Sequence[int]) -> Factor:
    """The factor in a weight of this shape, along the axes that are new too."""
    axes = sorted((*factor.axes, *new))
    places = [*map(axes.index, factor.axes), len(axes)]
    sizes = [*(shape[axis] for axis in axes), factor.array.shape[-1]]
    return factor.changed(lax.broadcast_in_dim(factor.array, sizes, places), axes)


def slice_(
    weight: Weight, *, start_indices: Sequence[int], limit_indices: Sequence[int], strides: Sequence[int] | None
) -> Factors:
    steps = strides or [1] * len(weight.shape)

    def sliced(factor: Factor) -> Factor:
        starts, limits, by = ([part[axis] for axis in factor.axes] for part in (start_indices, limit_indices, steps))
        if tuple(limits) == factor.array.shape[:-1] and not any(starts) and set(by) <= {1}:
            return factor  # the very same, so that a concatenation of slices sees it
        return factor.changed(lax.slice(factor.array, [*starts, 0], [*limits, weight.rank], [*by, 1]))

    return [sliced(factor) for factor in weight.factors]


def dynamic_slice(weight: Weight, *starts: Any, slice_sizes: Sequence[int]) -> Factors:
    def sliced(factor: Factor) -> Factor:
        at = [starts[axis] for axis in factor.axes]
        sizes = [slice_sizes[axis] for axis in factor.axes]
        zero = jnp.zeros((), jnp.result_type(starts[0]))
        return factor.changed(lax.dynamic_slice(factor.array, [*at, zero], [*sizes, weight.rank]))

    return [sliced(factor) for factor in weight.factors]


def split(weight: Weight, *, sizes: Sequence[int], axis: int) -> Sequence[Sequence[Factor]]:
    """The factors of every part: a factor that has the axis is split along it."""
    parts = [
        lax.split(factor.array, sizes, factor.axes.index(axis)) if axis in factor.axes else [factor.array] * len(sizes)
        for factor in weight.factors
    ]
    return [
        [factor.changed(part[n]) for factor, part in zip(weight.factors, parts, strict=True)] for n in range(len(sizes))
    ]


def reshape(weight: Weight, *, new_sizes: Shape, dimensions: Any = None, **_: Any) -> Factors:
    """Axes that are joined or split belong to the same factors; in a probe they become one factor."""
    if dimensions is not None or 0 in weight.shape:
        return None
    blocks = list(_blocks(weight.shape, tuple(new_sizes)))
    factors: list[Factor] = list(weight.factors)
    members = []
    for old, _new in blocks:
        wide = [axis for axis in old if weight.shape[axis] != 1]
        having = [factor for factor in factors if set(wide) & set(factor.axes)] if wide else list(factors)
        if weight.probe and len(having) > 1:
            joined = _joined(having)
            factors = [factor for factor in factors if factor not in having] + [joined]
        elif any(not set(wide) <= set(factor.axes) for factor in having):
            return None
        members.append(wide)

    def reshaped(factor: Factor) -> Factor:
        sizes: list[int] = []
        axes: list[int] = []
        for (_old, new), wide in zip(blocks, members, strict=True):
            if set(wide) <= set(factor.axes):
                axes.extend(new)
                sizes.extend(new_sizes[axis] for axis in new)
        return factor.changed(factor.array.reshape(*sizes, weight.rank), axes)

    return [reshaped(factor) for factor in factors]


def _joined(factors: Sequence[Factor]) -> Factor:
    """The factor of a probe that has the axes of several."""
    axes = sorted({axis for factor in factors for axis in factor.axes})
    sizes = {axis: size for factor in factors for axis, size in zip(factor.axes, factor.array.shape, strict=False)}
    array = jnp.zeros([*(sizes[axis] for axis in axes), 1], factors[0].array.dtype)
    origin = sorted(axis for factor in factors for axis in factor.origin)
    return Factor(array, tuple(axes), tuple(origin), any(factor.looked_up for factor in factors))


def _blocks(old: Shape, new: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest runs of old and new axes that hold the same elements, in order."""
    i = j = 0
    while i < len(old) or j < len(new):
        first, second = i, j
        left = right = 1
        if i < len(old):
            left, i = left * old[i], i + 1
        if j < len(new):
            right, j = right * new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        yield list(range(first, i)), list(range(second, j))


def indexed_axes(shape: Shape, params: Mapping[str, Any]) -> tuple[int, ...]:
    """The axes of which a gather takes a part by index; where it takes the whole axis the index is clipped to 0."""
    clipped = params["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    sizes = params["slice_sizes"]
    named = params["dimension_numbers"].start_index_map
    return tuple(axis for axis in named if not clipped or sizes[axis] != shape[axis])


def gather(weight: Weight, indices: jax.Array, **params: Any) -> Factors:
    """Slices looked up by index, as `jnp.take` and `weight[ids]` do: a factor that is indexed gets the ids' axes."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if numbers.operand_batching_dims:
        return None
    indexed = indexed_axes(weight.shape, params)
    kept = [axis for axis in range(len(weight.shape)) if axis not in numbers.collapsed_slice_dims]
    count = indices.ndim - 1
    ids = [axis for axis in range(count + len(kept)) if axis not in numbers.offset_dims]
    new = dict(zip(kept, numbers.offset_dims, strict=True))
    sizes_found = dict(zip(ids, indices.shape, strict=False)) | {new[axis]: sizes[axis] for axis in kept}
    shape = tuple(sizes_found[axis] for axis in range(len(sizes_found)))
    value = params["fill_value"]
    fill = value if value is None or math.isnan(value) else 0

    def looked_up(factor: Factor) -> Factor:
        columns = [column for column, axis in enumerate(numbers.start_index_map) if axis in indexed]
        columns = [column for column in columns if numbers.start_index_map[column] in factor.axes]
        if not columns:
            rest = factor.without(numbers.collapsed_slice_dims).renumbered(new)
            return rest if indexed else _spread(rest, shape, ids)  # every index is clipped to 0: all rows are the same
        place = factor.axes.index
        others = [axis for axis in factor.axes if axis in kept]
        array = lax.gather(
            factor.array,
            indices[..., tuple(columns)],
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(count, count + len(others) + 1)),
                collapsed_slice_dims=tuple(place(axis) for axis in factor.axes if axis not in kept),
                start_index_map=tuple(place(numbers.start_index_map[column]) for column in columns),
            ),
            [*(sizes[axis] for axis in factor.axes), weight.rank],
            mode=params["mode"],
            fill_value=fill,
        )
        found = dataclasses.replace(factor, looked_up=True)
        return found.changed(array, [*ids, *(new[axis] for axis in others)])

    return [looked_up(factor) for factor in weight.factors]
