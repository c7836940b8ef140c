"""The tensors of a checkpoint as transformers has them in memory, where they are read when they are asked for."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.disk import Checkpoint, LazyArray, read_json
from jlora.errors import DataError, JloraWarning
from jlora.interop.peft import names_embedding
from jlora.interop.transformers import Facts, filled, pattern_of

Tree = dict[str, LazyArray]


def settings_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The config.json of a checkpoint; nothing where there is none, and with a warning where it cannot be read."""
    path = checkpoint.folder / "config.json"
    try:
        return read_json(path) if path.is_file() else {}
    except DataError as error:
        unknown = "which weights are tied, and what transformers names and turns otherwise, is not known"
        warnings.warn(f"{error}; {unknown}", JloraWarning, stacklevel=2)
        return {}


def in_memory(tree: Mapping[str, LazyArray], facts: Facts) -> Tree:
    """The tensors by their names in memory, with slashes for dots.

    Experts that are one array in memory are one here; a weight that is tied to an embedding, and that the checkpoint
    does not have, is there beside it, as PEFT adapts each alone.
    """
    left = {path.replace("/", "."): leaf for path, leaf in tree.items()}
    found: Tree = {}
    for template, parts in facts.stacked:
        found |= _stacked(left, template, parts)
    found |= {facts.in_memory(name): leaf for name, leaf in left.items()}
    for tied, source in facts.tied:
        if tied not in found and source in found:
            found[tied] = found[source]
    return {name.replace(".", "/"): leaf for name, leaf in found.items()}


def is_converted(name: str, facts: Facts) -> bool:
    """Whether the tensor that has this name on the disk is another in memory, in a way that is not known here."""
    return any(pattern_of(template).fullmatch(name) for template in facts.converted)


def roles_of(path: str, ndim: int, facts: Facts) -> str | None:
    """The roles of the axes of a tensor of transformers; None for what is no weight, or is named as Flax does."""
    module, _, name = path.rpartition("/")
    last = module.rpartition("/")[2]
    if name == "weight" and ndim >= 2:
        if f"/{path}".endswith(tuple(f"/{end.replace('.', '/')}" for end in facts.parameters)):
            return "oi" if ndim == 2 else None
        is_embedding = last in facts.embedding or (names_embedding(last) and last not in facts.linear)
        is_turned = last in facts.conv1d or is_embedding
        return "io" if ndim == 2 and is_turned else "o" + "i" * (ndim - 1)
    if ndim == 2 and module and name.endswith("_weight"):  # a parameter by its own name, such as in_proj_weight
        return "oi"
    if ndim == 3 and module.endswith("experts"):
        return "bio" if f"{last}.{name}" in facts.transposed else "boi"
    return None


def kind_in_memory(path: str, facts: Facts) -> str | None:
    """PEFT's kind of a weight of axes in, out."""
    last = path.rpartition("/")[0].rpartition("/")[2]
    return "conv1d" if last in facts.conv1d else "embedding" if last in facts.embedding else None


def _stacked(left: Tree, template: str, parts: tuple[str, ...]) -> Tree:
    """The arrays of experts that a template names; their tensors are taken out of `left`."""
    groups: dict[str, dict[tuple[int, int], str]] = {}
    for place, part in enumerate(parts):
        pattern = pattern_of(part)
        for name in left:
            if match := pattern.fullmatch(name):
                groups.setdefault(filled(template, match), {})[int(match["e"]), place] = name
    found: Tree = {}
    for memory, names in groups.items():
        count = 1 + max(expert for expert, _ in names)
        grid = [[names.get((expert, place)) for place in range(len(parts))] for expert in range(count)]
        if any(name is None for row in grid for name in row):
            raise DataError(f"{memory}: of its {count} experts only {len(names)} tensors are there")
        found[memory] = stack_of([[left.pop(str(name)) for name in row] for row in grid])
    return found


def stack_of(grid: list[list[LazyArray]]) -> LazyArray:
    """The experts of all rows as one array (experts, rows, columns)."""
    first = grid[0]
    shape = (len(grid), sum(part.shape[0] for part in first), *first[0].shape[1:])

    def load() -> np.ndarray[Any, Any]:
        return np.stack([np.concatenate([np.asarray(part) for part in row]) for row in grid])

    return LazyArray(shape, first[0].dtype, load)
