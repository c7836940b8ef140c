"""LoRA files of diffusion models: one safetensors file, as sd-scripts (kohya), ComfyUI and diffusers write it.

    <module>.lora_down.weight (r, in...), <module>.lora_up.weight (out, r, 1...), <module>.alpha
    <module>.lora_A.weight,               <module>.lora_B.weight            the same, in PEFT's words
    <module>.lora_mid.weight (r, r, window)                                 between them (LoCon's Tucker form)
    <module>.lora_magnitude_vector (out,), <module>.lora_B.bias (out,)      DoRA and the bias of a B, as PEFT has them

The update is alpha / r * up@down; without an alpha up@down, as in ComfyUI and diffusers 0.42 (utils/peft_utils.py).
diffusers may keep PEFT's configuration in the metadata, under `lora_adapter_metadata`, its keys behind the component.

sd-scripts flattens names: `lora_unet_` and the module's name with underscores for dots. They are found again in a
checkpoint; without one they stay as they are.
"""

import collections
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.config import LoraConfig, effective_alpha
from jlora.disk import LazyArray, TensorFile, parse_json
from jlora.errors import DataError, JloraWarning
from jlora.interop._flattened import in_checkpoint, is_flat
from jlora.interop._lora_files import COMPONENTS, lora_file, write_diffusers, write_kohya
from jlora.interop._lora_keys import METADATA, parts_by_module, taken_apart
from jlora.interop._named import Module, entries_of_modules
from jlora.interop.peft import FLAT, Scales, check_peft_config
from jlora.interop.peft import Mapping as Table

__all__ = [
    "COMPONENTS",
    "is_flat",
    "is_lora_file",
    "lora_file",
    "read_lora_file",
    "write_diffusers",
    "write_kohya",
]


def is_lora_file(path: str | Path) -> bool:
    """Whether a file holds LoRA by its tensors' names.

    >>> is_lora_file("no/such/file")
    False
    """
    if not Path(path).is_file():
        return False
    try:
        with TensorFile(path) as file:
            return any(
                taken_apart(key)[1] in ("down", "up") or ".hada_" in key or ".lokr_" in key for key in file.entries
            )
    except DataError:
        return False


def read_lora_file(
    path: str | Path,
    mapping: Table = FLAT,
    *,
    lazy: bool = False,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[dict[str, dict[str, Any]], LoraConfig]:
    """The entries by path and their configuration.

    Args:
      path: the file.
      mapping: as of `jlora.interop.peft.read_peft`; the names of its rows may be flattened ones.
      lazy: whether the arrays are read when they are asked for.
      shapes: of the tensors of the checkpoint that the adapters are for, whose names take the place of flattened ones.
        Modules of components that it does not have (a text encoder beside a unet) are left out, with a warning.

    Raises:
      DataError: a file that cannot be read, tensors that do not fit each other, a variant that A and B do not
        represent; all are named.
    """
    try:
        with TensorFile(path) as file:
            found = parts_by_module(file.entries)
            scales = _Metadata(file)
            modules = [_module(name, keys, file, scales, lazy=lazy) for name, keys in found.items()]
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    if shapes is not None:
        modules = in_checkpoint(path, modules, shapes)
    entries, config = entries_of_modules(path, modules, mapping)
    flat = [at for at in entries if is_flat(at)]
    if flat and shapes is None:
        warnings.warn(
            f"{path}: {len(flat)} names have underscores for dots and stay so, such as {flat[0]}: `jlora merge`, "
            "`jlora inspect --base` and `jlora convert --base` find their weights, --mapping renames them",
            JloraWarning,
            stacklevel=2,
        )
    return entries, config


class _Metadata:
    """The scaling of each module, as far as PEFT's configurations in the metadata say it."""

    def __init__(self, file: TensorFile) -> None:
        text = file.metadata.get(METADATA)
        try:
            data = {} if text is None else parse_json(text.encode("utf-8"))
        except ValueError as error:
            raise DataError(f"the metadata {METADATA} is not valid JSON: {error}") from None
        configs: dict[str, dict[str, Any]] = collections.defaultdict(dict)
        for key, value in data.items():
            component, _, field = key.rpartition(".")
            configs[component][field] = value
        for config in configs.values():
            check_peft_config({"peft_type": "LORA"} | config)
        self._configs = {
            component: (Scales(config), bool(config.get("use_rslora"))) for component, config in configs.items()
        }

    def scaling_of(self, module: str, rank: int) -> float | None:
        """The scaling of a module; None where nothing is said of its component.

        Raises:
          DataError: another rank than that of the tensors.
        """
        for component, (scales, is_rslora) in self._configs.items():
            if component and not module.startswith(f"{component}."):
                continue
            name = module.removeprefix(f"{component}.") if component else module
            if scales.rank_of(name) != rank:
                raise DataError(f"{module}: the rank is {rank}, and {scales.rank_of(name)} in the metadata {METADATA}")
            return float(effective_alpha(scales.alpha_of(name), rank, "rslora" if is_rslora else "standard")) / rank
        return None


def _module(name: str, keys: Mapping[str, str], file: TensorFile, metadata: _Metadata, *, lazy: bool) -> Module:
    """The adapter of a module, in PEFT's layout."""
    read: Any = file.lazy if lazy else file.read
    parts = {part: read(key) for part, key in keys.items() if part != "alpha"}
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    rank, window = down.shape[0] if down.ndim else 0, down.shape[2:]
    shapes = f"down {down.shape}, up {up.shape}" + (f", mid {mid.shape}" if mid is not None else "")
    fits = down.ndim >= 2 and up.ndim >= 2 and up.shape[1] == rank >= 1 and set(up.shape[2:]) <= {1}
    if mid is not None:
        fits = fits and mid.ndim > 2 and mid.shape[:2] == (rank, rank) and set(window) <= {1}
        window = mid.shape[2:]
    if not fits:
        raise DataError(f"{name}: {shapes} do not fit each other: wanted (r, in...) and (out, r)")
    said = metadata.scaling_of(name, rank)
    if "alpha" in keys:
        if said is not None:
            raise DataError(f"{name}: there is an alpha, and one in the metadata {METADATA}")
        alpha = file.read(keys["alpha"])
        if alpha.size != 1 or not np.isfinite(alpha.astype(np.float64)).all():
            raise DataError(f"{keys['alpha']}: wanted one finite number")
        said = float(alpha.reshape(())) / rank
    if mid is not None:
        down = _with_mid(down, mid)
    up = up.reshape(up.shape[0], rank, *(1 for _ in window))
    kind = "conv" if window else "linear"
    return Module(
        name, kind, down, up, rank, 1.0 if said is None else said, parts.get("magnitude"), parts.get("offset")
    )


def _with_mid(down: Any, mid: Any) -> Any:
    """The convolution (r, in, window) that down (r, in, 1...) and mid (r, r, window) are one after the other."""

    def product() -> np.ndarray[Any, Any]:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later, by its name
            first = np.asarray(down).astype(np.float64).reshape(down.shape[:2])
            return np.einsum("rs...,si->ri...", np.asarray(mid).astype(np.float64), first).astype(np.float32)

    return LazyArray((mid.shape[0], down.shape[1], *mid.shape[2:]), np.float32, product)
