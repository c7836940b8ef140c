"""The LoRA layers of gemma.peft: base, adapters and a configuration from their params.

They lie at <module>/lora/{a, b} beside the weight of the module, and at <module>/_LoRAEinsum_<name>/lora/{a, b} beside
the weight <name>, or `w` for a number as the name (gm.nn.LoRA around a Gemma model). The update is a@b.
"""

import re
from collections.abc import Mapping
from typing import Any

from jlora.interop._beside import Converted, Keys, Leaves, converted, leaves_of, paired

__all__ = ["from_gemma"]

_WRAPPER = re.compile(r"_LoRAEinsum_(.+)")
_NOT_WEIGHTS = ("bias", "scale")


def from_gemma(params: Mapping[str, Any], *, factorizations: Mapping[str, str] | None = None) -> Converted:
    """Params with the LoRA layers of gemma.peft as base, adapters and their configuration.

    The update of these layers is a@b, with no alpha: the configuration has alpha = rank at every path.

    Args:
      params: nested mappings that hold base and LoRA params, or flat ones by `a/b/c` or `a.b.c`; arrays or shapes.
      factorizations: pattern -> one letter per axis of the weight, b (batch), i (in) or o (out), for weights whose
        shape can be read in several ways.

    Returns:
      `(base, adapters, config)`: the params without their LoRA; adapters of the same structure, `A (*batch, *in, r)`
      and `B (*batch, r, *out)` in their own dtypes; the configuration for which `jlora.merge_params(base, adapters,
      config)` is what gemma computes.

    Raises:
      DataError: LoRA params that cannot be mapped, all paths named: no weight beside them, shapes that do not fit it or
        fit in several ways; no LoRA params at all.

    >>> from jax.numpy import ones
    >>> params = {'up': {'kernel': ones((3, 5)), 'lora': {'a': ones((3, 2)), 'b': ones((2, 5))}}}
    >>> base, adapters, config = from_gemma(params)
    >>> base['up'].keys(), adapters['up']['kernel']['B'].shape, config.alpha / config.rank
    (dict_keys(['kernel']), (2, 5), 1.0)
    """
    leaves = leaves_of(params)
    pairs: dict[Keys, dict[str, Keys]] = {}
    for keys in leaves:
        if len(keys) > 1 and keys[-2] == "lora" and keys[-1] in ("a", "b"):
            pairs.setdefault(keys[:-2], {})[keys[-1]] = keys
    problems: list[str] = []
    found = list(paired(pairs, leaves, problems, _gemma_weight))
    return converted("gemma.peft", leaves, found, problems, dict(factorizations or {}), None)


def _gemma_weight(module: Keys, leaves: Leaves) -> list[Keys]:
    """The weights that the `lora` of a module may belong to; one of Flax's names before any other."""
    if module and (wrapper := _WRAPPER.fullmatch(str(module[-1]))):
        return [(*module[:-1], "w" if wrapper[1].isdigit() else wrapper[1])]
    beside = [
        k
        for k, leaf in leaves.items()
        if k[:-1] == module and k[-1] not in _NOT_WEIGHTS and len(getattr(leaf, "shape", ())) > 1
    ]
    named = [keys for keys in beside if keys[-1] in ("kernel", "w")]
    return named if len(named) == 1 else beside
