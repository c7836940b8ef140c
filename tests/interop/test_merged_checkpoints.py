"""A checkpoint of transformers, in shards, merged by jlora: transformers loads it and it says what PEFT's model did."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jlora
from jlora.checkpoints import merge, unmerge
from tests.interop.models import CASES, Case, Net, adapted, base_of, load_file, logits_of, quiet, save

NAMES = [name for name, case in CASES.items() if case.model is not Net and name != "vit"]


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
    merge(base, [adapter], tmp_path / "merged")
    found = logits_of(reloaded(case, tmp_path / "merged"))
    before = logits_of(reloaded(case, base))
    assert np.abs(before - wanted).max() > 1e-3
    tolerance = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}[case.dtype]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()))


def test_names_that_transformers_changes_as_it_loads_are_refused(tmp_path: Path) -> None:
    """The adapter of a ViT has the names in memory, its checkpoint others (transformers 5)."""
    case = CASES["vit"]
    _, live = adapted(case)
    base, adapter = checkpoint(case, tmp_path / "base"), save(case, live, tmp_path / "adapter")
    with pytest.raises(
        jlora.DataError, match=r"q_proj.weight: the checkpoint has no such tensor; nearest: vit.encoder"
    ):
        merge(base, [adapter], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_base_comes_back_to_the_byte(tmp_path: Path) -> None:
    case = CASES["llama"]
    _, live = adapted(case)
    base, adapter = checkpoint(case, tmp_path / "base"), save(case, live, tmp_path / "adapter")
    merge(base, [adapter], tmp_path / "merged", keep_residual=True)
    unmerge(tmp_path / "merged", [adapter], tmp_path / "back")
    for shard in base.glob("*.safetensors"):
        assert (tmp_path / "back" / shard.name).read_bytes() == shard.read_bytes()
