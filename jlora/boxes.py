"""Boxes: what Flax puts around a param to name its axes, as `nn.Partitioned`.

A box is a pytree node with one child and the methods `unbox` and `replace_boxed` of `flax.core.meta.AxisMetadata`; Flax
itself is not needed to tell. Its `unbox` may put a sharding constraint on the param, so that what lies in it is read
here as its child.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jlora.pytrees import leaves, map_leaves

__all__ = ["box_like", "box_named", "is_box", "names_of", "unboxed"]


def is_box(node: Any) -> bool:
    """Whether a node of a pytree is a box."""
    return hasattr(type(node), "unbox") and hasattr(type(node), "replace_boxed")


def unboxed(tree: Any) -> Any:
    """The tree with what lies in its boxes in place of them; the tree itself where it has none."""
    if not any(map(is_box, leaves(tree, is_box))):
        return tree
    return map_leaves(lambda node: unboxed(_content(node)) if is_box(node) else node, tree, is_box)


def box_like(box: Any, value: Any) -> Any:
    """The value in a box as this one, if it is one."""
    return box.replace_boxed(box_like(_content(box), value)) if is_box(box) else value


def box_named(box: Any, value: Any, axes: Sequence[int | None]) -> Any:
    """The value in a box as this one, with the names that these axes have in it; None for an axis of its own.

    The value itself, where there is no box, or one that does not say its `names`.
    """
    if not is_box(box) or not isinstance(names := getattr(box, "names", None), tuple | list):
        return value
    return dataclasses.replace(box, value=value, names=names_of(names, axes))


def names_of(names: Sequence[Any], axes: Sequence[int | None]) -> tuple[Any, ...]:
    """The names of these axes; None for the rank, which is None among them, and beyond the last name."""
    return tuple(None if axis is None or axis >= len(names) else names[axis] for axis in axes)


def _content(box: Any) -> Any:
    (child,) = leaves(box, lambda node: node is not box)
    return child
