"""PEFT's files made by hand, and what they mean, in plain NumPy and without the code under test."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from jlora.disk import write_tensors

Rng = np.random.Generator
PREFIX = "base_model.model."


def write_folder(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    """A folder as PEFT writes one; `tensors` without PEFT's prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"peft_type": "LORA", "r": 2, "lora_alpha": 5}
    data |= {"use_dora": True} if any("magnitude" in name for name in tensors) else {}
    data |= {"lora_bias": True} if any("lora_B.bias" in name for name in tensors) else {}
    data |= {"peft_version": "0.21.2"} if config.get("target_parameters") else {}
    data |= config
    (folder / "adapter_config.json").write_text(json.dumps(data, indent=2, sort_keys=True))
    with (folder / "adapter_model.safetensors").open("wb") as file:
        write_tensors(file, {PREFIX + key: value for key, value in tensors.items()}, {"format": "pt"})
    return folder


def pair(
    rng: Rng, module: str, out: int, ins: int | tuple[int, ...], rank: int = 2, dtype: Any = "float32"
) -> dict[str, Any]:
    """A and B of a module, a convolution where `ins` has several axes."""
    sizes = ins if isinstance(ins, tuple) else (ins,)
    b = (out, rank, *(1 for _ in sizes[1:]))
    return {
        f"{module}.lora_A.weight": rng.standard_normal((rank, *sizes)).astype(dtype),
        f"{module}.lora_B.weight": rng.standard_normal(b).astype(dtype),
    }


def embedding_pair(rng: Rng, module: str, vocabulary: int, dim: int, rank: int = 2) -> dict[str, Any]:
    """A and B of an embedding."""
    return {
        f"{module}.lora_embedding_A": rng.standard_normal((rank, vocabulary)).astype("float32"),
        f"{module}.lora_embedding_B": rng.standard_normal((dim, rank)).astype("float32"),
    }


def experts_pair(rng: Rng, module: str, count: int, out: int, ins: int, rank: int = 2) -> dict[str, Any]:
    """A and B of one parameter that holds experts."""
    return {
        f"{module}.lora_A.weight": rng.standard_normal((count * rank, ins)).astype("float32"),
        f"{module}.lora_B.weight": rng.standard_normal((out, count * rank)).astype("float32"),
    }


def delta(tensors: dict[str, Any], module: str, kind: str, *, rank: int = 2, alpha: float = 5, rs: bool = False) -> Any:
    """The update of one module in the axes of the Hugging Face model, in float64."""
    found = {
        key.removeprefix(f"{module}."): value.astype(np.float64)
        for key, value in tensors.items()
        if key.startswith(f"{module}.")
    }
    scale = alpha / (math.sqrt(rank) if rs else rank)
    if kind == "embedding":
        return scale * (found["lora_embedding_B"] @ found["lora_embedding_A"]).T
    a, b = found["lora_A.weight"], found["lora_B.weight"]
    if kind == "linear":
        return scale * b @ a
    if kind == "conv1d":
        return scale * (b @ a).T
    if kind == "conv":
        return scale * np.einsum("or,ri...->oi...", b.reshape(b.shape[:2]), a)
    count = a.shape[0] // rank
    a, b = a.reshape(count, rank, -1), b.reshape(b.shape[0], rank, count)
    return scale * np.einsum("ore,eri->eoi" if kind == "experts" else "ore,eri->eio", b, a)
