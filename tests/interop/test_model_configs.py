"""config.json as transformers writes it, now and before: every key is used, known not to matter, or refused."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest

from jlora import ConfigError
from jlora.models import FAMILIES, DecoderConfig, parse_config
from jlora.models._families import NEUTRAL, NO_MATTER
from tests.interop.decoders import FAMILY_SIZES, SIZES, config_of, torch_model, written_config
from tests.interop.models import transformers

FULL, LOCAL = "full_attention", "sliding_attention"


def class_of(family: str) -> Any:
    return transformers.models.auto.configuration_auto.CONFIG_MAPPING[family]


def keys_of(family: str) -> dict[str, Any]:
    """Every key of a family's configuration class, and its default."""
    fields = dataclasses.fields(class_of(family))
    return {field.name: field.default for field in fields if not field.name.startswith("_")}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_class_is_accounted_for(family: str) -> None:
    row = FAMILIES[family]
    groups = [
        set(row.defaults),
        set(row.neutral) | set(NEUTRAL),
        set(NO_MATTER),
        set(row.ignored),
        set(row.other_names),
    ]
    assert set(keys_of(family)) <= set.union(*groups)
    assert sum(map(len, groups)) == len(set.union(*groups))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_is_missing_is_what_transformers_takes_for_it(family: str, tmp_path: Path) -> None:
    config = class_of(family)()
    config.save_pretrained(tmp_path)
    written = {**config.to_dict(), "model_type": family}
    full = parse_config(written)
    for key in keys_of(family):
        assert parse_config({name: value for name, value in written.items() if name != key}) == full, key
    assert parse_config({"model_type": family}) == full


def other_values(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value / 2 + 3]
    return ["other", 7, True]


def parsed_or_refused(data: dict[str, Any]) -> tuple[DecoderConfig | None, str]:
    try:
        return parse_config(data), ""
    except ConfigError as error:
        return None, str(error)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_value_changes_the_configuration_or_is_refused(family: str) -> None:
    written = {**class_of(family)(**SIZES | FAMILY_SIZES[family]).to_dict(), "model_type": family}
    plain = parse_config(written)
    silent = set()
    for key in set(keys_of(family)) - NO_MATTER:
        for value in other_values(written.get(key)):
            changed, refused = parsed_or_refused({**written, key: value})
            assert key in refused or changed is not None, refused
            if changed == plain:
                silent.add(key)
    together = {"max_window_layers", "use_sliding_window", "sliding_window", "original_max_position_embeddings"}
    assert silent <= together | {"intermediate_size"}  # those say something only with another key
    if family in ("mistral", "gemma2", "gemma3_text"):
        assert "sliding_window" not in silent
    assert ("intermediate_size" in silent) == (family == "qwen3_moe")


OLD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # as before transformers 5, and what it makes of that
    "llama": (
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}},
    ),
    "mistral": ({"rope_theta": 77.0, "sliding_window": None}, {"rope_parameters": {"rope_theta": 77.0}}),
    "qwen2": (
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": [FULL, FULL, LOCAL]},
    ),
    "gemma2": ({"sliding_window": 5}, {"sliding_window": 5, "layer_types": [LOCAL, FULL, LOCAL]}),
    "gemma3_text": (
        {
            "sliding_window": 5,
            "sliding_window_pattern": 3,
            "rope_theta": 900.0,
            "rope_local_base_freq": 70.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "sliding_window": 5,
            "layer_types": [LOCAL, LOCAL, FULL],
            "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 900.0, "factor": 8.0},
                LOCAL: {"rope_type": "default", "rope_theta": 70.0},
            },
        },
    ),
    "phi3": (
        {"rope_theta": 90.0, "partial_rotary_factor": 0.7},
        {"rope_parameters": {"rope_theta": 90.0, "partial_rotary_factor": 0.7, "rope_type": "default"}},
    ),
}


@pytest.mark.parametrize("family", OLD)
def test_the_older_spelling_says_the_same(family: str, tmp_path: Path) -> None:
    older, newer = OLD[family]
    sizes = {**SIZES, **FAMILY_SIZES[family], "model_type": family}
    found = parse_config({**sizes, **older})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found == config_of(torch_model(family, **older), tmp_path)
    if family == "mistral":
        newer = {**newer, "sliding_window": None}
    assert found == parse_config({**sizes, **newer})
    assert found != parse_config(sizes)


def test_longrope_has_its_older_names(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}
    sizes = {**SIZES, "hidden_size": 24, "model_type": "phi3", "partial_rotary_factor": 0.7}
    sizes |= {"original_max_position_embeddings": 16}
    found: DecoderConfig = parse_config({**sizes, "rope_scaling": {"type": "su", **factors}})
    assert found == parse_config({**sizes, "rope_scaling": {"type": "longrope", **factors}})
    assert found.ropes[0].dims == 4
    assert found.ropes[0].original == 16


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read(family: str, tmp_path: Path) -> None:
    model = torch_model(family)
    config = parse_config(written_config(model, tmp_path))
    assert config.family == family
    assert config.tied == model.config.tie_word_embeddings
