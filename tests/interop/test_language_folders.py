"""Folders and adapters of language models: transformers and PEFT write what jlora reads, and read what jlora writes."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.adapter import is_adapter
from jlora.checkpoints import resize
from jlora.errors import DataError, TargetError
from jlora.models import (
    DecoderConfig,
    adapter_tensors,
    decoder,
    read_adapter,
    read_config,
    read_params,
    write_adapter,
    write_model,
)
from jlora.paths import leaves_by_path
from tests.interop.decoders import assert_logits, random_tokens, torch_logits, torch_model
from tests.interop.models import load_file, peft, quiet, torch, transformers

TOKENS = random_tokens(np.random.default_rng(0), (2, 9))
LAYERS = "model/layers/**/*_proj"


def saved(folder: Path, family: str, size: str = "1GB", **changes: Any) -> tuple[Any, DecoderConfig, Any]:
    """A model of transformers, saved to a folder and read from it."""
    model = torch_model(family, **changes)
    with quiet():
        model.save_pretrained(folder, max_shard_size=size)
    return model, read_config(folder), read_params(folder)


@pytest.mark.parametrize(
    ("family", "changes", "dtype"),
    [
        ("llama", {}, None),
        ("llama", {"tie_word_embeddings": True}, "bfloat16"),
        ("qwen3_moe", {}, None),
        ("phi3", {}, "float16"),
    ],
)
def test_a_model_and_back(tmp_path: Path, family: str, changes: dict[str, Any], dtype: str | None) -> None:
    model, config, params = saved(tmp_path / "one", family, "10KB", **changes)
    np.testing.assert_allclose(decoder(config)(params, TOKENS), torch_logits(model, TOKENS), rtol=0, atol=1e-4)
    if dtype is not None:
        params = read_params(tmp_path / "one", dtype=dtype)
    write_model(tmp_path / "two", params, config, tmp_path / "one")
    with quiet():
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype="auto")
    wanted = model.state_dict()
    assert back.state_dict().keys() == wanted.keys()
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == (torch.float32 if dtype is None else getattr(torch, dtype)), name
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name
    for file in (tmp_path / "one").iterdir():
        if dtype is None or (file.suffix == ".json" and "config" not in file.name and "index" not in file.name):
            assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes(), file.name


def adapters_for(fn: Any, params: Any, targets: tuple[str, ...], **fields: Any) -> tuple[Any, Any, jlora.LoraConfig]:
    """The adapted function, adapters with a random B, and their configuration."""
    config = jlora.LoraConfig(**{"rank": 3, "alpha": 5.0} | fields, target_modules=targets)
    adapted, adapters, config, _ = jlora.adapt(fn, config, params, jnp.asarray(TOKENS), strict=True)
    rng = np.random.default_rng(1)

    def filled(entry: Any) -> Any:
        return entry | {"B": jnp.asarray(0.3 * rng.standard_normal(entry["B"].shape), jnp.float32)}

    return adapted, jax.tree.map(filled, adapters, is_leaf=is_adapter), config


TO_PEFT: dict[str, tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    "llama": ("llama", {}, (LAYERS,), {"rank_pattern": {"**/q_proj": 2}, "alpha_pattern": {"**/mlp": 3.0}}),
    "head": ("llama", {}, ("model/embed_tokens", "lm_head", "**/v_proj"), {"scaling": "rslora"}),
    "tied": (
        "llama",
        {"tie_word_embeddings": True},
        ("model/embed_tokens", LAYERS),
        {"alpha_pattern": {"model/e*": 9.0}},
    ),
    "experts": ("qwen3_moe", {}, (LAYERS, "**/experts"), {"rank_pattern": {"**/down_proj": 2}}),
    "fused": ("phi3", {}, (LAYERS,), {}),
}


@pytest.mark.parametrize("case", TO_PEFT)
def test_peft_reads_what_jlora_writes(tmp_path: Path, case: str) -> None:
    family, changes, targets, fields = TO_PEFT[case]
    model, config, params = saved(tmp_path / "base", family, **changes)
    fn = decoder(config)
    adapted, adapters, lora_config = adapters_for(fn, params, targets, **fields)
    write_adapter(tmp_path / "adapter", adapters, lora_config, config, base=str(tmp_path / "base"))

    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(tmp_path / "base")
    assert told["task_type"] == "CAUSAL_LM"
    with quiet():
        live = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    wanted = np.asarray(jax.jit(adapted)(params, adapters, TOKENS))
    assert np.abs(wanted - np.asarray(fn(params, TOKENS))).max() > 0.1
    np.testing.assert_allclose(torch_logits(live, TOKENS), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    held = {name for name, _ in live.named_parameters() if "lora_" in name}
    assert len(held) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))

    back, back_config = read_adapter(tmp_path / "adapter", config)
    assert jax.tree.structure(back) == jax.tree.structure(adapters)
    for path, part in leaves_by_path(adapters).items():
        np.testing.assert_array_equal(leaves_by_path(back)[path], part, err_msg=path)
    np.testing.assert_array_equal(jax.jit(jlora.lora(fn, back_config))(params, back, TOKENS), wanted)
    tensors, data = adapter_tensors(adapters, lora_config, config, base=str(tmp_path / "base"))
    assert data == told
    in_file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == in_file.keys()
    assert all(np.array_equal(tensors[name], tensor.numpy()) for name, tensor in in_file.items())
    # The letters may be left out: the model says them.
    write_adapter(tmp_path / "again", adapters, lora_config.replace(factorizations={}), config)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


FROM_PEFT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all linear": ("qwen3", {}, {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "use_rslora": True}),
    "dora": ("llama", {}, {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "tied": (
        "llama",
        {"tie_word_embeddings": True},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "some layers": ("llama", {}, {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0, 2]}),
    "experts": (
        "qwen3_moe",
        {},
        {
            "target_modules": ["k_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "lora_dropout": 0.0,
        },
    ),
}


def peft_adapter(model: Any, folder: Path, fields: dict[str, Any]) -> Any:
    """The model adapted by PEFT at random, and its adapter in a folder."""
    with quiet():
        live = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, **fields)).eval()
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in live.named_parameters():
                if "lora_magnitude" in name:
                    parameter.mul_(1.3)
                elif "lora_" in name:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
            for name, parameter in live.named_parameters():  # which PEFT ties when it makes them, not when they change
                if fields.get("ensure_weight_tying") and "lm_head.lora_" in name:
                    table = live.base_model.model.model.embed_tokens
                    own = table.lora_embedding_B if "lora_A" in name else table.lora_embedding_A
                    parameter.copy_(own["default"].T)
        live.save_pretrained(folder, save_embedding_layers=False)
    return live


@pytest.mark.parametrize("case", FROM_PEFT)
def test_jlora_reads_what_peft_writes(tmp_path: Path, case: str) -> None:
    family, changes, fields = FROM_PEFT[case]
    model, config, params = saved(tmp_path / "base", family, **changes)
    live = peft_adapter(model, tmp_path / "adapter", fields)
    adapters, lora_config = read_adapter(tmp_path / "adapter", config)
    found = np.asarray(
        jax.jit(jlora.lora(decoder(config), lora_config, strict=case != "dora"))(params, adapters, TOKENS)
    )
    wanted = torch_logits(live, TOKENS)
    assert np.abs(wanted - np.asarray(decoder(config)(params, TOKENS))).max() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())

    write_adapter(tmp_path / "back", adapters, lora_config, config)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    told, again = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "back"))
    assert again["base_model_name_or_path"] == told["base_model_name_or_path"]
    if case != "tied":  # where PEFT's file does not name the head
        assert again == told


def test_an_embedding_that_is_the_head_changes_as_one(tmp_path: Path) -> None:
    model, config, _ = saved(tmp_path / "base", "llama", tie_word_embeddings=True)
    peft_adapter(model, tmp_path / "one", {"target_modules": ["embed_tokens"]})
    with pytest.raises(DataError, match="the head of this model is its embedding, and the adapter changes them diff"):
        read_adapter(tmp_path / "one", config)


def test_layers_of_other_ranks_and_adapters_of_another_model(tmp_path: Path) -> None:
    model, config, _ = saved(tmp_path / "base", "llama")
    fields = {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2}}
    live = peft_adapter(model, tmp_path / "ranks", fields)
    with pytest.raises(
        DataError, match=r"model/layers/self_attn/q_proj/weight: .*differ in rank.*jlora resize"
    ) as found:
        read_adapter(tmp_path / "ranks", config)
    assert "problems" not in str(found.value)
    resize(tmp_path / "ranks", tmp_path / "resized", rank=3)
    adapters, lora_config = read_adapter(tmp_path / "resized", config)
    params = read_params(tmp_path / "base")
    assert_logits(jlora.lora(decoder(config), lora_config)(params, adapters, TOKENS), torch_logits(live, TOKENS), 1e-4)

    other, _, _ = saved(tmp_path / "other", "llama", num_hidden_layers=4, hidden_size=24)
    peft_adapter(other, tmp_path / "four", {"target_modules": ["q_proj"]})
    with pytest.raises(DataError, match=r"model\.layers\.3\.self_attn\.q_proj\.weight: no row"):
        read_adapter(tmp_path / "four", config)

    fn = decoder(config)
    _, adapters, lora_config = adapters_for(fn, read_params(tmp_path / "base"), (LAYERS,))
    with pytest.raises(TargetError, match="model/layers/self_attn/q_proj/weight"):
        write_adapter(tmp_path / "wrong", adapters, lora_config, read_config(tmp_path / "other"))
    assert not (tmp_path / "wrong").exists()


def test_a_vera_of_pefts_is_expanded(tmp_path: Path, rng: np.random.Generator) -> None:
    model, config, params = saved(tmp_path / "model", "llama")
    with quiet():
        live = peft.get_peft_model(model, peft.VeraConfig(r=5, target_modules=["q_proj", "v_proj", "down_proj"])).eval()
        with torch.no_grad():
            for name, array in live.named_parameters():
                if "vera_lambda_" in name:
                    array.copy_(torch.from_numpy(rng.standard_normal(array.shape).astype(np.float32)))
        live.save_pretrained(tmp_path / "adapter")
    adapters, lora_config = read_adapter(tmp_path / "adapter", config)
    found = jlora.lora(decoder(config), lora_config)(params, adapters, jnp.asarray(TOKENS))
    wanted = torch_logits(live, TOKENS)
    assert np.abs(wanted - np.asarray(decoder(config)(params, jnp.asarray(TOKENS)))).max() > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
