"""Adapters of another rank."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jlora.arrays import is_jax_array
from jlora.compose._factors import Held, padded, read_entries, replaced, rounded, truncated
from jlora.config import LoraConfig, Pairs, effective_alpha
from jlora.errors import AdapterError, raise_all
from jlora.paths import format_nearest, literal_pattern, matched_depths
from jlora.tree import check_config


def resize(
    adapters: Any, config: LoraConfig, rank: int, *, rank_pattern: Mapping[str, int] | Pairs = ()
) -> tuple[Any, LoraConfig]:
    """Adapters of another rank, each the best approximation of its delta: the truncated SVD.

    min ||s_old A@B - s_new A'@B'||_F over A', B' of the new rank, from the factors alone; the dense delta is never
    built. alpha and the scaling mode stay, so that s changes with the rank, and A' and B' absorb it. Where the rank
    shrinks, the roots of the singular values go to A' and to B'.

    What else an entry holds has no rank and stays: a value; an offset, multiplied by s_old / s_new, so that its update
    is the same; the magnitude m of DoRA. The weight m V/||V||, V = W + s A@B, keeps its norms then; of all V of that
    rank it has the nearest, which may not give the nearest weight: to find that one takes W, which is not at hand.

    Args:
      adapters: entries of any floating dtype, `None` where nothing is adapted.
      config: the configuration that they were made with.
      rank: the new rank, at least 1 and at most the smaller side of each weight. Where it is larger than the old one
        the delta is kept, and zero columns are added to A' and B'; these have no gradient until one of the two is
        made random.
      rank_pattern: pattern -> rank, for paths that differ; it replaces that of `config`.

    Returns:
      Adapters in the structure and dtypes of `adapters`, and their configuration. The arithmetic is in float64 and
      rounded once. float64 adapters are NumPy arrays where JAX does not have x64 enabled, as those of NumPy ones are.

    Raises:
      ConfigError: a rank that is no whole number of at least 1.
      AdapterError: with every problem at once: a node that is no entry, no A and B at all, a rank larger than the
        smaller side, a pattern that matches nothing, a number that is not finite.

    >>> adapters = {'up': {'A': np.eye(3, 2, dtype='float32'), 'B': np.array([[1., 0.], [0., 3.]], 'float32')}}
    >>> small, config = resize(adapters, LoraConfig(rank=2, alpha=2), rank=1)
    >>> delta = config.effective_alpha_of('up') / 1 * small['up']['A'] @ small['up']['B']
    >>> abs(delta).round(4).tolist()
    [[0.0, 0.0], [0.0, 3.0], [0.0, 0.0]]

    Eckart and Young 1936, "The approximation of one matrix by another of lower rank", Psychometrika 1.
    """
    check_config(config)
    resized = config.replace(rank=rank, rank_pattern=rank_pattern)
    found = read_entries(adapters, config)
    raise_all(_problems(found, resized), AdapterError)
    by_path = {}
    for path, held in found.items():
        old, new = config.rank_of(path), resized.rank_of(path)
        # One alpha divides out of s_old / s_new, also where it is 0.
        ratio = _scaling_of_one(old, config.scaling) / _scaling_of_one(new, config.scaling)
        by_path[path] = _with_rank(path, held, new, ratio)
    return replaced(adapters, by_path), resized


def _scaling_of_one(rank: int, scaling: str) -> float:
    """The scaling at an alpha of 1."""
    return effective_alpha(1.0, rank, scaling) / rank


def _with_rank(path: str, held: Held, rank: int, ratio: float) -> dict[str, Any]:
    """The entry at another rank; A@B and the offset are multiplied by the ratio of the scalings."""
    entry = dict(held.others)
    if "offset" in entry:
        offset = entry["offset"]
        wide = np.asarray(offset).astype(np.float64) * ratio
        entry["offset"] = rounded(path, wide, offset.dtype, is_jax_array(offset))
    factors = held.factors
    if factors is None:
        return entry
    if rank >= factors.rank:
        return entry | factors.adapter(path, *padded(factors.a, factors.b * ratio, rank))
    root = np.sqrt(ratio)
    return entry | factors.adapter(path, *truncated(factors.a * root, factors.b * root, rank))


def _problems(found: Mapping[str, Held], config: LoraConfig) -> Iterator[str]:
    adapted = {path: held.factors for path, held in found.items() if held.factors is not None}
    if found and not adapted:
        yield f"{next(iter(found))}: neither this nor any other entry holds A and B; wanted some that have a rank"
    for pattern in dict(config.rank_pattern):
        if not any(matched_depths(pattern, path) for path in adapted):
            yield f"rank_pattern: {pattern!r} matches nothing that is adapted; {format_nearest(pattern, adapted)}"
    for path, factors in adapted.items():
        rank, most = config.rank_of(path), factors.smaller_side
        if rank > most:
            yield (
                f"{path or 'the root'}: rank {rank} is larger than the smaller side {most}; lower it, or give "
                f"rank_pattern={{{literal_pattern(path)!r}: {most}}}"
            )
