"""The LoRA of qwix: base, adapters and a configuration from its params.

<weight>_lora_a and <weight>_lora_b lie beside <weight>. The update is alpha / rank * a@b.
"""

import re
from collections.abc import Mapping
from typing import Any

from jlora.interop._beside import Converted, Keys, converted, leaves_of, paired

__all__ = ["from_qwix"]


def from_qwix(
    params: Mapping[str, Any], *, alpha: float | Mapping[str, float], factorizations: Mapping[str, str] | None = None
) -> Converted:
    """Params with the LoRA of qwix as base, adapters and their configuration.

    Args:
      params: nested mappings of a Linen model, an `nnx.State` of an NNX one, or flat by `a/b/c` or `a.b.c`; the arrays
        may stand in Flax's boxes.
      alpha: of the LoraProvider, which the params do not hold: the update is alpha / rank * a@b; or pattern -> alpha
        where there are several rules, the first that matches wins.
      factorizations: as of `from_gemma`.

    Returns:
      `(base, adapters, config)`, as of `from_gemma`. The LoRA of a grouped convolution is no update of its kernel, and
      cannot be told from shapes: leave such layers out in qwix.

    Raises:
      DataError: LoRA params that cannot be mapped, all paths named: no weight beside them, a quantized weight, shapes
        that do not fit it or fit in several ways, no alpha for a path; no LoRA params at all.

    >>> from jax.numpy import ones
    >>> params = {'kernel': ones((3, 5, 7)), 'kernel_lora_a': ones((3, 2)), 'kernel_lora_b': ones((2, 35))}
    >>> base, adapters, config = from_qwix(params, alpha=16)
    >>> adapters['kernel']['B'].shape, dict(config.factorizations)
    ((2, 5, 7), {'kernel': 'ioo'})
    """
    leaves = leaves_of(params)
    pairs: dict[Keys, dict[str, Keys]] = {}
    for keys in leaves:
        if match := re.fullmatch(r"(.+)_lora_([ab])", str(keys[-1])):
            pairs.setdefault((*keys[:-1], match[1]), {})[match[2]] = keys
    problems: list[str] = []
    found = list(paired(pairs, leaves, problems, lambda keys, _: [keys]))
    return converted("qwix", leaves, found, problems, dict(factorizations or {}), alpha)
