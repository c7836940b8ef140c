"""What stands in the place of safetensors: each gets its name, and the way out."""

import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from jlora import DataError, LoraConfig, checkpoints
from jlora.disk import Checkpoint, write_tensors
from jlora.interop.peft import read_peft, write_peft
from jlora.storage import load_adapters

NAME = "up.weight"


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"x" * 100)


FILES = {
    "git-lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n"),
        "git lfs pull",
    ),
    "gguf": (lambda path: path.write_bytes(b"GGUF\3\0\0\0" + bytes(64)), "a GGUF file, packed for llama.cpp"),
    "torch": (zipped, "a zip file, as PyTorch's pickles are, which can run code"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1}, 2)), "a pickle, which can run code"),
    "pickle of today": (
        lambda path: path.write_bytes(pickle.dumps({"a": "b" * 99}, 4)),
        "a pickle, which can run code",
    ),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64)), "an HDF5 file"),
    "page": (lambda path: path.write_text("<!DOCTYPE html><html>404</html>"), "a web page"),
    "cut short": (lambda path: path.write_bytes((10**6).to_bytes(8, "little") + b"{}"), "cut short, or another format"),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("place", ["a checkpoint", "a file", "an adapter"])
def test_a_file_of_another_format(kind, place, tmp_path, rng):
    make, message = FILES[kind]
    if place == "an adapter":
        path = adapter(tmp_path / "adapter", rng) / "adapter_model.safetensors"
    else:
        path = tmp_path / "model.safetensors"
    make(path)
    with pytest.raises(DataError, match=f"not a readable safetensors file: .*{message}"):
        read_peft(path.parent) if place == "an adapter" else Checkpoint(path if place == "a file" else tmp_path)


def adapter(folder, rng):
    pair = {"A": rng.normal(size=(5, 2)).astype("float32"), "B": rng.normal(size=(2, 3)).astype("float32")}
    write_peft(folder, {NAME: pair}, LoraConfig(rank=2, factorizations={"**": "oi"}))
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "pytorch_model.bin is a pickle, which can run code .*: load it with .* save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "pytorch_model-00001-of-00002.bin is a pickle"),
        ("consolidated.00.pth", "consolidated.00.pth is a pickle"),
        ("model.gguf", "model.gguf is a GGUF file"),
        ("tf_model.h5", "tf_model.h5 is an HDF5 file"),
        ("flax_model.msgpack", "flax_model.msgpack is Flax's own format"),
        ("model.nemo", "model.nemo is an archive of NeMo's: export it"),
        ("manifest.ocdbt", "this is an Orbax checkpoint: restore it with Orbax"),
        ("training_args.bin", "no safetensors file: wanted a checkpoint: one file, or several with an index"),
    ],
)
def test_a_checkpoint_in_another_format(name, message, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=message):
        Checkpoint(tmp_path)


def model(folder: Path) -> None:
    folder.mkdir(parents=True)
    with (folder / "model.safetensors").open("wb") as file:
        write_tensors(file, {NAME: np.ones((3, 5), np.float32)}, {"format": "pt"})


def test_the_cache_of_hugging_face(tmp_path):
    repository = tmp_path / "models--org--name"
    model(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    with pytest.raises(DataError, match=r"cache of a repository: give .*/models--org--name/snapshots/abc$"):
        Checkpoint(repository)
    with pytest.raises(DataError, match=r"cache: give a folder in .*/models--org--name/snapshots$"):
        Checkpoint(tmp_path)
    Checkpoint(repository / "snapshots" / "abc")


def test_a_folder_below(tmp_path):
    model(tmp_path / "run" / "checkpoint-20")
    with pytest.raises(DataError, match=r"no safetensors file; but checkpoint-20 in it holds one"):
        Checkpoint(tmp_path / "run")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_an_adapter_that_is_a_pickle(name, tmp_path, rng):
    folder = adapter(tmp_path / "adapter", rng)
    (folder / "adapter_model.safetensors").rename(folder / name)
    for read in (read_peft, checkpoints.read_adapters):
        with pytest.raises(DataError, match=f"No such file or directory; {name} is a pickle, which can run code"):
            read(folder)


def test_the_folder_of_a_trainer(tmp_path, rng):
    adapter(tmp_path / "out" / "checkpoint-500", rng)
    (tmp_path / "out" / "trainer_state.json").write_text("{}")
    for read in (load_adapters, checkpoints.read_adapters):
        with pytest.raises(DataError, match="holds no adapters itself, but checkpoint-500 in it does"):
            read(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: b"\xef\xbb\xbf" + text, "byte order mark: save it as UTF-8 without one"),
        (
            lambda text: b"// ours\n" + text,
            "adapter_config.json: not valid JSON: .*; JSON has no comments: take them out",
        ),
        (lambda text: text.replace(b"2,", b"2, # rank\n"), "not valid JSON: .*; JSON has no comments: take them out"),
        (lambda text: text.rstrip()[:-1] + b",}", "not valid JSON: .*; JSON has no comma behind the last item"),
        (lambda text: text.decode().encode("utf-16"), "not valid JSON: .*; save it as UTF-8"),
        (lambda text: b" ", "adapter_config.json: not valid JSON: .*; the file is empty"),
        (lambda text: b"version https://git-lfs.github.com/spec/v1\n", "adapter_config.json: .*git lfs pull"),
        (lambda text: text.replace(b'"r": 2', b'"r": NaN'), "NaN is no JSON number"),
        (lambda text: text.replace(b"peft_type", b"peft"), 'adapter_config.json has no peft_type, which is "LORA"'),
    ],
)
def test_the_configuration_is_what_is_blamed(change, message, tmp_path, rng):
    folder = adapter(tmp_path / "adapter", rng)
    path = folder / "adapter_config.json"
    path.write_bytes(change(path.read_bytes()))
    before = shutil.copytree(folder, tmp_path / "before")
    for read in (read_peft, checkpoints.read_adapters):
        with pytest.raises(DataError, match=message):
            read(folder)
    assert path.read_bytes() == (before / "adapter_config.json").read_bytes()


def test_the_configuration_is_missing(tmp_path, rng):
    folder = adapter(tmp_path / "adapter", rng)
    (folder / "adapter_config.json").unlink()
    for read in (load_adapters, checkpoints.read_adapters):
        with pytest.raises(DataError, match=r"if it is PEFT's, adapter_config\.json is missing beside it"):
            read(folder)


NOT_GATHERED = "holds no numbers.*: a tensor that is spread over processes was saved without being gathered"


@pytest.mark.parametrize("command", ["merge", "inspect", "extract", "extract from", "unmerge"])
def test_a_base_that_was_not_gathered(command, tmp_path, rng):
    model(tmp_path / "whole")
    model(tmp_path / "base")
    with (tmp_path / "base" / "model.safetensors").open("wb") as file:
        write_tensors(file, {NAME: np.ones((0,), np.float32)}, {"format": "pt"})
    given = adapter(tmp_path / "adapter", rng)
    whole, base, out = (tmp_path / name for name in ("whole", "base", "out"))
    calls = {
        "merge": lambda: checkpoints.merge(base, given, out),
        "unmerge": lambda: checkpoints.unmerge(base, given, out, unrecorded=True),
        "inspect": lambda: checkpoints.inspect(given, base=base),
        "extract": lambda: checkpoints.extract(whole, base, out),
        "extract from": lambda: checkpoints.extract(base, whole, out),
    }
    with pytest.raises(DataError, match=NOT_GATHERED):
        calls[command]()
    assert not out.exists()


NAMED = {
    "x.gguf": (
        b"GGUF\3\0\0\0",
        "x.gguf: is a GGUF file, packed for llama.cpp: give the safetensors that it was made from",
    ),
    "without_an_end": (b"GGUF\3\0\0\0", "without_an_end: is a GGUF file"),
    "adapters.npz": (b"PK\3\4", "adapters.npz: is an archive of NumPy's, as mlx-lm once wrote its adapters"),
    "lora.bin": (b"PK\3\4", "lora.bin: is a pickle, which can run code"),
    "lora.pt": (b"\x80\2", "lora.pt: is a pickle, which can run code"),
    "lit_model.pth.lora": (b"", "lit_model.pth.lora: is a pickle"),
    "x.onnx_adapter": (b"TSTO", "x.onnx_adapter: is an adapter for ONNX Runtime"),
    "x.lora.h5": (b"\x89HDF", "x.lora.h5: is an HDF5 file"),
    "notes.txt": (b"notes", "notes.txt: is a file: wanted the folder that save_adapters wrote"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_file_in_the_place_of_adapters(name, tmp_path):
    start, message = NAMED[name]
    (tmp_path / name).write_bytes(start + bytes(99) * bool(start))
    model(tmp_path / "base")
    for given in (
        lambda: checkpoints.merge(tmp_path / "base", tmp_path / name, tmp_path / "out"),
        lambda: checkpoints.inspect(tmp_path / name),
        lambda: checkpoints.convert(tmp_path / name, tmp_path / "out", "own"),
    ):
        with pytest.raises(DataError, match=re.escape(message)):
            given()


def test_a_folder_of_orbax(tmp_path):
    (tmp_path / "_CHECKPOINT_METADATA").write_text("{}")
    for given in (checkpoints.inspect, lambda path: checkpoints.convert(path, tmp_path / "out", "own", names="gemma")):
        with pytest.raises(
            DataError, match="this is an Orbax checkpoint: restore it with Orbax, and save its adapters"
        ):
            given(tmp_path)


@pytest.mark.parametrize("given", ["checkpoints", "checkpoints/7", "checkpoints/7/items"])
def test_folders_of_steps_and_trees_of_orbax(given, tmp_path):
    (tmp_path / "checkpoints" / "7" / "items").mkdir(parents=True)
    (tmp_path / "checkpoints" / "7" / "items" / "_METADATA").write_text("{}")
    with pytest.raises(DataError, match=r"LoRA of gemma, qwix \(tunix\), openpi or MaxText, `jlora convert --names`"):
        checkpoints.inspect(tmp_path / given)


def test_an_adapter_of_maxtext(tmp_path):
    (tmp_path / "0" / "items").mkdir(parents=True)
    (tmp_path / "0" / "items" / "_METADATA").write_text("{}")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}')
    for given in (checkpoints.inspect, lambda path: checkpoints.convert(path, tmp_path / "out", "own")):
        with pytest.raises(DataError, match="this is an adapter of MaxText, which `jlora convert --names maxtext` and"):
            given(tmp_path)


def test_the_tensors_alone_of_a_folder_with_its_configuration(tmp_path, rng):
    path = adapter(tmp_path / "adapter", rng) / "adapter_model.safetensors"
    with pytest.raises(DataError, match=r"its scaling is in adapter_config\.json beside it: give the folder of both"):
        checkpoints.inspect(path)
