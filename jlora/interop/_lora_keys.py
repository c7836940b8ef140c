"""The names of the tensors in LoRA files of diffusion models, taken apart."""

import re
from collections.abc import Iterable

from jlora.errors import DataError, listed, raise_all

METADATA = "lora_adapter_metadata"
"""Under which diffusers keeps PEFT's configurations in the metadata."""
_SUFFIXES = {
    f"{way}.weight": part
    for part, ways in {
        "down": (".lora_down", ".lora_A", ".lora_A.default", ".lora.down", ".lora_linear_layer.down", "_lora.down"),
        "up": (".lora_up", ".lora_B", ".lora_B.default", ".lora.up", ".lora_linear_layer.up", "_lora.up"),
        "mid": (".lora_mid",),
        "magnitude": (".lora_magnitude_vector",),
    }.items()
    for way in ways
} | {".lora_magnitude_vector": "magnitude", ".lora_B.bias": "offset", ".alpha": "alpha"}
_VARIANTS = {
    "dora_scale": "DoRA as LyCORIS has it, over whose norm ComfyUI and LyCORIS do not agree",
    "hada_": "LoHa, which is no product of two matrices",
    "lokr_": "LoKr, which is no product of two matrices",
    "oft_": "OFT, which turns the weight",
    "glora": "GLoRA, which is no product of two matrices",
    "lora_embedding_": "the adapter of an embedding",
    "lora_a": "mlx-lm's: give the folder, whose adapter_config.json has the scale",
    "lora_b": "mlx-lm's: give the folder, whose adapter_config.json has the scale",
    ".diff": "the difference of a whole tensor",
    "emb": "an embedding that was trained beside it",
}
_PEFT = "base_model.model."


def taken_apart(key: str) -> tuple[str, str]:
    """The module that a tensor belongs to, and which part of its adapter it is, "" where it is none."""
    suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), "")
    name = key.removesuffix(suffix)
    if not suffix or not name:
        return key, ""
    if suffix.startswith("_"):  # the attention processors of older versions of diffusers
        name = re.sub(r"\.processor\.(\w+)$", r".\1", name)
        name = re.sub(r"\.to_out$", ".to_out.0", name)
    return name, _SUFFIXES[suffix]


def parts_by_module(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """The keys of each module's parts.

    Raises:
      DataError: keys that belong to no LoRA, parts that stand alone.
    """
    found: dict[str, dict[str, str]] = {}
    problems = []
    for key in keys:
        name, part = taken_apart(key)
        parts = found.setdefault(name, {}) if part else {}
        if key.startswith(_PEFT):
            problems.append(f"{key}: of PEFT, which keeps the scaling in adapter_config.json: give the folder of both")
        elif not part:
            what = next((what for end, what in _VARIANTS.items() if end in key), "no part of a LoRA that jlora knows")
            problems.append(f"{key}: {what}")
        elif part in parts:
            problems.append(f"{key} and {parts[part]}: both the {part} of {name}")
        parts[part] = key
    problems += [
        f"{name}: {listed(parts.values())} without {'an up' if 'down' in parts else 'a down'}"
        for name, parts in found.items()
        if not {"down", "up"} <= set(parts)
    ]
    raise_all(problems, DataError, "tensors that are no LoRA that jlora reads")
    if not found:
        raise DataError("holds no tensors")
    return found
