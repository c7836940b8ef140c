"""The names of the tensors in LoRA files of diffusion models, taken apart."""

import re
from collections.abc import Collection

from jlora.errors import DataError, listed, raise_all, shortened

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
_VARIANTS = {  # the last part of a key, or what stands before .weight
    r"dora_scale": "DoRA as LyCORIS has it, over whose norm ComfyUI and LyCORIS do not agree",
    r"hada_\w+": "LoHa, which is no product of two matrices",
    r"lokr_\w+": "LoKr, which is no product of two matrices",
    r"oft_\w+": "OFT, which turns the weight",
    r"[ab][12]": "GLoRA, which is no product of two matrices",
    r"on_input": "IA3, which scales what goes in or out",
    r"lora_embedding_\w+": "the adapter of an embedding",
    r"lora_[ab]": "mlx-lm's: give the folder, whose adapter_config.json has the scale",
    r"diff|diff_b|set_weight": "the difference of a whole tensor, or the tensor",
    r"w_norm|b_norm": "a norm that was trained beside it",
    r"emb_params|clip_[lg]|\*": "an embedding that was trained beside it",
    r"lora_controlnet": "ControlLoRA, which has layers of its own too",
    r"\w*_lora\d\.(down|up)": "XLabs' names, of processors: ComfyUI and diffusers know them",
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


def _variant(key: str) -> str | None:
    """What a key belongs to that is no product of two matrices, where it is known."""
    name = key.removesuffix(".weight")
    return next((what for end, what in _VARIANTS.items() if re.search(rf"(^|\.)({end})$", name)), None)


def parts_by_module(keys: Collection[str]) -> dict[str, dict[str, str]]:
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
            problems.append(f"{key}: {_variant(key) or 'no part of a LoRA that jlora knows'}")
        elif part in parts:
            problems.append(f"{key} and {parts[part]}: both the {part} of {name}")
        parts[part] = key
    problems += [
        f"{name}: {listed(parts.values())} without {'an up' if 'down' in parts else 'a down'}"
        for name, parts in found.items()
        if not {"down", "up"} <= set(parts)
    ]
    if problems and not any(found) and not any(map(_variant, keys)):
        raise DataError("no LoRA: its tensors are those of a model, such as " + listed(map(shortened, keys), 2))
    raise_all(problems, DataError, "tensors that are no LoRA that jlora reads")
    if not found:
        raise DataError("holds no tensors")
    return found
