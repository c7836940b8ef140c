"""An adapter whose vocabulary grew or shrank: merged, transformers says what PEFT's live model did."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.checkpoints import merge, unmerge
from jlora.cli import main
from jlora.disk import Checkpoint
from jlora.errors import DataError
from jlora.interop.peft import read_peft
from tests.interop.models import LLAMA, load_file, peft, quiet, randomized, torch, transformers
from tests.interop.test_tied import reloaded, says

save_file = pytest.importorskip("safetensors.torch").save_file

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CASES: dict[str, dict[str, Any]] = {
    "saved": {"target_modules": ["q_proj"]},
    "adapted too": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "modules": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def llama(tied: bool, vocabulary: int = 37) -> Any:
    settings = LLAMA | {"tie_word_embeddings": tied, "vocab_size": vocabulary}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def made(tmp_path: Path, rows: int, tied: bool, shard: str, **fields: Any) -> tuple[Path, Path, np.ndarray]:
    """A base of 37 tokens, an adapter on the base with other rows, and what PEFT's live model says."""
    with quiet():
        torch.manual_seed(3)
        model = llama(tied).eval()
        model.save_pretrained(str(tmp_path / "base"), max_shard_size=shard)
        model.resize_token_embeddings(rows)
        live = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **fields)).eval()
        randomized(live, trained=True)
        live.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    return tmp_path / "base", tmp_path / "adapter", says(live)


@pytest.mark.parametrize("rows", [41, 31])
@pytest.mark.parametrize("shard", ["6KB", "1GB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_merged_it_says_what_the_live_model_did(case: str, tied: bool, shard: str, rows: int, tmp_path: Path) -> None:
    base, adapter, wanted = made(tmp_path, rows, tied, shard, **CASES[case])
    with pytest.raises(DataError, match=rf"has {rows} rows, the checkpoint 37: another vocabulary; .*--resize-vocab"):
        merge(base, adapter, tmp_path / "out")
    (adapter / "tokenizer.json").write_text("new")
    (base / "tokenizer.json").write_text("old")
    merge(base, adapter, tmp_path / "out", resize_vocabulary=True)
    found = says(reloaded(lambda: llama(tied, rows), tmp_path / "out"))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * max(1, np.abs(wanted).max()))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "new"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    out, before = Checkpoint(tmp_path / "out"), Checkpoint(base)
    assert out.entries[EMBEDDING].shape == (rows, 16)
    for name in set(before.entries) - {EMBEDDING, HEAD}:
        if "q_proj" not in name:
            assert out.read(name).tobytes() == before.read(name).tobytes()
    if out.index is not None:
        size = sum(entry.stop - entry.start for entry in out.entries.values())
        assert out.index["metadata"]["total_size"] == size
    with pytest.raises(DataError, match=r"cannot be taken out|another vocabulary"):
        unmerge(tmp_path / "out", adapter, tmp_path / "back")


def test_the_command_and_what_it_refuses(tmp_path: Path, capsys: Any) -> None:
    base, adapter, _ = made(tmp_path, 41, False, "1GB", **CASES["saved"])
    command = ["merge", str(base), str(adapter), "--resize-vocabulary", "--out", str(tmp_path / "out")]
    assert main([*command, "--keep-residual"]) == 2
    assert "no residual brings other rows back" in capsys.readouterr().err
    assert main([*command, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lm_head.weight"))
    tensors.pop(name)
    save_file(tensors, str(adapter / "adapter_model.safetensors"), {"format": "pt"})
    capsys.readouterr()
    assert main(command) == 2
    assert "lm_head.weight would have 37 rows, and model.embed_tokens.weight 41" in capsys.readouterr().err


def test_other_rows_of_what_is_no_vocabulary_are_refused(tmp_path: Path) -> None:
    base, adapter, _ = made(tmp_path, 41, False, "1GB", **CASES["saved"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 36}))
    with pytest.raises(DataError, match=r"embed_tokens\.weight"):
        merge(base, adapter, tmp_path / "out", resize_vocabulary=True)


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    base, adapter, wanted = made(tmp_path, 41, False, "6KB", **CASES["adapted too"])

    def stop(done: int, total: int) -> None:
        if done > 0.7 * total:
            raise InterruptedError

    with pytest.raises(DataError):
        merge(base, adapter, tmp_path / "out", resize_vocabulary=True, on_progress=stop)
    assert merge(base, adapter, tmp_path / "out", resize_vocabulary=True).resumed > 0
    found = says(reloaded(lambda: llama(False, 41), tmp_path / "out"))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * max(1, np.abs(wanted).max()))


def test_a_saved_module_that_is_written_twice(tmp_path: Path) -> None:
    """PEFT reads the plain name, whatever the copies hold."""
    _, adapter, _ = made(tmp_path, 41, False, "1GB", **CASES["modules"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    copies = [name for name in tensors if "modules_to_save" in name or "original_module" in name]
    assert len(copies) == 4
    plain, _ = read_peft(adapter)
    save_file(
        {name: value + (name in copies) for name, value in tensors.items()}, str(adapter / "adapter_model.safetensors")
    )
    changed, _ = read_peft(adapter)
    assert changed.keys() == plain.keys()
    for name in (EMBEDDING, HEAD):
        np.testing.assert_array_equal(changed[name]["value"], plain[name]["value"])
