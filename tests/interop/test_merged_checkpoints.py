"""A checkpoint of transformers, in shards, merged by jlora: transformers loads it and it says what PEFT's model did."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.checkpoints import inspect, merge, unmerge
from jlora.disk import Checkpoint
from jlora.interop.peft import paths_of_name
from jlora.interop.transformers import RENAMED
from tests.interop.models import (
    CASES,
    Case,
    Net,
    adapted,
    base_of,
    load_file,
    logits_of,
    quiet,
    save,
    torch,
    transformers,
)

save_file = pytest.importorskip("safetensors.torch").save_file

NAMES = [name for name, case in CASES.items() if case.model is not Net]


def checkpoint(case: Case, folder: Path) -> Path:
    """The base of a case as transformers saves it, in shards."""
    with quiet():
        base_of(case).save_pretrained(str(folder), max_shard_size="6KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def reloaded(case: Case, folder: Path) -> Any:
    """A checkpoint as transformers loads it, in evaluation."""
    kind = type(base_of(case))
    with quiet():
        model, report = kind.from_pretrained(str(folder), output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_jlora_merged(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    _, live = adapted(case)
    base, adapter = checkpoint(case, tmp_path / "base"), save(case, live, tmp_path / "adapter")
    wanted = logits_of(live)
    if name == "llama embeddings":  # PEFT saves the base's embeddings beside their adapters
        assert "base_model.model.lm_head.base_layer.weight" in load_file(adapter / "adapter_model.safetensors")
    merged = merge(base, [adapter], tmp_path / "merged")
    sizes = [entry.relative for entry in inspect(adapter, base=base).entries]
    assert None not in sizes
    assert len([size for size in sizes if size > 0]) <= len(merged.changed)  # of stacked experts many are in one entry
    found = logits_of(reloaded(case, tmp_path / "merged"))
    before = logits_of(reloaded(case, base))
    assert np.abs(before - wanted).max() > 1e-3
    tolerance = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}[case.dtype]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.model is Net])
def test_torch_loads_what_jlora_merged(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    _, live = adapted(case)
    adapter, model = save(case, live, tmp_path / "adapter"), base_of(case)
    save_file(model.state_dict(), str(tmp_path / "base.safetensors"))
    merge(tmp_path / "base.safetensors", adapter, tmp_path / "merged")
    before = logits_of(model)
    model.load_state_dict(load_file(tmp_path / "merged" / "base.safetensors"))
    wanted = logits_of(live)
    assert np.abs(before - wanted).max() > 1e-3
    np.testing.assert_allclose(logits_of(model), wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))


def test_every_name_that_transformers_changes_is_known(tmp_path: Path) -> None:
    """Each tensor of a model in memory leads to one on the disk, for the families that transformers 5 renames."""
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    image, text = sizes | {"image_size": 8, "patch_size": 4}, sizes | {"vocab_size": 37, "num_key_value_heads": 1}
    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [1], "num_heads": [2], "window_size": 2}
    models = [
        transformers.ViTForImageClassification(transformers.ViTConfig(**image)),
        transformers.DeiTForImageClassification(transformers.DeiTConfig(**image)),
        transformers.BeitForImageClassification(transformers.BeitConfig(**image)),
        transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**image)),
        transformers.SwinForImageClassification(transformers.SwinConfig(**swin)),
        transformers.MixtralForCausalLM(transformers.MixtralConfig(**text, head_dim=6, num_local_experts=3)),
    ]
    for number, model in enumerate(models):
        with quiet():
            model.save_pretrained(str(tmp_path / str(number)))
        disk = Checkpoint(tmp_path / str(number)).entries
        for name, weight in model.named_parameters():
            if name.endswith(".weight") and weight.ndim > 1:
                assert name in disk or any(path in disk for path in paths_of_name(RENAMED, name)), name


def test_the_base_comes_back_to_the_byte(tmp_path: Path) -> None:
    case = CASES["llama"]
    _, live = adapted(case)
    base, adapter = checkpoint(case, tmp_path / "base"), save(case, live, tmp_path / "adapter")
    merge(base, [adapter], tmp_path / "merged", keep_residual=True)
    unmerge(tmp_path / "merged", [adapter], tmp_path / "back")
    for shard in base.glob("*.safetensors"):
        assert (tmp_path / "back" / shard.name).read_bytes() == shard.read_bytes()


def resnet() -> Any:
    sizes = {"embedding_size": 5, "hidden_sizes": [7, 11], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


def test_the_integers_of_a_batch_norm_are_merged(tmp_path: Path) -> None:
    """A BatchNorm counts its batches; the count is not a number that float32 has."""
    case = Case(resnet, {"target_modules": ["convolution"], "modules_to_save": ["normalization", "classifier"]})
    _, live = adapted(case)
    with torch.no_grad():
        live.train()(torch.randn(3, 3, 16, 16))
        live.eval()
        for name, buffer in live.named_buffers():
            if name.endswith("default.num_batches_tracked"):
                buffer.fill_(2**24 + 1)
    base, adapter = checkpoint(case, tmp_path / "base"), save(case, live, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged", keep_residual=True)
    model = reloaded(case, tmp_path / "merged")
    wanted = logits_of(live)
    assert np.abs(logits_of(reloaded(case, base)) - wanted).max() > 1e-2
    np.testing.assert_allclose(logits_of(model), wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
    counts = [int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert set(counts) == {2**24 + 1}
    unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    for shard in base.glob("*.safetensors"):
        assert (tmp_path / "back" / shard.name).read_bytes() == shard.read_bytes()


def test_of_an_index_and_one_file_jlora_reads_what_transformers_loads(tmp_path: Path) -> None:
    case = CASES["llama"]
    base = checkpoint(case, tmp_path / "base")
    other = {name: value + 1 for name, value in base_of(case).state_dict().items() if not name.startswith("lm_head")}
    save_file(other, str(base / "model.safetensors"), {"format": "pt"})
    loaded = type(base_of(case)).from_pretrained(str(base)).state_dict()
    found = Checkpoint(base)
    assert found.shards == ["model.safetensors"]
    for name in found.entries:
        np.testing.assert_array_equal(found.read(name), loaded[name].numpy())
