"""Adapters of mlx-lm, read and written: `adapter_config.json` and `adapters.safetensors`.

    lora_a (in, r), lora_b (r, out)                      of a Linear (out, in), and of an embedding (in, out)
    lora_a (experts, r, in), lora_b (experts, out, r)    of a SwitchLinear (experts, out, in)
    m (out)                                              the magnitude of DoRA

The update is scale * lora_a@lora_b, with one scale and one rank for all (mlx-lm 0.32.2, tuner/lora.py, tuner/dora.py).
"""

import json
import re
from collections.abc import Iterator
from collections.abc import Mapping as MappingType
from pathlib import Path
from typing import Any

import numpy as np

from jlora.config import LoraConfig
from jlora.disk import CONFIG, Pair, bytes_of_all, dump_json, parse_json, write_tensors
from jlora.errors import DataError, raise_all, shortened
from jlora.interop._named import Module, alike, entries_of_modules
from jlora.interop._placed import placed
from jlora.interop.peft import FLAT, Mapping, ModelEntry, base_model_of, model_entries, names_embedding
from jlora.paths import nest
from jlora.pytrees import leaves
from jlora.storage import check_folder_to_write, folder_to_write, write_once

__all__ = ["check_base_of_mlx", "is_mlx_folder", "read_mlx", "read_mlx_arrays", "write_mlx"]

TENSORS = "adapters.safetensors"
_EXTRA = "mlx"
_PARTS = {"lora_a": "a", "lora_b": "b", "m": "magnitude"}
_CONV1D = re.compile(r"(^|\.)h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)$")

# What mlx-lm 0.32.2 does in `sanitize` to weights that keep their name and their shape.
_CHANGED = {
    "gpt2": "transposes the weights of GPT-2",
    "falcon_h1": "scales the weights of Falcon-H1",
    "baichuan_m1": "normalizes the head of Baichuan-M1",
    "bailing_moe": "normalizes the head of Bailing-MoE",
    "bailing_moe_linear": "normalizes the head of Bailing-MoE",
}


def is_mlx_folder(path: str | Path) -> bool:
    """Whether a folder holds an adapter of mlx-lm: by its configuration, or by its tensors where there is none.

    >>> is_mlx_folder("no/such/folder")
    False
    """
    folder = Path(path)
    try:
        data = parse_json(Pair(folder, TENSORS).read_config())
    except DataError:  # there is none
        return (folder / TENSORS).is_file()
    except ValueError:
        return False
    return "peft_type" not in data and "format" not in data and bool({"fine_tune_type", "lora_parameters"} & set(data))


def read_mlx(path: str | Path, mapping: Mapping = FLAT) -> tuple[Any, LoraConfig]:
    """The adapters and the configuration in a folder that mlx-lm wrote.

    Args:
      path: the folder with `adapter_config.json` and `adapters.safetensors`.
      mapping: as of `jlora.interop.peft.read_peft`. The names are those of mlx-lm's model, which for most models are
        those on the disk; where mlx-lm renames or splits weights as it loads them, give rows.

    Returns:
      `(adapters, config)`, as `read_peft`.

    Raises:
      DataError: no such adapter, a damaged file, tensors that do not fit each other or the configuration, whole weights
        (fine_tune_type "full"), a model whose weights mlx-lm changes as it loads them, DoRA of an embedding, whose
        norm mlx-lm takes over other axes.
    """
    entries, config = read_mlx_arrays(path, mapping)
    return nest(placed(path, entries)), config


def read_mlx_arrays(
    path: str | Path, mapping: Mapping = FLAT, *, lazy: bool = False
) -> tuple[dict[str, dict[str, Any]], LoraConfig]:
    """`read_mlx` with NumPy arrays by path; lazy ones are read when asked for."""
    folder = Path(path)
    try:
        with Pair(folder, TENSORS).opened() as (text, file):
            data = _parsed(text)
            check = _Parameters(data)
            read: Any = file.lazy if lazy else file.read
            tensors = {key: read(key) for key in file.entries}
            modules = list(_modules(tensors, check))
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    entries, config = entries_of_modules(
        folder, modules, mapping, dropout=check.dropout, base=check.model, task_type="CAUSAL_LM"
    )
    return entries, config.replace(extras={**dict(config.extras), _EXTRA: json.dumps({"model": check.model})})


def check_base_of_mlx(config: LoraConfig, model_type: Any) -> None:
    """Raises a DataError for an adapter of mlx-lm and a base that mlx-lm has changed as it loaded it."""
    if _EXTRA in dict(config.extras) and model_type in _CHANGED:
        raise _changed(str(model_type))


def _changed(model_type: str) -> DataError:
    return DataError(
        f"mlx-lm {_CHANGED[model_type]} as it loads them, so that its adapters do not fit the checkpoint: fuse them "
        "there (mlx_lm.fuse)"
    )


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{CONFIG}: not valid JSON: {error}") from None


class _Parameters:
    """What the configuration says of all modules."""

    def __init__(self, data: MappingType[str, Any]) -> None:
        kind = data.get("fine_tune_type", "lora")
        if kind == "full":
            raise DataError(
                "fine_tune_type full: these are whole weights and no adapters; mlx_lm.fuse makes a checkpoint of them, "
                "of which `jlora extract` makes adapters"
            )
        if kind not in ("lora", "dora"):
            raise DataError(f"fine_tune_type = {shortened(kind)}: wanted lora or dora")
        given = data.get("lora_parameters")
        if not isinstance(given, dict):
            raise DataError(f"lora_parameters = {shortened(given)}: wanted a mapping with rank and scale")
        for key in ("scale", "dropout"):
            value = given.get(key, 0.0 if key == "dropout" else None)
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
                raise DataError(f"lora_parameters.{key} = {shortened(value)}: wanted a number")
        model = data.get("model")
        self.model = model if isinstance(model, str) else None
        self.is_dora, self.rank = kind == "dora", given.get("rank")
        self.scale, self.dropout = float(given["scale"]), float(given.get("dropout", 0.0))
        _check_name(self.model)


def _check_name(model: str | None) -> None:
    """Raises a DataError for a model whose weights mlx-lm changes, as far as its name says."""
    plain = re.sub(r"[^a-z0-9]+", "_", (model or "").lower())
    for model_type in _CHANGED:
        if re.search(rf"(^|_){model_type}(_|$)", plain):
            raise _changed(model_type)


def _modules(tensors: MappingType[str, Any], given: _Parameters) -> Iterator[Module]:
    found: dict[str, dict[str, Any]] = {}
    problems = []
    for key, array in tensors.items():
        name, _, last = key.rpartition(".")
        if not name or last not in _PARTS:
            problems.append(f"{key}: no lora_a, lora_b or m of a module")
        else:
            found.setdefault(name, {})[_PARTS[last]] = array
    problems += [problem for name, parts in found.items() if (problem := _problem(name, parts, given))]
    raise_all(problems, DataError, "tensors that are no part of an adapter of mlx-lm")
    if not found:
        raise DataError(f"{TENSORS} holds no tensors")
    for name, parts in found.items():
        a, b = parts["a"], parts["b"]
        if a.ndim == 3:
            count, rank, ins = a.shape
            a, b = a.reshape(count * rank, ins), b.transpose(1, 2, 0).reshape(b.shape[1], rank * count)
            yield Module(name, "experts", a, b, rank, given.scale)
        else:
            kind = "embedding" if names_embedding(name.rpartition(".")[2]) else "linear"
            yield Module(name, kind, a.T, b.T, a.shape[1], given.scale, parts.get("magnitude"))


def _problem(name: str, parts: MappingType[str, Any], given: _Parameters) -> str | None:
    if "a" not in parts or "b" not in parts:
        return f"{name}: lora_a and lora_b are not both there"
    a, b = parts["a"].shape, parts["b"].shape
    if _CONV1D.search(name):
        return f"{name}: {_changed('gpt2')}"
    fits = len(a) == len(b) == 2 and a[1] == b[0]
    if not fits and not (len(a) == len(b) == 3 and a[0] == b[0] and a[1] == b[2]):
        return f"{name}: lora_a {a} and lora_b {b} do not fit each other: wanted (in, r) and (r, out)"
    rank = a[1]
    if given.rank is not None and given.rank != rank:
        return f"{name}: has the rank {rank}, but lora_parameters.rank = {shortened(given.rank)}"
    if ("magnitude" in parts) != given.is_dora:
        found = "a magnitude m" if "magnitude" in parts else "no magnitude m"
        return f"{name}: has {found}, but fine_tune_type is {'dora' if given.is_dora else 'lora'}"
    if given.is_dora and names_embedding(name.rpartition(".")[2]):
        return f"{name}: DoRA of an embedding, whose norms mlx-lm takes token by token; fuse it there (mlx_lm.fuse)"
    if given.is_dora and (len(a) == 3 or parts["magnitude"].shape != b[1:]):
        return f"{name}: m {parts['magnitude'].shape} does not fit lora_b {b}"
    return None


def write_mlx(path: str | Path, adapters: Any, config: LoraConfig, mapping: Mapping = FLAT) -> None:
    """Writes a folder that mlx-lm loads, as `mlx_lm.generate --adapter-path`.

    mlx-lm has one rank and one scale for all: smaller ranks are padded with zeros, other scalings go into lora_b.

    Args:
      path: the folder; what was there is replaced as a whole, or stays.
      adapters, config: as of `jlora.interop.peft.write_peft`.
      mapping: rows from the names of mlx-lm's model to the paths.

    Raises:
      DataError: an adapter that mlx-lm has no place for: a whole value, the bias of a B, a convolution, a Conv1D,
        single experts (its own are `switch_mlp`, in one array), DoRA of some alone; a model whose weights mlx-lm
        changes.

    >>> import tempfile
    >>> entry = {"A": np.ones((7, 2), np.float32), "B": np.ones((2, 5), np.float32)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_mlx(folder, {"up.weight": entry}, LoraConfig(rank=2, alpha=6, factorizations={"**": "oi"}))
    ...     adapters, config = read_mlx(folder)
    >>> adapters["up.weight"]["A"].shape, config.scaling_of("up.weight")
    ((7, 2), 3.0)
    """
    _check_name(base_model_of(config))
    entries = model_entries(path, adapters, config, mapping)
    is_dora = any("magnitude" in entry.parts for entry in entries)
    problems = [problem for entry in entries if (problem := _unwritable(entry, is_dora))]
    raise_all(problems, DataError, f"{path}: mlx-lm has no place for")
    entries, rank, scale = alike(entries, config)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for entry in entries:
        module, a, b = entry.name.removesuffix(".weight"), entry.parts["A"], entry.parts["B"]
        if entry.kind.startswith("experts"):
            a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)
        tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        if "magnitude" in entry.parts:
            tensors[f"{module}.m"] = entry.parts["magnitude"]
    keys = [entry.name.removesuffix(".weight") for entry in entries]
    parameters = {"rank": rank, "scale": scale, "dropout": config.dropout, "keys": keys}
    data = {"fine_tune_type": "dora" if is_dora else "lora", "num_layers": -1, "lora_parameters": parameters}
    folder = Path(path)

    def write() -> None:
        with folder_to_write(folder, TENSORS):
            Pair(folder, TENSORS).replace(dump_json(data), lambda file: write_tensors(file, tensors, {"format": "mlx"}))

    write_once(leaves(adapters), write, lambda: check_folder_to_write(folder, bytes_of_all(tensors), TENSORS))


def _unwritable(entry: ModelEntry, is_dora: bool) -> str | None:
    """Why mlx-lm has no place for an entry; None where it has one."""
    more = set(entry.parts) - {"A", "B", "magnitude"}
    if more:
        return f"{entry.path}: a part {min(more)}"
    if entry.kind == "conv1d" or _CONV1D.search(entry.name.removesuffix(".weight")):
        return f"{entry.path}: a weight (in, out), which mlx-lm transposes as it loads it"
    if entry.kind not in ("linear", "embedding", "experts", "experts_open") or not entry.name.endswith(".weight"):
        return (
            f"{entry.path}: {entry.kind} of {entry.name}; wanted the weight of a Linear, a SwitchLinear or an embedding"
        )
    if re.search(r"\.experts\.\d+\.", entry.name):
        return f"{entry.path}: a single expert; give --mapping with a stack of all as switch_mlp, as mlx-lm names them"
    if is_dora and ("magnitude" not in entry.parts or entry.kind != "linear"):
        return f"{entry.path}: {entry.kind} without a magnitude beside DoRA, or no Linear"
    return None
