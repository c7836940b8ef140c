"""Params written as a folder: byte for byte what was read, whole or not at all, every problem in one error."""

import json
from collections import namedtuple
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import jlora.models._write as module
from jlora.disk import Checkpoint, dry_run
from jlora.errors import DataError
from jlora.models import read_config, read_params, write_model
from tests.models.folders import LLAMA, MOE, tensors_of, write_folder

TIED = LLAMA | {"tie_word_embeddings": True}


@pytest.mark.parametrize(("config", "files"), [(LLAMA, 1), (MOE, 3)])
def test_what_was_read_is_written_byte_for_byte(tmp_path: Path, config: dict, files: int) -> None:
    source = write_folder(tmp_path / "source", config, tensors_of(config), files)
    (source / "tokenizer.json").write_text("{}")
    (source / "jlora_merge.json").write_text("{}")  # of other numbers than those that are written
    (source / "pytorch_model.bin").write_text("")
    (tmp_path / "out").mkdir()
    params = read_params(source)
    write_model(tmp_path / "out", params, read_config(source), source)
    written = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert written == sorted({file.name for file in source.iterdir()} - {"jlora_merge.json", "pytorch_model.bin"})
    for name in written:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name

    as_numpy = jax.tree.map(np.asarray, params)
    write_model(tmp_path / "deep" / "numpy", as_numpy, read_config(source), source)
    for name in written:
        assert (tmp_path / "deep" / "numpy" / name).read_bytes() == (source / name).read_bytes(), name


def test_another_dtype_is_told(tmp_path: Path) -> None:
    config = LLAMA | {"dtype": "float32"}
    tensors = tensors_of(config)
    source = write_folder(tmp_path / "source", config, tensors, 2)
    write_model(tmp_path / "out", read_params(source, dtype="bfloat16"), read_config(source), source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"dtype": "bfloat16"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values()) // 2
    written = Checkpoint(tmp_path / "out")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written.read(name), tensor.astype(ml_dtypes.bfloat16))


def test_what_is_no_param_stays(tmp_path: Path) -> None:
    """The copy of a tied weight changes with it; buffers, and other parts of a larger model, are as they were."""
    tensors = tensors_of(TIED)
    body = {f"model.language_{name}": tensor for name, tensor in tensors.items()}
    assert "model.language_model.norm.weight" in body
    more = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "vision_tower.patch.weight": np.ones((3, 2), np.float32),
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    source = write_folder(tmp_path / "source", TIED, body | more)
    doubled = jax.tree.map(lambda array: 2 * array, read_params(source))
    write_model(tmp_path / "out", doubled, read_config(source), source)
    written = Checkpoint(tmp_path / "out")
    assert written.entries.keys() == (body | more).keys()
    for name, tensor in (body | more).items():
        factor = 1 if "vision" in name or "inv_freq" in name else 2
        np.testing.assert_array_equal(written.read(name), factor * tensor, err_msg=name)


def test_all_problems_are_one_error(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    params, config = read_params(source), read_config(source)
    del params["lm_head"]
    params["model"]["norm"]["weight"] = np.ones(13, np.float32)
    params["model"]["norm"]["bias"] = np.ones(12, np.float32)
    params["model"]["embed_tokens"]["weight"] = "table"
    params["model"]["layers"]["mlp"]["up_proj"]["weight"] = jax.random.key(0)
    with pytest.raises(DataError) as caught:
        write_model(tmp_path / "out", params, config, source)
    message = str(caught.value)
    for part in (
        "params: 5 problems:",
        "model/norm/bias: the model has no such param",
        "lm_head/weight: is missing",
        "model/norm/weight: found ndarray [13], wanted an array [12]",
        "model/embed_tokens/weight: found str [], wanted an array [37, 12]",
        "model/layers/mlp/up_proj/weight: found",
    ):
        assert part in message
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source"]


def test_places_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "source", LLAMA, tensors_of(LLAMA))
    params, config = read_params(source), read_config(source)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    for place, match in (
        (source, "the output would replace"),
        (tmp_path, "the output would replace"),
        (taken, "taken: is there already; give another folder, or empty this one"),
        (tmp_path / "file", "file: is there already"),
        (tmp_path / "file" / "inner", "cannot be written"),
    ):
        with pytest.raises(DataError, match=match):
            write_model(place, params, config, source)
    with dry_run():
        with pytest.raises(DataError, match="taken: is there already"):
            write_model(taken, params, config, source)
        write_model(tmp_path / "out", params, config, source)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage(1000))
    with pytest.raises(DataError, match=r"GB are to be written, 0\.00 GB are free"):
        write_model(tmp_path / "out", params, config, source)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "source", "taken"]
    assert [file.name for file in taken.iterdir()] == ["mine.txt"]


def test_a_fault_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "source", LLAMA, tensors_of(LLAMA), 2)
    params, config = read_params(source), read_config(source)
    write_shard, done = module._write_shard, []

    def failing(file: Path, *arguments: object) -> int:
        if done:
            raise OSError(28, "No space left on device")
        done.append(file)
        return write_shard(file, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_write_shard", failing)
    with pytest.raises(DataError, match="out: cannot be written: No space left on device"):
        write_model(tmp_path / "out", params, config, source)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    write_model(tmp_path / "out", params, config, source)  # and takes away what the other left
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]
