"""Checkpoints and adapters on the disk for the tests, and what merging has to make of them, in float64."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jlora import LoraConfig
from jlora.contraction import Factorization
from jlora.disk import Checkpoint, write_tensors
from jlora.storage import save_adapters

DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "fp32": np.float32,
    "fp64": np.float64,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
SIDE_FILES = {"tokenizer.json": b'{"a": 1}', "generation_config.json": b"{ }", "README.md": b"# base\n"}
Tensors = dict[str, np.ndarray[Any, Any]]


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32, std: float = 0.02) -> Any:
    return (std * rng.standard_normal(shape)).astype(dtype)


def llama(rng: np.random.Generator, dtype: Any = ml_dtypes.bfloat16, layers: int = 2, width: int = 31) -> Tensors:
    """Random weights under the names of a Llama; sizes that are prime."""
    shapes = {"self_attn.q_proj": (29, width), "self_attn.o_proj": (width, 29), "mlp.up_proj": (43, width)}
    tensors = {"model.embed_tokens.weight": random(rng, (53, width), dtype), "lm_head.weight": random(rng, (53, width))}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors |= {f"{at}.{name}.weight": random(rng, shape, dtype) for name, shape in shapes.items()}
        tensors[f"{at}.input_layernorm.weight"] = random(rng, (width,), dtype)
    return tensors


def write_file(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    with path.open("wb") as file:
        write_tensors(file, tensors, metadata or {"format": "pt"})


def write_checkpoint(folder: Path, tensors: Mapping[str, Any], shards: int = 2, **config: Any) -> Path:
    """A folder in the layout of Hugging Face, the tensors dealt out to the shards in turn."""
    folder.mkdir(parents=True)
    names = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    )
    for i, name in enumerate(names):
        write_file(folder / name, dict(list(tensors.items())[i::shards]), {"format": "pt", "made by": "a test"})
    if shards > 1:
        weight_map = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
        index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))
    for name, contents in SIDE_FILES.items():
        (folder / name).write_bytes(contents)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def factors(rng: np.random.Generator, shape: tuple[int, ...], roles: str, rank: int, std: float = 0.1) -> Tensors:
    """Random A and B for a weight."""
    a_shape, b_shape = Factorization(roles).adapter_shapes(shape, rank)
    return {"A": random(rng, a_shape, std=std), "B": random(rng, b_shape, std=std)}


def write_own(folder: Path, entries: Mapping[str, Any], config: LoraConfig) -> Path:
    """Entries by path, in jlora's own format."""
    tree: dict[str, Any] = {}
    for path, entry in entries.items():
        *modules, last = path.split("/")
        node = tree
        for name in modules:
            node = node.setdefault(name, {})
        node[last] = dict(entry)
    save_adapters(folder, tree, config)
    return folder


def write_peft(folder: Path, parts: Mapping[str, Any], **config: Any) -> Path:
    """Tensors by PEFT's names without their `base_model.model.`, as PEFT writes them."""
    folder.mkdir(parents=True)
    write_file(folder / "adapter_model.safetensors", {f"base_model.model.{name}": part for name, part in parts.items()})
    modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in parts if ".lora_" in name})
    data = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": modules, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(data))
    return folder


def peft_parts(
    rng: np.random.Generator, tensors: Mapping[str, Any], *ends: str, rank: int = 3, std: float = 0.1
) -> Tensors:
    """PEFT's A and B of the Linear weights whose modules end in one of `ends`."""
    parts: Tensors = {}
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if module.endswith(ends):
            parts[f"{module}.lora_A.weight"] = random(rng, (rank, weight.shape[1]), std=std)
            parts[f"{module}.lora_B.weight"] = random(rng, (weight.shape[0], rank), std=std)
    return parts


def write_llama(
    folder: Path, rng: np.random.Generator, dtype: Any = ml_dtypes.bfloat16, **sizes: int
) -> tuple[Tensors, Path, Path]:
    """The weights of a Llama, its checkpoint of three shards, and PEFT's adapter of its projections."""
    tensors = llama(rng, dtype, **sizes)
    base = write_checkpoint(folder / "base", tensors, 3)
    return tensors, base, write_peft(folder / "adapter", peft_parts(rng, tensors, "_proj"))


def bits(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but what jlora says of its merge."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("jlora_"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def read(folder: Path) -> Tensors:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def product(parts: Mapping[str, Any], roles: str, scaling: float) -> Any:
    """scaling * A@B in float64, by an einsum over letters that follow from the roles."""
    letters = "abcdefgh"[: len(roles)]
    batch, ins, outs = (
        "".join(c for c, role in zip(letters, roles, strict=True) if role == wanted) for wanted in "bio"
    )
    a, b = (np.asarray(parts[name], np.float64) for name in "AB")
    return scaling * np.einsum(f"{batch}{ins}z,{batch}z{outs}->{letters}", a, b)


def rounded(exact: Any, dtype: Any) -> Any:
    """float64 to the nearest number of a dtype, ties to even, in one step; NumPy's way to bfloat16 takes two."""
    near = exact.astype(dtype)
    low, high = (np.nextafter(near, np.asarray(end, dtype)) for end in (-_largest(dtype), _largest(dtype)))
    options = np.stack([near, low, high])
    off = np.abs(options.astype(np.float64) - exact)
    odd = options.view(f"u{options.itemsize}") & 1
    best = np.lexsort((odd, off), axis=0)[:1]
    return np.take_along_axis(options, best, 0)[0]


def _largest(dtype: Any) -> float:
    return float(ml_dtypes.finfo(dtype).max)


def assert_rounds_to(found: Any, exact: Any, reach: Any) -> None:
    """`found` is `exact` rounded once, but where a sum in float32 came out on the other side of a tie.

    float32's own rounding is 2^-24 of `reach`, the largest number in the sum, a few times over; a spacing of bfloat16
    is 2^-8 of the number. So that few numbers in ten thousand can differ, by one spacing: for float32 itself many can.
    """
    wanted = rounded(exact, found.dtype)
    off = np.abs(found.astype(np.float64) - wanted.astype(np.float64))
    eps = 2.0**-53 if found.dtype == np.float64 else 2.0**-24
    spacing = np.spacing(np.abs(wanted)).astype(np.float64)
    assert np.all(off <= np.maximum(spacing, 16 * eps * reach) * (off > 0))
    ratio = 16 * eps * reach / spacing
    assert np.mean(off > 0) <= min(0.7, 2 * float(np.mean(np.minimum(ratio, 1))) + 2 / off.size)
