"""The function of a language model: tokens to logits, for every family by its configuration."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.errors import ConfigError, DataError
from jlora.fields import choice
from jlora.models._attention import View, attention, turns, visible
from jlora.models._cache import Cache, check_length
from jlora.models._config import DecoderConfig
from jlora.models._kernels import KERNELS, cudnn_can
from jlora.models._mlp import mlp
from jlora.models._parts import norm

__all__ = ["decoder"]

Policy = Callable[..., Any]


def decoder(
    config: DecoderConfig, *, remat: str | Policy | None = None, attention: str | None = None
) -> Callable[..., Any]:
    """The language model of a configuration, as a pure function of its params.

    The layers are one `lax.scan` over params that are stacked on a leading axis: the program does not grow with their
    number. Products are computed in the dtype of the params; norms, rotations, softmaxes and the logits in float32.

    Args:
      config: as `read_config` reads it.
      remat: what a gradient computes again rather than keep. None keeps all activations; "layer" keeps the input of
        each layer only, which costs about one more forward pass; a policy of `jax.checkpoint_policies` says what is
        kept of each layer.
      attention: "xla" or "cudnn", the implementation of `jax.nn.dot_product_attention`; None takes cuDNN on NVIDIA GPUs
        where it takes the shapes and dtypes: then no array of T x T logits exists. A cache is read by XLA, and
        softcapped attention is written out.

    Returns:
      `fn(params, tokens, *, positions=None, segments=None, cache=None, logits_at=None)`:

      - params: as `param_shapes(config)` has them.
      - tokens: int32 (B, T).
      - positions: int32 (B, T), for the rotations alone; by default 0, 1, ..., or on from what the cache holds.
      - segments: int32 (B, T): tokens see those before them in the row that have the same number. Packed examples
        have numbers of their own and positions from 0 on; padding has one too.
      - cache: a `Cache`. The tokens take the slots after those that it holds, and see these.
      - logits_at: int32 (B,): the one token of each row whose logits are wanted.

      It returns logits, float32 (B, T, vocab_size), or (B, vocab_size) with `logits_at`; with a cache
      `(logits, cache)`.

    Raises:
      ConfigError: a remat or an attention that is not known, or cuDNN for a model with softcapped attention.
      DataError: while tracing: rows longer than `config.max_positions` or than the cache; a cache and segments.

    Example:
      >>> from jlora.models import init_params, parse_config
      >>> sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
      >>> config = parse_config({"model_type": "llama", "num_attention_heads": 2, **sizes})
      >>> params = init_params(jax.random.key(0), config)
      >>> decoder(config)(params, jnp.array([[1, 2, 3]])).shape
      (1, 3, 11)
    """
    if remat is not None and remat != "layer" and not callable(remat):
        raise ConfigError(f"remat = {remat!r}: wanted None, 'layer' or a policy of jax.checkpoint_policies")
    if attention is not None:
        choice("attention", attention, KERNELS)
    if attention == "cudnn" and config.attention_softcap is not None:
        raise ConfigError("attention = 'cudnn': the model's attention is softcapped, which cuDNN cannot: wanted None")
    kinds = list(dict.fromkeys(zip(config.windows, config.ropes, strict=True)))
    kind_of_layer = [kinds.index(kind) for kind in zip(config.windows, config.ropes, strict=True)]

    def logits_of(
        params: Any,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
        logits_at: jax.Array | None = None,
    ) -> Any:
        _check(config, tokens, segments, cache)
        length = tokens.shape[1]
        held = length if cache is None else cache.slots
        slots = jnp.broadcast_to(jnp.arange(length), tokens.shape)  # (B, T)
        if cache is not None:
            slots += cache.lengths[:, None]
        turned = [turns(rope, slots if positions is None else positions) for _, rope in kinds]
        seen = None
        if segments is not None or cache is not None or len({window for window, _ in kinds}) > 1:
            seen = [visible(slots, held, window, segments) for window, _ in kinds]
        of_kinds = (jnp.stack(turned), None if seen is None else jnp.stack(seen))
        kernel = "xla" if cache is not None else attention
        if kernel is None:
            dtype = params["model"]["embed_tokens"]["weight"].dtype
            kernel = "cudnn" if cudnn_can(dtype, config.head_dim, length) else "xla"

        def layer(carry: Any, scanned: Any) -> Any:
            hidden, cache = carry
            weights, kind, index = scanned
            turned, seen = jax.tree.map(lambda each: each[kind], of_kinds)
            view = View(turned, seen, config.windows[0], kernel, slots, index)
            return _layer(config, weights, hidden, view, cache), None

        if remat is not None:
            policy: Any = None if remat == "layer" else remat
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)  # a scan keeps apart what CSE would join
        scanned = (params["model"]["layers"], jnp.array(kind_of_layer), jnp.arange(config.layers))
        (hidden, cache), _ = lax.scan(layer, (_embed(config, params, tokens), cache), scanned)
        logits = _head(config, params, hidden, logits_at)
        if cache is None:
            return logits
        return logits, cache._replace(lengths=cache.lengths + length)

    return logits_of


def _check(config: DecoderConfig, tokens: jax.Array, segments: Any, cache: Cache | None) -> None:
    if tokens.ndim != 2:
        raise DataError(f"tokens of shape {tokens.shape}: wanted (batch, length)")
    check_length(config, tokens.shape[1])
    if cache is None:
        return
    if segments is not None:
        raise DataError("a cache and segments: wanted one of them, as a cache has a row for each example")
    if tokens.shape[1] > cache.slots or tokens.shape[0] != cache.lengths.shape[0]:
        held = f"{cache.lengths.shape[0]} rows of {cache.slots}"
        raise DataError(f"tokens of shape {tokens.shape}, and the cache is for {held}: wanted one that holds them")


def _embed(config: DecoderConfig, params: Any, tokens: jax.Array) -> jax.Array:
    table = params["model"]["embed_tokens"]["weight"]
    hidden = table[tokens]  # (B, T, D)
    if config.embedding_scaled:
        hidden = hidden * jnp.asarray(config.hidden_size**0.5, hidden.dtype)
    return hidden


def _head(config: DecoderConfig, params: Any, hidden: jax.Array, at: jax.Array | None) -> jax.Array:
    if at is not None:
        hidden = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]  # (B, D)
    hidden = norm(config, params["model"]["norm"], hidden)
    table = params["model"]["embed_tokens"] if config.tied else params["lm_head"]
    logits = jnp.einsum("...d,vd->...v", hidden, table["weight"], preferred_element_type=jnp.float32)
    if config.logits_softcap is not None:
        logits = config.logits_softcap * jnp.tanh(logits / config.logits_softcap)
    return logits


def _layer(config: DecoderConfig, weights: Any, hidden: jax.Array, view: View, cache: Cache | None) -> Any:
    """Hidden (B, T, D) plus attention of it, plus the MLP of that; and the cache with these tokens."""
    before = config.norms in ("before", "around")
    after = config.norms in ("after", "around")
    # where norms stand before alone, the one before the MLP has the name of the one after attention
    before_mlp = "post_attention_layernorm" if config.norms == "before" else "pre_feedforward_layernorm"

    x = norm(config, weights["input_layernorm"], hidden) if before else hidden
    x, cache = attention(config, weights["self_attn"], x, view, cache)
    hidden += norm(config, weights["post_attention_layernorm"], x) if after else x

    x = norm(config, weights[before_mlp], hidden) if before else hidden
    x = mlp(config, weights["mlp"], x)
    hidden += norm(config, weights["post_feedforward_layernorm"], x) if after else x
    return hidden, cache
