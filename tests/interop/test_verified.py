"""Adapters that PEFT wrote, and wrong ones made of them, verified beside the models of transformers."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import checkpoints
from jlora.disk import file_written_whole, write_tensors
from jlora.models import read_adapter, write_adapter
from jlora.recipes import verify_logits
from tests.interop.models import gpt2, load_file, peft, quiet
from tests.interop.test_extracted import gemma3_images
from tests.interop.test_language_folders import peft_adapter, saved

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[bool, bool]]] = {  # and whether vLLM, SGLang load it
    "all linear": ("qwen3", {}, {"target_modules": "all-linear"}, (True, True)),
    "rslora": ("llama", {}, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, (True, False)),
    "dora": ("llama", {}, {"target_modules": ["gate_proj", "up_proj"], "use_dora": True}, (False, False)),
    "tied": (
        "llama",
        {"tie_word_embeddings": True},
        {"target_modules": ["embed_tokens", "q_proj", "v_proj"], "ensure_weight_tying": True},
        (True, False),  # the head is none of target_modules
    ),
    "head": ("gemma2", {"tie_word_embeddings": False}, {"target_modules": ["o_proj", "lm_head"]}, (False, True)),
    "some layers": ("phi3", {}, {"target_modules": ["qkv_proj"], "layers_to_transform": [0, 2]}, (True, True)),
    "experts": (
        "qwen3_moe",
        {},
        {
            "target_modules": ["q_proj", "v_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "lora_dropout": 0.0,
        },
        (True, False),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_writes_is_right(tmp_path: Path, case: str) -> None:
    family, changes, fields, loads = CASES[case]
    model, config, _ = saved(tmp_path / "base", family, **changes)
    peft_adapter(model, tmp_path / "adapter", fields)
    found = checkpoints.verify(tmp_path / "base", tmp_path / "adapter")
    assert found.is_right, str(found)
    assert [verdict.loads for verdict in found.engines] == [True, *loads], str(found)
    logits = verify_logits(tmp_path / "base", tmp_path / "adapter")
    assert (logits.answer, logits.problems) == ("ok", ())
    if case != "some layers":  # of which the others are written as zeros
        write_adapter(tmp_path / "back", *read_adapter(tmp_path / "adapter", config), config)
        assert checkpoints.verify(tmp_path / "base", tmp_path / "back").is_right


LANGUAGE = r".*language_model.*\.(q_proj|v_proj)"
OTHERS: dict[str, tuple[Any, dict[str, Any], str]] = {  # and what SGLang has against it
    "gemma3 with images": (gemma3_images, {"target_modules": LANGUAGE}, "target_modules = "),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, "names without a number behind"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_models_that_jlora_has_no_function_of(tmp_path: Path, case: str) -> None:
    make, fields, against = OTHERS[case]
    model = make()
    with quiet():
        model.save_pretrained(tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", fields)
    found = checkpoints.verify(tmp_path / "base", tmp_path / "adapter")
    assert found.is_right, str(found)
    assert [verdict.loads for verdict in found.engines] == [True, True, False]
    assert found.engines[2].problems[0].startswith(against)
    assert not verify_logits(tmp_path / "base", tmp_path / "adapter").asked


def test_names_of_the_text_model_beside_one_with_images(tmp_path: Path) -> None:
    model = gemma3_images()
    with quiet():
        model.save_pretrained(tmp_path / "base")
    peft_adapter(model, tmp_path / "adapter", {"target_modules": LANGUAGE})
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    told["target_modules"] = ["q_proj", "v_proj"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(told))
    rewritten(tmp_path / "adapter", lambda tensors: {n.replace("language_model.", ""): t for n, t in tensors.items()})
    found = checkpoints.verify(tmp_path / "base", tmp_path / "adapter")
    assert not found.is_right
    peft_says, vllm_says, sglang_says = found.engines
    assert "other names than in the base" in peft_says.problems[0]
    assert "passed over without an error" in vllm_says.problems[0]
    assert sglang_says.loads


def rewritten(folder: Path, change: Any) -> Path:
    """The adapter with other tensors."""
    tensors = {name: tensor.numpy() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    with file_written_whole(folder / "adapter_model.safetensors") as file:
        write_tensors(file, change(tensors), {"format": "pt"})
    return folder


def test_what_peft_passes_over_with_a_warning_is_found(tmp_path: Path) -> None:
    model, _, _ = saved(tmp_path / "base", "llama")
    peft_adapter(model, tmp_path / "adapter", {"target_modules": ["q_proj", "down_proj"]})
    fresh, _, _ = saved(tmp_path / "again", "llama")
    folder = rewritten(
        tmp_path / "adapter",
        lambda tensors: {n.replace("model.model.layers", "model.layers"): part for n, part in tensors.items()},
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(fresh, folder)
    assert any("missing adapter keys" in str(warning.message) for warning in told)
    found = checkpoints.verify(tmp_path / "base", folder)
    assert not found.is_right
    assert "other names than in the base" in found.engines[0].problems[0]


def test_a_missing_layer_a_zero_b_and_another_base(tmp_path: Path) -> None:
    model, _, _ = saved(tmp_path / "base", "llama")
    saved(tmp_path / "wider", "llama", hidden_size=28)
    folder = tmp_path / "adapter"
    peft_adapter(model, folder, {"target_modules": ["q_proj", "down_proj"]})
    assert checkpoints.verify(tmp_path / "base", folder).is_right
    assert {check.name for check in checkpoints.verify(tmp_path / "wider", folder).checks if check.problems} == {
        "shapes"
    }
    assert not verify_logits(tmp_path / "wider", folder).asked

    rewritten(folder, lambda tensors: {n: np.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()})
    logits = verify_logits(tmp_path / "base", folder)
    assert logits.problems[0].startswith("the adapters change the logits by 0.0e+00")
    found = checkpoints.verify(tmp_path / "base", folder)
    assert len(next(check for check in found.checks if check.name == "numbers").problems) == 6

    rewritten(folder, lambda tensors: {n: tensor for n, tensor in tensors.items() if ".layers.1.mlp" not in n})
    found = checkpoints.verify(tmp_path / "base", folder)
    (lacking,) = next(check for check in found.checks if check.name == "targets").problems
    assert lacking.startswith("model.layers.1.mlp.down_proj.weight: ")


def test_a_transposed_update_that_merge_would_take(tmp_path: Path) -> None:
    model, _, _ = saved(tmp_path / "base", "llama")
    peft_adapter(model, tmp_path / "adapter", {"target_modules": ["down_proj"]})

    def turned(tensors: Any) -> Any:
        other = {"A": "B", "B": "A"}
        return {f"{n[:-8]}{other[n[-8]]}.weight": np.ascontiguousarray(tensor.T) for n, tensor in tensors.items()}

    folder = rewritten(tmp_path / "adapter", turned)
    with quiet(), pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(model.__class__(model.config), folder)
    found = checkpoints.verify(tmp_path / "base", folder)
    problems = next(check for check in found.checks if check.name == "shapes").problems
    assert len(problems) == 3
    assert "transposed" in problems[0]


def test_a_family_that_is_not_known_has_a_table_of_files(tmp_path: Path) -> None:
    model, _, _ = saved(tmp_path / "base", "llama")
    peft_adapter(model, tmp_path / "adapter", {"target_modules": ["q_proj"]})
    told = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(told | {"model_type": "unheard"}))
    logits = verify_logits(tmp_path / "base", tmp_path / "adapter")
    assert not logits.asked
    assert "unheard" in logits.found
    assert checkpoints.verify(tmp_path / "base", tmp_path / "adapter").is_right
