"""`python -m benchmarks.merge`: a LoRA merged into a checkpoint on the disk by jlora and by PEFT, and a plain copy.

The checkpoint is random, in the shape of a Llama in bfloat16: hidden 2048, 14 layers, 1.9 GB in 4 files; the adapter
has rank 16 on all linear layers. Each run is a process of its own; runs take turns; before each, what was written is
flushed to the disk.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

from jlora.disk import file_written_whole, write_tensors
from jlora.tables import text_table

HIDDEN, INTERMEDIATE, VOCABULARY, RANK = 2048, 6912, 32000, 16
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def make_checkpoint(folder: Path, layers: int, shards: int) -> int:
    """Writes the checkpoint and returns its size in bytes."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEAR.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    files: list[list[str]] = [[] for _ in range(shards)]
    begin = 0
    for name, shape in shapes.items():
        files[begin * shards // total].append(name)
        begin += 2 * int(np.prod(shape))
    pool = (0.02 * np.random.default_rng(0).standard_normal(1 << 22, np.float32)).astype(ml_dtypes.bfloat16)
    folder.mkdir(parents=True)
    weight_map = {}
    for number, names in enumerate(files, 1):
        file_name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        with file_written_whole(folder / file_name) as file:
            write_tensors(file, {name: np.resize(pool, shapes[name]) for name in names}, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return total


def make_adapter(folder: Path, layers: int) -> None:
    """Writes an adapter of all linear layers in PEFT's format."""
    random = np.random.default_rng(1)
    tensors = {}
    for layer in range(layers):
        for name, (out, ins) in LINEAR.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = 0.02 * random.standard_normal((RANK, ins), np.float32)
            tensors[f"{module}.lora_B.weight"] = 0.02 * random.standard_normal((out, RANK), np.float32)
    folder.mkdir(parents=True)
    with file_written_whole(folder / "adapter_model.safetensors") as file:
        write_tensors(file, tensors, {"format": "pt"})
    targets = [name.rpartition(".")[2] for name in LINEAR]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def forget(file: Path) -> None:
    """Takes a file out of the page cache."""
    handle = os.open(file, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def measured(command: list[str], out: Path, cold: list[Path]) -> tuple[float, float, float]:
    """Of a process that writes `out`: seconds, seconds until all is on the disk, peak memory in MB.

    The files `cold` are out of the page cache when it begins.
    """
    if out.exists():
        shutil.rmtree(out)
    os.sync()
    for file in cold:
        forget(file)
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    os.sync()
    return seconds, time.perf_counter() - begin, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def commands(folder: Path, names: list[str]) -> dict[str, Callable[[Path], list[str]]]:
    """The command of each form, given where it writes to."""
    source, adapter = str(folder / "checkpoint"), str(folder / "adapter")
    jlora = [str(Path(sys.executable).with_name("jlora")), "merge", source, adapter, "--out"]
    peft = [sys.executable, str(Path(__file__).with_name("peft_merge.py")), source, adapter]
    known: dict[str, Callable[[Path], list[str]]] = {
        "cp -r": lambda out: ["cp", "-r", source, str(out)],
        "jlora merge": lambda out: [*jlora, str(out)],
        "jlora merge --keep-residual": lambda out: [*jlora, str(out), "--keep-residual"],
        "PEFT": lambda out: [*peft, str(out)],
    }
    return {name: known[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=__doc__)
    parser.add_argument("--layers", type=int, default=14, help="of the model (14, 1.9 GB; 160 is 19 GB)")
    parser.add_argument("--shards", type=int, default=4, help="files of the checkpoint (4)")
    parser.add_argument("--cold", action="store_true", help="the checkpoint is out of the page cache before each run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (5)")
    parser.add_argument("--folder", type=Path, help="where to work (a temporary folder)")
    parser.add_argument("--forms", default="cp -r,jlora merge,jlora merge --keep-residual,PEFT", help="what to run")
    arguments = parser.parse_args()
    names = arguments.forms.split(",")
    if "PEFT" in names and any(importlib.util.find_spec(name) is None for name in ("torch", "peft", "transformers")):
        names.remove("PEFT")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        # In a process of its own: a child's peak memory counts what its parent had when it was started.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            size = pool.submit(make_checkpoint, folder / "checkpoint", arguments.layers, arguments.shards).result()
            pool.submit(make_adapter, folder / "adapter", arguments.layers).result()
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
        forms = commands(folder, names)
        for _ in range(arguments.repeats):
            for name, command in forms.items():
                cold = list((folder / "checkpoint").iterdir()) if arguments.cold else []
                runs[name].append(measured(command(folder / "out"), folder / "out", cold))
    rows = []
    for name, found in runs.items():
        seconds, synced, peak = (statistics.median(values) for values in zip(*found, strict=True))
        cells = (f"{seconds:.1f}", f"{size / 1e9 / seconds:.2f}", f"{synced:.1f}", f"{peak:,.0f}")
        rows.append((name, *cells) if name != "cp -r" else (name, *cells[:-1], "-"))
    print(text_table((f"{size / 1e9:.1f} GB in bfloat16", "seconds", "GB/s", "until on disk", "peak MB"), rows))


if __name__ == "__main__":
    main()
