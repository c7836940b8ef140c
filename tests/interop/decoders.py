"""Tiny random language models of transformers, and their params as jlora has them."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models import DecoderConfig, param_shapes, parse_config
from jlora.paths import leaves_by_path, nest
from tests.interop.models import torch, transformers

SIZES = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 22,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# model_type -> what its config class does not share with the others, at tiny sizes
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 6},
    "mistral": {"head_dim": 6},
    "qwen2": {"hidden_size": 24},
    "qwen3": {"head_dim": 6},
    "qwen3_moe": {"head_dim": 6, "moe_intermediate_size": 14, "num_experts": 5, "num_experts_per_tok": 2},
    "gemma2": {"head_dim": 6, "query_pre_attn_scalar": 7},
    "gemma3_text": {"head_dim": 6, "query_pre_attn_scalar": 7},
    "phi3": {"hidden_size": 24},
    "olmo2": {"hidden_size": 24},
}


def torch_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model of transformers in evaluation mode with eager attention; every parameter random, norms and biases too."""
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILY_SIZES[family] | changes)
    torch.manual_seed(seed)
    # with other kernels transformers leaves out the cap of attention's logits, and wants experts of even sizes
    written_out = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **written_out).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if name.endswith("norm.weight") and "gemma" not in family else 0.0
            parameter.copy_(center + 0.3 * torch.randn_like(parameter))
    return model


def written_config(model: Any, folder: Path) -> dict[str, Any]:
    """What transformers writes to config.json."""
    model.config.save_pretrained(folder)
    return dict(json.loads((folder / "config.json").read_text()))


def config_of(model: Any, folder: Path) -> DecoderConfig:
    return parse_config(written_config(model, folder))


def params_of(model: Any, config: DecoderConfig) -> Any:
    """The params tree, put together by this file alone."""
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    arrays = {}
    for path, leaf in leaves_by_path(param_shapes(config)).items():
        if path.startswith("model/layers/"):
            name = path.removeprefix("model/layers/").replace("/", ".")
            array = np.stack([state[f"model.layers.{i}.{name}"] for i in range(config.layers)])
        else:
            array = state[path.replace("/", ".")]
        assert array.shape == leaf.shape, path
        arrays[path] = jnp.asarray(array)
    return nest(arrays)


def torch_logits(model: Any, tokens: np.ndarray, **more: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(tokens), **more).logits.float())


def random_tokens(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(3, SIZES["vocab_size"], shape)


def assert_logits(found: jax.Array, wanted: np.ndarray, relative: float = 1e-5) -> None:
    assert found.dtype == jnp.float32
    assert found.shape == wanted.shape
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=relative * float(np.abs(wanted).max()))
