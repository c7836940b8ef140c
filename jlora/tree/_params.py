"""Adapters over a params pytree: made, merged and taken out again."""

from collections.abc import Callable
from typing import Any

import chex
import jax

from jlora.adapter import init_lora_adapter, is_adapter, merge_lora_weight, unmerge_lora_weight
from jlora.config import LoraConfig
from jlora.errors import AdapterError, TargetError
from jlora.paths import leaves_by_path, path_number, path_string
from jlora.tree._targets import adapted_targets, check_floating, find_targets


def init_lora(key: chex.PRNGKey | None, params: Any, config: LoraConfig) -> Any:
    """The adapters of a params tree, with B zero: the model is unchanged.

    Args:
      key: PRNG key; `None` for `jax.random.key(config.seed)`. Each adapter's key is derived from it and the path,
        so that another target does not change the others.
      params: a pytree of arrays or of `jax.ShapeDtypeStruct`: dicts, lists, FrozenDicts, dataclasses.
      config: what is adapted and how.

    Returns:
      A pytree of the structure of `params`: an adapter where a weight is adapted, `None` elsewhere.

    Raises:
      TargetError: the configuration does not fit the tree; every problem is named with its path.

    >>> params = {'up': {'kernel': jax.numpy.ones((5, 7)), 'bias': jax.numpy.ones(7)}}
    >>> jax.tree.map(jax.numpy.shape, init_lora(jax.random.key(0), params, LoraConfig(rank=2)))
    {'up': {'bias': None, 'kernel': {'A': (5, 2), 'B': (2, 7)}}}
    """
    targets = find_targets(params, config)
    root = jax.random.key(config.seed) if key is None else key

    def adapter_at(key_path: Any, weight: Any) -> Any:
        path = path_string(key_path)
        target = targets.get(path)
        if target is None:
            return None
        return init_lora_adapter(
            jax.random.fold_in(root, path_number(path)),
            weight,
            target.rank,
            init_std=config.init_std,
            dtype=config.dtype,
            factorization=target.factorization,
            init=config.init,
        )

    return jax.tree_util.tree_map_with_path(adapter_at, params)


def merge_params(params: Any, adapters: Any, config: LoraConfig) -> Any:
    """The params with every update folded into its weight: an ordinary params tree again.

    Args:
      params: the base.
      adapters: adapters at the paths of their weights, `None` or nothing elsewhere. Every pattern of the configuration
        must have one.
      config: the configuration that the adapters were made with; it holds alpha and the scaling.

    Returns:
      The structure, shapes and dtypes of `params`; leaves without an adapter are the same array objects. In bf16 and
      fp16 the sum is formed in float32 and rounded once.

    Raises:
      TargetError: adapters, params and configuration do not fit; every problem is named with its path.

    >>> params = {'kernel': jax.numpy.zeros((2, 3))}
    >>> adapters = {'kernel': {'A': jax.numpy.ones((2, 1)), 'B': jax.numpy.ones((1, 3))}}
    >>> merge_params(params, adapters, LoraConfig(rank=1, alpha=2))['kernel'][0].tolist()
    [2.0, 2.0, 2.0]
    """
    return _fold(params, adapters, config, merge_lora_weight)


def unmerge_params(merged: Any, adapters: Any, config: LoraConfig) -> Any:
    """The params with every update taken out, by the arithmetic of `merge_params` backwards.

    Rounding to the weights' dtypes loses bits that no subtraction brings back: where the base must return to the
    bit, keep it.
    """
    return _fold(merged, adapters, config, unmerge_lora_weight)


def _fold(params: Any, adapters: Any, config: LoraConfig, fold: Callable[..., jax.Array]) -> Any:
    targets = adapted_targets(params, adapters, config)
    leaves = leaves_by_path(params)
    check_floating({path: leaves[path] for path in targets})
    by_path = leaves_by_path(adapters, is_leaf=is_adapter)

    def folded(key_path: Any, weight: Any) -> Any:
        path = path_string(key_path)
        target = targets.get(path)
        if target is None:
            return weight
        try:
            return fold(weight, by_path[path], target.effective_alpha, factorization=target.factorization)
        except AdapterError as error:
            raise TargetError(f"{path}: {error}") from None

    return jax.tree_util.tree_map_with_path(folded, params)
