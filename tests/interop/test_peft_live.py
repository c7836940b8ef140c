"""What jlora writes, in PEFT's live model: every tensor finds its place, and the model says the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.adapter import is_adapter
from jlora.interop.peft import read_peft, write_peft
from tests.interop.models import (
    CASES,
    Case,
    adapted,
    base_of,
    load_file,
    logits_of,
    peft,
    quiet,
    save,
    torch,
    transformers,
)

# Fresh adapters: model -> the roles of the axes of its weights, by pattern; and what else the configuration says.
FRESH: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "llama": (
        "llama",
        {"*.[qv]_proj.weight": "oi", "*.mlp.*_proj.weight": "oi", "*.embed_tokens.weight": "io", "lm_head.*": "oi"},
        {"rank_pattern": {"*.q_proj.weight": 5}, "scaling": "rslora"},
    ),
    "llama alpha": ("llama", {"*.layers.1.*_proj.weight": "oi"}, {"alpha_pattern": {"*.k_proj.weight": 2.5}}),
    "qwen3": ("qwen3", {"*.self_attn.?_proj.weight": "oi"}, {"rank_pattern": {"*.o_proj.weight": 2}}),
    "qwen3 moe": (
        "qwen3 moe",
        {"*.experts.gate_up_proj": "boi", "*.experts.down_proj": "boi", "*.k_proj.weight": "oi"},
        {"rank_pattern": {"*.down_proj": 2}, "alpha_pattern": {"*.gate_up_proj": 2.5}},
    ),
    "gpt2": ("gpt2", {"*.c_attn.weight": "io", "*.c_proj.weight": "io", "*.wte.weight": "io"}, {}),
    "bert": ("bert", {"*.query.weight": "oi", "*.word_embeddings.weight": "io"}, {"scaling": "rslora"}),
    "vit": ("vit", {"*.[qv]_proj.weight": "oi", "*.projection.weight": "oiii"}, {}),
    "conv": (
        "conv",
        {
            "embed.*": "io",
            "conv1.weight": "oii",
            "conv2.weight": "oiii",
            "conv3.weight": "oiiii",
            "linear.weight": "oi",
        },
        {"rank_pattern": {"conv2.weight": 1}},
    ),
}


def fresh(name: str) -> tuple[Callable[[], Any], dict[str, Any], Any, jlora.LoraConfig]:
    """A model, its state dict, and adapters that jlora made for it, B random."""
    case, roles, fields = FRESH[name]
    model = base_of(CASES[case])
    params = {key: value.numpy() for key, value in model.state_dict().items()}
    config = jlora.LoraConfig(
        **{"rank": 3, "alpha": 7, "init": "kaiming_uniform", "factorizations": roles, **fields},
        target_modules=tuple(roles),
    )
    adapters = jlora.init_lora(jax.random.key(1), params, config)
    rng = np.random.default_rng(2)
    adapters = jax.tree.map(
        lambda entry: entry | {"B": jnp.asarray(0.3 * rng.standard_normal(entry["B"].shape), jnp.float32)},
        adapters,
        is_leaf=is_adapter,
    )
    return lambda: base_of(CASES[case]), params, adapters, config


def assert_loads_whole(model: Any, folder: Path) -> Any:
    """The live model; PEFT warns of missing keys, and warnings are errors."""
    with quiet():
        live = peft.PeftModel.from_pretrained(model, str(folder)).eval()
        result = peft.set_peft_model_state_dict(live, load_file(folder / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    trained = {key.replace(".default", "") for key in live.state_dict() if "lora_" in key}
    assert trained == {key for key in load_file(folder / "adapter_model.safetensors") if "lora_" in key}
    return live


def loaded(model: Any, state: dict[str, Any]) -> Any:
    """The model with another state dict."""
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return model


@pytest.mark.parametrize("name", FRESH)
def test_fresh_adapters_are_the_same_model_in_peft(name: str, tmp_path: Path) -> None:
    model, params, adapters, config = fresh(name)
    write_peft(tmp_path, adapters, config)
    found = logits_of(assert_loads_whole(model(), tmp_path))
    wanted = logits_of(loaded(model(), jlora.merge_params(params, adapters, config)))
    base = logits_of(model())
    assert np.abs(wanted - base).max() > 1e-3 * np.abs(base).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("name", FRESH)
def test_fresh_adapters_come_back_from_peft_to_the_bit(name: str, tmp_path: Path) -> None:
    model, params, adapters, config = fresh(name)
    write_peft(tmp_path / "first", adapters, config)
    live = assert_loads_whole(model(), tmp_path / "first")
    with quiet():
        live.save_pretrained(str(tmp_path / "second"), save_embedding_layers=False)
    again, found = read_peft(tmp_path / "second", params=params)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, adapters)))
    for path, entry in adapters.items():
        if entry is not None:
            assert found.rank_of(path) == config.rank_of(path)
            assert found.effective_alpha_of(path) == pytest.approx(config.effective_alpha_of(path))


LIVE = [name for name, case in CASES.items() if case.dtype == "float32"]


@pytest.mark.parametrize("name", LIVE)
def test_peft_loads_what_it_wrote_once_jlora_has_written_it(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    _, live = adapted(case)
    wanted = logits_of(live)
    write_peft(tmp_path / "jlora", *read_peft(save(case, live, tmp_path / "peft")))
    with quiet():
        again = peft.PeftModel.from_pretrained(base_of(case), str(tmp_path / "jlora")).eval()
    np.testing.assert_array_equal(logits_of(again), wanted)


@pytest.mark.parametrize("name", LIVE)
def test_the_merged_model_says_what_the_live_one_does(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    _, live = adapted(case)
    wanted = logits_of(live)
    model = base_of(case)
    params = {key: value.numpy() for key, value in model.state_dict().items()}
    merged = jlora.merge_params(params, *read_peft(save(case, live, tmp_path), params=params))
    np.testing.assert_allclose(logits_of(loaded(model, merged)), wanted, rtol=0, atol=1e-5 * max(1, abs(wanted).max()))


def test_the_configuration_names_every_module(tmp_path: Path) -> None:
    _, _, adapters, config = fresh("qwen3 moe")
    write_peft(tmp_path, adapters, config)
    data = json.loads((tmp_path / "adapter_config.json").read_text())
    assert data["target_modules"] == [f"model.layers.{layer}.self_attn.k_proj" for layer in (0, 1)]
    experts = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("down_proj", "gate_up_proj")]
    assert data["target_parameters"] == experts
    assert (data["r"], data["lora_alpha"], data.get("use_rslora", False)) == (3, 7, False)
    assert set(data["rank_pattern"].values()) == {2}
    assert set(data["alpha_pattern"].values()) == {2.5}


def test_another_name_than_default_lies_in_a_folder_of_its_own(tmp_path: Path) -> None:
    case = Case(CASES["qwen3"].model, {"target_modules": ["q_proj"]})
    base, live = adapted(case)
    with quiet():
        live.add_adapter("other", peft.LoraConfig(r=3, target_modules=["o_proj"], init_lora_weights=False))
        live.save_pretrained(str(tmp_path))
    adapters, config = read_peft(tmp_path / "other", params=base)
    assert config.rank == 3
    assert {path.split(".")[-2] for path, entry in adapters.items() if entry is not None} == {"o_proj"}


def test_the_checkpoint_of_experts_has_other_names_than_the_model(tmp_path: Path) -> None:
    """Mappings are of names in memory: transformers 5 joins the experts as it loads them."""
    model = base_of(CASES["qwen3 moe"])
    with quiet():
        model.save_pretrained(str(tmp_path))
        again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert not [key for key in load_file(tmp_path / "model.safetensors") if "gate_up_proj" in key]
    assert [key for key in again.state_dict() if "gate_up_proj" in key]
