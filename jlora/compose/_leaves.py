"""What two params trees have in common, and what not."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jlora.arrays import is_jax_array, is_number
from jlora.paths import format_nearest

ALONE = "in one of the two alone"
RESHAPED = "of another shape"
UNFIT = "no weight of known axes"
UNTARGETED = "not targeted"


def unlike(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The paths of leaves that cannot be compared, each with why, and what there is to say of it."""
    for path, leaf in base.items():
        if path not in tuned:
            yield path, ALONE, f"{path}: in base, not in tuned; {format_nearest(path, tuned)}"
        elif (shape := getattr(leaf, "shape", ())) != (other := getattr(tuned[path], "shape", ())):
            problem = f"{path}: shape {tuple(shape)} in base, {tuple(other)} in tuned"
            yield path, RESHAPED, f"{problem}: exclude_modules leaves it out, whole carries it"
    for path in tuned:
        if path not in base:
            yield path, ALONE, f"{path}: in tuned, not in base; {format_nearest(path, base)}"


def is_changed(base: Any, tuned: Any) -> bool:
    """Whether two leaves of one shape differ; what is no array of numbers does not count."""
    if not (_is_numeric(base) and _is_numeric(tuned)):
        return False
    x, y = np.asarray(base), np.asarray(tuned)
    return not bool(np.all((x == y) | ((x != x) & (y != y))))


def copied(leaf: Any) -> Any:
    """An array of its own with the numbers of a leaf."""
    return leaf.copy() if is_jax_array(leaf) else np.array(leaf)


def _is_numeric(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and (is_number(leaf.dtype) or leaf.dtype == np.bool_)
