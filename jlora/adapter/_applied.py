"""The weight that follows from an entry: merged, unmerged, and what a magnitude multiplies it with."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.adapter._entry import Entry, part_axes
from jlora.adapter._functions import with_delta
from jlora.adapter._sharding import placed
from jlora.contraction import Factorization
from jlora.errors import AdapterError
from jlora.products import common_dtype, spec_of


def base_weight(entry: Entry, weight: Any) -> jax.Array:
    """The weight before A and B: the value in its place, the offset added; float32 at least."""
    total = jnp.asarray(entry.parts.get("value", weight)).astype(_wide(weight))
    return _plus_offset(entry, total, 1)


def merged_weight(entry: Entry, weight: Any) -> jax.Array:
    """The weight with the entry applied; sums in float32 at least, rounded once to the weight's dtype.

    The norm under a magnitude is a constant to gradients, as in Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank
    Adaptation", arXiv 2402.09353, section 4.3.
    """
    entry.check(jnp.shape(weight))
    if entry.is_adapter:
        return _plus_delta(entry, weight, 1)
    total = _plus_delta(entry, base_weight(entry, weight), 1)
    if "magnitude" in entry.parts and entry.split is not None:
        axes = entry.split.axes("i")
        gain = _gain(_magnitude(entry, total.dtype), jnp.sum(total * total, axes))
        total = total * jnp.expand_dims(gain, axes)
    return total.astype(weight.dtype)


def unmerged_weight(entry: Entry, weight: Any) -> jax.Array:
    """The weight before `merged_weight`, by the same arithmetic backwards; up to rounding where it is reversible."""
    entry.check(jnp.shape(weight))
    if entry.is_adapter:
        return _plus_delta(entry, weight, -1)
    total = _plus_delta(entry, jnp.asarray(weight).astype(_wide(weight)), -1)
    return _plus_offset(entry, total, -1).astype(weight.dtype)


def init_magnitude(weight: Any, split: Factorization) -> jax.Array:
    """The magnitude with which DoRA begins: the norm of the weight over its in axes, so that the gain is 1.

    Args:
      weight: an array of the dtype of a parameter.
      split: how its axes split.

    Returns:
      (*batch, *out), in float32 at least, on the weight's devices as its axes lie there.

    Raises:
      AdapterError: a shape, which has no norms.

    >>> init_magnitude(jnp.array([[3.0, 1.0], [4.0, 0.0]]), Factorization("io")).tolist()
    [5.0, 1.0]
    """
    if isinstance(weight, jax.ShapeDtypeStruct):
        raise AdapterError(
            "kind = 'dora': the magnitude begins at the norms of the weight, and this is a shape: give arrays; for the "
            "shapes of the adapters, jax.eval_shape(lambda params: init_lora(key, params, config), params)"
        )
    wide = jnp.asarray(weight).astype(_wide(weight))
    ins, axes = split.axes("i"), part_axes(wide.ndim, split)["magnitude"]
    norms = jnp.sqrt(jnp.sum(wide * wide, ins))  # the batch and out axes in the order of the weight's
    kept = [axis for axis in range(wide.ndim) if axis not in ins]
    return placed(norms.transpose([kept.index(axis) for axis in axes if axis is not None]), weight, axes)


def gain_of(entry: Entry, base: jax.Array) -> jax.Array | None:
    """m / ||V||, the batch and out axes as the weight has them; None where there is no magnitude.

    V = base + scaling A@B is not built: the squares are ||base||^2 + 2 s <base, A@B> + s^2 ||A@B||^2 for each out
    element, from products of the size of the rank. Where the update takes away nearly all of the base, they are as
    rough as float32 makes this sum.
    """
    if "magnitude" not in entry.parts or entry.split is None:
        return None
    wide = common_dtype(base.dtype, jnp.float32)
    parts = (base, entry.parts["A"], entry.parts["B"])
    weight, a, b = (lax.stop_gradient(jnp.asarray(part)).astype(wide) for part in parts)
    letters = "abcdefghijklmnopqrstuvw"[: weight.ndim]
    batch = "".join(letters[axis] for axis in entry.split.axes("b"))
    ins = "".join(letters[axis] for axis in entry.split.axes("i"))
    outs = "".join(letters[axis] for axis in entry.split.axes("o"))
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
    added = jnp.sum((2 * down + entry.scaling * own) * b, len(batch))  # (*batch, *out)
    squares = jnp.sum(weight * weight, entry.split.axes("i")) + entry.scaling * entry.split.out_like(added)
    return _gain(_magnitude(entry, wide), squares)


def _magnitude(entry: Entry, dtype: Any) -> jax.Array:
    """The magnitude, the batch and out axes as the weight has them."""
    assert entry.split is not None
    return entry.split.out_like(jnp.asarray(entry.parts["magnitude"])).astype(dtype)


def _plus_offset(entry: Entry, total: jax.Array, sign: int) -> jax.Array:
    if "offset" not in entry.parts:
        return total
    return total + sign * entry.scaling * jnp.asarray(entry.parts["offset"]).astype(total.dtype)


def _plus_delta(entry: Entry, weight: Any, sign: int) -> jax.Array:
    if "A" not in entry.parts:
        return weight
    adapter = {name: entry.parts[name] for name in "AB"}
    return with_delta(weight, adapter, entry.scaling * entry.rank, entry.split, sign)


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
