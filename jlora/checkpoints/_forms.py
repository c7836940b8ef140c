"""In which format adapters lie on the disk: jlora's own, or that of another library."""

from pathlib import Path
from typing import Any

from jlora.config import LoraConfig
from jlora.disk import Pair
from jlora.interop.mlx import TENSORS as MLX_TENSORS
from jlora.interop.mlx import is_mlx_folder, read_mlx_arrays
from jlora.interop.peft import FLAT, Mapping, is_peft_folder, read_peft_arrays
from jlora.storage import is_adapters_folder, load_arrays

Entries = dict[str, dict[str, Any]]


def form_of(path: str | Path) -> str:
    """The format that adapters are in: "own", "mlx" or "peft"; "own" where it is not known."""
    if is_mlx_folder(path):
        return "mlx"
    return "peft" if is_peft_folder(path) else "own"


def is_adapters(path: str | Path) -> bool:
    """Whether a folder holds adapters in a format that is read."""
    return form_of(path) != "own" or is_adapters_folder(path)


def read_entries(
    path: str | Path,
    mapping: Mapping = FLAT,
    *,
    lazy: bool = False,
    settled_experts: bool = False,
    transposed_experts: bool | None = None,
) -> tuple[Entries, LoraConfig]:
    """The entries by path, lazy ones read when asked for, and the configuration.

    `mapping` is for other formats than jlora's own; how experts lie is a question to PEFT's alone.
    """
    form = form_of(path)
    if form == "own":
        return load_arrays(path)
    if form == "mlx":
        return read_mlx_arrays(path, mapping, lazy=lazy)
    return read_peft_arrays(
        path, mapping, lazy=lazy, settled_experts=settled_experts, transposed_experts=transposed_experts
    )


def files_of(path: str | Path) -> tuple[Path, ...]:
    """The files that hold adapters."""
    return (Pair(path, MLX_TENSORS) if form_of(path) == "mlx" else Pair(path)).current()
