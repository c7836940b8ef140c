"""In which format adapters lie on the disk: jlora's own, or that of another library."""

from collections.abc import Mapping as MappingType
from pathlib import Path
from typing import Any

from jlora.config import LoraConfig
from jlora.disk import Checkpoint, Pair
from jlora.interop.diffusion import is_lora_file, read_lora_file
from jlora.interop.mlx import TENSORS as MLX_TENSORS
from jlora.interop.mlx import is_mlx_folder, read_mlx_arrays
from jlora.interop.peft import FLAT, Mapping, is_peft_folder, read_peft_arrays
from jlora.storage import is_adapters_folder, load_arrays

Entries = dict[str, dict[str, Any]]
Shapes = MappingType[str, tuple[int, ...]]


def form_of(path: str | Path) -> str:
    """The format that adapters are in: "own", "file", "mlx" or "peft"; "own" where it is not known."""
    if Path(path).is_file() and Path(path).suffix == ".safetensors":
        return "file"
    if is_mlx_folder(path):
        return "mlx"
    return "peft" if is_peft_folder(path) else "own"


def is_adapters(path: str | Path) -> bool:
    """Whether a folder or a file holds adapters in a format that is read."""
    form = form_of(path)
    return is_lora_file(path) if form == "file" else form != "own" or is_adapters_folder(path)


def read_entries(
    path: str | Path,
    mapping: Mapping = FLAT,
    *,
    lazy: bool = False,
    settled_experts: bool = False,
    transposed_experts: bool | None = None,
    shapes: Shapes | None = None,
) -> tuple[Entries, LoraConfig]:
    """The entries by path, lazy ones read when asked for, and the configuration.

    `mapping` is for other formats than jlora's own; how experts lie is a question to PEFT's alone. `shapes` are of the
    tensors that the adapters are for, for flattened names.
    """
    form = form_of(path)
    if form == "file":
        return read_lora_file(path, mapping, lazy=lazy, shapes=shapes)
    if form == "own":
        return load_arrays(path)
    if form == "mlx":
        return read_mlx_arrays(path, mapping, lazy=lazy)
    return read_peft_arrays(
        path, mapping, lazy=lazy, settled_experts=settled_experts, transposed_experts=transposed_experts
    )


def files_of(path: str | Path) -> tuple[Path, ...]:
    """The files that hold adapters."""
    if form_of(path) == "file":
        return (Path(path),)
    return (Pair(path, MLX_TENSORS) if form_of(path) == "mlx" else Pair(path)).current()


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors."""
    return {name: entry.shape for name, entry in checkpoint.entries.items()}
