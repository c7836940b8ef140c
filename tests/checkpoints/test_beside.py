"""Nothing is left out without a word: what lies beside the base, and beside an adapter."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.checkpoints import merge, unmerge
from jlora.disk import Checkpoint, beside
from jlora.errors import DataError
from tests.checkpoints.make import peft_parts, random, read, write_checkpoint, write_file, write_llama, write_peft
from tests.interop.files import pair, write_folder


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"contents of {name}".encode())


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


COPIED = (
    "additional_chat_templates/tool_use.jinja",
    "package/inner/code.py",
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
    "2_Dense/config.json",
)
LEFT = ("onnx/model.onnx", "onnx/config.json", "original/consolidated.00.pth", "pytorch_model.bin", "checkpoint-7/x.pt")


def dressed(base: Path) -> Path:
    """A base with everything beside it."""
    put(base, *COPIED, *LEFT, ".git/config", "package/.hidden")
    modules = [{"path": "", "type": "T"}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (base / "modules.json").write_text(json.dumps(modules))
    return base


def test_folders_of_the_base_are_copied_or_named(tmp_path, rng):
    _, base, adapter = write_llama(tmp_path, rng)
    dressed(base)
    done = merge(base, adapter, tmp_path / "out")
    found = files(tmp_path / "out")
    for name in COPIED:
        assert found[name] == files(base)[name]
    assert not set(LEFT) & set(found)
    assert not any(part.startswith(".") for name in found for part in name.split("/"))
    left = (
        "checkpoint-7 with checkpoint-7/x.pt",
        "onnx with onnx/model.onnx",
        "original with original/consolidated.00.pth",
        "pytorch_model.bin",
    )
    assert done.left_out == left
    assert str(done).splitlines()[-1] == f"not copied: {', '.join(left)}"
    back = unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert set(COPIED) < set(files(tmp_path / "back"))
    assert back.left_out == ()


def test_an_output_with_folders_of_its_own_is_replaced(tmp_path, rng):
    _, base, adapter = write_llama(tmp_path, rng)
    dressed(base)
    merge(base, adapter, tmp_path / "out", keep_residual=True)
    merge(base, adapter, tmp_path / "out", weights=[0.5], force=True)
    merge(base, adapter, tmp_path / "fresh", weights=[0.5])
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    put(tmp_path / "out", "package/mine.py")
    with pytest.raises(DataError, match=r"would be replaced with 'package' in it, which is no part of a checkpoint"):
        merge(base, adapter, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "package" / "mine.py").is_file()


@pytest.mark.parametrize("damage", ["{", "[]", '{"folders": 3}', '{"folders": [3, "../base"]}'])
def test_an_output_whose_record_is_damaged_keeps_its_folders(tmp_path, rng, damage):
    _, base, adapter = write_llama(tmp_path, rng)
    dressed(base)
    merge(base, adapter, tmp_path / "out")
    (tmp_path / "out" / "jlora_merge.json").write_text(damage)
    with pytest.raises(
        DataError, match=r"would be replaced with '1_Pooling', '2_Dense', 'additional_chat_templates' and 1"
    ):
        merge(base, adapter, tmp_path / "out", force=True)


def test_what_is_no_file_is_named(tmp_path, rng):
    _, base, _ = write_llama(tmp_path, rng)
    put(base, "package/code.py")
    os.mkfifo(base / "package" / "pipe")
    os.mkfifo(base / "pipe")
    (base / "package" / "round").symlink_to(base, target_is_directory=True)
    (base / "gone").symlink_to(base / "nowhere")
    found = beside(Checkpoint(base))
    assert found.left_out == ("gone", "package with package/pipe", "pipe")
    (base / "modules.json").write_text(json.dumps([{"path": "package"}]))
    found = beside(Checkpoint(base))
    assert "package/code.py" in found.files
    assert set(found.left_out) == {"gone", "package/pipe", "package/round", "pipe"}


@pytest.mark.parametrize("modules", ["{", "{}", '["onnx"]', '[{"path": ["onnx"]}]', "3"])
def test_modules_that_are_none(tmp_path, rng, modules):
    _, base, _ = write_llama(tmp_path, rng)
    put(base, "onnx/model.onnx")
    (base / "modules.json").write_text(modules)
    assert beside(Checkpoint(base)).left_out == ("onnx with onnx/model.onnx",)


def test_a_model_beside_an_index_is_what_transformers_loads(tmp_path, rng):
    tensors, base, adapter = write_llama(tmp_path, rng)
    other = {name: random(rng, array.shape, array.dtype) for name, array in tensors.items()}
    write_file(base / "model.safetensors", other)
    done = merge(base, adapter, tmp_path / "out")
    assert Checkpoint(tmp_path / "out").shards == ["model.safetensors"]
    name = "model.embed_tokens.weight"
    assert read(tmp_path / "out")[name].tobytes() == other[name].tobytes()
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert done.left_out == (*shards, "model.safetensors.index.json")
    for shard in shards:
        (base / shard).unlink()
    assert Checkpoint(base).index is None


def test_an_index_of_one_model_file_is_kept(tmp_path, rng):
    tensors = {"q.weight": random(rng, (7, 5))}
    base = write_checkpoint(tmp_path / "base", tensors, 1)
    index = {"weight_map": {"q.weight": "model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = write_folder(tmp_path / "adapter", pair(rng, "q", 7, 5))
    assert merge(base, adapter, tmp_path / "out").left_out == ()
    assert Checkpoint(tmp_path / "out").index == index


@pytest.mark.parametrize("variant", [False, True])
def test_the_index_of_diffusers(tmp_path, rng, variant):
    """It is called after the class of the model; a variant of another dtype may lie beside it."""
    tensors = {f"{name}.weight": random(rng, (7, 5)) for name in "qk"}
    base = write_checkpoint(tmp_path / "base", tensors, 2)
    stem = "diffusion_pytorch_model"
    index = json.loads((base / "model.safetensors.index.json").read_text())
    (base / "model.safetensors.index.json").unlink()
    for part in (1, 2):
        (base / f"model-0000{part}-of-00002.safetensors").rename(base / f"{stem}-{part}.safetensors")
    index["weight_map"] = {name: f"{stem}-{n + 1}.safetensors" for n, name in enumerate(tensors)}
    (base / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    if variant:
        write_file(base / f"{stem}.fp16-1.safetensors", tensors)
        (base / f"{stem}.fp16.safetensors.index.json").write_text(json.dumps(index))
    adapter = write_folder(tmp_path / "adapter", pair(rng, "q", 7, 5))
    done = merge(base, adapter, tmp_path / "out")
    others = (f"{stem}.fp16-1.safetensors", f"{stem}.fp16.safetensors.index.json")
    assert (done.changed, done.left_out) == (("q.weight",), others if variant else ())
    assert Checkpoint(tmp_path / "out").index == index


def test_several_indexes_are_not_guessed_at(tmp_path, rng):
    base = write_checkpoint(tmp_path / "base", {"q.weight": random(rng, (7, 5))}, 1)
    (base / "model.safetensors").rename(base / "a.safetensors")
    for name in "ab":
        (base / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(DataError, match=r"several indexes: a\.safetensors\.index\.json, b\.safetensors\.index\.json"):
        Checkpoint(base)


def test_weights_beside_an_adapter_are_named(tmp_path, rng):
    tensors, base, adapter = write_llama(tmp_path, rng)
    put(adapter, "optimizer.pt", "rng_state_0.pth", "training_args.bin", "adapter_model.bin", "README.md")
    assert merge(base, adapter, tmp_path / "out").warnings == ()
    put(adapter, "non_lora_trainables.bin", "new_embeddings.safetensors")
    other = write_peft(tmp_path / "other", peft_parts(rng, tensors, "_proj"))
    done = merge(base, [other, adapter], tmp_path / "more")
    wanted = "new_embeddings.safetensors, non_lora_trainables.bin beside the adapter is not merged"
    assert done.warnings == (f"{adapter}: {wanted}; jlora reads the adapter alone",)


@pytest.mark.parametrize("bias", ["all", "lora_only", "none"])
def test_biases_that_a_file_lacks_are_named(tmp_path: Path, rng: Any, bias: str) -> None:
    tensors = {f"{name}.{last}": random(rng, (7, 5) if last == "weight" else (7,)) for name in "qkv" for last in LAST}
    base = write_checkpoint(tmp_path / "base", tensors, 1)
    parts = pair(rng, "q", 7, 5) | pair(rng, "k", 7, 5)
    adapter = write_folder(tmp_path / "adapter", parts | {"k.bias": np.ones(7, "float32")}, bias=bias)
    done = merge(base, adapter, tmp_path / "out")
    missing = {"all": "q.bias, v.bias", "lora_only": "q.bias", "none": ""}[bias]
    wanted = f"{adapter}: the configuration says bias={bias}, but the file does not hold {missing}"
    assert done.warnings == ((wanted,) if missing else ())


LAST = ("weight", "bias")
