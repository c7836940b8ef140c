"""Gradients of A and B, divided by the Gram matrix of the other factor."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.adapter import is_entry
from jlora.boxes import box_like, unboxed
from jlora.config import LoraConfig
from jlora.errors import ConfigError, listed
from jlora.paths import leaves_by_path, path_string
from jlora.products import common_dtype
from jlora.tree import batch_dims_of


def divided_by_gram(
    grads: Any, adapters: Any, config: LoraConfig, damping: float, parts: Collection[str], *, by_scaling: bool = False
) -> Any:
    """dA (B B^T + damping I)^-1 and (A^T A + damping I)^-1 dB of every adapter, for the parts that are named.

    Args:
      grads: of the adapters.
      adapters: A (*batch, *in, r) and B (*batch, r, *out) at the paths of their weights.
      config: of the adapters: how many of their axes are batch axes, and the scaling.
      damping: what is added to the diagonals.
      parts: of "A" and "B"; all others stay as they are.
      by_scaling: whether they are divided by scaling^2 too.
    """
    if adapters is None:
        raise ConfigError("the optimizer needs what it trains: optimizer.update(grads, state, adapters)")
    if by_scaling:
        _check_patterns(config, list(leaves_by_path(adapters, is_leaf=is_entry)))

    def divided(key_path: Any, grad: Any, boxed: Any) -> Any:
        if not is_entry(boxed) or "A" not in boxed:
            return grad
        path, entry = path_string(key_path), unboxed(boxed)
        n = batch_dims_of(path, entry, config)
        factor = config.scaling_of(path) ** -2 if by_scaling else 1.0
        a, b = _columns(entry["A"], n), _rows(entry["B"], n)  # (*batch, in, r), (*batch, r, out)
        found = dict(grad)
        if "A" in parts:
            turned = _solve(b @ b.mT, _columns(unboxed(grad["A"]), n).mT, damping)  # (*batch, r, in): it is symmetric
            found["A"] = _like(factor * turned.mT, grad["A"])
        if "B" in parts:
            found["B"] = _like(factor * _solve(a.mT @ a, _rows(unboxed(grad["B"]), n), damping), grad["B"])
        return found

    with jax.default_matmul_precision("highest"):
        return jax.tree_util.tree_map_with_path(divided, grads, adapters, is_leaf=is_entry)


def _check_patterns(config: LoraConfig, paths: Sequence[str]) -> None:
    """Refuses ranks and alphas that are given for other paths: the scaling would be another one, and nothing tell."""
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(config, field):
            if not any(pattern in dict(config.matches(field, path)) for path in paths):
                raise ConfigError(
                    f"{field}: {pattern!r} matches nothing that the optimizer trains ({listed(paths, 3)}): give the "
                    "configuration the paths that it sees, as an nnx.Optimizer sees lora/... before each"
                )


def _columns(a: jax.Array, batch_dims: int) -> jax.Array:
    """A as matrices (*batch, in, r), in float32 at least."""
    shape = (*a.shape[:batch_dims], math.prod(a.shape[batch_dims:-1]), a.shape[-1])
    return a.astype(common_dtype(a.dtype, jnp.float32)).reshape(shape)


def _rows(b: jax.Array, batch_dims: int) -> jax.Array:
    """B as matrices (*batch, r, out), in float32 at least."""
    shape = (*b.shape[: batch_dims + 1], math.prod(b.shape[batch_dims + 1 :]))
    return b.astype(common_dtype(b.dtype, jnp.float32)).reshape(shape)


def _solve(gram: jax.Array, right: jax.Array, damping: float) -> jax.Array:
    """(gram + damping I)^-1 right, (*batch, r, n)."""
    return jnp.linalg.solve(gram + damping * jnp.eye(gram.shape[-1], dtype=gram.dtype), right)


def _like(found: jax.Array, grad: Any) -> Any:
    """In the shape and the dtype of the gradient, and in a box as it is."""
    array = unboxed(grad)
    return box_like(grad, lax.reshape(found, array.shape).astype(array.dtype))
