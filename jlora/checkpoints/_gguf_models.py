"""Which tensors and settings llama.cpp's models have, and what they are in Hugging Face's.

llama.cpp has one name for a tensor and one key for a setting, whatever the model's class calls it (llama.cpp,
gguf-py/gguf/tensor_mapping.py and constants.py). What a file leaves out is what llama.cpp takes then
(src/llama-model.cpp). Two things are changed by its conversion (conversion/llama.py, gemma.py) and undone here: the
rows of q and k are paired as they rotate together, and norms that the model adds to 1 are written whole.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from jlora.checkpoints._gguf_settings import Settings
from jlora.errors import DataError, listed, shortened

# The sizes of a tensor, by the letters of its shape below.
#   V vocabulary  D hidden  F intermediate  G gate and up  Q all query heads  K all key heads  P q, k and v  H one head
_ATTENTION = {
    "attn_q": ("self_attn.q_proj", "QD"),
    "attn_k": ("self_attn.k_proj", "KD"),
    "attn_v": ("self_attn.v_proj", "KD"),
    "attn_output": ("self_attn.o_proj", "DQ"),
}
_MLP = {
    "ffn_gate": ("mlp.gate_proj", "FD"),
    "ffn_up": ("mlp.up_proj", "FD"),
    "ffn_down": ("mlp.down_proj", "DF"),
}
_NORMS = {"attn_norm": ("input_layernorm", "D"), "ffn_norm": ("post_attention_layernorm", "D")}
_HEAD_NORMS = {"attn_q_norm": ("self_attn.q_norm", "H"), "attn_k_norm": ("self_attn.k_norm", "H")}
_FOUR_NORMS = {
    "attn_norm": ("input_layernorm", "D"),
    "post_attention_norm": ("post_attention_layernorm", "D"),
    "ffn_norm": ("pre_feedforward_layernorm", "D"),
    "post_ffw_norm": ("post_feedforward_layernorm", "D"),
}
_FUSED = {
    "attn_qkv": ("self_attn.qkv_proj", "PD"),
    "attn_output": ("self_attn.o_proj", "DQ"),
    "ffn_up": ("mlp.gate_up_proj", "GD"),
    "ffn_down": ("mlp.down_proj", "DF"),
}
_ENDS = {"token_embd": ("model.embed_tokens", "VD"), "output_norm": ("model.norm", "D")}
_HEAD = {"output": ("lm_head", "VD")}

Config = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures lies in a Hugging Face folder.

    Attributes:
      class_name, model_type: as config.json has them.
      layer: part of a layer -> (its module in Hugging Face's layer, the letters of its weight's shape).
      biases: parts of a layer that have a bias too.
      options: the settings of this architecture beside those that all have.
      is_reordered: whether the rows of q and k are paired.
      norms_are_added: whether Hugging Face keeps norms less 1.
    """

    class_name: str
    model_type: str
    layer: Mapping[str, tuple[str, str]]
    options: Callable[[Settings, Config], Config]
    biases: tuple[str, ...] = ()
    is_reordered: bool = False
    norms_are_added: bool = False


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor goes: its name in the folder, the shape that it has to have, what is undone as it is read."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0
    added: float = 0.0

    def restored(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """With the rows of each head as Hugging Face has them: (half, 2) becomes (2, half)."""
        if not self.heads:
            return array
        return array.reshape(self.heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def read_model(settings: Settings, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Config, dict[str, Place]]:
    """config.json, and tensor -> Place of all that the architecture has; `shapes` are those of the file.

    Raises:
      DataError: an architecture, a setting or a variant that is not known here.
    """
    known = ARCHITECTURES.get(settings.architecture)
    if known is None:
        raise DataError(
            f"{settings.path}: general.architecture = {shortened(settings.architecture)}; known here are "
            f"{listed(ARCHITECTURES)}"
        )
    biases = known.biases
    if known.is_reordered and "blk.0.attn_q.bias" in shapes:
        biases = tuple(_ATTENTION)
    config = _common(known, settings, shapes)
    config |= known.options(settings, config)
    if known.is_reordered:
        config |= {"attention_bias": bool(biases), "mlp_bias": False}
    places = _places(known, config, biases, "output.weight" in shapes)
    is_usual = config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    if is_usual and known.model_type in ("qwen2", "phi3"):
        del config["head_dim"]  # which their own configurations do not have
    return config, places


def _common(known: Architecture, settings: Settings, shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """The settings that all architectures have."""
    hidden, heads = settings.count("embedding_length"), settings.count("attention.head_count")
    head_dim = settings.count("attention.key_length", None) or settings.count("rope.dimension_count", hidden // heads)
    if head_dim % 2:
        raise DataError(f"{settings.path}: heads of {head_dim} numbers, which cannot rotate in pairs")
    settings.same("attention.value_length", head_dim)
    if known.model_type != "phi3":
        settings.same("rope.dimension_count", head_dim)
    settings.same("expert_count", 0)
    settings.same("expert_used_count", 0)
    settings.same("attention.causal", True)
    rows = next(iter(shapes.get("token_embd.weight", ())), 0) or settings.count("vocab_size", 1)
    settings.same("vocab_size", rows)
    layers = settings.count("block_count")
    if layers > len(shapes):
        raise DataError(
            f"{settings.path}: {layers:,} layers ({settings.architecture}.block_count) in {len(shapes):,} tensors"
        )
    return {
        "architectures": [known.class_name],
        "model_type": known.model_type,
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": settings.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": settings.count("context_length"),
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": settings.number("rope.freq_base", 10000.0),
        "rope_scaling": settings.rope_scaling(head_dim // 2),
        "tie_word_embeddings": "output.weight" not in shapes,
    }


def _places(known: Architecture, config: Config, biases: tuple[str, ...], has_head: bool) -> dict[str, Place]:
    """Tensor -> Place, in the order of the model."""
    hidden, width, wide = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    sizes = {
        "V": config["vocab_size"],
        "D": hidden,
        "F": wide,
        "G": 2 * wide,
        "Q": heads * width,
        "K": key_heads * width,
        "P": (heads + 2 * key_heads) * width,
        "H": width,
    }
    reordered = {"attn_q": heads, "attn_k": key_heads} if known.is_reordered else {}
    places: dict[str, Place] = {}

    def place(gguf_name: str, part: str, name: str, letters: str) -> None:
        added = -1.0 if known.norms_are_added and part.endswith("norm") else 0.0
        shape = tuple(sizes[letter] for letter in letters)
        places[gguf_name] = Place(name, shape, reordered.get(part, 0), added)

    for part, (module, letters) in (_ENDS | (_HEAD if has_head else {})).items():
        place(f"{part}.weight", part, f"{module}.weight", letters)
    for layer in range(config["num_hidden_layers"]):
        for part, (module, letters) in known.layer.items():
            place(f"blk.{layer}.{part}.weight", part, f"model.layers.{layer}.{module}.weight", letters)
        for part in biases:
            module, letters = known.layer[part]
            place(f"blk.{layer}.{part}.bias", part, f"model.layers.{layer}.{module}.bias", letters[:1])
    return places


def _llama(settings: Settings, config: Config) -> Config:
    settings.same("tensor_data_layout", "Meta AI original pth")  # the paired rows, which all files have
    return {"hidden_act": "silu"}


def _qwen2(settings: Settings, config: Config) -> Config:
    return {"hidden_act": "silu", "use_sliding_window": False}


def _qwen3(settings: Settings, config: Config) -> Config:
    return {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False}


def _gemma2(settings: Settings, config: Config) -> Config:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": _attention_width(config, layers_of_27b=46),
        "sliding_window": settings.count("attention.sliding_window", 4096),
        "attn_logit_softcapping": settings.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": settings.number("final_logit_softcapping", 30.0),
    }


def _gemma3(settings: Settings, config: Config) -> Config:
    every = settings.count("attention.sliding_window_pattern", 6)
    layers = range(1, config["num_hidden_layers"] + 1)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": _attention_width(config, layers_of_27b=62),
        "sliding_window": settings.count("attention.sliding_window"),
        "layer_types": ["sliding_attention" if layer % every else "full_attention" for layer in layers],
        "rope_theta": settings.number("rope.freq_base", 1e6),
        "rope_local_base_freq": settings.number("rope.freq_base_swa", 10000.0),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": settings.number("final_logit_softcapping", None),
    }


def _attention_width(config: Config, layers_of_27b: int) -> int:
    """What attention is scaled by, which is in no key: llama.cpp tells the models of 27B by their layers."""
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config["head_dim"])


def _phi3(settings: Settings, config: Config) -> Config:
    rotated = settings.count("rope.dimension_count", config["head_dim"])
    settings.same("rope.scaling.original_context_length", config["max_position_embeddings"])
    more = {} if rotated == config["head_dim"] else {"partial_rotary_factor": rotated / config["head_dim"]}
    window = settings.count("attention.sliding_window", None, least=0) or None  # 0 for none, as of Phi-4
    return {"hidden_act": "silu", "sliding_window": window, **more}


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture("LlamaForCausalLM", "llama", _NORMS | _ATTENTION | _MLP, _llama, is_reordered=True),
        "qwen2": Architecture(
            "Qwen2ForCausalLM", "qwen2", _NORMS | _ATTENTION | _MLP, _qwen2, biases=("attn_q", "attn_k", "attn_v")
        ),
        "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", _NORMS | _ATTENTION | _HEAD_NORMS | _MLP, _qwen3),
        "gemma2": Architecture(
            "Gemma2ForCausalLM", "gemma2", _FOUR_NORMS | _ATTENTION | _MLP, _gemma2, norms_are_added=True
        ),
        "gemma3": Architecture(
            "Gemma3ForCausalLM",
            "gemma3_text",
            _FOUR_NORMS | _ATTENTION | _HEAD_NORMS | _MLP,
            _gemma3,
            norms_are_added=True,
        ),
        "phi3": Architecture("Phi3ForCausalLM", "phi3", _NORMS | _FUSED, _phi3),
    }
)
