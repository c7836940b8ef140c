"""What read_config refuses: the file, the key, what was found and what was wanted."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from jlora import ConfigError, DataError
from jlora.models import FAMILIES, parse_config, read_config
from jlora.models._rope_config import _ALWAYS, _KEYS
from tests.models.sizes import KINDS, config_of

LOCAL = "sliding_attention"
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "family": (
        {"model_type": "mamba"},
        r"model_type = 'mamba' is not known: known are llama \(LlamaForCausalLM\), mistral",
    ),
    "no-family": ({"model_type": None}, "model_type = None is not known"),
    "images": ({"model_type": "gemma3"}, "model_type = 'gemma3' is not known: .*gemma3_text"),
    "class": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "architectures = LlamaForSequenceClassification of model_type 'llama' is not known: wanted LlamaForCausalLM",
    ),
    "classes": ({"architectures": "LlamaForCausalLM"}, "architectures = 'LlamaForCausalLM': wanted a list of names"),
    "key": ({"attention_sinks": 4}, "attention_sinks = 4: this key is not known for LlamaForCausalLM. Take it out"),
    "packed": (
        {"quantization_config": {"bits": 4}},
        r"quantization_config = \{'bits': 4\}: packed weights are not supported",
    ),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported for LlamaForCausalLM: wanted 0"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    "partial-rope": (
        {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}},
        "rope_parameters/partial_rotary_factor = 0.5: wanted 1 for this family",
    ),
    "activation": ({"hidden_act": "silus"}, r"hidden_act = 'silus': wanted one of .*did you mean 'silu'"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads = 3: wanted a divisor of num_attention_heads = 4"),
    "width": ({"head_dim": None, "hidden_size": 21}, "num_attention_heads = 4: wanted a divisor of hidden_size = 21"),
    "odd": ({"head_dim": 7}, "7 axes of head_dim = 7 would be turned: wanted an even number"),
    "size": ({"vocab_size": "many"}, "vocab_size = 'many': wanted a whole number of at least 1"),
    "flag": ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1: wanted true or false"),
    "eps": ({"rms_norm_eps": -1}, "rms_norm_eps = -1"),
    "rope-kind": (
        {"rope_scaling": {"type": "lniear"}},
        "rope_parameters/rope_type = 'lniear': wanted one of .*did you mean 'linear'",
    ),
    "rope-key": (
        {"rope_scaling": {"type": "linear", "fact": 2}},
        "of rope_type 'linear': unknown key 'fact' .*'factor'",
    ),
    "rope-missing": ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs factor, which is missing"),
    "rope-number": (
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        "rope_parameters/factor = 0.5: wanted a number of at least 1",
    ),
    "rope-table": ({"rope_parameters": 5}, "rope_parameters = 5: wanted an object or null"),
    "rope-bounds": (
        {"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}},
        "low_freq_factor = 4.0 and high_freq_factor = 4.0",
    ),
    "rope-long": (
        {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
        "rope_parameters/short_factor: wanted a list of 3 numbers, found 1 numbers",
    ),
    "rope-layers": (
        {"model_type": "gemma3_text", "rope_parameters": {"full_attentoin": {}}},
        "rope_parameters: unknown key 'full_attentoin'",
    ),
    "window": (
        {"model_type": "mistral", "sliding_window": 0},
        "sliding_window = 0: wanted a whole number of at least 1",
    ),
    "types": (
        {"model_type": "gemma2", "layer_types": [LOCAL]},
        "wanted a list of num_hidden_layers = 3 names, found a list of 1",
    ),
    "type": ({"model_type": "gemma2", "layer_types": ["chunked"] * 3}, "layer_types = 'chunked': wanted one of"),
    "no-window": (
        {"model_type": "qwen2", "layer_types": [LOCAL] * 3},
        "there is no sliding_window: wanted one, switched on",
    ),
    "some-experts": (
        {**KINDS["experts"], "decoder_sparse_step": 2, "mlp_only_layers": [0]},
        r"(?s)2 problems:.*decoder_sparse_step = 2 is not supported.*mlp_only_layers = \[0\] is not supported",
    ),
    "experts": (
        {**KINDS["experts"], "num_experts_per_tok": 6},
        "num_experts_per_tok = 6: wanted a whole number .* below 6",
    ),
    "bidirectional": (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "use_bidirectional_attention = True",
    ),
    "no-cap": (
        {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
        "attn_logit_softcapping = 50.0 is not supported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as found:
        config_of("plain", **changes)
    assert str(found.value).startswith("config.json: ")


def test_all_problems_are_in_one_error() -> None:
    with pytest.raises(ConfigError) as found:
        config_of("plain", sinks=4, head_dim="wide", vocab_size=0, hidden_act="no", mlp_bias=3, num_hidden_layers=-1)
    for key in ("6 problems", "sinks", "head_dim", "vocab_size", "hidden_act", "mlp_bias", "num_hidden_layers"):
        assert key in str(found.value)


def test_the_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "head_dim": "wide"}))
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json: head_dim = 'wide'"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "it has no config.json: wanted the folder of a Hugging Face model"),
        ("", "not valid JSON"),
        ('{"model_type": "lla', "not valid JSON"),
        ("[1, 2]", "wanted an object, found list"),
        ('{"head_dim": 6, "head_dim": 8}', "head_dim"),
    ],
)
def test_files_that_are_no_configuration(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=message) as found:
        read_config(tmp_path)
    assert str(tmp_path) in str(found.value)


def test_the_class_alone_names_the_family() -> None:
    assert parse_config({"architectures": ["Olmo2ForCausalLM"]}).family == "olmo2"


def test_a_configuration_is_hashable_and_says_all_that_differs() -> None:
    assert hash(config_of("alternating")) == hash(config_of("alternating"))
    assert config_of("alternating") != config_of("alternating", sliding_window=4)
    assert config_of("alternating").windows == (5, None, 5)


def test_what_does_not_matter_is_left_out() -> None:
    more = {"torch_dtype": "bfloat16", "use_cache": False, "_name_or_path": "x", "is_decoder": False, "auto_map": {}}
    assert config_of("plain", **more) == config_of("plain")


PUBLISHED: dict[str, dict[str, Any]] = {  # keys that published models have beside those of transformers' classes
    "llama": {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}, "pretraining_tp": 1},
    "gemma2": {"cache_implementation": "hybrid", "hidden_act": "gelu"},
    "gemma3_text": {"cache_implementation": "hybrid", "_sliding_window_pattern": 6},
    "phi3": {"auto_map": {"AutoConfig": "x"}, "interpolate_factor": 1, "lm_head_bias": False, "full_attn_mod": 1},
    "qwen3_moe": {"max_window_layers": 48, "mlp_only_layers": [], "router_aux_loss_coef": 0.001},
    "qwen2": {"use_mrope": False},
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_keys_of_published_models(family: str) -> None:
    assert parse_config({"model_type": family, **PUBLISHED[family]}) == parse_config({"model_type": family})


HOSTILE = (None, True, -1, 0, 1, 2.5, 1e308, 10**40, float("nan"), "x", "", [], [1], [[]], {}, {"a": 1}, {"factor": []})


def parsed_or_refused(data: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        hash(parse_config(data))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_is_taken_or_refused(family: str) -> None:
    for key in ("model_type", "architectures", *FAMILIES[family].defaults, *FAMILIES[family].neutral):
        for value in HOSTILE:
            parsed_or_refused({"model_type": family, "use_sliding_window": True, key: value})


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn", "longrope"])
def test_any_value_about_positions_is_taken_or_refused(kind: str) -> None:
    whole = {**LLAMA3, "rope_type": kind, "rope_theta": 9.0, "original_max_position_embeddings": 16}
    whole |= {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48, "beta_fast": 8, "beta_slow": 2, "mscale": 1.0}
    whole |= {"mscale_all_dim": 0.5, "attention_factor": 1.0, "truncate": False, "partial_rotary_factor": 1.0}
    known = {key: value for key, value in whole.items() if key in (*_ALWAYS, *_KEYS[kind])}
    for family in ("llama", "phi3"):
        parsed_or_refused({"model_type": family, "rope_parameters": known})
        for key in known:
            for value in HOSTILE:
                parsed_or_refused({"model_type": family, "rope_parameters": {**known, key: value}})
    for value in HOSTILE:
        parsed_or_refused({"model_type": "gemma3_text", "rope_parameters": {"full_attention": value}})


def test_two_names_of_one_number() -> None:
    assert config_of("experts", num_local_experts=5).experts == 5
    with pytest.raises(
        ConfigError, match="num_experts = 5 and num_local_experts = 4, which are two names of one number"
    ):
        config_of("experts", num_local_experts=4)
