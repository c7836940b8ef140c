"""Queries, keys and values: turned by positions, masked, softmaxed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.models._cache import Cache
from jlora.models._config import DecoderConfig
from jlora.models._parts import linear, norm
from jlora.models._rope import Rope

__all__ = ["View", "attention", "turns", "visible"]


class View(NamedTuple):
    """What one layer's attention is told of its tokens.

    Attributes:
      turns: of queries and keys, float32 (2, B, T, dims / 2).
      seen: bool (B, 1, T, S), which slots each token attends to.
      slots: int32 (B, T), that of each token.
      layer: its number.
    """

    turns: jax.Array
    seen: jax.Array
    slots: jax.Array
    layer: jax.Array


def turns(rope: Rope, positions: jax.Array, length: int) -> jax.Array:
    """Cosines and sines, float32 (2, B, T, dims / 2), of int32 positions (B, T) in rows of up to `length` tokens."""
    angles = positions[..., None].astype(jnp.float32) * rope.frequencies(length)  # (B, T, dims / 2)
    return rope.scale * jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def visible(queries: jax.Array, slots: int, window: int | None, segments: jax.Array | None = None) -> jax.Array:
    """Which slots each query sees, bool (B, 1, T, S): those up to its own, within its window and its segment.

    Args:
      queries: int32 (B, T), the slot of each query.
      slots: S, of the keys.
      window: how many slots a query sees, its own included; None for all.
      segments: int32 (B, S), where queries and keys are the same tokens.
    """
    ahead = queries[:, :, None] - jnp.arange(slots)  # (B, T, S)
    seen = ahead >= 0
    if window is not None:
        seen &= ahead < window
    if segments is not None:
        seen &= segments[:, :, None] == segments[:, None, :]
    return seen[:, None]


def attention(config: DecoderConfig, weights: Any, x: jax.Array, view: View, cache: Cache | None) -> Any:
    """Attention of x (B, T, D) to itself and to what the cache holds; and the cache with these tokens."""
    q, k, v = _queries_keys_values(config, weights, x)
    q, k = _rotate(q, view.turns), _rotate(k, view.turns)
    if cache is not None:
        cache = cache.written(view.layer, view.slots, k, v)
        k, v = cache.keys[view.layer], cache.values[view.layer]
    out = _attend(q, k, v, view.seen, config.query_scale, config.attention_softcap)
    return linear(weights["o_proj"], out.reshape(*x.shape[:2], -1)), cache


def _queries_keys_values(config: DecoderConfig, weights: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """Each (B, T, its heads, head_dim), not turned yet."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    if config.fused:
        q, k, v = jnp.split(linear(weights["qkv_proj"], x), (queries, queries + keys), axis=-1)
    else:
        q, k, v = (linear(weights[name], x) for name in ("q_proj", "k_proj", "v_proj"))
    if config.query_norm == "whole":
        q, k = norm(config, weights["q_norm"], q), norm(config, weights["k_norm"], k)
    q, k, v = (each.reshape(*x.shape[:2], -1, config.head_dim) for each in (q, k, v))
    if config.query_norm == "head":
        q, k = norm(config, weights["q_norm"], q), norm(config, weights["k_norm"], k)
    return q, k, v


def _rotate(x: jax.Array, turns: jax.Array) -> jax.Array:
    """Heads (B, T, N, H) turned by their positions; computed in float32, returned in their own dtype.

    Axis i of the first half of the turned axes pairs with axis i of the second half, as Hugging Face's weights have it.
    """
    cos, sin = turns[:, :, :, None]  # (B, T, 1, dims / 2)
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float, softcap: float | None = None
) -> jax.Array:
    """softmax(cap(scale q k')) v, where `seen`; the softmax in float32.

    Args:
      q: (B, T, N, H).
      k, v: (B, S, K, H), each for N / K heads of the queries.
      seen: bool (B, 1, T, S).
      softcap: c in cap(x) = c tanh(x / c), which no kernel of `jax.nn.dot_product_attention` has; None for none.

    Returns:
      (B, T, N, H), in the dtype of v.
    """
    if softcap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=seen, scale=scale)
    batch, queries, heads, width = q.shape
    q = q.reshape(batch, queries, k.shape[2], -1, width)  # (B, T, K, N / K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    logits = softcap * jnp.tanh(logits * (scale / softcap))
    logits = jnp.where(seen[:, :, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, queries, heads, width)
