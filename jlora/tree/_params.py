"""Adapters over a params pytree: made, merged and taken out again."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jlora.adapter import (
    Entry,
    adapter_dtype,
    boxed_entry,
    count_lost,
    init_lora_adapter,
    init_magnitude,
    merged_weight,
    range_problem,
    unmerged_weight,
)
from jlora.boxes import box_like, unboxed
from jlora.config import RANDOM_INITS, LoraConfig
from jlora.contraction import Factorization
from jlora.errors import AdapterError, ConfigError, DataError, TargetError, raise_all
from jlora.lazy import is_lazy
from jlora.paths import is_param, leaves_by_path, path_number, path_string
from jlora.residual import Residual, pack, unpack
from jlora.tree._bind import bind
from jlora.tree._targets import check_config, check_floating, survey


def init_lora(key: chex.PRNGKey | None, params: Any, config: LoraConfig, *, strict: bool = False) -> Any:
    """The adapters of a params tree, with B zero: the model is unchanged.

    Args:
      key: PRNG key; `None` for `jax.random.key(config.seed)`. Each adapter's key is derived from it and the path,
        so that another target does not change the others.
      params: a pytree of arrays or of `jax.ShapeDtypeStruct`: dicts, lists, FrozenDicts, dataclasses. Of weights in
        boxes (`nn.Partitioned`) A and B come in boxes, with the weights' names of their axes and None for the rank.
      config: what is adapted and how.
      strict: whether a weight that a pattern spans and that cannot be adapted is an error; else it is left out, and
        `summary` says why.

    Returns:
      A pytree of the structure of `params`: an adapter where a weight is adapted, `None` elsewhere. Of kind "dora" it
      has a magnitude too, the norm of the weight for each of its outputs, which needs arrays.

    Raises:
      ConfigError: a configuration of kind "vera" or "xs".
      TargetError: the configuration does not fit the tree; every problem is named with its path.

    >>> params = {'up': {'kernel': jax.numpy.ones((5, 7)), 'bias': jax.numpy.ones(7)}}
    >>> jax.tree.map(jax.numpy.shape, init_lora(jax.random.key(0), params, LoraConfig(rank=2)))
    {'up': {'bias': None, 'kernel': {'A': (5, 2), 'B': (2, 7)}}}
    """
    check_config(config)
    if config.kind in ("vera", "xs"):
        raise ConfigError(
            f"kind = {config.kind!r}: a smaller tree is trained, which jlora.variants.init makes; of it "
            "jlora.variants.adapters makes the adapters"
        )
    if config.init not in RANDOM_INITS:
        raise ConfigError(
            f"init = {config.init!r}: begins at the weights, and may change them: jlora.start(key, params, config) "
            "returns the params, the adapters and the configuration"
        )
    return _made(key, params, config, strict)


def _made(
    key: chex.PRNGKey | None,
    params: Any,
    config: LoraConfig,
    strict: bool = False,
    make: Callable[..., dict[str, Any]] = init_lora_adapter,
) -> Any:
    targets = survey(params, config).checked(strict=strict).targets
    root = jax.random.key(config.seed) if key is None else key

    def adapter_at(key_path: Any, weight: Any) -> Any:
        path = path_string(key_path)
        target = targets.get(path)
        if target is None:
            return None
        array = unboxed(weight)
        adapter = make(
            jax.random.fold_in(root, path_number(path)),
            array,
            target.rank,
            init_std=config.init_std,
            dtype=adapter_dtype(array.dtype, config.dtype),
            factorization=target.factorization,
            init=config.init,
        )
        if config.kind == "dora":
            try:
                adapter["magnitude"] = init_magnitude(array.dense() if is_lazy(array) else array, target.factorization)
            except AdapterError as error:
                raise TargetError(f"{path}: {error}") from None
        return boxed_entry(weight, adapter, target.factorization)

    return jax.tree_util.tree_map_with_path(adapter_at, params, is_leaf=is_param)


def adapter_shapes(params: Any, config: LoraConfig) -> Any:
    """The shapes and dtypes of what `init_lora` makes of params, arrays or shapes; nothing is computed.

    Of the kinds "vera" and "xs" they are those of the adapters that `jlora.variants` makes.
    """
    targets = survey(params, config).targets
    weights = {path: weight for path, weight in leaves_by_path(params, is_leaf=is_param).items() if path in targets}

    def made(weights: Any) -> Any:
        def traced(key_path: Any, leaf: Any) -> Any:
            path = path_string(key_path)
            return box_like(leaf, weights[path]) if path in weights else leaf

        tree = jax.tree_util.tree_map_with_path(traced, params, is_leaf=is_param)
        drawn = config.kind in ("lora", "dora") and config.init in RANDOM_INITS
        return _made(None, tree, config, make=init_lora_adapter if drawn else _zeros)

    return jax.eval_shape(made, weights)


def _zeros(_: Any, weight: Any, rank: int, *, dtype: Any, factorization: Factorization, **__: Any) -> dict[str, Any]:
    """An A and a B of any rank; that of VeRA may be larger than the sides of the weight."""
    shapes = factorization.adapter_shapes(weight.shape, rank)
    return {name: jnp.zeros(shape, dtype) for name, shape in zip("AB", shapes, strict=True)}


def merge_params(params: Any, adapters: Any, config: LoraConfig, *, return_residual: bool = False) -> Any:
    """The params with every update folded into its weight: an ordinary params tree again.

    Args:
      params: the base.
      adapters: adapters at the paths of their weights, `None` or nothing elsewhere. Every pattern of the configuration
        must have one.
      config: the configuration that the adapters were made with; it holds alpha and the scaling.
      return_residual: False; with True this is `merge_params_with_residual`.

    Returns:
      The structure, shapes and dtypes of `params`; leaves without an adapter are the same objects, and a lazy base
      with one becomes a dense array. In bf16 and
      fp16 the sum is formed in float32 and rounded once.

    Raises:
      TargetError: adapters, params and configuration do not fit; every problem is named with its path. Outside jit,
        grad and vmap also a finite number of the base that is not finite any more: a sum that the dtype cannot hold, or
        an adapter that is not finite.

    >>> params = {'kernel': jax.numpy.zeros((2, 3))}
    >>> adapters = {'kernel': {'A': jax.numpy.ones((2, 1)), 'B': jax.numpy.ones((1, 3))}}
    >>> merge_params(params, adapters, LoraConfig(rank=1, alpha=2))['kernel'][0].tolist()
    [2.0, 2.0, 2.0]
    """
    if return_residual:
        return merge_params_with_residual(params, adapters, config)
    ranges = _Ranges()

    def merged(path: str, weight: Any, entry: Entry) -> jax.Array:
        return ranges.looked_at(path, weight, merged_weight(entry, weight), entry)

    tree = _fold(params, adapters, config, merged)
    ranges.check()
    return tree


def merge_params_with_residual(params: Any, adapters: Any, config: LoraConfig) -> tuple[Any, dict[str, Residual]]:
    """What `merge_params` returns, and the bits that `unmerge_params` would miss, by path; outside jit only.

    >>> params = {'kernel': jax.numpy.full((2, 3), 0.1, 'bfloat16')}
    >>> adapters = {'kernel': {'A': jax.numpy.ones((2, 1)), 'B': jax.numpy.ones((1, 3))}}
    >>> config = LoraConfig(rank=1, alpha=2)
    >>> merged, residual = merge_params_with_residual(params, adapters, config)
    >>> base = unmerge_params(merged, adapters, config, residual=residual)
    >>> bool((base['kernel'] == params['kernel']).all())
    True
    """
    residuals: dict[str, Residual] = {}
    ranges = _Ranges()

    def merged(path: str, weight: Any, entry: Entry) -> jax.Array:
        result = ranges.looked_at(path, weight, merged_weight(entry, weight), entry)
        residuals[path] = pack(_concrete(weight), _concrete(unmerged_weight(entry, result)))
        return result

    tree = _fold(params, adapters, config, merged)
    ranges.check()
    return tree, residuals


def unmerge_params(
    merged: Any, adapters: Any, config: LoraConfig, *, residual: Mapping[str, Residual] | None = None
) -> Any:
    """The params with every update taken out, by the arithmetic of `merge_params` backwards.

    Rounding to the weights' dtypes loses bits that no subtraction brings back: where the base must return to the bit,
    keep it, or merge by `merge_params_with_residual` and pass the residual that it returned; outside jit only.

    Raises:
      TargetError: adapters, params and configuration do not fit; an update that cannot be taken out without a residual
        (a weight that was replaced, DoRA); a residual that does not lead back to the base; a difference that the dtype
        cannot hold, as for `merge_params`.
    """
    ranges = _Ranges()

    def unmerged(path: str, weight: Any, entry: Entry) -> jax.Array:
        if residual is None and not entry.is_reversible:
            names = ", ".join(entry.parts)
            raise AdapterError(f"an update of {names} cannot be taken out; keep the base, or a residual")
        guess = unmerged_weight(entry, weight)
        if residual is None:
            return ranges.looked_at(path, weight, guess, entry)
        if path not in residual:
            raise AdapterError("the residual has no entry for it; pass what merge_params returned for these adapters")
        return jax.device_put(unpack(residual[path], _concrete(guess)), getattr(weight, "sharding", None))

    tree = _fold(merged, adapters, config, unmerged)
    ranges.check()
    return tree


def _fold(params: Any, adapters: Any, config: LoraConfig, fold: Callable[..., Any]) -> Any:
    entries = bind(params, adapters, config)
    leaves = leaves_by_path(params)
    check_floating({path: leaves[path] for path in entries})

    def folded(key_path: Any, weight: Any) -> Any:
        path = path_string(key_path)
        if path not in entries:
            return weight
        try:
            array = unboxed(weight)
            result = fold(path, array.dense() if is_lazy(array) else array, entries[path])
        except (AdapterError, DataError) as error:
            raise TargetError(f"{path}: {error}") from None
        return box_like(weight, result)

    return jax.tree_util.tree_map_with_path(folded, params, is_leaf=is_param)


class _Ranges:
    """Whether the sums of a tree fit their dtypes, asked when all are under way."""

    def __init__(self) -> None:
        self._counts: dict[str, Any] = {}
        self._sums: dict[str, tuple[jax.Array, Any]] = {}

    def looked_at(self, path: str, before: Any, after: jax.Array, entry: Entry) -> jax.Array:
        """The sum itself."""
        self._counts[path], self._sums[path] = count_lost(before, after, entry.parts), (after, entry.parts)
        return after

    def check(self) -> None:
        """Raises a TargetError for every path where numbers were lost."""
        lost = {path: int(count) for path, count in jax.device_get(self._counts).items() if count}
        problems = [f"{path}: {range_problem(count, *self._sums[path])}" for path, count in lost.items()]
        raise_all(problems, TargetError)


def _concrete(array: Any) -> Any:
    if isinstance(array, jax.core.Tracer):
        raise AdapterError("a residual needs arrays of numbers: call outside jit, grad and vmap")
    return array
