"""A VeRA of PEFT's as ordinary entries: the checkpoint that it is for says how wide the inputs of its weights are."""

from collections.abc import Mapping as MappingType
from pathlib import Path
from typing import Any

import numpy as np

from jlora.arrays import ShapeDtype
from jlora.config import LoraConfig
from jlora.errors import DataError, JloraError, listed
from jlora.interop.peft import Mapping, paths_of_name, read_vera_arrays, vera_weights
from jlora.variants import expanded_entries

Shapes = MappingType[str, tuple[int, ...]]


def read_vera_entries(
    path: str | Path, mapping: Mapping, shapes: Shapes | None
) -> tuple[dict[str, dict[str, Any]], LoraConfig]:
    """A and B of each weight by path, and a configuration of kind "lora".

    Args:
      path: the folder.
      mapping: from PEFT's names to the paths; its rows change names alone.
      shapes: of the tensors of the checkpoint, by name.

    Raises:
      DataError: no shapes, or none for a weight; files that cannot be read.
    """
    if shapes is None:
        raise DataError(
            f"{path}: a VeRA of PEFT's, whose vectors do not say how wide the inputs of the weights are: give the "
            "model as base (--base), or expand it first: jlora convert FOLDER OUT --to peft --base MODEL"
        )
    if any(row.transpose or row.reshape or row.stack for row in mapping):
        raise DataError(
            f"{path}: a VeRA is not read through rows that change more than names: expand it first, without them"
        )
    found, missing = {}, []
    for name in vera_weights(path):
        shape = _shape_of(name, shapes)
        if shape is None:
            missing.append(name)
        else:
            found[next(iter(paths_of_name(mapping, name)), name)] = shape
    if missing:
        raise DataError(f"{path}: the base has no tensor for {listed(missing, 3)}, or several of other shapes")
    params = {place: ShapeDtype(shape, np.dtype(np.float32)) for place, shape in found.items()}
    trained, frozen, config = read_vera_arrays(path, params, mapping)
    try:
        return expanded_entries(trained, frozen, found, config), config.replace(kind="lora")
    except JloraError as error:
        raise DataError(f"{path}: {error}") from None


def _shape_of(name: str, shapes: Shapes) -> tuple[int, ...] | None:
    """The shape of a weight, whose name in the checkpoint may have more before it, or less; None if it is not clear."""
    if name in shapes:
        return shapes[name]
    dotted = {other.replace("/", "."): shape for other, shape in shapes.items()}
    fits = {
        s for other, s in dotted.items() if other == name or other.endswith(f".{name}") or name.endswith(f".{other}")
    }
    return fits.pop() if len(fits) == 1 else None
