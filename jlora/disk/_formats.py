"""What a file or a folder is that is not the one wanted, and what its owner can do."""

import os
from pathlib import Path

START = 64  # bytes of a file by which its format is known
_PICKLE = (
    "which can run code as it is loaded, so that jlora loads none: load it with the library that wrote it, and save it "
    "again as safetensors, as save_pretrained does"
)
_GGUF = "a GGUF file, packed for llama.cpp: give the safetensors that it was made from"
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
    (".bin", ".pt", ".pth", ".ckpt", ".pkl"): f"a pickle, {_PICKLE}",
    (".gguf",): _GGUF,
    (".h5",): _HDF5,
    (".msgpack",): "Flax's own format: save the model as safetensors",
}
_OF_TRAINING = ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin", "scheduler.bin")
_MOST_NAMES = 1000


def format_of(start: bytes) -> str:
    """What a file is that begins so, and what to do; "" where nothing is known of it."""
    return next((what for known, what in _STARTS if start.startswith(known)), "")


def found_instead(folder: Path, wanted: str) -> str:
    """What a folder without a file `wanted` holds in its place, and what to do; "" where nothing is known of it.

    A file is recognised by its name alone. `wanted` is the end of the file's name.
    """
    names = _names(folder)
    if "snapshots" in names and (versions := _names(folder / "snapshots")):
        return f"this is Hugging Face's cache of a repository: give {folder / 'snapshots' / versions[-1]}"
    if caches := [name for name in names if name.startswith(("models--", "datasets--"))]:
        return f"this is Hugging Face's cache: give a folder in {folder / caches[0] / 'snapshots'}"
    for ends, what in _ENDS.items():
        if found := [name for name in names if name.endswith(ends) and name not in _OF_TRAINING]:
            return f"{found[0]} is {what}"
    below = [name for name in names if any(inner.endswith(wanted) for inner in _names(folder / name))]
    return f"but {' and '.join(below[:3])} in it {'hold one' if len(below) > 1 else 'holds one'}" if below else ""


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))[:_MOST_NAMES]
    except OSError:
        return []
