"""Adapters by the names of modules, as the files of other libraries have them, read as PEFT's are."""

import collections
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.config import LoraConfig
from jlora.errors import DataError
from jlora.interop.peft import Mapping, ModelEntry, Named, of_model, read_named

_KEYS = {
    "linear": {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
    "embedding": {"A": "lora_embedding_A", "B": "lora_embedding_B", "magnitude": "lora_magnitude_vector"},
}


@dataclasses.dataclass(frozen=True)
class Module:
    """The adapter of one module.

    Attributes:
      name: of the module, such as "model.layers.0.mlp.up_proj".
      kind: "linear", "conv", "embedding" or "experts", as of `ModelEntry`.
      a, b: in PEFT's layout: (r, in...) and (out, r, 1...); of experts (experts * r, in) and (out, r * experts).
      rank: r.
      scaling: the update is scaling * the product.
      magnitude: of DoRA, (out,), of a convolution (1, out, 1...).
      offset: the bias of a B, (out,), which is scaled as A@B is.
    """

    name: str
    kind: str
    a: Any
    b: Any
    rank: int
    scaling: float
    magnitude: Any = None
    offset: Any = None

    @property
    def alpha(self) -> float:
        return self.scaling * self.rank


def entries_of_modules(
    source: str | Path,
    modules: Sequence[Module],
    mapping: Mapping,
    *,
    dropout: float = 0.0,
    base: str | None = None,
    task_type: str | None = None,
) -> tuple[dict[str, dict[str, Any]], LoraConfig]:
    """The entries by path and their configuration, which tells `write_peft` of the model."""
    rank = most_frequent([module.rank for module in modules])
    alpha = most_frequent([module.alpha for module in modules])
    parameters = [f"{module.name}.weight" for module in modules if module.kind == "experts"]
    names: list[Named] = []
    tensors: dict[str, Any] = {}
    for module in modules:
        weight, ways = f"{module.name}.weight", _KEYS.get(module.kind, _KEYS["linear"])
        keys = {part: f"{module.name}.{way}" for part, way in ways.items()}
        parts = {keys["A"]: module.a, keys["B"]: module.b, keys["magnitude"]: module.magnitude}
        there = {part: key for part, key in keys.items() if parts[key] is not None}
        names.append(Named(weight, weight if module.kind == "experts" else module.name, there))
        tensors |= {key: parts[key] for key in there.values()}
        if module.offset is not None:
            key = f"{module.name}.lora_B.bias"
            names.append(Named(f"{module.name}.bias", module.name, {"offset": key}))
            tensors[key] = module.offset
    data = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "rank_pattern": {_exactly(module): module.rank for module in modules if module.rank != rank},
        "alpha_pattern": {_exactly(module): module.alpha for module in modules if module.alpha != alpha},
        "target_parameters": parameters or None,
    }
    entries, config = read_named(source, data, names, tensors, mapping)
    kinds = {f"{module.name}.weight": module.kind for module in modules if module.kind != "linear"}
    return entries, of_model(
        config, base_model_name_or_path=base, task_type=task_type, kinds=kinds, target_parameters=parameters
    )


def _exactly(module: Module) -> str:
    name = f"{module.name}.weight" if module.kind == "experts" else module.name
    return f"^{re.escape(name)}"


def alike(entries: Sequence[ModelEntry], config: LoraConfig) -> tuple[list[ModelEntry], int, float]:
    """Entries of one rank and one scaling, that rank and that scaling, for files that have one of each for all.

    Smaller ranks are padded with zeros. B takes in the quotient of its scaling and the most frequent one.
    """
    if not entries:
        raise DataError("there are no adapters to write")
    rank = max(entry.parts["A"].shape[-1] for entry in entries)
    scalings = {entry.name: config.scaling_of(entry.path) for entry in entries}
    most = [scaling for scaling in scalings.values() if scaling]
    scaling = most_frequent(most) if most else 1.0
    found = []
    for entry in entries:
        parts = dict(entry.parts)
        if scalings[entry.name] != scaling:
            parts["B"] = scaled(parts["B"], scalings[entry.name] / scaling)
        missing = rank - parts["A"].shape[-1]
        if missing:
            parts["A"] = _padded(parts["A"], -1, missing)
            parts["B"] = _padded(parts["B"], 1 if entry.kind.startswith("experts") else 0, missing)
        found.append(dataclasses.replace(entry, parts=parts))
    return found, rank, scaling


def scaled(array: np.ndarray[Any, Any], factor: float) -> np.ndarray[Any, Any]:
    """An array times a number, as float32, or float64 where it is that."""
    wide = np.float64 if array.dtype == np.float64 else np.float32
    return (array.astype(np.float64) * factor).astype(wide)


def most_frequent(values: Sequence[Any]) -> Any:
    """The value that is there most often, the first of several."""
    return collections.Counter(values).most_common(1)[0][0]


def _padded(array: np.ndarray[Any, Any], axis: int, count: int) -> np.ndarray[Any, Any]:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, count)
    return np.pad(array, widths)
