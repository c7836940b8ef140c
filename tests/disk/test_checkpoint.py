"""Checkpoints: one file, or a folder of files with an index."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from jlora import DataError
from jlora.disk import Checkpoint, beside

INDEX = "model.safetensors.index.json"


def sharded(folder: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Three tensors in two files, with an index and side files."""
    tensors = {
        name: rng.standard_normal((3, size)).astype(np.float32) for name, size in zip("abc", (5, 0, 7), strict=True)
    }
    safetensors.numpy.save_file({"a": tensors["a"]}, folder / "model-1.safetensors")
    safetensors.numpy.save_file({name: tensors[name] for name in "bc"}, folder / "model-2.safetensors")
    write_index(folder, {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"})
    for name in ("config.json", "tokenizer.json", "pytorch_model.bin", ".hidden"):
        (folder / name).write_text("{}")
    (folder / "sub").mkdir()
    return tensors


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 3}, "weight_map": weight_map}))


def test_a_folder_of_files(tmp_path, rng):
    tensors = sharded(tmp_path, rng)
    found = Checkpoint(tmp_path)
    assert found.shards == ["model-1.safetensors", "model-2.safetensors"]
    assert found.shard_of == {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    assert found.index is not None
    assert found.index["metadata"] == {"total_size": 3}
    assert {name: entry.shape for name, entry in found.entries.items()} == {"a": (3, 5), "b": (3, 0), "c": (3, 7)}
    for name, array in tensors.items():
        np.testing.assert_array_equal(found.read(name), array)
    with pytest.raises(DataError, match="no tensor 'd'"):
        found.read("d")
    assert beside(found).files == ("config.json", INDEX, "tokenizer.json")


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_one_file(tmp_path, rng, name):
    array = rng.standard_normal((3, 5))
    safetensors.numpy.save_file({"a": array}, tmp_path / name)
    for path in (tmp_path, tmp_path / name, str(tmp_path)):
        found = Checkpoint(path)
        np.testing.assert_array_equal(found.read("a"), array)
        assert found.index is None
        assert beside(found) == ((), ())


def test_one_file_by_its_name_among_others(tmp_path, rng):
    for name in ("model.safetensors", "other.safetensors"):
        safetensors.numpy.save_file({name: np.ones(3)}, tmp_path / name)
    assert Checkpoint(tmp_path).shards == ["model.safetensors"]
    (tmp_path / "model.safetensors").rename(tmp_path / "third.safetensors")
    with pytest.raises(DataError, match=f"2 safetensors files and no {INDEX}: wanted a checkpoint"):
        Checkpoint(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(DataError, match="no safetensors file: wanted a checkpoint"):
        Checkpoint(tmp_path)
    for path in (tmp_path / "nothing", "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(DataError, match="no such file or folder"):
            Checkpoint(path)


MAPS: dict[str, tuple[Any, str]] = {
    "a list": (["a"], "wanted a weight_map from tensors to files"),
    "nothing": ({}, "wanted a weight_map"),
    "numbers": ({"a": 1}, "wanted a weight_map"),
    "a nested list": ({"a": [[["x"]]]}, "wanted a weight_map"),
    "missing": ({"a": "model-3.safetensors"}, "1 files of the index are missing: 'model-3.safetensors'"),
    "above": ({"a": "../model-1.safetensors"}, "'../model-1.safetensors' is no file name of this folder"),
    "absolute": ({"a": "/etc/passwd"}, "'/etc/passwd' is no file name of this folder"),
    "the folder": ({"a": "."}, "'.' is no file name"),
    "the folder above": ({"a": ".."}, "files of the index are missing"),
    "empty": ({"a": ""}, "'' is no file name"),
    "null byte": ({"a": "a\0b"}, r"'a\\x00b' is no file name"),
    "long": ({"a": "x" * 300}, "files of the index are missing: 'xxx+[.][.][.]"),
    "no tensors": ({"a": "config.json"}, "config.json: not a readable safetensors file"),
    "another tensor": (
        {"a": "model-1.safetensors", "d": "model-2.safetensors"},
        "differ in 3 tensors, such as 'b': by the index in None, found in model-2.safetensors",
    ),
    "another file": (
        {"a": "model-2.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"},
        "differ in 2 tensors, such as 'a': by the index in model-2.safetensors, found in model-1.safetensors",
    ),
}


@pytest.mark.parametrize("case", MAPS)
def test_an_index_that_does_not_fit(tmp_path, rng, case):
    sharded(tmp_path, rng)
    weight_map, message = MAPS[case]
    write_index(tmp_path, weight_map)
    with pytest.raises(DataError, match=message):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_files(tmp_path, rng):
    sharded(tmp_path, rng)
    safetensors.numpy.save_file({"a": np.ones(3), "b": np.ones(3)}, tmp_path / "model-2.safetensors")
    with pytest.raises(DataError, match=r"model-2.safetensors: 'a' is in another file of the checkpoint too"):
        Checkpoint(tmp_path)


def test_a_shard_that_is_damaged(tmp_path, rng):
    sharded(tmp_path, rng)
    path = tmp_path / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"model-2.safetensors: not a readable safetensors file: .*cut short"):
        Checkpoint(tmp_path)
