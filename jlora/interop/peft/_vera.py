"""PEFT's files of VeRA: the vectors of each module, and the pair of A and B that all share.

    base_model.vera_A                                   (r, largest in)
    base_model.vera_B                                   (largest out, r)
    base_model.model.MODULE.vera_lambda_d               (r,)
    base_model.model.MODULE.vera_lambda_b               (out,)

The vectors do not say how wide the inputs of a weight are: it takes the model's weights, or their shapes, to read them.
"""

import math
from collections.abc import Iterable
from collections.abc import Mapping as MappingType
from pathlib import Path
from typing import Any

import numpy as np

from jlora.arrays import is_floating
from jlora.config import LoraConfig
from jlora.disk import CONFIG, TENSORS, Pair, bytes_of_all, dump_json, parse_json, write_tensors
from jlora.errors import DataError, TargetError, listed, raise_all, shortened
from jlora.interop._placed import placed
from jlora.interop.peft._keys import entries_of
from jlora.interop.peft._mapping import FLAT, Mapping, places_of_names
from jlora.interop.peft._read import read_named
from jlora.interop.peft._targeted import check_fields, check_together
from jlora.interop.peft._wrappers import PREFIX, without_wrappers
from jlora.interop.peft._write import to_tensors
from jlora.paths import format_nearest, leaves_by_path, literal_pattern
from jlora.storage import check_folder_to_write, folder_to_write, unreachable, write_once
from jlora.tree import Target, find_targets

Vectors = dict[str, dict[str, Any]]

_PAIR = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
_VECTORS = {".vera_lambda_b": "b", ".vera_lambda_d": "d"}
_KEPT = (  # of what PEFT's configurations of VeRA and of LoRA both say
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
)


def is_vera_config(data: MappingType[str, Any]) -> bool:
    """Whether a configuration of PEFT's is one of VeRA."""
    return data.get("peft_type") == "VERA"


def is_vera_folder(path: str | Path) -> bool:
    """Whether a folder holds a VeRA that PEFT wrote, by its configuration."""
    try:
        return is_vera_config(parse_json(Pair(path).read_config()))
    except ValueError:
        return False


def vera_weights(path: str | Path) -> list[str]:
    """The names of the weights, in the Hugging Face model, that a folder of PEFT's has vectors for."""
    with Pair(path).opened() as (_, file):
        names = without_wrappers(file.entries).values()
    suffix = ".vera_lambda_b"
    return [f"{name.removeprefix(PREFIX).removesuffix(suffix)}.weight" for name in names if name.endswith(suffix)]


def read_vera(path: str | Path, params: Any, mapping: Mapping = FLAT) -> tuple[Any, Any, LoraConfig]:
    """What `jlora.variants.vera` trains and keeps, from a folder that PEFT wrote.

    Args:
      path: the folder with `adapter_config.json` and `adapter_model.safetensors`.
      params: the params tree, arrays or shapes.
      mapping: as for `read_peft`.

    Returns:
      `(trained, frozen, config)`, arrays of JAX, for `jlora.variants.vera.adapters(trained, frozen, params, config)`.
      The layers that a stack has no vectors of get zeros, which stay zeros in training.

    Raises:
      DataError: no VeRA, a damaged file, one without the shared pair, vectors that do not fit the params, biases or
        modules that were saved as a whole.
    """
    trained, frozen, config = read_vera_arrays(path, params, mapping)
    vectors = placed(path, trained)
    return vectors, placed(path, {"the shared pair": frozen})["the shared pair"], config


def read_vera_arrays(path: str | Path, params: Any, mapping: Mapping = FLAT) -> tuple[Vectors, Any, LoraConfig]:
    """`read_vera` with NumPy arrays."""
    folder = Path(path)
    try:
        with Pair(folder).opened() as (text, file):
            data = _parsed(text)
            tensors = {name: file.read(key) for key, name in without_wrappers(file.entries).items()}
        pair, modules = _taken_apart(tensors, data)
        ins = _ins(
            pair, modules, {path: tuple(np.shape(leaf)) for path, leaf in leaves_by_path(params).items()}, mapping
        )
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    trained, config = _in_tree(folder, data, modules, ins, params, mapping)
    return trained, {"A": pair["A"].T, "B": pair["B"].T}, config


def write_vera(
    path: str | Path, trained: Any, frozen: Any, params: Any, config: LoraConfig, mapping: Mapping = FLAT
) -> None:
    """Writes a folder that PEFT loads as VeRA: the vectors, and the shared pair (`save_projection`).

    Args:
      path: as for `write_peft`.
      trained, frozen: as `jlora.variants.vera` has them.
      params: the params, arrays or shapes.
      config: the configuration that they were made with, or that `read_vera` returned.
      mapping: as for `read_peft`.

    Raises:
      TargetError: the configuration does not fit the params.
      DataError: as of `write_peft`; weights that are none of a Linear or a Conv1D, for which alone PEFT has VeRA; a
        mapping whose rows change the order of the axes of in or of out, on which the shared pair depends.
    """
    tensors, data = _peft_of(path, trained, frozen, params, config, mapping)
    folder, text = Path(path), dump_json(data).rstrip(b"\n")

    def write() -> None:
        with folder_to_write(folder):
            Pair(folder).replace(text, lambda file: write_tensors(file, tensors, {"format": "pt"}))

    write_once(tensors.values(), write, lambda: check_folder_to_write(folder, bytes_of_all(tensors)))


def _parsed(text: bytes) -> dict[str, Any]:
    """The configuration.

    Raises:
      DataError: it is none of VeRA's, or says what is not read.
    """
    try:
        data = parse_json(text)
    except ValueError as error:
        raise DataError(f"{CONFIG}: not valid JSON: {error}") from None
    if not is_vera_config(data):
        raise DataError(f"peft_type {shortened(data.get('peft_type'))}: wanted VERA; read_peft reads LORA")
    rank, dropout = data.get("r", 256), data.get("vera_dropout") or 0.0
    if type(rank) is not int or not 1 <= rank < 2**31:
        raise DataError(f"r = {shortened(rank)}: wanted a whole number of at least 1")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise DataError(f"vera_dropout = {shortened(dropout)}: wanted a number, 0 <= vera_dropout < 1")
    check_fields({key: value for key, value in data.items() if key != "bias"})
    return data | {"r": rank, "vera_dropout": dropout}


def _taken_apart(
    tensors: MappingType[str, Any], data: MappingType[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """The shared pair, A (r, in) and B (out, r), and the vectors of each module."""
    pair = {part: tensors[name] for name, part in _PAIR.items() if name in tensors}
    modules: dict[str, dict[str, np.ndarray]] = {}
    others = []
    for name, array in tensors.items():
        suffix = next((suffix for suffix in _VECTORS if name.endswith(suffix)), None)
        if suffix is not None and name.startswith(PREFIX):
            modules.setdefault(name.removeprefix(PREFIX).removesuffix(suffix), {})[_VECTORS[suffix]] = array
        elif name not in _PAIR:
            others.append(name)
    if others:
        raise DataError(
            f"{listed(map(shortened, others), 3)}: no part of VeRA; biases and modules that were saved as a whole are "
            "not read"
        )
    if len(pair) < 2:
        raise DataError(
            f"{TENSORS} does not hold the shared pair, vera_A and vera_B (save_projection is "
            f"{shortened(data.get('save_projection'))}): PEFT draws it with torch from projection_prng_key = "
            f"{shortened(data.get('projection_prng_key'))}, which nothing but torch can; load it in PEFT and save it "
            "with save_projection = True in its configuration"
        )
    rank = data["r"]
    problems = [_problem(name, array) for name, array in tensors.items()]
    if pair["A"].ndim != 2 or pair["B"].ndim != 2 or pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
        problems.append(
            f"vera_A {pair['A'].shape} and vera_B {pair['B'].shape}: wanted ({rank}, in) and (out, {rank}), as r says"
        )
    for module, vectors in modules.items():
        if vectors.keys() != {"b", "d"} or vectors["d"].shape != (rank,) or vectors["b"].ndim != 1:
            found = {name: vector.shape for name, vector in sorted(vectors.items())}
            problems.append(f"{module}: vectors {found}: wanted d ({rank},) and b (out,)")
    raise_all(filter(None, problems), DataError)
    if not modules:
        raise DataError(f"{TENSORS} holds no vectors")
    return pair, modules


def _problem(name: str, array: np.ndarray) -> str | None:
    if not is_floating(array.dtype):
        return f"{name} has the dtype {array.dtype}: wanted a floating one"
    return None if np.isfinite(array.astype(np.float64)).all() else f"{name} holds a NaN or an infinity"


def _ins(
    pair: MappingType[str, np.ndarray],
    modules: MappingType[str, MappingType[str, np.ndarray]],
    shapes: MappingType[str, tuple[int, ...]],
    mapping: Mapping,
) -> dict[str, int]:
    """How wide the inputs of each module's weight are, by the weight in the params."""
    places = places_of_names(mapping, [f"{module}.weight" for module in modules])
    ins: dict[str, int] = {}
    problems = []
    for module, found in modules.items():
        place, outs = places[f"{module}.weight"], len(found["b"])
        if place.path not in shapes:
            problems.append(f"{place.path}: params has no leaf there; {format_nearest(place.path, shapes)}")
            continue
        size = math.prod(shapes[place.path]) // math.prod(count for _, count in place.row.stack)
        ins[module] = size // outs
        if size % outs or ins[module] > pair["A"].shape[1] or outs > pair["B"].shape[0]:
            problems.append(
                f"{module}: a weight {shapes[place.path]} and a vector b ({outs},) do not fit vera_A {pair['A'].shape} "
                f"and vera_B {pair['B'].shape}"
            )
    raise_all(problems, DataError)
    return ins


def _in_tree(
    folder: Path,
    data: MappingType[str, Any],
    modules: MappingType[str, Any],
    ins: MappingType[str, int],
    params: Any,
    mapping: Mapping,
) -> tuple[Vectors, LoraConfig]:
    """The vectors by path, and the configuration.

    They are read as LoRA's A and B that repeat them, so that stacks, transposes and shapes are those of `read_peft`.
    """
    rank = data["r"]
    as_lora = {key: data[key] for key in _KEPT if key in data} | {"peft_type": "LORA"}
    as_lora |= {"r": rank, "lora_alpha": rank, "lora_dropout": data["vera_dropout"]}
    tensors: dict[str, np.ndarray] = {}
    for module, vectors in modules.items():
        d, b = vectors["d"], vectors["b"]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.broadcast_to(d[:, None], (rank, ins[module]))
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.broadcast_to(b[:, None], (len(b), rank))
    names = entries_of(tensors, [])
    try:
        check_together(as_lora, names)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    entries, config = read_named(folder, as_lora, names, tensors, mapping, params)
    trained: Vectors = {}
    for path, entry in entries.items():
        batch = dict(config.factorizations)[literal_pattern(path)].count("b")
        a, b = entry["A"], entry["B"]
        d = a.reshape(*a.shape[:batch], -1, rank)[..., 0, :]  # (*batch, r)
        trained[path] = {"b": np.take(b, 0, axis=batch), "d": np.ascontiguousarray(d)}
    config = config.replace(kind="vera")
    _check_order(folder, trained, params, config, mapping)
    return trained, config


def _check_order(path: str | Path, trained: Iterable[str], params: Any, config: LoraConfig, mapping: Mapping) -> None:
    """Raises a DataError where rows of the mapping change the order in which the shared pair is taken.

    It shows by numbered ins and outs, sent the way of a LoRA of rank 1.
    """
    targets = find_targets(params, config)
    numbered = {}
    for name in trained:
        batch, ins, outs = (targets[name].factorization.sizes(targets[name].shape, role) for role in "bio")
        a = np.arange(1.0, 1 + math.prod(ins)).reshape(*ins, 1)
        b = np.arange(1.0, 1 + math.prod(outs)).reshape(1, *outs)
        numbered[name] = {"A": np.broadcast_to(a, (*batch, *a.shape)), "B": np.broadcast_to(b, (*batch, *b.shape))}
    tensors, _ = to_tensors(numbered, config.replace(rank=1, rank_pattern=(), dropout=0.0), mapping)
    turned = [
        name for name, array in tensors.items() if not np.array_equal(array.ravel(), np.arange(1, 1 + array.size))
    ]
    if turned:
        module = turned[0].removeprefix(PREFIX).rpartition(".lora_")[0]
        raise DataError(
            f"{path}: {module}: a row of the mapping changes the order of its axes, on which "
            "the pair depends that all weights share: write or read it as a LoRA, with the adapters that it expands to"
        )


def _peft_of(
    path: str | Path, trained: Any, frozen: Any, params: Any, config: LoraConfig, mapping: Mapping
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """PEFT's tensors by name, and its configuration."""
    found = leaves_by_path({"trained": trained, "frozen": frozen})
    if problem := next((problem for array in found.values() if (problem := unreachable(array))), None):
        raise DataError(f"{path}: {problem}")
    targets = find_targets(params, config)
    if unknown := [name for name in trained if name not in targets]:
        raise TargetError(f"{unknown[0]}: is no weight that is adapted; {format_nearest(unknown[0], targets)}")
    roles = {literal_pattern(name): targets[name].factorization.roles for name in trained}
    settled = config.replace(factorizations=roles, dropout=0.0)
    repeated = {name: _repeated(vectors, targets[name]) for name, vectors in trained.items()}
    as_lora, data = to_tensors(repeated, settled, mapping)
    _check_order(path, trained, params, settled, mapping)
    tensors: dict[str, np.ndarray] = {}
    ins, outs = 0, 0
    for name, array in as_lora.items():
        module, suffix = name.removesuffix(".weight").rsplit(".", 1)
        if suffix not in ("lora_A", "lora_B") or array.ndim != 2 or data.get("target_parameters"):
            raise DataError(f"{path}: {module.removeprefix(PREFIX)}: PEFT has VeRA for Linear and Conv1D alone")
        if suffix == "lora_A":  # (r, in)
            tensors[f"{module}.vera_lambda_d"], ins = array[:, 0], max(ins, array.shape[1])
        else:  # (out, r)
            tensors[f"{module}.vera_lambda_b"], outs = array[:, 0], max(outs, array.shape[0])
    tensors["base_model.vera_A"] = np.asarray(frozen["A"])[:ins].T
    tensors["base_model.vera_B"] = np.asarray(frozen["B"])[:, :outs].T
    raise_all(filter(None, (_problem(name, array) for name, array in tensors.items())), DataError, str(path))
    own = {"d_initial": 0.1, "peft_type": "VERA", "projection_prng_key": 0, "save_projection": True}
    own |= {"r": config.rank, "vera_dropout": config.dropout}
    plain = {name: np.ascontiguousarray(array) for name, array in sorted(tensors.items())}
    return plain, {key: data[key] for key in _KEPT if key in data} | own


def _repeated(vectors: MappingType[str, Any], target: Target) -> dict[str, np.ndarray]:
    """An A and a B of LoRA that repeat the vectors: d for each in, b for each rank."""
    batch, ins, outs = (target.factorization.sizes(target.shape, role) for role in "bio")
    d, b = np.asarray(vectors["d"]), np.asarray(vectors["b"])
    a = d.reshape(*batch, *(1 for _ in ins), -1)  # (*batch, 1..., r)
    over_rank = b.reshape(*batch, 1, *outs)  # (*batch, 1, *out)
    rank = d.shape[-1]
    return {
        "A": np.broadcast_to(a, (*batch, *ins, rank)),
        "B": np.broadcast_to(over_rank, (*batch, rank, *outs)),
    }
