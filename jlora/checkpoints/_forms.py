"""In which format adapters lie on the disk: jlora's own, or that of another library; VeRA and LoRA-XS are expanded."""

from collections.abc import Mapping as MappingType
from pathlib import Path
from typing import Any

from jlora.checkpoints._vera import read_vera_entries
from jlora.config import LoraConfig
from jlora.disk import CONFIG, TENSORS, Checkpoint, Pair
from jlora.errors import DataError, listed
from jlora.interop.diffusion import is_lora_file, read_lora_file
from jlora.interop.mlx import TENSORS as MLX_TENSORS
from jlora.interop.mlx import is_mlx_folder, read_mlx_arrays
from jlora.interop.peft import FLAT, Mapping, is_peft_folder, is_vera_folder, read_peft_arrays
from jlora.storage import is_adapters_folder, load_arrays
from jlora.variants import is_variant_folder, load_expanded

Entries = dict[str, dict[str, Any]]
Shapes = MappingType[str, tuple[int, ...]]

_MOST_FILES = 20  # of adapters in a folder; those of a checkpoint are not looked into


def form_of(path: str | Path) -> str:
    """The format that adapters are in: "own", "file", "mlx", "peft" or "variant"; "own" where it is not known."""
    if _file_in(path) is not None:
        return "file"
    if is_variant_folder(path):
        return "variant"
    if is_mlx_folder(path):
        return "mlx"
    return "peft" if is_peft_folder(path) else "own"


def is_adapters(path: str | Path) -> bool:
    """Whether a folder or a file holds adapters in a format that is read."""
    file = _file_in(path)
    return is_lora_file(file) if file is not None else form_of(path) != "own" or is_adapters_folder(path)


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
    tensors that the adapters are for, for flattened names, and for the vectors of PEFT's VeRA.
    """
    file = _file_in(path)
    if file is not None:
        if file.name in (TENSORS, MLX_TENSORS) and (file.parent / CONFIG).is_file():
            raise DataError(f"{file}: its scaling is in {CONFIG} beside it: give the folder of both")
        return read_lora_file(file, mapping, lazy=lazy, shapes=shapes)
    form = form_of(path)
    if form == "own":
        return load_arrays(path)
    if form == "mlx":
        return read_mlx_arrays(path, mapping, lazy=lazy)
    if form == "variant":
        return load_expanded(path)
    if is_vera_folder(path):
        return read_vera_entries(path, mapping, shapes)
    return read_peft_arrays(
        path, mapping, lazy=lazy, settled_experts=settled_experts, transposed_experts=transposed_experts
    )


def files_of(path: str | Path) -> tuple[Path, ...]:
    """The files that hold adapters."""
    if (file := _file_in(path)) is not None:
        return (file,)
    return (Pair(path, MLX_TENSORS) if form_of(path) == "mlx" else Pair(path)).current()


def _file_in(path: str | Path) -> Path | None:
    """The LoRA file of a diffusion model that a path is, or the only one in a folder that holds no other adapters.

    Raises:
      DataError: several in such a folder.
    """
    given = Path(path)
    if given.is_file():
        return given if given.suffix == ".safetensors" or is_lora_file(given) else None
    if not given.is_dir() or any((given / name).exists() for name in (CONFIG, TENSORS, MLX_TENSORS)):
        return None
    files = sorted(given.glob("*.safetensors"))
    found = [file for file in files if len(files) <= _MOST_FILES and is_lora_file(file)]
    if len(found) > 1:
        raise DataError(f"{path}: holds several LoRA files, {listed(file.name for file in found)}: give one of them")
    return found[0] if found else None


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors."""
    return {name: entry.shape for name, entry in checkpoint.entries.items()}
