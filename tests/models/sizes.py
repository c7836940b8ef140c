"""Tiny configurations of every kind of decoder, and random params in which nothing is zero or one."""

from typing import Any

import jax
import numpy as np

from jlora.models import DecoderConfig, param_shapes, parse_config
from tests.reference import randomize

SIZES = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 22,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"model_type": "llama"},
    "window": {"model_type": "mistral", "sliding_window": 5},
    "alternating": {"model_type": "gemma3_text", "sliding_window": 5, "sliding_window_pattern": 2},
    "capped": {"model_type": "gemma2", "sliding_window": 5, "attn_logit_softcapping": 3.0},
    "fused": {"model_type": "phi3"},
    "experts": {"model_type": "qwen3_moe", "moe_intermediate_size": 14, "num_experts": 5, "num_experts_per_tok": 2},
}


def config_of(kind: str, **changes: Any) -> DecoderConfig:
    return parse_config({**SIZES, **KINDS[kind], **changes})


def random_params(rng: np.random.Generator, config: DecoderConfig, dtype: Any = "float32") -> Any:
    return randomize(rng, param_shapes(config, dtype), std=0.3)


def random_tokens(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    return jax.device_put(rng.integers(3, SIZES["vocab_size"], shape, np.int32))
