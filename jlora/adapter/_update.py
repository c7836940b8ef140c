"""What an entry of the adapters may hold beside A and B, and the weight that follows.

    value      takes the weight's place                                   the weight's shape
    offset     is added, times the scaling                                the weight's shape
    A, B       W + scaling * A@B                                          (*batch, *in, r), (*batch, r, *out)
    magnitude  m * V / ||V||, V the sum so far, the norm over the in axes (DoRA)       (*batch, *out)

They are applied in this order. An entry of A and B alone is an adapter; the others come from files of other libraries:
weights that were trained as a whole, the bias of a B, DoRA.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax

from jlora.adapter._functions import with_delta
from jlora.boxes import box_named, unboxed
from jlora.contraction import Factorization, common_dtype
from jlora.errors import AdapterError

PARTS = ("value", "offset", "A", "B", "magnitude")


def is_update(node: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a node of a pytree is an entry of the adapters: a mapping of arrays named A and B, or of other parts."""
    return (
        isinstance(node, Mapping)
        and bool(node)
        and set(node) <= set(PARTS)
        and ("A" in node) == ("B" in node) >= ("magnitude" in node)
        and all(hasattr(unboxed(part), "ndim") for part in node.values())
    )


def boxed_update(weight: Any, update: Mapping[str, Any], factorization: Factorization | None) -> dict[str, Any]:
    """The entry of a weight in a box with its parts in such boxes, which name the axes that they have of the weight."""
    axes = part_axes(unboxed(weight).ndim, factorization)
    return {name: box_named(weight, part, axes[name]) for name, part in update.items()}


def part_axes(ndim: int, factorization: Factorization | None) -> dict[str, tuple[int | None, ...]]:
    """The axes of a weight of `ndim` axes that the axes of each part are; None for the rank."""
    every = tuple(range(ndim))
    if factorization is None:
        return {"value": every, "offset": every}
    a_axes, b_axes = factorization.adapter_axes
    magnitude = tuple(axis for axis in b_axes if axis is not None)
    return {"value": every, "offset": every, "A": a_axes, "B": b_axes, "magnitude": magnitude}


def check_update(shape: tuple[int, ...], update: Mapping[str, Any], factorization: Factorization | None) -> None:
    """Raises an AdapterError where a part of the entry does not fit a weight of this shape."""
    wanted = dict.fromkeys(("value", "offset"), shape)
    if factorization is not None and "A" in update:
        a_shape, b_shape = factorization.adapter_shapes(shape, update["A"].shape[-1])
        wanted |= {"A": a_shape, "B": b_shape, "magnitude": factorization.out_shape(shape)}
    for name, part in update.items():
        if name not in wanted:
            raise AdapterError(f"{name} {tuple(part.shape)} of a weight {shape}: no factorization is given")
        if tuple(part.shape) != wanted[name]:
            raise AdapterError(f"{name} {tuple(part.shape)} does not fit the weight {shape}: wanted {wanted[name]}")


def apply_update(
    weight: Any, update: Mapping[str, Any], scaling: Any, factorization: Factorization | None = None
) -> jax.Array:
    """The weight with an entry of the adapters applied; sums in float32, rounded once to the weight's dtype.

    The norm under a magnitude is a constant to gradients, as in Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank
    Adaptation", arXiv 2402.09353, section 4.3.
    """
    check_update(jnp.shape(weight), update, factorization)
    if set(update) == {"A", "B"}:
        return with_delta(weight, update, scaling * update["A"].shape[-1], factorization, 1)
    total = jnp.asarray(update.get("value", weight)).astype(_wide(weight))
    if "offset" in update:
        total = total + scaling * jnp.asarray(update["offset"]).astype(total.dtype)
    if "A" in update:
        adapter = {name: update[name] for name in "AB"}
        total = with_delta(total, adapter, scaling * update["A"].shape[-1], factorization, 1)
    if "magnitude" in update and factorization is not None:
        axes = factorization.axes("i")
        squares = lax.stop_gradient(jnp.sum(total * total, axes, keepdims=True))
        squares = jnp.where(jnp.isfinite(squares), squares, jnp.nan)  # an infinite norm would make zeros
        norm = jnp.sqrt(jnp.where(squares == 0, 1, squares))  # what is zero stays zero
        magnitude = jnp.expand_dims(factorization.out_like(update["magnitude"]), axes)
        total = total * (magnitude.astype(total.dtype) / norm)
    return total.astype(weight.dtype)


def undo_update(
    weight: Any, update: Mapping[str, Any], scaling: Any, factorization: Factorization | None = None
) -> jax.Array:
    """The weight before `apply_update`, by the same arithmetic backwards; up to rounding where it `is_reversible`."""
    check_update(jnp.shape(weight), update, factorization)
    if set(update) == {"A", "B"}:
        return with_delta(weight, update, scaling * update["A"].shape[-1], factorization, -1)
    total = jnp.asarray(weight).astype(_wide(weight))
    if "A" in update:
        adapter = {name: update[name] for name in "AB"}
        total = with_delta(total, adapter, scaling * update["A"].shape[-1], factorization, -1)
    if "offset" in update:
        total = total - scaling * jnp.asarray(update["offset"]).astype(total.dtype)
    return total.astype(weight.dtype)


def is_reversible(update: Mapping[str, Any]) -> bool:
    """Whether an entry can be taken out of a merged weight: a value or a norm that it has lost cannot."""
    return not {"value", "magnitude"} & set(update)


def _wide(weight: Any) -> Any:
    """The dtype of the sums."""
    dtype = jnp.dtype(weight.dtype)
    if dtype != jax.dtypes.canonicalize_dtype(dtype):
        raise AdapterError(f"a weight of dtype {dtype}: set jax_enable_x64, or cast it first")
    return common_dtype(dtype, jnp.float32)
