"""The entries of a tree of adapters, each bound to its weight: the one place that asks the configuration about them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlora.adapter import Entry, boxed_entry, is_entry
from jlora.boxes import is_box
from jlora.config import LoraConfig
from jlora.contraction import Factorization, factorization_from_shapes, split_batch_axes
from jlora.errors import AdapterError, JloraError, TargetError, raise_all
from jlora.paths import format_nearest, is_param, leaves_by_path, literal_pattern, path_string
from jlora.pytrees import map_with_path
from jlora.tree._targets import (
    MOST_PROBLEMS,
    LeftOut,
    check_config,
    given_factorization,
    shapes_by_path,
    survey,
    unused_patterns,
)


def bind(params: Any, adapters: Any, config: LoraConfig) -> dict[str, Entry]:
    """The entries at hand by path, with their scaling, and how the axes of their weights split.

    Args:
      params: the base, arrays or shapes.
      adapters: entries at the paths of their weights, `None` or nothing elsewhere.
      config: the configuration that they were made with.

    Raises:
      TargetError: with every problem at once: an entry where params has no leaf, a leaf that is no entry, an adapter
        whose rank is not the configuration's, shapes that do not fit, a pattern of the configuration of which there is
        no entry.
    """
    check_config(config)
    shapes = shapes_by_path(params)
    config.check_work(len(shapes))
    problems: list[str] = []
    entries: dict[str, Entry] = {}
    found = leaves_by_path(adapters, is_leaf=is_entry)
    for path, parts in found.items():
        if not is_entry(parts):
            problems.append(
                f"{path or 'adapters'}: found {type(parts).__name__}, wanted an adapter {{'A', 'B'}} or None"
            )
        elif path not in shapes:
            near = format_nearest(path, shapes) if len(problems) < MOST_PROBLEMS else "and no near path was sought"
            problems.append(f"{path}: an adapter where params has no leaf; {near}")
        else:
            try:
                entry = Entry(parts, config.scaling_of(path), split_of(path, shapes, parts, config))
                entry.check(shapes[path])
                entries[path] = entry
            except JloraError as error:
                problems.append(f"{path}: {error}")
    raise_all(problems or _without_effect(params, config, list(found)), TargetError)
    return entries


def split_of(
    path: str, shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Any], config: LoraConfig
) -> Factorization | None:
    """How the axes of the weight at `path` split, by the configuration or by A and B; None where there are none."""
    if "A" not in parts:
        return None
    shape, a_shape, b_shape = shapes[path], np.shape(parts["A"]), np.shape(parts["B"])
    rank, given = config.rank_of(path), given_factorization(path, shapes, config)
    if a_shape[-1:] != (rank,):
        raise AdapterError(f"A {a_shape} does not have the rank {rank} of the configuration")
    if given is None:
        named = path.rpartition("/")[2] in ("kernel", "embedding")  # Flax's (in, out); others may be (out, in)
        return factorization_from_shapes(shape, a_shape, b_shape, transposed=not named)
    if (a_shape, b_shape) != (wanted := given.adapter_shapes(shape, rank)):
        raise AdapterError(
            f"A {a_shape} and B {b_shape} do not fit the weight {shape} with factorization {given.roles!r}: "
            f"wanted A {wanted[0]} and B {wanted[1]}"
        )
    return given


def given_split(path: str, parts: Mapping[str, Any], config: LoraConfig) -> Factorization | None:
    """The factorization that the configuration gives for A and B, their weight unknown; None where it gives none.

    Raises:
      AdapterError: A and B have other numbers of axes.
    """
    a_shape, b_shape = np.shape(parts["A"]), np.shape(parts["B"])
    for pattern, roles in config.matches("factorizations", path):
        batch, ins, outs = (roles.count(role) for role in "bio")
        if (len(a_shape), len(b_shape)) != (batch + ins + 1, batch + outs + 1):
            raise AdapterError(
                f"A {a_shape} and B {b_shape} do not fit the factorization {roles!r} given by {pattern!r}"
            )
        return Factorization(roles)
    return None


def batch_dims_of(path: str, parts: Mapping[str, Any], config: LoraConfig) -> int:
    """How many batch axes A and B have, their weight unknown: by the configuration, or by their shapes.

    Raises:
      AdapterError: A and B do not fit each other or the factorization that the configuration gives, or fit in two ways.
    """
    split = given_split(path, parts, config)
    given = None if split is None else len(split.axes("b"))
    way_out = f"give the configuration factorizations={{{literal_pattern(path)!r}: 'bio'}} or the like to say"
    return split_batch_axes(np.shape(parts["A"]), np.shape(parts["B"]), given, way_out)


def in_structure(params: Any, entries: Mapping[str, Any], config: LoraConfig) -> Any:
    """Entries of the adapters, by path, in the structure of params, `None` elsewhere; in boxes as their weights."""
    shapes = shapes_by_path(params)

    def entry_at(key_path: Any, weight: Any) -> Any:
        path = path_string(key_path)
        entry = entries.get(path)
        if entry is None or not is_box(weight):
            return entry
        return boxed_entry(weight, entry, split_of(path, shapes, entry, config))

    return map_with_path(entry_at, params, is_param)


def _without_effect(params: Any, config: LoraConfig, adapted: list[str]) -> list[str]:
    """A problem for every pattern without effect on the entries at hand."""

    def found(left_out: Sequence[LeftOut]) -> list[str]:
        paths, unadapted = list(shapes_by_path(params)), "without an adapter at hand"
        return list(unused_patterns(config, paths, adapted, unadapted, left_out=left_out))

    return found(survey(params, config).left_out) if found(()) else []
