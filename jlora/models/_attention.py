"""Queries, keys and values: turned by positions, masked, softmaxed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.models._cache import Cache
from jlora.models._config import DecoderConfig
from jlora.models._kernels import attend, within
from jlora.models._parts import linear, norm
from jlora.models._rope import Rope

__all__ = ["View", "attention", "turns", "visible"]


class View(NamedTuple):
    """What one layer's attention is told of its tokens.

    Attributes:
      turns: of queries and keys, float32 (2, B, T, dims / 2).
      seen: bool (B, 1, T, S), which slots each token attends to; None for all up to its own, within `window`.
      window: of all layers, where `seen` is None.
      kernel: of `KERNELS`.
      slots: int32 (B, T), that of each token.
      layer: its number.
    """

    turns: jax.Array
    seen: jax.Array | None
    window: int | None
    kernel: str
    slots: jax.Array
    layer: jax.Array


def turns(rope: Rope, positions: jax.Array) -> jax.Array:
    """Cosines and sines, float32 (2, B, T, dims / 2), of int32 positions (B, T)."""
    frequencies: Any = rope.frequencies()
    if rope.kind == "longrope":  # as transformers does, for all rows by the farthest of them
        far = jnp.max(positions) >= rope.original
        frequencies = jnp.where(far, rope.frequencies(far=True), frequencies)
    angles = positions[..., None].astype(jnp.float32) * frequencies  # (B, T, dims / 2)
    return rope.scale * jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def visible(slots: jax.Array, held: int, window: int | None, segments: jax.Array | None = None) -> jax.Array:
    """Which slots each token attends to, bool (B, 1, T, S): those up to its own, within its window and its segment.

    Args:
      slots: int32 (B, T), that of each token.
      held: S, how many slots there are.
      window: how many slots a token attends to, its own included; None for all.
      segments: int32 (B, S), where the tokens are all that there is.
    """
    seen = within(slots, held, window)
    if segments is not None:
        seen &= segments[:, None, :, None] == segments[:, None, None, :]
    return seen


def attention(config: DecoderConfig, weights: Any, x: jax.Array, view: View, cache: Cache | None) -> Any:
    """Attention of x (B, T, D) to itself and to what the cache holds; and the cache with these tokens."""
    q, k, v = _queries_keys_values(config, weights, x)
    q, k = _rotate(q, view.turns), _rotate(k, view.turns)
    if cache is not None:
        cache = cache.written(view.layer, view.slots, k, v)
        k, v = cache.keys[view.layer], cache.values[view.layer]
    out = attend(
        q,
        k,
        v,
        scale=config.query_scale,
        seen=view.seen,
        window=view.window,
        softcap=config.attention_softcap,
        kernel=view.kernel,
    )
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
