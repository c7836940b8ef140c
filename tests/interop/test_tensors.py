"""PEFT's tensors in memory: what `write_peft` writes and `read_peft` reads, and what PEFT itself takes and gives."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jlora
from jlora.disk import TensorFile
from jlora.errors import DataError
from jlora.interop.peft import FLAT, Mapping, Row, from_tensors, read_peft, to_tensors, write_peft
from jlora.paths import leaves_by_path
from tests.interop.models import CASES, base_of, logits_of, peft, quiet, torch


def entry(rng: np.random.Generator, a: tuple[int, ...], b: tuple[int, ...], dtype: Any = np.float32) -> dict[str, Any]:
    return {"A": rng.standard_normal(a).astype(dtype), "B": rng.standard_normal(b).astype(dtype)}


def adapters_of_every_kind() -> tuple[Any, jlora.LoraConfig, Mapping]:
    rng = np.random.default_rng(0)
    adapters = {
        "model.embed_tokens.weight": entry(rng, (11, 2), (2, 7), ml_dtypes.bfloat16),
        "model.conv.weight": entry(rng, (5, 3, 2), (2, 13)),
        "model.up.weight": entry(rng, (7, 3), (3, 5)),
        "model.up.bias": {"value": rng.standard_normal(5).astype(np.float16)},
    }
    letters = {"model.embed_tokens.*": "io", "model.conv.*": "oii", "model.up.weight": "oi"}
    config = jlora.LoraConfig(rank=2, alpha=3, factorizations=letters, rank_pattern={"model.up.*": 3})
    return adapters, config, FLAT


def stacked_adapters() -> tuple[Any, jlora.LoraConfig, Mapping]:
    rng = np.random.default_rng(1)
    adapters = {"layers": {"up": entry(rng, (3, 7, 2), (3, 2, 5)), "experts": entry(rng, (3, 4, 7, 2), (3, 4, 2, 5))}}
    letters = {"layers/up": "boi", "layers/experts": "bboi"}
    config = jlora.LoraConfig(rank=2, factorizations=letters, scaling="rslora")
    layers = (("{i}", 3),)
    mapping = (
        Row("model.layers.{i}.up.weight", "layers/up", stack=layers),
        Row("model.layers.{i}.mlp.experts.down_proj", "layers/experts", stack=layers),
    )
    return adapters, config, mapping


def in_order(config: jlora.LoraConfig) -> jlora.LoraConfig:
    """A configuration whose patterns are sorted, as files have their tensors in the order of dtypes."""
    return config.replace(
        target_modules=tuple(sorted(config.target_modules)), factorizations=sorted(config.factorizations)
    )


@pytest.mark.parametrize("made", [adapters_of_every_kind, stacked_adapters])
def test_they_are_what_the_files_hold(tmp_path: Path, made: Any) -> None:
    adapters, config, mapping = made()
    tensors, data = to_tensors(adapters, config, mapping)
    write_peft(tmp_path, adapters, config, mapping)
    assert data == json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(tensors) == sorted(tensors)
    with TensorFile(tmp_path / "adapter_model.safetensors") as file:
        assert tensors.keys() == file.entries.keys()
        for name, tensor in tensors.items():
            assert tensor.flags.c_contiguous
            assert tensor.dtype == file.entries[name].dtype
            np.testing.assert_array_equal(tensor, file.read(name))

    from_files, config_of_files = read_peft(tmp_path, mapping)
    as_jax = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
    for given in (tensors, as_jax):
        found, found_config = from_tensors(given, data, mapping)
        assert in_order(found_config) == in_order(config_of_files)
        assert jax.tree.structure(found) == jax.tree.structure(from_files)
        for path, part in leaves_by_path(from_files).items():
            np.testing.assert_array_equal(leaves_by_path(found)[path], part)
    again, data_again = to_tensors(found, found_config, mapping)
    assert data_again == data
    assert all(np.array_equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("case", ["llama dora", "qwen3 moe", "conv"])
def test_a_live_model_takes_and_gives_them(case: str) -> None:
    live = base_of(CASES[case])
    with quiet():
        config = peft.LoraConfig(**CASES[case].fields, init_lora_weights=False)
        adapted = peft.get_peft_model(live, config).eval()
        tensors = {name: tensor.numpy() for name, tensor in peft.get_peft_model_state_dict(adapted).items()}
        adapters, lora_config = from_tensors(
            tensors, adapted.peft_config["default"].to_dict(), transposed_experts=False
        )
        back, data = to_tensors(adapters, lora_config)
        assert back.keys() == tensors.keys()
        other = peft.get_peft_model(base_of(CASES[case]), peft.LoraConfig.from_peft_type(**data)).eval()
        state = {name: torch.from_numpy(np.array(tensor)) for name, tensor in back.items()}
        report = peft.set_peft_model_state_dict(other, state)
    assert not report.unexpected_keys
    np.testing.assert_array_equal(logits_of(other), logits_of(adapted))


def test_what_is_refused() -> None:
    adapters, config, _ = adapters_of_every_kind()
    tensors, data = to_tensors(adapters, config)
    for change, told, match in (
        (
            {"base_model.model.model.up.lora_A.weight": [1.0]},
            data,
            "lora_A.weight' is a list: wanted an array of NumPy",
        ),
        ({"model.up.lora_C.weight": np.ones(3)}, data, r"tensors: .*model\.up\.lora_C\.weight"),
        ({"base_model.model.model.up.lora_A.weight": np.full((3, 7), np.nan, np.float32)}, data, "holds a NaN"),
        ({}, data | {"peft_type": "IA3"}, "peft_type 'IA3': jlora reads LORA"),
        ({}, data | {"r": np.ones(3)}, "tensors: cannot be written as JSON"),
        ({}, {}, "has no peft_type"),
    ):
        with pytest.raises(DataError, match=match):
            from_tensors(tensors | change, told)
    with pytest.raises(DataError, match="tensors: "):
        from_tensors({}, data)
    adapters["model.up.weight"]["B"][0, 0] = np.inf
    with pytest.raises(DataError, match=r"adapters: B of model\.up\.weight holds a NaN or an infinity"):
        to_tensors(adapters, config)
