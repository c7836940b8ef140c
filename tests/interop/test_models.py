"""Language models beside transformers' own: logits of tiny random ones, with every option that changes them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.models import decoder
from jlora.paths import leaves_by_path, nest, path_string
from tests.interop.decoders import assert_logits, config_of, params_of, random_tokens, torch_logits, torch_model
from tests.interop.models import peft, quiet, torch
from tests.reference import as64

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.7,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 5.0],
}
FULL, LOCAL = "full_attention", "sliding_attention"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-no-head-dim": ("llama", {"head_dim": None, "hidden_size": 24}),
    "llama-all-heads": ("llama", {"num_key_value_heads": None, "rms_norm_eps": 0.1}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-gelu-new": ("llama", {"hidden_act": "gelu_new"}),
    "llama-relu": ("llama", {"hidden_act": "relu"}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 3.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-all": ("llama", {"rope_parameters": {**YARN, "beta_fast": 3, "beta_slow": 0.5, "truncate": False}}),
    "llama-yarn-scale": ("llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}}),
    "llama-yarn-factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.5}}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-types": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": [LOCAL, FULL, LOCAL]}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe-normalized": ("qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 3}),
    "qwen3_moe-window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5, "attention_bias": True}),
    "gemma2": ("gemma2", {"sliding_window": 5}),
    "gemma2-caps": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
    "gemma2-no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-gelu": ("gemma2", {"hidden_activation": "gelu", "query_pre_attn_scalar": 3, "num_key_value_heads": 4}),
    "gemma2-types": ("gemma2", {"sliding_window": 4, "layer_types": [FULL, LOCAL, FULL], "attention_bias": True}),
    "gemma3": ("gemma3_text", {"sliding_window": 5}),
    "gemma3-pattern": ("gemma3_text", {"sliding_window": 5, "sliding_window_pattern": 2, "num_hidden_layers": 5}),
    "gemma3-cap": ("gemma3_text", {"final_logit_softcapping": 2.0, "tie_word_embeddings": False}),
    "gemma3-ropes": (
        "gemma3_text",
        {
            "sliding_window": 7,
            "layer_types": [LOCAL, FULL, LOCAL],
            "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 100.0, "factor": 8.0},
                LOCAL: {"rope_type": "default", "rope_theta": 30.0},
            },
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 5, "num_key_value_heads": 4}),
    "phi3-partial": ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.7}}),
    "phi3-short": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 40}),
    "phi3-long": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "olmo2": ("olmo2", {}),
    "olmo2-biases": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, rng: np.random.Generator, tmp_path: Path) -> None:
    family, changes = CASES[case]
    model = torch_model(family, **changes)
    config = config_of(model, tmp_path)
    params = params_of(model, config)
    tokens = random_tokens(rng, (2, 23))
    assert_logits(jax.jit(decoder(config))(params, tokens), torch_logits(model, tokens))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "phi3", "olmo2", "qwen3_moe"])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(
    family: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    model = torch_model(family)
    config = config_of(model, tmp_path)
    params = jax.tree.map(lambda array: array.astype(jnp.bfloat16), params_of(model, config))
    model.to(torch.bfloat16)
    tokens = random_tokens(rng, (4, 23))
    theirs = torch_logits(model, tokens)
    found = jax.jit(decoder(config))(params, tokens)
    assert found.dtype == jnp.float32
    exact = torch_logits(model.float(), tokens)

    def error(logits: Any) -> float:
        return float(np.median(np.abs(as64(logits) - exact)))  # a token that went to another expert says nothing

    assert error(found) <= 1.1 * error(theirs)


def torch_gradients(model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Of the loss of next tokens, by the names of PEFT's parameters."""
    ids = torch.from_numpy(tokens)
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}


def stacked_adapters(arrays: dict[str, np.ndarray], layers: int) -> Any:
    """PEFT's A (r, in) and B (out, r) of each layer as the adapters of stacked weights."""
    by_path: dict[str, list[Any]] = {}
    for name, array in arrays.items():
        _, _, module, part, _ = name.replace("base_model.model.", "").replace(".default", "").rsplit(".", 4)
        block = "self_attn" if "self_attn" in name else "mlp"
        by_path.setdefault(f"model/layers/{block}/{module}/weight/{part[-1]}", []).append(array.T)
    assert all(len(each) == layers for each in by_path.values())
    return nest({path: jnp.asarray(np.stack(each)) for path, each in by_path.items()})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_of_adapters_are_those_of_peft(family: str, rng: np.random.Generator, tmp_path: Path) -> None:
    model = torch_model(family)
    config = config_of(model, tmp_path)
    params = params_of(model, config)
    lora = peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights=False)
    with quiet():
        model = peft.get_peft_model(model, lora)
    tokens = random_tokens(rng, (2, 17))
    theirs = torch_gradients(model, tokens)
    arrays = {name: p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad}

    targets = jlora.LoraConfig(rank=3, alpha=7, target_modules=("model/layers/**",), exclude_modules=("**/*norm",))
    fn, adapters, _, _ = jlora.adapt(decoder(config), targets, params, tokens, strict=True)

    def loss(adapters: Any) -> jax.Array:
        chances = jax.nn.log_softmax(fn(params, adapters, tokens)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1))

    wanted = leaves_by_path(stacked_adapters(theirs, config.layers))
    given = leaves_by_path(stacked_adapters(arrays, config.layers))
    adapters = jax.tree_util.tree_map_with_path(lambda keys, _: given[path_string(keys)], adapters)
    found = leaves_by_path(jax.jit(jax.grad(loss))(adapters))
    assert set(found) == set(wanted)
    for path, gradient in found.items():
        scale = float(np.abs(wanted[path]).max())
        assert scale > 0
        np.testing.assert_allclose(gradient, wanted[path], rtol=0, atol=1e-4 * scale, err_msg=path)
