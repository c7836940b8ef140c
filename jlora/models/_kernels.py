"""Attention itself: `jax.nn.dot_product_attention` by XLA or cuDNN, or written out where neither has what is needed."""

import re
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["KERNELS", "attend", "cudnn_can", "within"]

KERNELS = ("xla", "cudnn")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    seen: jax.Array | None,
    window: int | None = None,
    softcap: float | None = None,
    kernel: str = "xla",
) -> jax.Array:
    """softmax(cap(scale q k')) v, the softmax in float32.

    Args:
      q: (B, T, N, H).
      k, v: (B, S, K, H), each for N / K heads of the queries.
      scale: of the logits.
      seen: bool (B, 1, T, S), which keys each query sees; None for all up to its own, within `window`, where S = T.
      window: how many keys a query sees, its own included, where `seen` is None; None for all.
      softcap: c in cap(x) = c tanh(x / c); None for cap(x) = x.
      kernel: "xla" or "cudnn".

    Returns:
      (B, T, N, H), in the dtype of v.
    """
    if softcap is not None:
        slots = jnp.arange(k.shape[1])
        return _capped(q, k, v, scale, within(slots[None], slots.size, window) if seen is None else seen, softcap)
    how: dict[str, Any] = {"scale": scale, "implementation": kernel}
    if seen is not None:
        return jax.nn.dot_product_attention(q, k, v, mask=seen, **how)
    before = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=before, **how)


def _capped(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, seen: jax.Array, softcap: float) -> jax.Array:
    batch, queries, heads, width = q.shape
    q = q.reshape(batch, queries, k.shape[2], -1, width)  # (B, T, K, N / K, H)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    logits = softcap * jnp.tanh(logits * (scale / softcap))
    logits = jnp.where(seen[:, :, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, queries, heads, width)


def within(queries: jax.Array, slots: int, window: int | None) -> jax.Array:
    """Which of S slots queries at slots (B, T) see, bool (B, 1, T, S): those up to their own, within the window."""
    ahead = queries[:, :, None] - jnp.arange(slots)  # (B, T, S)
    seen = ahead >= 0
    if window is not None:
        seen &= ahead < window
    return seen[:, None]


def cudnn_can(dtype: Any, width: int, length: int) -> bool:
    """Whether cuDNN's attention takes rows of `length` tokens to themselves, on the devices that JAX uses by default.

    Its limits are those that `jax.nn.dot_product_attention` checks in JAX 0.7 to 0.12: an NVIDIA GPU of compute
    capability 8.0, numbers of 16 bits, heads of a multiple of 8 axes up to 128, and up to 256 on Hopper; and for
    gradients, rows of an even length.
    """
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < 8:  # of AMD it is a name
        return False
    widest = 256 if capability == "9.0" else 128
    halves = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return halves and width % 8 == 0 and width <= widest and length % 2 == 0
