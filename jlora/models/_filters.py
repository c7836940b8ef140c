"""Which tokens may come next, and one of them: temperature, top-k and top-p, in the order of transformers."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["filtered", "sample"]


def filtered(logits: jax.Array, temperature: Any = 1.0, top_k: int | None = None, top_p: Any = None) -> jax.Array:
    """The logits of the distribution that is sampled from: -inf for tokens that are left out.

    Args:
      logits: float32 (..., vocabulary).
      temperature: above 0; the logits are divided by it.
      top_k: only the k most likely tokens are kept, and those as likely as the last of them (Fan et al. 2018).
      top_p: only the most likely tokens are kept, as few as have this probability together (Holtzman et al. 2020);
        at least one.

    >>> filtered(jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])), top_k=3, top_p=0.7).tolist()[:2]
    [-inf, -inf]
    """
    scaled = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        last = jax.lax.top_k(scaled, top_k)[0][..., -1:]  # (..., 1)
        scaled = jnp.where(scaled < last, -jnp.inf, scaled)
    if top_p is not None:
        falling = -jnp.sort(-scaled, axis=-1)  # (..., V)
        shares = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares  # the probability of the more likely ones
        is_kept = (before < top_p) | (top_p >= 1)  # the sum of all shares may be rounded to more than 1
        kept = jnp.maximum(jnp.sum(is_kept, axis=-1, keepdims=True), 1)  # (..., 1)
        last = jnp.take_along_axis(falling, kept - 1, axis=-1)
        scaled = jnp.where(scaled < last, -jnp.inf, scaled)
    return scaled


def sample(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """One token of each row: logits (B, vocabulary), keys (B,) -> int32 (B,)."""
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
