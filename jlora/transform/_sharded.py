"""What primitives that place a weight on a mesh, or move it between devices within shard_map, do to its parts."""

from collections.abc import Sequence
from typing import Any

from jax import lax

from jlora.transform._weight import Factor, Parts, Weight, differs

DIFFERS = "A or B may differ between the devices that it is gathered from; shard_map with check_vma=True tells"
EXCHANGED = "the devices exchange an axis of A for one of B"


def all_gather(
    weight: Weight,
    *,
    all_gather_dimension: int,
    axis_name: Any,
    axis_index_groups: Any,
    tiled: bool,
    **_: Any,
) -> Parts:
    """The parts of all devices along an axis: along that of the factors that have it, if the others are the same there.

    Along a new axis everything that differs is gathered.
    """
    names = _names(axis_name)

    def gathered(factor: Factor) -> Factor:
        place = sorted({*factor.axes, all_gather_dimension}).index(all_gather_dimension)
        array = lax.all_gather(factor.array, axis_name, axis=place, tiled=tiled, axis_index_groups=axis_index_groups)
        return factor.changed(array, sorted({*factor.axes, all_gather_dimension}))

    factors: Sequence[Factor] = weight.parts
    if not tiled:
        factors = [
            factor.renumbered({axis: axis + (axis >= all_gather_dimension) for axis in factor.axes})
            for factor in factors
        ]
        differing = [factor for factor in factors if differs(factor, names)] or factors
        return [gathered(factor) if factor in differing else factor for factor in factors]
    having = [factor for factor in factors if all_gather_dimension in factor.axes]
    if weight.differs([factor for factor in factors if factor not in having], names):
        return DIFFERS
    return [gathered(factor) if factor in having else factor for factor in factors]


def ppermute(weight: Weight, *, axis_name: Any, perm: Any) -> Parts:
    """Every factor that differs from device to device goes to the device that its weight goes to."""
    names = _names(axis_name)
    moving = [factor for factor in weight.parts if differs(factor, names)] or weight.parts
    return [
        factor.changed(lax.ppermute(factor.array, axis_name, perm)) if factor in moving else factor
        for factor in weight.parts
    ]


def all_to_all(
    weight: Weight, *, axis_name: Any, split_axis: int, concat_axis: int, axis_index_groups: Any, tiled: bool, **_: Any
) -> Parts:
    """A factor that has both axes is split and joined as the weight is; one that has neither is the same everywhere."""
    names = _names(axis_name)
    axes = {split_axis, concat_axis}
    moving = [factor for factor in weight.parts if axes <= set(factor.axes)]
    staying = [factor for factor in weight.parts if factor not in moving]
    if not tiled or not moving or any(axes & set(factor.axes) for factor in staying):
        return EXCHANGED
    if weight.differs(staying, names):
        return DIFFERS

    def exchanged(factor: Factor) -> Factor:
        places = factor.axes.index(split_axis), factor.axes.index(concat_axis)
        array = lax.all_to_all(factor.array, axis_name, *places, axis_index_groups=axis_index_groups, tiled=True)
        return factor.changed(array)

    return [exchanged(factor) if factor in moving else factor for factor in weight.parts]


def _names(axis_name: Any) -> tuple[str, ...]:
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
