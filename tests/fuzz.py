"""Damaged folders: each is loaded as it was before, or refused with a JloraError, soon and in little memory.

    python -m tests.fuzz --cases 100000 --seed 3 --format own

A format is a `make_folder(folder, number)`, which writes a valid folder, another for every number, a `load(folder)`,
whose results compare with `==`, and perhaps a `seal(folder)`, which makes the checksums of a damaged folder right, so
that what lies behind them is reached. What a sealed folder holds may load as something else.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora import JloraError, LoraConfig, variants
from jlora.checkpoints import merge, unmerge
from jlora.checkpoints._params import read_params
from jlora.config import write_mapping
from jlora.disk import RECORD, Checkpoint, dump_json, file_written_whole, write_tensors
from jlora.interop.diffusion import read_lora_file
from jlora.interop.mlx import read_mlx
from jlora.interop.peft import read_peft, read_rows, read_vera, write_peft
from jlora.recipes import JobConfig
from jlora.storage import load_adapters, save_adapters
from jlora.text import pack, read_examples, read_tokenizer
from jlora.train import MetricsLog
from tests.text.make import CHAT, MARKED, turns, write_folder, write_lines

Rng = np.random.Generator
Files = dict[str, bytes]

MOST_SECONDS = 10.0
MOST_BYTES = 64 << 20
ODD = [None, True, -1, 0, 3, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, "", "a", "x" * 5000, "\0", "é", "../up", [], {}]
ODD_NUMBERS = [b"0", b"-1", b"1e999", b"NaN", b"9" * 5000, b"4294967296", b"18446744073709551615", b"0.5", b"007"]


def fuzz(
    make_folder: Callable[[Path, int], None],
    load: Callable[[Path], Any],
    cases: int,
    seed: int,
    *,
    seal: Callable[[Path], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> Counter[str]:
    """How many damaged folders were loaded and how many refused; an AssertionError that names the first bad case."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, mock.patch("os.fsync", return_value=None):
        root = Path(name)
        originals = [root / "0", root / "1"]
        for number, folder in enumerate(originals):
            make_folder(folder, number)
        wanted = [_loaded(load, folder, root / "case") for folder in originals]
        start = time.perf_counter()
        for case in range(cases):
            counts[_case(originals, wanted, root / "case", load, seal, (seed, case))] += 1
            if report is not None and (case + 1) % max(1, cases // 20) == 0:
                report(f"{case + 1:,} of {cases:,} in {time.perf_counter() - start:.0f} s: {dict(counts)}")
    return counts


def _loaded(load: Callable[[Path], Any], original: Path, folder: Path) -> Any:
    shutil.copytree(original, folder)
    try:
        return load(folder)
    finally:
        shutil.rmtree(folder)


def _case(
    originals: list[Path],
    wanted: list[Any],
    folder: Path,
    load: Callable[[Path], Any],
    seal: Callable[[Path], None] | None,
    seed: tuple[int, int],
) -> str:
    rng = np.random.default_rng(seed)
    shutil.copytree(originals[0], folder)
    try:
        done = [mutate(folder, originals[1], rng) for _ in range(rng.integers(1, 4))]
        sealed = seal is not None and rng.random() < 0.5
        if seal is not None and sealed:
            seal(folder)
        try:
            with _bounded():
                found = load(folder)
        except JloraError:
            return "refused"
        except BaseException as error:
            raise AssertionError(f"seed {seed[0]} case {seed[1]}, {done}: {type(error).__name__}: {error}") from error
        assert sealed or found in wanted, f"seed {seed[0]} case {seed[1]}, {done}: loaded something else"
        return "loaded, sealed" if sealed else "loaded"
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Interrupts what takes too long, and fails for what takes too much memory."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    tracemalloc.start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_BYTES, f"{peak:,} bytes"


def mutate(folder: Path, other: Path, rng: Rng) -> str:
    """Damages one file of a folder, and says how."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    if not names:
        return "nothing left"
    path = folder / str(rng.choice(names))
    if rng.random() < 0.12:
        change = _pick(rng, [_replace_by_other, _replace_by_special, _remove, _rename])
        change(path, other, rng)
    else:
        change = _pick(rng, [*BYTES, *BYTES, change_json, change_json, change_json])
        data = change(path.read_bytes(), rng)
        path.write_bytes(data)
    return f"{change.__name__} {path.name}"


def _pick(rng: Rng, options: list[Any]) -> Any:
    return options[rng.integers(len(options))]


def _replace_by_other(path: Path, other: Path, rng: Rng) -> None:
    sources = sorted(source for source in other.iterdir() if source.is_file())
    same = [source for source in sources if source.name == path.name]
    shutil.copyfile(_pick(rng, same or sources), path)


def _replace_by_special(path: Path, other: Path, rng: Rng) -> None:
    path.unlink()
    kind = rng.integers(7)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.write_bytes(b"")
    else:
        path.symlink_to([other / path.name, "/dev/zero", path.name, "/no/such/file"][kind - 3])


def _remove(path: Path, other: Path, rng: Rng) -> None:
    path.unlink()


def _rename(path: Path, other: Path, rng: Rng) -> None:
    path.rename(path.with_name(_pick(rng, [f".{path.name}.new", f"{path.name}.bak", "model.safetensors"])))


def _span(data: bytes, rng: Rng) -> tuple[int, int]:
    """A range of the bytes, often at their beginning, mostly a short one."""
    most = len(data) if rng.random() < 0.5 else min(len(data), 600)
    start = int(rng.integers(most + 1))
    return start, min(len(data), start + int(2 ** rng.uniform(0, 9)))


def flip_bits(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4) if data else 0):
        changed[min(_span(data, rng)[0], len(data) - 1)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def cut(data: bytes, rng: Rng) -> bytes:
    return data[: _span(data, rng)[0]]


def drop(data: bytes, rng: Rng) -> bytes:
    start, stop = _span(data, rng)
    return data[:start] + data[stop:]


def duplicate(data: bytes, rng: Rng) -> bytes:
    start, stop = _span(data, rng)
    return data[:stop] + data[start:stop] * int(rng.integers(1, 4)) + data[stop:]


def swap(data: bytes, rng: Rng) -> bytes:
    (a, b), (c, d) = sorted([_span(data, rng), _span(data, rng)])
    c = max(b, c)
    return data[:a] + data[c : max(c, d)] + data[b:c] + data[a:b] + data[max(c, d) :]


def insert(data: bytes, rng: Rng) -> bytes:
    start, stop = _span(data, rng)
    return data[:start] + rng.bytes(stop - start) + data[start:]


def overwrite(data: bytes, rng: Rng) -> bytes:
    start, stop = _span(data, rng)
    fill = _pick(rng, [b"\0", b"\xff", b"[", b"{", b" "]) * (stop - start)
    return data[:start] + fill + data[stop:]


def change_length(data: bytes, rng: Rng) -> bytes:
    return int(2 ** rng.uniform(0, 64) - 1).to_bytes(8, "little") + data[8:]


def change_number(data: bytes, rng: Rng) -> bytes:
    numbers = list(re.finditer(rb"(?<![0-9a-f])[0-9]+", data))
    if not numbers:
        return data
    number = _pick(rng, numbers)
    return data[: number.start()] + _pick(rng, ODD_NUMBERS) + data[number.end() :]


def nest(data: bytes, rng: Rng) -> bytes:
    start, _ = _span(data, rng)
    depth = int(10 ** rng.uniform(1, 5))
    return data[:start] + _pick(rng, [b"[", b'{"a":']) * depth + data[start:]


BYTES = [flip_bits, cut, drop, duplicate, swap, insert, overwrite, change_length, change_number, nest]


def change_json(data: bytes, rng: Rng) -> bytes:
    """Puts an odd value, or one from elsewhere, into the JSON of a file or of a safetensors header."""
    try:
        length = int.from_bytes(data[:8], "little")
        if 8 + length <= len(data):
            text = json.dumps(_changed(json.loads(data[8 : 8 + length]), rng)).encode()
            return len(text).to_bytes(8, "little") + text + data[8 + length :]
        return json.dumps(_changed(json.loads(data), rng)).encode()
    except (ValueError, RecursionError):
        return flip_bits(data, rng)


def _changed(data: Any, rng: Rng) -> Any:
    places = list(_places(data))
    if not places:
        return _pick(rng, ODD)
    parent, key = _pick(rng, places)
    kind = rng.integers(4)
    if isinstance(parent[key], str) and parent[key][:1] in ("{", "[") and kind:
        parent[key] = json.dumps(_changed(json.loads(parent[key]), rng))
    elif kind == 0:
        parent[key] = _pick(rng, ODD)
    elif kind == 1:
        other, name = _pick(rng, places)
        parent[key], other[name] = other[name], parent[key]
    elif kind == 2:
        del parent[key]
    elif isinstance(parent, dict):
        parent[str(_pick(rng, ["", "x", "__metadata__", key + "~2", "A"]))] = parent.pop(key)
    else:
        parent.append(parent[key])
    return data


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield data, key
        yield from _places(data[key])


def make_own(folder: Path, number: int) -> None:
    """A folder of adapters of several dtypes."""
    rng = np.random.default_rng(number)

    def entry(a: tuple[int, ...], b: tuple[int, ...], dtype: str) -> dict[str, Any]:
        return {
            name: rng.standard_normal(shape).astype(jax.numpy.dtype(dtype))
            for name, shape in zip("AB", (a, b), strict=True)
        }

    adapters = {
        "embed": {"embedding": entry((7, 2), (2, 5), "float32")},
        "layers": [
            {"kernel": entry((5, 2), (2, 3, 4), "bfloat16"), "bias": None},
            ({"a/b": entry((5, 2), (2, 3), "float8_e5m2")},),
        ],
        "norm": {"scale": {"value": rng.standard_normal(5).astype(np.float32)}, "steps": {}},
    }
    config = LoraConfig(rank=2, alpha=3 + number, alpha_pattern={"layers/*/kernel": 5.0, "embed": 7.5})
    save_adapters(folder, adapters, config, metadata={"number": number, "notes": ["a", {"b": None}]})


def load_own(folder: Path) -> Any:
    """The adapters as nested bytes, and the configuration."""
    adapters, config = load_adapters(folder)
    leaves, structure = jax.tree.flatten(adapters)
    return [(leaf.dtype.name, leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves], str(structure), config


def seal_own(folder: Path) -> None:
    """Makes both checksums right again, where the files still have a place for them."""
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if any(path.is_symlink() or not path.is_file() for path in (config, tensors)):
        return
    data = tensors.read_bytes()
    digest = hashlib.sha256(config.read_bytes()).hexdigest().encode()
    data = re.sub(rb'"config_sha256": ?"[0-9a-f]{64}"', lambda _: b'"config_sha256":"' + digest + b'"', data)
    data = re.sub(rb'"sha256": ?"[0-9a-f]{64}"', lambda _: b'"sha256":"' + b"0" * 64 + b'"', data)
    with contextlib.suppress(ValueError, RecursionError):  # the two substitutions may have taken out spaces
        _, length = json.JSONDecoder().raw_decode(data[8:].decode("latin-1"))
        stop = 8 + length
        while data[stop : stop + 1] == b" ":
            stop += 1
        data = (stop - 8).to_bytes(8, "little") + data[8:]
    whole = hashlib.sha256(data).hexdigest().encode()
    tensors.write_bytes(data.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + whole, 1))


def make_peft(folder: Path, number: int) -> None:
    """A folder in PEFT's format: linear layers, experts, an embedding, a whole tensor, DoRA, the bias of a B."""
    rng = np.random.default_rng(number)
    shapes = {
        "up.lora_A.weight": (2, 7),
        "up.lora_B.weight": (5, 2),
        "wide.down.lora_A.weight": (3, 5),
        "wide.down.lora_B.weight": (7, 3),
        "experts.lora_A.weight": (6, 5),
        "experts.lora_B.weight": (7, 6),
        "head.weight": (3, 5),
    }
    shapes |= {"up.lora_magnitude_vector": (5,), "wide.down.lora_magnitude_vector": (7,)} if number == 0 else {}
    embed = {"lora_embedding_A": (2, 11), "lora_embedding_B": (5, 2), "lora_magnitude_vector": (5,)}
    shapes |= {f"embed.{name}": shape for name, shape in embed.items()} if number == 0 else {"up.lora_B.bias": (5,)}
    tensors = {f"base_model.model.{name}": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3 + number, "rank_pattern": {"down": 3}, "use_rslora": True}
    config |= {"target_parameters": ["experts.gate_up_proj"], "target_modules": ["up", "down", "embed"]}
    config |= {"use_dora": number == 0, "lora_bias": number != 0}
    folder.mkdir(exist_ok=True)
    with file_written_whole(folder / "adapter_model.safetensors") as file:
        write_tensors(file, tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_bytes(dump_json(config))


def load_peft(folder: Path) -> str:
    """That the folder could be read; the format has no checksum that would tell a changed number."""
    read_peft(folder)
    return "read"


VERA = {"up.weight": np.zeros((5, 7), np.float32), "wide.down.weight": np.zeros((3, 5), np.float32)}


def make_vera(folder: Path, number: int) -> None:
    """A VeRA in PEFT's format."""
    rng = np.random.default_rng(number)
    shapes = {"base_model.vera_A": (2, 7), "base_model.vera_B": (5, 2)}
    for name, weight in VERA.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        shapes |= {f"{module}.vera_lambda_b": weight.shape[:1], f"{module}.vera_lambda_d": (2,)}
    config = {"peft_type": "VERA", "r": 2, "vera_dropout": 0.1, "target_modules": ["up", "down"]}
    folder.mkdir(exist_ok=True)
    with file_written_whole(folder / "adapter_model.safetensors") as file:
        write_tensors(file, {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()})
    (folder / "adapter_config.json").write_bytes(
        dump_json(config | {"save_projection": True, "d_initial": 0.1 * number})
    )


def load_vera(folder: Path) -> str:
    """That the folder could be read."""
    read_vera(folder, VERA)
    return "read"


def make_variant(folder: Path, number: int) -> None:
    """What VeRA or LoRA-XS trains, in jlora's format."""
    config = LoraConfig(rank=2, kind=variants.KINDS[number % 2], seed=number, factorizations={"**": "oi"})
    variants.save(folder, *variants.init(None, VARIED, config), VARIED, config)


VARIED = {name: np.random.default_rng(0).standard_normal(weight.shape, np.float32) for name, weight in VERA.items()}


def load_variant(folder: Path) -> str:
    """That the folder could be read, and its adapters made."""
    variants.load(folder)
    variants.load_expanded(folder)
    return "read"


def make_mlx(folder: Path, number: int) -> None:
    """A folder of mlx-lm: a linear layer, experts and an embedding, or DoRA."""
    rng = np.random.default_rng(number)
    shapes = {"m.up.lora_a": (7, 2), "m.up.lora_b": (2, 5)}
    if number:
        shapes["m.up.m"] = (5,)
    else:
        shapes |= {"m.switch.lora_a": (3, 2, 7), "m.switch.lora_b": (3, 5, 2)}
        shapes |= {"embed.lora_a": (11, 2), "embed.lora_b": (2, 7)}
    parameters = {"rank": 2, "scale": 3.5 + number, "dropout": 0.1, "keys": ["m.up"]}
    config = {"fine_tune_type": "dora" if number else "lora", "num_layers": 4, "model": "some/model"}
    folder.mkdir(exist_ok=True)
    with file_written_whole(folder / "adapters.safetensors") as file:
        write_tensors(file, {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()})
    (folder / "adapter_config.json").write_bytes(dump_json(config | {"lora_parameters": parameters}))


def load_mlx(folder: Path) -> str:
    """That the folder could be read."""
    read_mlx(folder)
    return "read"


def make_diffusion(folder: Path, number: int) -> None:
    """A LoRA file of a diffusion model: with alphas and a middle, or with PEFT's configuration in its metadata."""
    rng = np.random.default_rng(number)
    down, up = ("lora_A", "lora_B") if number else ("lora_down", "lora_up")
    shapes: dict[str, tuple[int, ...]] = {"unet.m.q": (5, 7), "unet.conv": (3, 2, 2, 3)}
    tensors = {}
    for name, (out, *ins) in shapes.items():
        tensors[f"{name}.{down}.weight"] = rng.standard_normal((2, *ins), np.float32)
        tensors[f"{name}.{up}.weight"] = rng.standard_normal((out, 2, *(1 for _ in ins[1:])), np.float32)
    metadata = {"unet.r": 2, "unet.lora_alpha": 5, "unet.alpha_pattern": {"q": 3}, "unet.use_rslora": True}
    if not number:
        tensors |= {f"{name}.alpha": np.float32(1.5).reshape(()) for name in shapes}
        tensors["unet.conv.lora_down.weight"] = rng.standard_normal((2, 2, 1, 1), np.float32)
        tensors["unet.conv.lora_mid.weight"] = rng.standard_normal((2, 2, 2, 3), np.float32)
    folder.mkdir(exist_ok=True)
    with file_written_whole(folder / "x.safetensors") as file:
        write_tensors(file, tensors, {"lora_adapter_metadata": json.dumps(metadata)} if number else {})


def load_diffusion(folder: Path) -> str:
    """That the file could be read."""
    read_lora_file(folder / "x.safetensors")
    return "read"


def make_maxtext(folder: Path, number: int) -> None:
    """What lies beside the LoRA of MaxText. The tree is not damaged: tensorstore may end the process for it."""
    rng = np.random.default_rng(number)
    shapes = {"lora_a.kernel": (7, 3, 2), "lora_b.kernel": (2, 3, 4, 5)}
    query = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "0" / "items", {"params": {"decoder": {"query": query}}})
    (folder / "adapter_config.json").write_bytes(dump_json({"r": 2, "lora_alpha": 3 + number, "target_modules": ["q"]}))
    said = {"scan_layers": True, "lora": {"lora_rank": 2, "lora_alpha": 3.0 + number}}
    (folder / "_CHECKPOINT_METADATA").write_bytes(dump_json({"item_handlers": {}, "custom_metadata": said}))


def load_maxtext(folder: Path) -> str:
    """That the params could be read, with either of the files beside them."""
    read_params(folder / "0" / "items", "maxtext")
    with contextlib.suppress(OSError):
        (folder / "adapter_config.json").unlink()
    read_params(folder / "0" / "items", "maxtext")
    return "read"


def make_checkpoint(folder: Path, number: int) -> None:
    """A checkpoint of two files with an index."""
    rng = np.random.default_rng(number)
    weight_map = {}
    folder.mkdir(exist_ok=True)
    for shard in ("model-1.safetensors", "model-2.safetensors"):
        names = [f"{shard[6]}.{name}" for name in ("a.weight", "b.weight", "c")]
        with file_written_whole(folder / shard) as file:
            write_tensors(file, {name: rng.standard_normal((3, 5), np.float32) for name in names}, {"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_bytes(dump_json({"weight_map": weight_map}))


def load_checkpoint(folder: Path) -> str:
    """That every tensor could be read."""
    checkpoint = Checkpoint(folder)
    for name in checkpoint.entries:
        if checkpoint.entries[name].code not in ("F4", "F6_E2M3", "F6_E3M2"):
            checkpoint.read(name)
    return "read"


def make_mapping(folder: Path, number: int) -> None:
    """A mapping as TOML and as JSON, and an adapter of PEFT's for it."""
    rng = np.random.default_rng(number)
    rows = [
        {"name": "layers.{i}.up.weight", "path": "layers/{i}/up/kernel", "transpose": [1, 0]},
        {"name": "layers.{i}.q.weight", "path": "layers/{i}/q", "reshape": [2, 2 + number, -1], "transpose": [2, 0, 1]},
        {"name": "experts.{e}.down.weight", "path": "down", "stack": [["{e}", 3]]},
        {"name": "others.{rest*}", "path": "others/{rest/}"},
    ]
    folder.mkdir(exist_ok=True)
    write_mapping(folder / "rows.toml", {"row": rows})
    write_mapping(folder / "rows.json", {"row": rows})
    sides = {"layers.0.up": (5, 7), "layers.1.q": (4 + 2 * number, 7), "experts.1.down": (5, 3), "others.a.b": (5, 3)}
    tensors = {}
    for name, (out, ins) in sides.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((2, ins), np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((out, 2), np.float32)
    (folder / "adapter").mkdir(exist_ok=True)
    with file_written_whole(folder / "adapter" / "adapter_model.safetensors") as file:
        write_tensors(file, tensors, {"format": "pt"})
    (folder / "adapter" / "adapter_config.json").write_bytes(dump_json({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))


def load_mapping(folder: Path) -> str:
    """That what the rows make of the adapter can be written back through them."""
    for name in ("rows.toml", "rows.json"):
        rows = read_rows(folder / name)
        adapters, config = read_peft(folder / "adapter", rows)
        write_peft(folder / "written", adapters, config, rows)
        shutil.rmtree(folder / "written")
    return "read"


def make_config(folder: Path, number: int) -> None:
    """Configurations of an adaptation and of a job, as TOML and as JSON."""
    config = LoraConfig(
        rank=2 + number,
        target_modules=("**/query", "head/kernel"),
        rank_pattern={"head": 3},
        alpha_pattern={"**/query": 0.5},
        factorizations={"head": "io"},
        extras={"peft": "{}"},
        dtype="bfloat16",
    )
    functions = {"model": {"function": "a:b", "width": 3}, "data": {"function": "c:d", "note": "e"}}
    job = functions | {"lora": config.to_dict(), "train": {"steps": 3}, "optimizer": {"name": "adamw"}}
    folder.mkdir(exist_ok=True)
    for ending in ("toml", "json"):
        config.write(folder / f"lora.{ending}")
        write_mapping(folder / f"job.{ending}", job)


def load_config(folder: Path) -> str:
    """That the configurations could be read, and come back as they are when they are written."""
    for ending in ("toml", "json"):
        for name, kind in (("lora", LoraConfig), ("job", JobConfig)):
            found = kind.read(folder / f"{name}.{ending}")
            for again in ("toml", "json"):
                if again == ending:  # TOML has dates, JSON null
                    found.write(folder / f"again.{again}")
                    assert kind.read(folder / f"again.{again}") == found
                    (folder / f"again.{again}").unlink()
    return "read"


def make_metrics(folder: Path, number: int) -> None:
    """The metrics of a run."""
    folder.mkdir(exist_ok=True)
    rows = [{"step": step, "loss": number + 1 / step, "test_accuracy": 0.5} for step in range(1, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def load_metrics(folder: Path) -> str:
    """That a run could go on from there."""
    log = MetricsLog(folder / "metrics.jsonl", 10)
    log.write({"step": 11, "loss": 0.5})
    assert all(math.isfinite(row["step"]) for row in MetricsLog.read_file(log.path))
    return "read"


def make_record(folder: Path, number: int) -> None:
    """What a merge and an unmerge that were stopped have left, beside what they work on."""
    rng = np.random.default_rng(number)
    (folder / "base").mkdir(parents=True, exist_ok=True)
    shards = ("model-1.safetensors", "model-2.safetensors")
    for shard in shards:
        with file_written_whole(folder / "base" / shard) as file:
            write_tensors(file, {f"{shard[6]}.weight": rng.standard_normal((5, 3), np.float32)}, {"format": "pt"})
    index = {"weight_map": {f"{shard[6]}.weight": shard for shard in shards}}
    (folder / "base" / "model.safetensors.index.json").write_bytes(dump_json(index))
    (folder / "base" / "config.json").write_bytes(dump_json({"tie_word_embeddings": True}))
    entry = {"A": rng.standard_normal((3, 2), np.float32), "B": rng.standard_normal((2, 5), np.float32)}
    config = LoraConfig(rank=2, factorizations={"**": "oi"})
    save_adapters(folder / "adapter", {f"{n}/weight": entry for n in "12"}, config)
    merge(folder / "base", folder / "adapter", folder / "merged", force=True)
    for shard in shards:  # a journal that is damaged lies beside shards that are not
        shutil.copyfile(folder / "merged" / shard, folder / shard)
    (folder / "journal.json").write_bytes(dump_json(_journal(folder, shards)))
    os.replace(folder / "merged" / RECORD, folder / RECORD)


def _journal(folder: Path, shards: tuple[str, ...]) -> dict[str, Any]:
    """The journal of an unmerge, all of whose shards are done."""

    def stop(done: int, total: int) -> None:
        if done == total:
            raise InterruptedError

    with contextlib.suppress(JloraError):  # of the interrupt
        unmerge(folder / "merged", folder / "adapter", folder / "out", on_progress=stop)
    (place,) = folder.glob(".out.*.jlora")
    journal = json.loads((place / "journal.json").read_bytes())
    shutil.rmtree(place)
    return journal | {"done": {shard: [{}, 0, 0.0] for shard in shards}}


def load_record(folder: Path) -> str:
    """That an unmerge could go on in a workplace with this journal, from a merge with this record."""
    if os.path.lexists(folder / RECORD):
        os.replace(folder / RECORD, folder / "merged" / RECORD)
    place = folder / ".out.0123456789abcdef.jlora"
    (place / "new").mkdir(parents=True, exist_ok=True)
    (place / "jlora_workplace").write_text("out")
    if os.path.lexists(folder / "journal.json"):
        os.replace(folder / "journal.json", place / "journal.json")
    for shard in folder.glob("*.safetensors"):
        os.replace(shard, place / "new" / shard.name)
    str(unmerge(folder / "merged", folder / "adapter", folder / "out"))
    return "read"


def make_examples(folder: Path, number: int) -> None:
    """A tokenizer, a chat template, and examples of every kind."""
    write_folder(folder, template=(CHAT, MARKED)[number], pad_token="<pad>", chat_template="{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (folder / "special_tokens_map.json").write_text('{"sep_token": {"content": "<sep>", "lstrip": true}}')
    rows: list[Any] = [{"prompt": f"{number} is ", "completion": "a number"}, {"text": "größer"}]
    rows.append({"messages": turns("Hi", "Hello"), "tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}})
    write_lines(folder / "x.jsonl", *rows)


def load_examples(folder: Path) -> str:
    """That the examples could be read and laid into rows."""
    examples, report = read_examples(folder / "x.jsonl", read_tokenizer(folder), length=100)
    rows, packed = pack(examples, 100)
    assert rows["inputs"]["segments"].astype(bool).sum() == report.tokens == packed.tokens
    return "read"


FORMATS: dict[str, Any] = {
    "own": (make_own, load_own, seal_own),
    "peft": (make_peft, load_peft, None),
    "vera": (make_vera, load_vera, None),
    "variant": (make_variant, load_variant, None),
    "mlx": (make_mlx, load_mlx, None),
    "diffusion": (make_diffusion, load_diffusion, None),
    "maxtext": (make_maxtext, load_maxtext, None),
    "checkpoint": (make_checkpoint, load_checkpoint, None),
    "mapping": (make_mapping, load_mapping, None),
    "config": (make_config, load_config, None),
    "metrics": (make_metrics, load_metrics, None),
    "examples": (make_examples, load_examples, None),
    "record": (make_record, load_record, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Damages folders and loads them.")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=sorted(FORMATS), default="own")
    options = parser.parse_args()
    make_folder, load, seal = FORMATS[options.format]
    counts = fuzz(
        make_folder, load, options.cases, options.seed, seal=seal, report=lambda line: print(line, flush=True)
    )
    print(f"{options.cases:,} cases of {options.format}, seed {options.seed}: {dict(counts)}; none wrong")


if __name__ == "__main__":
    sys.exit(main())
