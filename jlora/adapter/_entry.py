"""An entry of the adapters: the parts that it may hold, and the weight that follows from them.

    part       axes of the weight                what it does
    value      all of them                       takes the weight's place
    offset     all of them                       is added, times the scaling
    A, B       batch, in, and batch, out         W + scaling * A@B
    magnitude  batch, out                        m * V / ||V||, V the sum so far, the norm over the in axes (DoRA)

They are applied in this order. An entry of A and B alone is an adapter; the others come from files of other libraries:
weights that were trained as a whole, the bias of a B, DoRA. From a part's axes follow its shape, the names of its axes
in a box, and how it is placed on a mesh.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np

from jlora.boxes import box_named, unboxed
from jlora.contraction import Factorization
from jlora.errors import AdapterError

PARTS = ("value", "offset", "A", "B", "magnitude")

Axes = tuple[int | None, ...]
Adapter = Mapping[str, Any]


def is_adapter(node: Any) -> TypeGuard[Adapter]:
    """Whether a node of a pytree is an adapter: a mapping of exactly the arrays `A` and `B`."""
    return (
        isinstance(node, Mapping)
        and set(node) == {"A", "B"}
        and all(hasattr(unboxed(node[name]), "ndim") for name in "AB")
    )


def is_entry(node: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a node of a pytree is an entry of the adapters: a mapping of arrays named A and B, or of other parts."""
    return (
        isinstance(node, Mapping)
        and bool(node)
        and set(node) <= set(PARTS)
        and ("A" in node) == ("B" in node) >= ("magnitude" in node)
        and all(hasattr(unboxed(part), "ndim") for part in node.values())
    )


def part_axes(ndim: int, split: Factorization | None) -> dict[str, Axes]:
    """The axes of a weight of `ndim` axes that the axes of each part are; None for the rank.

    Without a factorization there are only the parts that have all axes.
    """
    every: Axes = tuple(range(ndim))
    if split is None:
        return {"value": every, "offset": every}
    a_axes, b_axes = split.adapter_axes
    magnitude = tuple(axis for axis in b_axes if axis is not None)
    return {"value": every, "offset": every, "A": a_axes, "B": b_axes, "magnitude": magnitude}


def matrices_of(parts: Mapping[str, Any], batch_dims: int) -> tuple[np.ndarray, np.ndarray]:
    """A (n, in, r) and B (n, r, out) on the host in float64: the batch axes joined to one, and the in and out axes."""
    a_shape, b_shape = tuple(parts["A"].shape), tuple(parts["B"].shape)
    n, rank = math.prod(a_shape[:batch_dims]), a_shape[-1]
    ins, outs = math.prod(a_shape[batch_dims:-1]), math.prod(b_shape[batch_dims + 1 :])
    with np.errstate(all="ignore"):
        a, b = (np.asarray(parts[name]).astype(np.float64) for name in "AB")
    return a.reshape(n, ins, rank), b.reshape(n, rank, outs)


def boxed_entry(weight: Any, parts: Mapping[str, Any], split: Factorization | None) -> dict[str, Any]:
    """The entry of a weight in a box with its parts in such boxes, which name the axes that they have of the weight."""
    axes = part_axes(len(unboxed(weight).shape), split)
    return {name: box_named(weight, part, axes[name]) for name, part in parts.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry that is bound to its weight.

    Attributes:
      parts: arrays by name.
      scaling: of the offset and of A@B, a number or a scalar array.
      split: how the axes of the weight split; None where there are no A and B.
    """

    parts: Mapping[str, Any]
    scaling: Any
    split: Factorization | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether there are A and B alone."""
        return self.parts.keys() == {"A", "B"}

    @property
    def is_reversible(self) -> bool:
        """Whether arithmetic takes it out of a merged weight, which has lost a value that was replaced, and a norm."""
        return not self.parts.keys() & {"value", "magnitude"}

    @property
    def rank(self) -> int:
        return int(self.parts["A"].shape[-1])

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises an AdapterError where a part does not fit a weight of this shape."""
        if self.split is not None:
            self.split.sizes(shape, "i")
        axes = part_axes(len(shape), self.split)
        for name, part in self.parts.items():
            if name not in axes:
                raise AdapterError(f"{name} {tuple(part.shape)} of a weight {shape}: no factorization is given")
            wanted = tuple(self.rank if axis is None else shape[axis] for axis in axes[name])
            if tuple(part.shape) != wanted:
                raise AdapterError(f"{name} {tuple(part.shape)} does not fit the weight {shape}: wanted {wanted}")
