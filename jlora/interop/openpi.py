"""The LoRA of openpi: base, adapters and a configuration from its params.

    <module>/lora_a, <module>/lora_b beside <module>/w    of an einsum; the update is scaled
    <name>_lora_a, <name>_lora_b beside <name>            of the feed forward; it is not scaled

A has the weight's axes with r for the last, B with r for the last but one, and all others are axes of the einsum that a
and b have in common (openpi, src/openpi/models/lora.py). Of the heads of attn_vec_einsum the sum is taken after each of
the two products, so that its update is that of a and of the sum of b over the heads.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.errors import DataError, raise_all
from jlora.interop._beside import Converted, Keys, config_of, leaves_of, nested, paired, path_of

__all__ = ["from_openpi"]

_SUMMED = re.compile(r"attn_vec_einsum(_\d+)?")


def from_openpi(params: Mapping[str, Any], *, alpha: float | None = None, rslora: bool = False) -> Converted:
    """Params of openpi as base, adapters and their configuration.

    Args:
      params: nested mappings, or flat ones by `a/b/c` or `a.b.c`; with an axis for the layers or without one.
      alpha: of the LoRAConfig of the attention, which the params do not hold; None where it is the rank, as in openpi's
        own variants.
      rslora: whether that LoRAConfig has rslora.

    Returns:
      `(base, adapters, config)`, as of `jlora.interop.gemma.from_gemma`.

    Raises:
      DataError: LoRA params that cannot be mapped, all paths named; no LoRA params at all.

    >>> from jax.numpy import ones
    >>> params = {"q_einsum": {"w": ones((2, 7, 5)), "lora_a": ones((2, 7, 3)), "lora_b": ones((2, 3, 5))}}
    >>> base, adapters, config = from_openpi(params)
    >>> adapters["q_einsum"]["w"]["A"].shape, dict(config.factorizations)
    ((2, 7, 3), {'q_einsum/w': 'bio'})
    """
    leaves = leaves_of(params)
    pairs: dict[Keys, dict[str, Keys]] = {}
    for keys in leaves:
        if match := re.fullmatch(r"(?:(.+)_)?lora_([ab])", str(keys[-1])):
            pairs.setdefault((*keys[:-1], match[1] or "w"), {})[match[2]] = keys
    problems: list[str] = []
    found = list(paired(pairs, leaves, problems, lambda keys, _: [keys]))
    adapters: dict[Keys, Any] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    roles: dict[str, str] = {}
    for each in found:
        path, shape = path_of(each.weight), tuple(leaves[each.weight].shape)
        a, b = leaves[each.a], leaves[each.b]
        rank = a.shape[-1] if a.ndim else 0
        if len(shape) < 2 or a.shape != (*shape[:-1], rank) or b.shape != (*shape[:-2], rank, shape[-1]):
            problems.append(f"{path}: lora a {a.shape} and b {b.shape} do not fit the weight {shape}")
            continue
        is_einsum = each.a[-1] == "lora_a"
        is_summed = is_einsum and len(each.a) > 1 and _SUMMED.fullmatch(str(each.a[-2])) is not None
        if is_summed and len(shape) < 3:
            problems.append(f"{path}: the weight {shape} has no axis for the heads")
            continue
        adapters[each.weight] = {"A": a, "B": _summed(b) if is_summed else b}
        ranks[path] = rank
        alphas[path] = _alpha(alpha, rank, rslora) if is_einsum else float(rank)
        roles[path] = "b" * (len(shape) - 3) + "iio" if is_summed else "b" * (len(shape) - 2) + "io"
    if not problems and not adapters:
        problems.append(f"no params of openpi's LoRA among {len(leaves)} leaves")
    raise_all(problems, DataError, "openpi")
    lora = {each.a for each in found} | {each.b for each in found}
    base = {keys: leaf for keys, leaf in leaves.items() if keys not in lora}
    return nested(base), nested({keys: adapters.get(keys) for keys in base}), config_of(ranks, alphas, roles)


def _summed(b: Any) -> Any:
    """The sum of b (*batch, heads, r, out) over the heads."""
    wide = np.asarray(b).astype(np.float64).sum(axis=-3)
    return wide if b.dtype == np.float64 else wide.astype(np.float32)


def _alpha(alpha: float | None, rank: int, rslora: bool) -> float:
    """The alpha for which alpha / rank is the scaling."""
    given = float(rank) if alpha is None else alpha
    return given * math.sqrt(rank) if rslora else given
