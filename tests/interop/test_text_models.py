"""Adapters of a text model alone, merged into the model of images and text that holds it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.checkpoints import diff, merge
from tests.interop.models import Case, base_of, load_file, peft, quiet, randomized, transformers
from tests.interop.test_extracted import TEXT, gemma3_images, llava, logits, qwen2_vl

save_file = pytest.importorskip("safetensors.torch").save_file


def qwen3_vl() -> Any:
    """Its names on the disk are those in memory, so that both ends of a name are others than in the text model."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1], "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 12, "intermediate_size": 20, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 12, "num_position_embeddings": 4, "deepstack_visual_indexes": []}
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(
            text_config=TEXT | {"rope_scaling": rope}, vision_config=vision, tie_word_embeddings=False
        )
    )


@pytest.mark.parametrize("prefix", ["model.", "", "trainer.net.language_model."])
@pytest.mark.parametrize("make", [qwen3_vl, qwen2_vl, llava, gemma3_images])
def test_merged_it_says_what_the_whole_model_does(make: Callable[[], Any], prefix: str, tmp_path: Path) -> None:
    base = base_of(Case(make, {}))
    targets = r".*language_model.*(q_proj|down_proj)"
    with quiet():
        base.save_pretrained(str(tmp_path / "base"))
        live = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets))
        randomized(live, trained=True)
        live.save_pretrained(str(tmp_path / "whole"))
    folder = tmp_path / "text"
    folder.mkdir()
    tensors = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    names = {key: f"base_model.model.{prefix}{key.partition('language_model.')[2]}" for key in tensors}
    save_file({names[key]: value for key, value in tensors.items()}, str(folder / "adapter_model.safetensors"))
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "down_proj"]}))
    assert len(merge(tmp_path / "base", folder, tmp_path / "out").changed) == 4
    assert diff(folder, tmp_path / "whole", base=tmp_path / "base").is_identical
    with quiet():
        merged = type(base).from_pretrained(str(tmp_path / "out")).eval()
    wanted = logits(live)
    np.testing.assert_allclose(logits(merged), wanted, rtol=0, atol=1e-4 * max(1, np.abs(wanted).max()))
