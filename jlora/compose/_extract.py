"""Adapters from a base and its fine-tuned copy."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlora.arrays import is_floating, is_jax_array
from jlora.compose._difference import difference_of, squared_norm, squared_residual
from jlora.compose._factors import balanced, rounded, unit_config
from jlora.compose._leaves import UNFIT, UNTARGETED, copied, is_changed, unlike
from jlora.compose._report import Extracted, Extraction
from jlora.compose._svd import stacked_triples
from jlora.config import LoraConfig
from jlora.contraction import Factorization
from jlora.errors import AdapterError, ConfigError, TargetError, listed, raise_all
from jlora.fields import integer, number, refusal
from jlora.paths import PatternIndex, format_nearest, leaves_by_path, path_number
from jlora.tree import find_targets, in_structure, is_targeted


def extract_weight(
    base: Any,
    tuned: Any,
    factorization: Factorization | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    dtype: Any = None,
) -> tuple[dict[str, Any], Extracted]:
    """The best adapter of one weight's difference D = tuned - base: its truncated SVD.

    A@B = U_r diag(s_r) V_r^H, the roots of the singular values on each side, so that the scaling is 1 (alpha = rank).
    Exact where the smaller side is at most 512 or the rank a large share of it; else from a random sketch.

    Args:
      base: `(*batch, *in, *out)` in the order that `factorization` says, of any floating dtype.
      tuned: the same shape.
      factorization: one letter per axis, `b`, `i` or `o`.
      rank: at least 1 and at most the smaller side, the same for every entry of the batch axes.
      energy: 0 < energy <= 1, the share of ||D||_F^2, over all entries together, that is to be kept: by the smallest
        rank that does, at most `rank` where it is given. One of the two is needed.
      seed: of the sketch.
      dtype: of A and B; float32 unless given, float64 for float64 weights.

    Returns:
      `{'A': (*batch, *in, r), 'B': (*batch, r, *out)}` and how well it does. The difference is formed and factored in
      float32, in float64 for float64 weights; zero where nothing changed. float64 adapters are NumPy arrays where JAX
      does not have x64 enabled.

    Raises:
      ConfigError: rank, energy, seed or dtype are not allowed.
      AdapterError: shapes that differ, a dtype that is not floating, a rank larger than the smaller side, a difference
        that is not finite.

    >>> base, tuned = np.zeros((3, 2), 'float32'), np.diag([4., 3.]).astype('float32')
    >>> adapter, found = extract_weight(base, np.vstack([tuned, [[0., 0.]]]), "io", rank=1)
    >>> np.asarray(adapter['A'] @ adapter['B']).round(4).tolist(), round(found.error, 4), round(found.norm, 4)
    ([[4.0, 0.0], [0.0, 0.0], [0.0, 0.0]], 0.6, 5.0)

    Eckart and Young 1936, Psychometrika 1; Halko, Martinsson and Tropp 2011, arXiv 0909.4061.
    """
    split = factorization if isinstance(factorization, Factorization) else Factorization(factorization)
    if rank is None and energy is None:
        raise ConfigError("extract_weight: give rank=, energy=, or both")
    most = None if rank is None else integer("rank", rank, 1)
    return _extracted(base, tuned, split, most, _energy(energy), (integer("seed", seed, 0, 2**32),), dtype)


def extract(
    base: Any,
    tuned: Any,
    config: LoraConfig,
    *,
    energy: float | None = None,
    seed: int = 0,
    whole: str | Sequence[str] = (),
) -> tuple[Any, LoraConfig, Extraction]:
    """The best adapters of the difference of two params trees; see `extract_weight`.

    Args:
      base: the params that the adapters will be added to.
      tuned: the fine-tuned params, of the same paths and shapes but for what `config` does not target.
      config: which weights are adapted, with what rank and dtype (float32, float64 for float64 weights, unless given).
      energy: where given, each weight has the smallest rank that keeps this share of its squared Frobenius norm, at
        most that of `config`.
      seed: of the random sketches, together with each path.
      whole: patterns on the paths of leaves that are carried as they are, as `{'value': array}`, where they changed and
        have no adapter: biases, norms, buffers, embeddings with more rows.

    Returns:
      Adapters in the structure of `base`, `None` also where a weight did not change at all; their configuration, which
      targets each by its path, with the ranks found and a scaling of 1; and a table of what is kept of each, which
      says what is carried whole and what is left out.

    Raises:
      TargetError: the trees differ in paths or shapes, or the configuration does not fit; every problem is named.
      AdapterError: a weight cannot be extracted, with its path; or none of them changed and nothing is carried.

    >>> base = {'up': {'kernel': np.zeros((3, 2), 'float32'), 'bias': np.zeros(2, 'float32')}}
    >>> tuned = {'up': {'kernel': np.ones((3, 2), 'float32'), 'bias': np.ones(2, 'float32')}}
    >>> adapters, found, report = extract(base, tuned, LoraConfig(rank=2), energy=0.99)
    >>> found.rank, adapters['up']['kernel']['A'].shape, report.left_out
    (1, (3, 1), ('up/bias',))
    """
    share, seed = _energy(energy), integer("seed", seed, 0, 2**32)
    leaves, others = leaves_by_path(base), leaves_by_path(tuned)
    targets = find_targets(base, _of_base(config, leaves, others))
    wholes = _wholes(whole, [path for path in leaves if path in others], config)
    other = {path: (why, problem) for path, why, problem in unlike(leaves, others)}
    wanted = [path for path in other if is_targeted(config, path) and path not in wholes]
    raise_all((other[path][1] for path in wanted), TargetError)
    targets = {path: target for path, target in targets.items() if path not in other}
    changed = {path: path in other or is_changed(leaf, others[path]) for path, leaf in leaves.items()}
    changed |= dict.fromkeys((path for path in other if path not in leaves), True)
    adapters: dict[str, Any] = {}
    found: list[Extracted] = []
    for path, target in targets.items():
        if not changed[path]:
            continue
        weights, stream = (leaves[path], others[path]), (seed, path_number(path))
        try:
            adapter, one = _extracted(*weights, target.factorization, target.rank, share, stream, config.dtype)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from None
        adapters[path] = adapter
        found.append(dataclasses.replace(one, path=path))
    rest = [path for path, differs in changed.items() if differs and path not in adapters]
    carried = [path for path in rest if path in wholes]
    if not found and not carried:
        raise AdapterError(_why_none(rest))
    ranks = {one.path: one.rank for one in found}
    roles = {path: targets[path].factorization.roles for path in ranks}
    roles = {path: own for path, own in roles.items() if own != "io" or any(config.matches("factorizations", path))}
    unchanged = tuple(path for path in targets if path not in adapters)
    adapters |= {path: {"value": copied(others[path])} for path in carried}
    why = {path: _why(path, config, other) for path in rest if path not in wholes}
    report = Extraction(tuple(found), unchanged, tuple(why), tuple(carried), why)
    own = unit_config(config, ranks, roles, carried)
    return in_structure(base, adapters, own), own, report


def _energy(energy: Any) -> float | None:
    if energy is None:
        return None
    share = number("energy", energy, wanted="a share 0 < energy <= 1")
    if not 0 < share <= 1:
        raise refusal("energy", energy, "a share 0 < energy <= 1")
    return share


def _wholes(patterns: str | Sequence[str], paths: Sequence[str], config: LoraConfig) -> frozenset[str]:
    """The paths that the patterns match.

    Raises:
      TargetError: a pattern that matches nothing.
    """
    given = config.replace(target_modules=patterns, exclude_modules=()).target_modules if patterns else ()
    index = PatternIndex((pattern, None) for pattern in given)
    matched = {path: [pattern for pattern, _ in index.matches(path)] for path in paths}
    used = {pattern for found in matched.values() for pattern in found}
    unused = [pattern for pattern in given if pattern not in used]
    problems = (f"whole: {pattern!r} matches nothing; {format_nearest(pattern, paths)}" for pattern in unused)
    raise_all(problems, TargetError)
    return frozenset(path for path, found in matched.items() if found)


def _of_base(config: LoraConfig, base: Mapping[str, Any], tuned: Mapping[str, Any]) -> LoraConfig:
    """The configuration without the patterns that exclude what is in the tuned params alone."""
    used: dict[str, None] = {}
    alone: dict[str, None] = {}
    for path in {**base, **tuned}:
        (used if path in base else alone).update(config.matches("exclude_modules", path))
    return config.replace(exclude_modules=tuple(p for p in config.exclude_modules if p in used or p not in alone))


def _why_none(rest: Sequence[str]) -> str:
    """What to say where there is nothing to extract; `rest` is what changed all the same."""
    if not rest:
        return "none of the targeted weights changed: base and tuned are the same there"
    return (
        f"none of the targeted weights changed; what did has no adapter: {listed(rest)}; whole= carries such as it is "
        "(the command extract does, but for --adapters-only and the format mlx)"
    )


def _why(path: str, config: LoraConfig, other: Mapping[str, tuple[str, str]]) -> str:
    """Why a leaf that changed is left out."""
    if path in other:
        return other[path][0]
    return UNFIT if is_targeted(config, path) else UNTARGETED


def _extracted(
    base: Any,
    tuned: Any,
    split: Factorization,
    rank: int | None,
    energy: float | None,
    stream: tuple[int, ...],
    dtype: Any,
) -> tuple[dict[str, Any], Extracted]:
    shape = tuple(np.shape(base))
    if np.shape(tuned) != shape:
        raise AdapterError(f"the base is of shape {shape}, the tuned weight of {np.shape(tuned)}")
    most = split.max_rank(shape)
    if rank is not None and rank > most:
        raise AdapterError(f"rank {rank} is larger than the smaller side {most} of the weight {shape}")
    difference = difference_of(base, tuned, split)
    total = squared_norm(difference)
    if not math.isfinite(total):
        raise AdapterError("the difference of tuned and base is not finite")
    triples = stacked_triples(difference, most if rank is None else rank, energy, stream)
    pairs = [balanced(u.astype(np.float64), s.astype(np.float64), vh.astype(np.float64)) for u, s, vh in triples]
    a = np.stack([one_a for one_a, _ in pairs])  # (n, in, r)
    b = np.stack([one_b for _, one_b in pairs])  # (n, r, out)
    found, a_shape, b_shape = a.shape[-1], *split.adapter_shapes(shape, a.shape[-1])
    to = _adapter_dtype(dtype, difference.dtype)
    is_jax = is_jax_array(base) or is_jax_array(tuned)
    adapter = {"A": rounded("A", a.reshape(a_shape), to, is_jax), "B": rounded("B", b.reshape(b_shape), to, is_jax)}
    a, b = (np.asarray(adapter[name], np.float64).reshape(full.shape) for name, full in (("A", a), ("B", b)))
    error = math.sqrt(squared_residual(difference, a, b) / total) if total else 0.0
    return adapter, Extracted("", shape, found, max(0.0, 1 - error**2), error, math.sqrt(total))


def _adapter_dtype(dtype: Any, wide: Any) -> Any:
    to = wide if dtype is None else np.dtype(dtype)
    if not is_floating(to):
        raise refusal("dtype", dtype, "a floating dtype")
    return to
