"""The MLP of a layer, or its many MLPs, of which each token goes through a few."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.models._config import DecoderConfig
from jlora.models._parts import linear

__all__ = ["mlp"]

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
_ROWS_TIMES_OUT_IN = lax.RaggedDotDimensionNumbers(  # rows (m, in), sorted by expert, times weights (E, out, in)
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,)
)


def mlp(config: DecoderConfig, weights: Any, x: jax.Array) -> jax.Array:
    """down(activation(gate(x)) * up(x)) of x (B, T, D)."""
    if config.experts:
        return _experts(config, weights, x)
    if config.fused:
        gate, up = jnp.split(linear(weights["gate_up_proj"], x), 2, axis=-1)
    else:
        gate, up = linear(weights["gate_proj"], x), linear(weights["up_proj"], x)
    return linear(weights["down_proj"], _ACTIVATIONS[config.activation](gate) * up)


def _experts(config: DecoderConfig, weights: Any, x: jax.Array) -> jax.Array:
    """Each token through its best experts (Shazeer et al. 2017): x (B, T, D).

    The router's softmax goes over all experts; the best ones are taken, and their outputs summed with its weights.
    Tokens are sorted by expert, so that those of each are one block of a ragged product.
    """
    each = config.experts_per_token
    rows = x.reshape(-1, x.shape[-1])  # (n, D)
    logits = linear(weights["gate"], rows)  # (n, E)
    shares, chosen = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), each)  # (n, each)
    if config.experts_normalized:
        shares /= shares.sum(-1, keepdims=True)

    order = jnp.argsort(chosen.reshape(-1), stable=True)  # (n * each,)
    sizes = jnp.bincount(chosen.reshape(-1), length=config.experts).astype(jnp.int32)  # (E,)

    def multiply(name: str, x: jax.Array) -> jax.Array:
        return lax.ragged_dot_general(x, weights["experts"][name], sizes, _ROWS_TIMES_OUT_IN)

    taken = rows[order // each]  # (n * each, D), sorted by expert
    gate, up = jnp.split(multiply("gate_up_proj", taken), 2, axis=-1)  # (n * each, F) each
    out = multiply("down_proj", _ACTIVATIONS[config.activation](gate) * up)  # (n * each, D)
    out *= shares.reshape(-1)[order, None].astype(x.dtype)
    return jnp.zeros_like(rows).at[order // each].add(out).reshape(x.shape)
