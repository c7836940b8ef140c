"""What primitives that only move a weight about do to its parts, the factors and the gains.

A rule is called with the weight, the other operands and the parameters of the primitive, and returns the parts of the
result, or None where the result is no product of factors, or not all of it has the gain.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.transform._weight import Factor, Shape, Weight

Parts = Sequence[Factor] | None


def same(weight: Weight, *_: Any, **__: Any) -> Parts:
    """The value is placed or constrained, or varies over more axes of a mesh; the factors stay.

    They vary where they meet what varies, and not before: what does not vary is known to be the same on all devices.
    """
    return weight.parts


def convert_element_type(weight: Weight, *, new_dtype: Any, **_: Any) -> Parts:
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return None
    return [*(factor.cast(new_dtype) for factor in weight.factors), *weight.gains]


def stop_gradient(weight: Weight, **_: Any) -> Parts:
    return [part.changed(lax.stop_gradient(part.array)) for part in weight.parts]


def neg(weight: Weight, **_: Any) -> Parts:
    *others, last = weight.factors
    return [*others, last.changed(-last.array), *weight.gains]


def mul(weight: Weight, other: Any, **_: Any) -> Parts:
    return _scaled(weight, other, lax.mul)


def div(weight: Weight, other: Any, **_: Any) -> Parts:
    return _scaled(weight, other, lax.div)


def _scaled(weight: Weight, other: Any, operation: Any) -> Parts:
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
    return [*factors, *weight.gains]


def transpose(weight: Weight, *, permutation: Sequence[int]) -> Parts:
    new = {old: position for position, old in enumerate(permutation)}
    return [part.renumbered(new) for part in weight.parts]


def squeeze(weight: Weight, *, dimensions: Sequence[int]) -> Parts:
    kept = [axis for axis in range(len(weight.shape)) if axis not in dimensions]
    new = {axis: position for position, axis in enumerate(kept)}
    return [part.without(dimensions).renumbered(new) for part in weight.parts]


def rev(weight: Weight, *, dimensions: Sequence[int]) -> Parts:
    return [
        part.changed(lax.rev(part.array, [place for place, axis in enumerate(part.axes) if axis in dimensions]))
        for part in weight.parts
    ]


def pad(weight: Weight, _: Any, *, padding_config: Sequence[tuple[int, int, int]]) -> Parts:
    """The padding is one of the value; that of the factors is zero, and that of a gain, which may not reach it, one."""
    padded_axes = {axis for axis, padding in enumerate(padding_config) if any(padding)}
    if any(not padded_axes <= set(gain.axes) for gain in weight.gains):
        return None

    def padded(part: Factor, fill: int) -> Factor:
        padding = [*(padding_config[axis] for axis in part.axes), (0, 0, 0)]
        return part.changed(lax.pad(part.array, jnp.asarray(fill, part.array.dtype), padding))

    return [*(padded(factor, 0) for factor in weight.factors), *(padded(gain, 1) for gain in weight.gains)]


def tile(weight: Weight, *, reps: Sequence[int]) -> Parts:
    return [part.changed(jnp.tile(part.array, [*(reps[axis] for axis in part.axes), 1])) for part in weight.parts]


def unstack(weight: Weight, *, axis: int, **_: Any) -> Sequence[Sequence[Factor]]:
    """The parts of every element."""
    size = weight.shape[axis]
    sizes = [1 if other == axis else size for other, size in enumerate(weight.shape)]
    one: Any = jax.ShapeDtypeStruct(sizes, weight.dtype)
    found = split(weight, sizes=[1] * size, axis=axis)
    elements = [squeeze(weight.with_parts(one, parts), dimensions=[axis]) for parts in found]
    return [element for element in elements if element is not None]


def broadcast_in_dim(weight: Weight, *_: Any, shape: Shape, broadcast_dimensions: Sequence[int], **__: Any) -> Parts:
    """Axes of size 1 are spread in the parts that have them; new axes are batch axes, in every part."""
    new = [axis for axis in range(len(shape)) if axis not in broadcast_dimensions]
    moved = [part.renumbered(dict(enumerate(broadcast_dimensions))) for part in weight.parts]
    return [_spread(part, shape, new) for part in moved]


def _spread(factor: Factor, shape: Shape, new: Sequence[int]) -> Factor:
    """The factor in a weight of this shape, along the axes that are new too."""
    axes = sorted((*factor.axes, *new))
    places = [*map(axes.index, factor.axes), len(axes)]
    sizes = [*(shape[axis] for axis in axes), factor.rank]
    return factor.changed(lax.broadcast_in_dim(factor.array, sizes, places), axes)


def slice_(
    weight: Weight, *, start_indices: Sequence[int], limit_indices: Sequence[int], strides: Sequence[int] | None
) -> Parts:
    steps = strides or [1] * len(weight.shape)

    def sliced(factor: Factor) -> Factor:
        starts, limits, by = ([part[axis] for axis in factor.axes] for part in (start_indices, limit_indices, steps))
        if tuple(limits) == factor.array.shape[:-1] and not any(starts) and set(by) <= {1}:
            return factor  # the very same, so that a concatenation of slices sees it
        return factor.changed(lax.slice(factor.array, [*starts, 0], [*limits, factor.rank], [*by, 1]))

    return [sliced(part) for part in weight.parts]


def dynamic_slice(weight: Weight, *starts: Any, slice_sizes: Sequence[int]) -> Parts:
    def sliced(factor: Factor) -> Factor:
        at = [starts[axis] for axis in factor.axes]
        sizes = [slice_sizes[axis] for axis in factor.axes]
        zero = jnp.zeros((), jnp.result_type(starts[0]))
        return factor.changed(lax.dynamic_slice(factor.array, [*at, zero], [*sizes, factor.rank]))

    return [sliced(part) for part in weight.parts]


def split(weight: Weight, *, sizes: Sequence[int], axis: int) -> Sequence[Sequence[Factor]]:
    """The parts of every piece: a part that has the axis is split along it."""
    pieces = [
        lax.split(part.array, sizes, part.axes.index(axis)) if axis in part.axes else [part.array] * len(sizes)
        for part in weight.parts
    ]
    return [
        [part.changed(piece[n]) for part, piece in zip(weight.parts, pieces, strict=True)] for n in range(len(sizes))
    ]


def reshape(weight: Weight, *, new_sizes: Shape, dimensions: Any = None, **_: Any) -> Parts:
    """Axes that are joined or split belong to the same parts."""
    if dimensions is not None or 0 in weight.shape:
        return None
    blocks = list(_blocks(weight.shape, tuple(new_sizes)))
    members = [[axis for axis in old if weight.shape[axis] != 1] for old, _new in blocks]
    parts = weight.together(members).parts
    if any(0 < len(set(wide) & set(part.axes)) < len(wide) for wide in members for part in parts):
        return None

    def reshaped(factor: Factor) -> Factor:
        sizes: list[int] = []
        axes: list[int] = []
        for (_old, new), wide in zip(blocks, members, strict=True):
            if set(wide) <= set(factor.axes):
                axes.extend(new)
                sizes.extend(new_sizes[axis] for axis in new)
        return factor.changed(factor.array.reshape(*sizes, factor.rank), axes)

    return [reshaped(part) for part in parts]


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


def gather(weight: Weight, indices: jax.Array, **params: Any) -> Sequence[Factor] | str:
    """Slices looked up by index, as `jnp.take` and `weight[ids]` do: a factor that is indexed gets the ids' axes."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if numbers.operand_batching_dims:
        return "a lookup with a batch of tables"
    indexed = indexed_axes(weight.shape, params)
    kept = [axis for axis in range(len(weight.shape)) if axis not in numbers.collapsed_slice_dims]
    count = indices.ndim - 1
    ids = [axis for axis in range(count + len(kept)) if axis not in numbers.offset_dims]
    new = dict(zip(kept, numbers.offset_dims, strict=True))
    sizes_found = dict(zip(ids, indices.shape, strict=False)) | {new[axis]: sizes[axis] for axis in kept}
    shape = tuple(sizes_found[axis] for axis in range(len(sizes_found)))
    value = params["fill_value"]
    is_number = value is not None and not math.isnan(value)
    if is_number and any(not set(indexed) <= set(gain.axes) for gain in weight.gains):
        return "what it fills in beyond the table has no magnitude (DoRA)"

    def looked_up(factor: Factor, fill: int) -> Factor:
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
            [*(sizes[axis] for axis in factor.axes), factor.rank],
            mode=params["mode"],
            fill_value=fill if is_number else value,
        )
        return factor.after_lookup().changed(array, [*ids, *(new[axis] for axis in others)])

    return [*(looked_up(factor, 0) for factor in weight.factors), *(looked_up(gain, 1) for gain in weight.gains)]
