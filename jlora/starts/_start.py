"""`start`: adapters that begin at the weights, and the base that belongs to them."""

import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapter import adapter_dtype, is_entry, part_axes, part_sharding
from jlora.boxes import box_like, unboxed
from jlora.config import CUSTOM_INIT, MATRIX_INITS, LoraConfig, effective_alpha
from jlora.errors import AdapterError, ConfigError, JloraError, TargetError
from jlora.lazy import is_lazy
from jlora.paths import is_param, leaves_by_path, path_number, path_string
from jlora.starts._matrices import STARTS, MatrixStart, check_begin
from jlora.tree import Target, batch_dims_of, check_config, in_structure, survey


class Started(NamedTuple):
    """Adapters at their start, and the params that they are trained over.

    Attributes:
      params: the base, without what the start took out of it; the same objects where it took nothing.
      adapters: as of `init_lora`.
      config: of these adapters.
    """

    params: Any
    adapters: Any
    config: LoraConfig

    def plain(self, adapters: Any) -> tuple[Any, LoraConfig]:
        """Trained adapters as plain LoRA over the original params: of twice the rank, A = [A A0], B = [B; -B0].

        What is added to the original params is scaling (A B - A0 B0), exactly, so that everybody who has them can use
        it: `save_adapters`, `merge_params` and the writers of files take what this returns.

        Args:
          adapters: those at the start, trained.

        Returns:
          The adapters, and their configuration. Both as given if the start took nothing out of the base.

        Raises:
          AdapterError: the adapters are not those of this start.
        """
        if not self.config.changes_base:
            return adapters, self.config
        before = leaves_by_path(self.adapters, is_leaf=is_entry)
        after = leaves_by_path(adapters, is_leaf=is_entry)
        if before.keys() != after.keys():
            raise AdapterError("adapters: found other paths than this start has; give those that it returned, trained")

        def doubled(key_path: Any, entry: Any) -> Any:
            begun = before[path_string(key_path)]
            a, b = unboxed(entry["A"]), unboxed(entry["B"])
            a0, b0 = (jnp.asarray(unboxed(begun[name])).astype(part.dtype) for name, part in (("A", a), ("B", b)))
            if a.shape != a0.shape or b.shape != b0.shape:
                raise AdapterError(f"{path_string(key_path)}: found A {a.shape}, and A {a0.shape} at the start")
            axis = batch_dims_of(path_string(key_path), begun, self.config)
            return {
                "A": box_like(entry["A"], jnp.concatenate([a, a0], -1)),
                "B": box_like(entry["B"], jnp.concatenate([b, -b0], axis)),
            }

        plain = jax.tree_util.tree_map_with_path(doubled, adapters, is_leaf=is_entry)
        return plain, _doubled(self.config)


def start(key: chex.PRNGKey | None, params: Any, config: LoraConfig, *, init: MatrixStart | None = None) -> Started:
    """Adapters that begin at the weights themselves, as `config.init` says.

    "pissa" and "olora" begin with a part of each weight, which is taken out of the base; "mica" and "orthogonal" leave
    the base as it is. The model is unchanged, to the rounding of A, B and the base. Each weight is worked through on
    the host, of a stack one matrix after the other.

    Args:
      key: PRNG key; `None` for `jax.random.key(config.seed)`.
      params: a pytree of arrays.
      config: what is adapted and how; of weights that are not named as Flax's with every factorization, as
        `resolve_config` returns it.
      init: a start of your own in place of `config.init`; see `MatrixStart`.

    Returns:
      The params, the adapters and the configuration: `jlora.lora(fn, config)(params, adapters, ...)`.

    Raises:
      ConfigError: `config.init` needs no weights (`init_lora` is for it), or another kind than "lora".
      TargetError: the configuration does not fit the tree; a weight that is a shape, is not finite, or for which the
        start has no A and B, with its path.

    >>> params = {'up': {'kernel': jnp.eye(5, 7)}}
    >>> started = start(None, params, LoraConfig(rank=2, alpha=2, init="pissa"))
    >>> int(jnp.linalg.matrix_rank(started.params['up']['kernel']))
    3
    >>> adapters, config = started.plain(started.adapters)
    >>> config.rank, config.init
    (4, 'gaussian')
    """
    check_config(config)
    if init is None and config.init not in STARTS:
        raise ConfigError(
            f"init = {config.init!r}: needs nothing of the weights: init_lora is for it; jlora.start for "
            f"{', '.join(map(repr, MATRIX_INITS))}, or for a function given as init"
        )
    if config.kind != "lora":
        raise ConfigError(f"kind = {config.kind!r}: a start from the weights is for kind 'lora'")
    targets = survey(params, config).checked().targets
    root = jax.random.key(config.seed) if key is None else key
    numbers = [int(number) for number in np.ravel(jax.random.key_data(root))]
    rule = STARTS[config.init] if init is None else init
    weights: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for path, target in targets.items():
        weight = unboxed(leaves_by_path(params, is_leaf=is_param)[path])
        try:
            found = _begun(weight, target, config, rule, [*numbers, path_number(path)])
        except JloraError as error:
            raise TargetError(f"{path}: {error}") from None
        entries[path], changed = found
        if changed is not None:
            weights[path] = changed

    def changed_at(key_path: Any, leaf: Any) -> Any:
        path = path_string(key_path)
        return box_like(leaf, weights[path]) if path in weights else leaf

    base = jax.tree_util.tree_map_with_path(changed_at, params, is_leaf=is_param) if weights else params
    if init is not None:
        config = config.replace(init=CUSTOM_INIT if weights else "gaussian")
    return Started(base, in_structure(params, entries, config), config)


def _begun(
    weight: Any, target: Target, config: LoraConfig, rule: MatrixStart, stream: list[int]
) -> tuple[dict[str, jax.Array], jax.Array | None]:
    """A and B of a weight, and the weight without them if they are taken out of it."""
    dense = weight.dense() if is_lazy(weight) else weight
    if not hasattr(dense, "__array__"):
        raise AdapterError("a shape: the adapters begin at the numbers of the weight; give arrays")
    split, rank = target.factorization, target.rank
    scaling = effective_alpha(target.alpha, rank, config.scaling) / rank
    dtype = adapter_dtype(dense.dtype, config.dtype)
    batch, ins, outs = (split.sizes(target.shape, role) for role in "bio")
    count, rows, columns = math.prod(batch), math.prod(ins), math.prod(outs)
    wide = np.float64 if np.dtype(dense.dtype) == np.float64 else np.float32
    turned = np.asarray(dense).transpose(split.order)  # (*batch, *in, *out)
    stack = turned.reshape(count, rows, columns)
    a, b = np.empty((count, rows, rank), wide), np.empty((count, rank, columns), wide)
    left: np.ndarray[Any, Any] | None = None
    for place in range(count):
        matrix = stack[place].astype(wide)
        if not np.isfinite(matrix).all():
            raise AdapterError("holds a NaN or an infinity")
        begin = rule(np.random.default_rng([*stream, place]), matrix, rank, scaling)
        check_begin(begin, (rows, columns), rank)
        a[place], b[place] = (np.asarray(part).astype(dtype) for part in (begin.a, begin.b))  # as they are kept
        if begin.taken:
            left = np.array(stack, copy=True) if left is None else left
            left[place] = (matrix - scaling * (a[place] @ b[place])).astype(left.dtype)
    parts = {}
    shapes = split.adapter_shapes(target.shape, rank)
    axes = part_axes(len(target.shape), split)
    for name, part, shape in zip("AB", (a, b), shapes, strict=True):
        parts[name] = _put(part.reshape(shape).astype(dtype), part_sharding(weight, axes[name]))
    if left is None:
        return parts, None
    back = np.argsort(split.order)
    return parts, _put(left.reshape(turned.shape).transpose(back), getattr(dense, "sharding", None))


def _put(array: np.ndarray[Any, Any], sharding: Any) -> jax.Array:
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)


def _doubled(config: LoraConfig) -> LoraConfig:
    """The configuration for twice the ranks, with the same scaling, of adapters that began anywhere."""
    factor = 2.0 if config.scaling == "standard" else math.sqrt(2)
    return dataclasses.replace(
        config,
        rank=2 * config.rank,
        alpha=factor * config.alpha,
        rank_pattern={pattern: 2 * rank for pattern, rank in dict(config.rank_pattern).items()},
        alpha_pattern={pattern: factor * alpha for pattern, alpha in dict(config.alpha_pattern).items()},
        init="gaussian",
    )
