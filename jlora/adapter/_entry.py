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

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.adapter._functions import with_delta
from jlora.boxes import box_named, unboxed
from jlora.contraction import Factorization, common_dtype, spec_of
from jlora.errors import AdapterError

PARTS = ("value", "offset", "A", "B", "magnitude")

Axes = tuple[int | None, ...]


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

    def base(self, weight: Any) -> jax.Array:
        """The weight before A and B: the value in its place, the offset added; float32 at least."""
        total = jnp.asarray(self.parts.get("value", weight)).astype(_wide(weight))
        return self._plus_offset(total, 1)

    def merged(self, weight: Any) -> jax.Array:
        """The weight with the entry applied; sums in float32 at least, rounded once to the weight's dtype.

        The norm under a magnitude is a constant to gradients, as in Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank
        Adaptation", arXiv 2402.09353, section 4.3.
        """
        self.check(jnp.shape(weight))
        if self.is_adapter:
            return self._plus_delta(weight, 1)
        total = self._plus_delta(self.base(weight), 1)
        if "magnitude" in self.parts and self.split is not None:
            axes = self.split.axes("i")
            gain = _gain(self._magnitude(total.dtype), jnp.sum(total * total, axes))
            total = total * jnp.expand_dims(gain, axes)
        return total.astype(weight.dtype)

    def unmerged(self, weight: Any) -> jax.Array:
        """The weight before `merged`, by the same arithmetic backwards; up to rounding where it is reversible."""
        self.check(jnp.shape(weight))
        if self.is_adapter:
            return self._plus_delta(weight, -1)
        total = self._plus_delta(jnp.asarray(weight).astype(_wide(weight)), -1)
        return self._plus_offset(total, -1).astype(weight.dtype)

    def gain(self, base: jax.Array) -> jax.Array | None:
        """m / ||V||, the batch and out axes as the weight has them; None where there is no magnitude.

        V = base + scaling A@B is not built: the squares are ||base||^2 + 2 s <base, A@B> + s^2 ||A@B||^2 for each out
        element, from products of the size of the rank. Where the update takes away nearly all of the base, they are as
        rough as float32 makes this sum.
        """
        if "magnitude" not in self.parts or self.split is None:
            return None
        wide = common_dtype(base.dtype, jnp.float32)
        parts = (base, self.parts["A"], self.parts["B"])
        weight, a, b = (lax.stop_gradient(jnp.asarray(part)).astype(wide) for part in parts)
        letters = "abcdefghijklmnopqrstuvw"[: weight.ndim]
        batch = "".join(letters[axis] for axis in self.split.axes("b"))
        ins = "".join(letters[axis] for axis in self.split.axes("i"))
        outs = "".join(letters[axis] for axis in self.split.axes("o"))
        split_over = dict(zip(letters, spec_of(weight), strict=True))  # in a mesh of explicit axes

        def product(operands: str, output: str, *arrays: jax.Array) -> jax.Array:
            spec = [split_over.get(letter) for letter in output]
            own_split: dict[str, Any] = {}
            if any(split_over.values()):
                own_split["out_sharding"] = NamedSharding(jax.typeof(weight).sharding.mesh, PartitionSpec(*spec))
            return jnp.einsum(f"{operands}->{output}", *arrays, precision=lax.Precision.HIGHEST, **own_split)

        down = product(f"{batch}{ins}z,{letters}", f"{batch}z{outs}", a, weight)  # A^T W (*batch, r, *out)
        gram = product(f"{batch}{ins}y,{batch}{ins}z", f"{batch}yz", a, a)  # A^T A (*batch, r, r)
        own = product(f"{batch}yz,{batch}z{outs}", f"{batch}y{outs}", gram, b)  # A^T A B (*batch, r, *out)
        added = jnp.sum((2 * down + self.scaling * own) * b, len(batch))  # (*batch, *out)
        squares = jnp.sum(weight * weight, self.split.axes("i")) + self.scaling * self.split.out_like(added)
        return _gain(self._magnitude(wide), squares)

    def _magnitude(self, dtype: Any) -> jax.Array:
        """The magnitude, the batch and out axes as the weight has them."""
        assert self.split is not None
        return self.split.out_like(jnp.asarray(self.parts["magnitude"])).astype(dtype)

    def _plus_offset(self, total: jax.Array, sign: int) -> jax.Array:
        if "offset" not in self.parts:
            return total
        return total + sign * self.scaling * jnp.asarray(self.parts["offset"]).astype(total.dtype)

    def _plus_delta(self, weight: Any, sign: int) -> jax.Array:
        if "A" not in self.parts:
            return weight
        adapter = {name: self.parts[name] for name in "AB"}
        return with_delta(weight, adapter, self.scaling * self.rank, self.split, sign)


def _gain(magnitude: jax.Array, squares: jax.Array) -> jax.Array:
    """m / sqrt(squares); the squares are constants to gradients."""
    squares = jnp.maximum(lax.stop_gradient(squares), 0)  # of a norm that is zero rounding may leave less
    squares = jnp.where(jnp.isfinite(squares), squares, jnp.nan)  # an infinite norm would make zeros
    return magnitude / jnp.sqrt(jnp.where(squares == 0, 1, squares))  # what is zero stays zero


def _wide(weight: Any) -> Any:
    """The dtype of the sums."""
    dtype = jnp.dtype(weight.dtype)
    if dtype != jax.dtypes.canonicalize_dtype(dtype):
        raise AdapterError(f"a weight of dtype {dtype}: set jax_enable_x64, or cast it first")
    return common_dtype(dtype, jnp.float32)
