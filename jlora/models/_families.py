"""The families of language models: what differs between them, as data.

The source of every row is the family's configuration class and model in transformers 5.24.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["FAMILIES", "NEUTRAL", "NO_MATTER", "Family"]


@dataclasses.dataclass(frozen=True)
class Family:
    """What config.json of one family may say, and what it does not say.

    Attributes:
      architecture: the class of transformers that config.json names.
      defaults: the keys that are used, and what they are where config.json is silent.
      neutral: more keys, and the values at which they change nothing; any other value is refused. Null
        always is one.
      ignored: keys of the family that change nothing, whatever they are.
      fixed: fields of `DecoderConfig` that config.json says nothing about.
      window: which layers attend within `sliding_window`: "none"; "all"; "last", those from `max_window_layers` on;
        "even", the first, third and so on; "pattern", all but each `sliding_window_pattern`-th.
      switch: a window needs `use_sliding_window` as well.
      other_names: of keys, as some versions of transformers write them.
    """

    architecture: str
    defaults: Mapping[str, Any]
    neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    window: str = "none"
    switch: bool = False
    other_names: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _defaults(
    vocab: int, width: int, inner: int, layers: int, heads: int, positions: int, **more: Any
) -> dict[str, Any]:
    sizes = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": None,
        "max_position_embeddings": positions,
    }
    others = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    rope = {"rope_parameters": None, "rope_scaling": None, "rope_theta": 10_000.0}
    return sizes | others | rope | more


_SWITCHED = {"use_sliding_window": False, "sliding_window": 4096}
_QWEN = {"num_key_value_heads": 32, "max_window_layers": 28, "layer_types": None, **_SWITCHED}
_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_GEMMA_FIXED = {"norms": "around", "norm_offset": 1.0, "embedding_scaled": True}
_OTHER_ACT = ("hidden_act",)  # an older key, which transformers does not read either
_UNDROPPED = {"attention_dropout": (0,), "partial_rotary_factor": (1,)}


def _gemma(vocab: int, positions: int, **more: Any) -> dict[str, Any]:
    defaults = _defaults(vocab, 2304, 9216, 26, 8, positions, **_GEMMA | more)
    del defaults["hidden_act"]
    return defaults


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        _defaults(32_000, 4096, 11_008, 32, 32, 2048, head_dim=None, attention_bias=False, mlp_bias=False),
        _UNDROPPED | {"rope_interleaved": (False,)},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _defaults(32_000, 4096, 14_336, 32, 32, 4096 * 32, num_key_value_heads=8, head_dim=None, sliding_window=4096),
        _UNDROPPED,
        window="all",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _defaults(151_936, 4096, 22_016, 32, 32, 32_768, **_QWEN, head_dim=None),
        _UNDROPPED | {"use_mrope": (False,)},
        {"qkv_bias": True},
        window="last",
        switch=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _defaults(151_936, 4096, 22_016, 32, 32, 32_768, **_QWEN, head_dim=128, attention_bias=False),
        _UNDROPPED,
        {"query_norm": "head"},
        window="last",
        switch=True,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _defaults(
            151_936,
            2048,
            6144,
            24,
            32,
            32_768,
            num_key_value_heads=4,
            head_dim=None,
            attention_bias=False,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=False,
            **_SWITCHED,
        ),
        _UNDROPPED | {"decoder_sparse_step": (1,), "mlp_only_layers": ([],), "output_router_logits": (False,)},
        {"query_norm": "head"},
        ("max_window_layers",),  # transformers has the window in all layers of this family
        window="all",
        switch=True,
        other_names={"num_local_experts": "num_experts"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _gemma(256_000, 8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        _UNDROPPED | {"use_bidirectional_attention": (False,)},
        _GEMMA_FIXED,
        _OTHER_ACT,
        window="even",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _gemma(
            262_208,
            131_072,
            final_logit_softcapping=None,
            rope_theta=1_000_000.0,
            rope_local_base_freq=10_000.0,
            sliding_window_pattern=6,
        ),
        # transformers has the key attn_logit_softcapping, and does nothing with it
        _UNDROPPED | {"use_bidirectional_attention": (False,), "attn_logit_softcapping": ()},
        _GEMMA_FIXED | {"query_norm": "head"},
        _OTHER_ACT,
        window="pattern",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _defaults(
            32_064,
            3072,
            8192,
            32,
            32,
            4096,
            rms_norm_eps=1e-5,
            original_max_position_embeddings=4096,
            sliding_window=None,
            partial_rotary_factor=1.0,
            head_dim=None,
        ),
        {
            "attention_dropout": (0,),
            "resid_pdrop": (0,),
            "embd_pdrop": (0,),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "lm_head_bias": (False,),
            "full_attn_mod": (1,),
            "interpolate_factor": (1,),
        },
        {"fused": True},
        window="all",
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _defaults(50_304, 4096, 11_008, 32, 32, 2048, rms_norm_eps=1e-5, attention_bias=False, head_dim=None),
        _UNDROPPED,
        {"norms": "after", "query_norm": "whole"},
    ),
}

# Of every family: more keys, and the values at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "tf_legacy_loss": (False,),
    "tie_encoder_decoder": (False,),
}

# Of every family: what does not change the logits. What begins with an underscore is transformers' own bookkeeping.
NO_MATTER = frozenset(
    {
        "architectures",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "label2id",
        "license",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "sep_token_id",
        "task_specific_params",
        "tie_last_hidden_states",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        # how older versions were told to generate
        "bad_words_ids",
        "begin_suppress_tokens",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
