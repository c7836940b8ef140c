"""What a file or a folder is that is not the one wanted, and what its owner can do."""

import os
from pathlib import Path

START = 64  # bytes of a file by which its format is known
_PICKLE = (
    "which can run code as it is loaded, so that jlora loads none: load it with the library that wrote it, and save it "
    "again as safetensors, as save_pretrained does"
)
_GGUF = (
    "a GGUF file, packed for llama.cpp: give the safetensors that it was made from; of a model `jlora import-gguf` "
    "makes a folder of them"
)
_HDF5 = "an HDF5 file: save the model as safetensors"
_STARTS = (
    (b"version https://git-lfs", "a pointer of git-lfs in place of the file: `git lfs pull` fetches the file"),
    (b"GGUF", _GGUF),
    (b"PK\x03\x04", f"a zip file, as PyTorch's pickles are, {_PICKLE}"),
    *((b"\x80" + bytes([protocol]), f"a pickle, {_PICKLE}") for protocol in range(2, 6)),
    (b"\x89HDF", _HDF5),
    (b"<", "a web page, or other XML: the download did not give the file"),
)
_ENDS = {
    (".bin", ".pt", ".pth", ".pth.lora", ".ckpt", ".pkl"): f"a pickle, {_PICKLE}",
    (".gguf",): _GGUF,
    (".h5",): _HDF5,
    (".msgpack",): "Flax's own format: save the model as safetensors",
    (".npz",): "an archive of NumPy's, as mlx-lm once wrote its adapters: load it with MLX, and mx.save_safetensors",
    (".nemo",): "an archive of NeMo's: export it to Hugging Face with NeMo",
    (".onnx_adapter",): "an adapter for ONNX Runtime, packed: give the PEFT adapter that it was made from",
}
_ORBAX = (
    "an Orbax checkpoint: restore it with Orbax, and save its adapters with jlora.save_adapters; where its params hold "
    "the LoRA of gemma, qwix (tunix), openpi or MaxText, `jlora convert --names` and `jlora inspect --names` read it"
)
_MAXTEXT = "an adapter of MaxText, which `jlora convert --names maxtext` and `jlora inspect --names maxtext` read"
_TREE = "_METADATA"  # in the folder of a tree that Orbax saved
_OF_ORBAX = {"_CHECKPOINT_METADATA", "_METADATA", "_sharding", "manifest.ocdbt"}
_OF_TRAINING = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin", "scheduler.bin")
_MOST_NAMES = 1000
NOT_GATHERED = (
    "a tensor that is spread over processes was saved without being gathered; under DeepSpeed's ZeRO-3 set "
    "stage3_gather_16bit_weights_on_model_save, or use its zero_to_fp32.py"
)
"""Why a tensor holds no numbers."""


def format_of(start: bytes) -> str:
    """What a file is that begins so, and what to do; "" where nothing is known of it."""
    return next((what for known, what in _STARTS if start.startswith(known)), "")


def format_of_file(path: Path) -> str:
    """What a file is by its first bytes and its name, and what to do; "" where nothing is known of it."""
    if path.suffix == ".safetensors":  # the length that it begins with may look like any of them
        return ""
    by_name = next((what for ends, what in _ENDS.items() if path.name.endswith(ends)), "")
    try:
        with path.open("rb") as file:
            start = file.read(START)
    except OSError:
        return by_name
    return by_name if by_name and start.startswith(b"PK") else format_of(start) or by_name


def found_instead(folder: Path, wanted: str) -> str:
    """What a folder without a file `wanted` holds in its place, and what to do; "" where nothing is known of it.

    A file is recognised by its name alone. `wanted` is the end of the file's name.
    """
    names = _names(folder)
    if "snapshots" in names and (versions := _names(folder / "snapshots")):
        return f"this is Hugging Face's cache of a repository: give {folder / 'snapshots' / versions[-1]}"
    if caches := [name for name in names if name.startswith(("models--", "datasets--"))]:
        return f"this is Hugging Face's cache: give a folder in {folder / caches[0] / 'snapshots'}"
    if orbax := orbax_instead(folder):
        return orbax
    for ends, what in _ENDS.items():
        if found := [name for name in names if name.endswith(ends) and name not in _OF_TRAINING]:
            return f"{found[0]} is {what}"
    below = [name for name in names if any(inner.endswith(wanted) for inner in _names(folder / name))]
    return f"but {' and '.join(below[:3])} in it {'hold one' if len(below) > 1 else 'holds one'}" if below else ""


def orbax_instead(folder: Path) -> str:
    """That a folder is one of Orbax, or of its steps or trees, and what to do; "" where it is none."""
    names = _names(folder)
    if "adapter_config.json" in names and _TREE in _names(folder / "0" / "items"):
        return f"this is {_MAXTEXT}"
    steps = [folder / name for name in names if name.isdecimal()]
    below = [place / name for place in (folder, *steps[:1]) for name in _names(place)]
    is_above = any(_TREE in _names(place) for place in below)
    return f"this is {_ORBAX}" if is_above or not _OF_ORBAX.isdisjoint(names) else ""


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))[:_MOST_NAMES]
    except OSError:
        return []
