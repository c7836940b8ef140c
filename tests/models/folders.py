"""Folders of tiny models with random weights, named as Hugging Face names them, written without transformers."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.disk import write_tensors

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 12,
    "intermediate_size": 22,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
OF_A_LAYER = {
    "self_attn.q_proj.weight": (12, 12),
    "self_attn.k_proj.weight": (4, 12),
    "self_attn.v_proj.weight": (4, 12),
    "self_attn.o_proj.weight": (12, 12),
    "mlp.gate_proj.weight": (22, 12),
    "mlp.up_proj.weight": (22, 12),
    "mlp.down_proj.weight": (12, 22),
    "input_layernorm.weight": (12,),
    "post_attention_layernorm.weight": (12,),
}

MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
OF_A_MOE_LAYER = {
    **{name: shape for name, shape in OF_A_LAYER.items() if not name.startswith("mlp.")},
    "self_attn.q_norm.weight": (4,),
    "self_attn.k_norm.weight": (4,),
    "mlp.gate.weight": (5, 12),
    **{f"mlp.experts.{e}.{name}.weight": (7, 12) for e in range(5) for name in ("gate_proj", "up_proj")},
    **{f"mlp.experts.{e}.down_proj.weight": (12, 7) for e in range(5)},
}


def tensors_of(config: Mapping[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray[Any, Any]]:
    """Random tensors of a model by their names on the disk."""
    rng = np.random.default_rng(3)
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    of_a_layer = OF_A_MOE_LAYER if "num_experts" in config else OF_A_LAYER
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_a_layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]], files: int = 1
) -> Path:
    """The folder of a model; its tensors dealt out to so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        with open(folder / "model.safetensors", "wb") as file:
            write_tensors(file, dict(tensors), {"format": "pt"})
        return folder
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        own = {key: tensors[key] for place, key in enumerate(tensors) if place % files == number}
        with open(folder / name, "wb") as file:
            write_tensors(file, own, {"format": "pt"})
        weight_map |= dict.fromkeys(own, name)
    index = {"metadata": {"total_size": sum(array.nbytes for array in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def run_program(program: str, *arguments: Any, flags: str = "") -> str:
    """What another process prints that runs this program, with these flags of XLA."""
    code = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(code, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
