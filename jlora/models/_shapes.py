"""Which arrays a language model has: their places and shapes, and random ones."""

from typing import Any

import jax
import jax.numpy as jnp

from jlora.models._config import DecoderConfig
from jlora.paths import leaves_by_path, nest, path_number

__all__ = ["init_params", "param_shapes"]

_STD = 0.02  # of random weights: initializer_range of most families


def param_shapes(config: DecoderConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The params tree of a configuration, of `jax.ShapeDtypeStruct`.

    Names are Hugging Face's, and linear weights are (out, in) as it stores them; those of the layers are stacked on one
    leading axis, in `model/layers`.

    Example:
      >>> from jlora.models import parse_config
      >>> shapes = param_shapes(parse_config({"model_type": "llama", "num_hidden_layers": 2}))
      >>> shapes["model"]["layers"]["mlp"]["down_proj"]["weight"].shape
      (2, 4096, 11008)
    """
    shapes = {
        "model/embed_tokens/weight": (config.vocab_size, config.hidden_size),
        "model/norm/weight": (config.hidden_size,),
    }
    if not config.tied:
        shapes["lm_head/weight"] = (config.vocab_size, config.hidden_size)
    for name, shape in _of_a_layer(config).items():
        shapes[f"model/layers/{name}"] = (config.layers, *shape)
    return nest({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()})


def _of_a_layer(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    linear = {"self_attn/o_proj": (hidden, queries, config.output_bias)}  # out, in, with a bias
    if config.fused:
        linear["self_attn/qkv_proj"] = (queries + 2 * keys, hidden, config.qkv_bias)
    else:
        linear["self_attn/q_proj"] = (queries, hidden, config.qkv_bias)
        linear["self_attn/k_proj"] = (keys, hidden, config.qkv_bias)
        linear["self_attn/v_proj"] = (keys, hidden, config.qkv_bias)
    shapes: dict[str, tuple[int, ...]] = {}
    if config.experts:  # one array for all, as in transformers' memory, and so in the adapters of PEFT
        linear["mlp/gate"] = (config.experts, hidden, False)
        shapes["mlp/experts/gate_up_proj"] = (config.experts, 2 * inner, hidden)
        shapes["mlp/experts/down_proj"] = (config.experts, hidden, inner)
    else:
        if config.fused:
            linear["mlp/gate_up_proj"] = (2 * inner, hidden, config.mlp_bias)
        else:
            linear["mlp/gate_proj"] = linear["mlp/up_proj"] = (inner, hidden, config.mlp_bias)
        linear["mlp/down_proj"] = (hidden, inner, config.mlp_bias)
    for name, (wide, narrow, bias) in linear.items():
        shapes[f"{name}/weight"] = (wide, narrow)
        if bias:
            shapes[f"{name}/bias"] = (wide,)
    for name, size in _norms(config).items():
        shapes[f"{name}/weight"] = (size,)
    return shapes


def _norms(config: DecoderConfig) -> dict[str, int]:
    names = {
        "before": ("input_layernorm", "post_attention_layernorm"),
        "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "around": (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    }
    sizes = dict.fromkeys(names[config.norms], config.hidden_size)
    if config.query_norm is not None:
        heads, kv_heads = (config.heads, config.kv_heads) if config.query_norm == "whole" else (1, 1)
        sizes["self_attn/q_norm"] = heads * config.head_dim
        sizes["self_attn/k_norm"] = kv_heads * config.head_dim
    return sizes


def init_params(key: jax.Array, config: DecoderConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random params: normal weights with a standard deviation of 0.02, norms that multiply with one, biases of zero.

    Args:
      key: each array takes one of its own, by its path.
      config: of the model.
      dtype: of all arrays.
    """
    arrays = {}
    for path, leaf in leaves_by_path(param_shapes(config, dtype)).items():
        *_, module, kind = path.split("/")
        if kind == "bias":
            arrays[path] = jnp.zeros(leaf.shape, dtype)
        elif module.endswith("norm"):
            arrays[path] = jnp.full(leaf.shape, 1 - config.norm_offset, dtype)
        else:
            normal = jax.random.normal(jax.random.fold_in(key, path_number(path)), leaf.shape, dtype)
            arrays[path] = _STD * normal
    return nest(arrays)
