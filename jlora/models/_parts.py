"""What every layer is made of: linear maps and norms."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.models._config import DecoderConfig

__all__ = ["linear", "norm"]


def linear(weights: Any, x: jax.Array) -> jax.Array:
    """x (..., in) times a weight (out, in), as Hugging Face stores it, plus a bias (out,) where there is one."""
    out = jnp.einsum("...i,oi->...o", x, weights["weight"])
    return out + weights["bias"] if "bias" in weights else out


def norm(config: DecoderConfig, weights: Any, x: jax.Array) -> jax.Array:
    """RMS norm over the last axis, computed in float32 (Zhang and Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    wide *= lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps)
    return (wide * (weights["weight"].astype(jnp.float32) + config.norm_offset)).astype(x.dtype)
