"""One adapter as pure functions; see the room's face, `jlora.adapter`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from jlora.adapter._entry import Adapter, is_adapter
from jlora.adapter._range import check_range
from jlora.adapter._sharding import placed
from jlora.boxes import unboxed
from jlora.contraction import Factorization, factorization_from_shapes, split_batch_axes
from jlora.errors import AdapterError
from jlora.fields import choice, integer, number
from jlora.paths import path_string
from jlora.products import common_dtype, contract, dense_delta, factored_product


def adapter_dtype(weight_dtype: Any, given: Any = None) -> Any:
    """The dtype of the adapter of a weight: the one that is given, else float32, or the weight's where that is wider.

    A 16-bit parameter loses every update below a 256th (bfloat16) or a 2048th (float16) of it, as those of small rates
    are; A and B are few, so that 32 bits cost little.
    """
    dtype = jnp.dtype(weight_dtype if given is None else given)
    floating = jnp.issubdtype(dtype, jnp.floating)  # an adapter of another dtype is refused where it is made
    return common_dtype(dtype, jnp.float32) if given is None and floating else dtype


def _gaussian(key: chex.PRNGKey, shape: tuple[int, ...], dtype: Any, fan_in: int, std: float) -> jax.Array:
    return std * jax.random.normal(key, shape, dtype)


def _kaiming_uniform(key: chex.PRNGKey, shape: tuple[int, ...], dtype: Any, fan_in: int, std: float) -> jax.Array:
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _normal(key: chex.PRNGKey, shape: tuple[int, ...], dtype: Any, fan_in: int, std: float) -> jax.Array:
    return jax.random.normal(key, shape, dtype) / shape[-1]


_INITS: dict[str, Callable[..., jax.Array]] = {
    "gaussian": _gaussian,
    "kaiming_uniform": _kaiming_uniform,
    "normal": _normal,
}


def draw_a(
    key: chex.PRNGKey,
    shape: tuple[int, ...],
    dtype: Any,
    *,
    init: str = "gaussian",
    std: float = 0.01,
    batch_dims: int = 0,
) -> jax.Array:
    """A of an adapter, `(*batch, *in, r)`: drawn in float32 at least and rounded once to `dtype`.

    "gaussian" is N(0, std^2), "kaiming_uniform" U(+-1/sqrt(in)), "normal" N(0, 1/rank^2); the batch axes do not count
    to the fan-in.
    """
    choice("init", init, tuple(_INITS))
    fan_in = math.prod(shape[batch_dims:-1])
    return _INITS[init](key, shape, common_dtype(dtype, jnp.float32), fan_in, std).astype(dtype)


def init_lora_adapter(
    key: chex.PRNGKey,
    weight: chex.Array | jax.ShapeDtypeStruct,
    rank: int,
    *,
    init_std: float = 0.01,
    dtype: Any = None,
    factorization: Factorization | str | None = None,
    init: str = "gaussian",
) -> dict[str, jax.Array]:
    """An adapter for one weight: A drawn at random, B zero, so that the update is zero.

    Args:
      key: PRNG key.
      weight: the frozen weight, `(in, out)` or of any shape that `factorization` splits; its shape and dtype are
        used, and its sharding: A and B lie along its axes as it does, as `jlora.adapter_shardings` says.
      rank: at least 1 and at most the smaller side of the weight.
      init_std: standard deviation of the "gaussian" init.
      dtype: of A and B; the weight's unless given.
      factorization: one letter per axis, `b`, `i` or `o`; needed where the weight does not have two axes.
      init: "gaussian" N(0, init_std^2), "kaiming_uniform" U(+-1/sqrt(in)), "normal" N(0, 1/rank^2).

    Returns:
      `{'A': (*batch, *in, rank), 'B': (*batch, rank, *out)}`.

    Raises:
      AdapterError: the weight has not two axes and no factorization is given, or the rank does not fit.

    >>> adapter = init_lora_adapter(jax.random.key(0), jnp.ones((5, 7)), rank=2)
    >>> adapter['A'].shape, adapter['B'].shape
    ((5, 2), (2, 7))

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """
    rank = integer("rank", rank, 1)
    init_std = number("init_std", init_std, 0.0, wanted="a finite number of at least 0")
    shape = tuple(weight.shape)
    split = _factorization(shape, factorization)
    if rank > split.max_rank(shape):
        raise AdapterError(f"rank {rank} is larger than the smaller side {split.max_rank(shape)} of the weight {shape}")
    dtype = jax.dtypes.canonicalize_dtype(weight.dtype if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise AdapterError(f"dtype {dtype} of the adapter of a weight {shape}: wanted a floating dtype; pass dtype=")
    a_shape, b_shape = split.adapter_shapes(shape, rank)
    a = draw_a(key, a_shape, dtype, init=init, std=init_std, batch_dims=split.roles.count("b"))
    a_axes, b_axes = split.adapter_axes
    return {"A": placed(a, weight, a_axes), "B": placed(jnp.zeros(b_shape, dtype), weight, b_axes)}


def lora_delta(adapter: Adapter, alpha: Any = 1.0, *, batch_dims: int | None = None) -> jax.Array:
    """The dense update (alpha / rank) A@B of one adapter.

    Args:
      adapter: `{'A': (*batch, *in, r), 'B': (*batch, r, *out)}`.
      alpha: a number or a scalar array, which may be traced.
      batch_dims: the number of batch axes, for the rare shapes that can be read in two ways.

    Returns:
      `(*batch, *in, *out)` in the common dtype of A and B (float32 for integers); the product is formed in float32 and
      rounded once.

    Raises:
      AdapterError: A and B do not fit each other, or fit in two ways.

    >>> adapter = {'A': jnp.array([[1.], [2.]]), 'B': jnp.array([[3., 4., 5.]])}
    >>> lora_delta(adapter, alpha=2.0).tolist()
    [[6.0, 8.0, 10.0], [12.0, 16.0, 20.0]]
    """
    a, b = _parts(adapter)
    batch = split_batch_axes(a.shape, b.shape, batch_dims)
    roles = "b" * batch + "i" * (a.ndim - 1 - batch) + "o" * (b.ndim - 1 - batch)
    delta, dtype = _scaled_delta(a, b, alpha, Factorization(roles)), common_dtype(a.dtype, b.dtype)
    return delta.astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else delta


def lora_linear(x: chex.Array, frozen_weight: chex.Array, adapter: Adapter, alpha: Any = 1.0) -> jax.Array:
    """x@W + (alpha / rank) (x@A)@B, the delta never built.

    Args:
      x: `(..., in)`; for a weight of more axes `(*batch, ..., *in)`.
      frozen_weight: `(in, out)`, or `(*batch, *in, *out)`; how its axes split is read off the adapter.
      adapter: `{'A': (*batch, *in, r), 'B': (*batch, r, *out)}`.
      alpha: a number or a scalar array, which may be traced.

    Returns:
      `(..., out)`, or `(*batch, ..., *out)`, in the dtype of x@W.

    Raises:
      AdapterError: the shapes of x, the weight, A and B do not fit.

    >>> weight, adapter = jnp.ones((2, 3)), {'A': jnp.ones((2, 1)), 'B': jnp.ones((1, 3))}
    >>> lora_linear(jnp.ones((4, 5, 2)), weight, adapter).shape
    (4, 5, 3)
    """
    a, b = _parts(adapter)
    x, weight = jnp.asarray(x), jnp.asarray(frozen_weight)
    split = _canonical_split(weight.shape, a, b)
    base = linear(x, weight, split)
    axis, batch = _input_axes(x, weight, split)
    dtype = common_dtype(x.dtype, a.dtype, b.dtype)
    scale = _scaling(alpha, a.shape[-1])
    update = factored_product(x.astype(dtype), a.astype(dtype), b.astype(dtype), axis, batch, scale=scale)
    return base + update.astype(base.dtype)


def linear(x: jax.Array, weight: jax.Array, split: Factorization) -> jax.Array:
    """x@W for a weight in the order batch, in, out, in their common dtype."""
    axis, batch = _input_axes(x, weight, split)
    dtype = common_dtype(x.dtype, weight.dtype)
    return contract(x.astype(dtype), weight.astype(dtype), axis, batch)


def merge_lora_weight(
    frozen_weight: chex.Array,
    adapter: Adapter,
    alpha: Any = 1.0,
    *,
    factorization: Factorization | str | None = None,
) -> jax.Array:
    """W + (alpha / rank) A@B in the weight's shape and dtype.

    The sum is formed in float32 (float64 for float64 weights) and rounded once.

    Args:
      frozen_weight: `(in, out)`, or `(*batch, *in, *out)`.
      adapter: `{'A': (*batch, *in, r), 'B': (*batch, r, *out)}`.
      alpha: a number or a scalar array, which may be traced.
      factorization: one letter per axis, needed only where the weight's axes are not in the order batch, in, out.

    Raises:
      AdapterError: the weight and the adapter do not fit; a sum is too large for the weight's dtype, which is not
        looked at under jit, grad and vmap.

    >>> adapter = {'A': jnp.ones((2, 1)), 'B': jnp.ones((1, 3))}
    >>> merge_lora_weight(jnp.zeros((2, 3)), adapter, alpha=0.5).tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    merged = with_delta(frozen_weight, adapter, alpha, factorization, 1)
    check_range(frozen_weight, merged, adapter)
    return merged


def unmerge_lora_weight(
    merged_weight: chex.Array,
    adapter: Adapter,
    alpha: Any = 1.0,
    *,
    factorization: Factorization | str | None = None,
) -> jax.Array:
    """The weight that was merged, by the same arithmetic backwards; arguments and errors of `merge_lora_weight`.

    Rounding to the weight's dtype loses bits that no subtraction brings back: where the base must return to the
    bit, keep the base.
    """
    weight = with_delta(merged_weight, adapter, alpha, factorization, -1)
    check_range(merged_weight, weight, adapter)
    return weight


def tree_lora_delta(
    adapters: Any,
    alpha: Any = 1.0,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
    batch_dims: int | None = None,
) -> Any:
    """The dense updates of a pytree of adapters.

    Args:
      adapters: a pytree (dicts, lists, tuples, dataclasses) of adapters, `None` where nothing is adapted; one
        adapter alone gives one delta.
      alpha: a number, a traced scalar, or a pytree prefix of `adapters`.
      is_leaf: marks further nodes that `lora_delta` takes as a whole.
      batch_dims: as in `lora_delta`, for every adapter.

    Returns:
      The same pytree with each adapter replaced by its delta, `None` kept.

    Raises:
      AdapterError: a leaf is no adapter, A and B do not fit, or alpha is no prefix; the message names the path.

    >>> adapters = {'up': {'A': jnp.ones((2, 1)), 'B': jnp.ones((1, 3))}, 'down': None}
    >>> jax.tree.map(jnp.shape, tree_lora_delta(adapters))
    {'down': None, 'up': (2, 3)}
    """

    def stop(node: Any) -> bool:
        return is_adapter(node) or (is_leaf is not None and is_leaf(node))

    nodes, treedef = jax.tree_util.tree_flatten_with_path(adapters, is_leaf=stop)
    alphas = _broadcast_prefix(alpha, adapters, stop)
    deltas = []
    for (key_path, node), each in zip(nodes, alphas, strict=True):
        try:
            deltas.append(lora_delta(node, each, batch_dims=batch_dims))
        except AdapterError as error:
            raise AdapterError(f"at {path_string(key_path) or 'the root'}: {error}") from None
    return jax.tree.unflatten(treedef, deltas)


def lora_singular_values(adapter: Adapter, alpha: Any = 1.0, *, batch_dims: int | None = None) -> jax.Array:
    """The singular values of the delta, largest first, without building it.

    A = Q_a R_a and B^T = Q_b R_b, so that A@B has the singular values of the r x r matrix R_a R_b^T.

    Returns:
      `(*batch, r)`, float32 at least; as many as the smaller side where that is less than r. Not differentiable where
      the delta is zero.

    >>> adapter = {'A': jnp.array([[3., 0.], [0., 1.]]), 'B': jnp.eye(2)}
    >>> lora_singular_values(adapter, alpha=2.0).round(4).tolist()
    [3.0, 1.0]
    """
    a, b = _parts(adapter)
    n, rank = split_batch_axes(a.shape, b.shape, batch_dims), a.shape[-1]
    dtype = common_dtype(a.dtype, b.dtype, jnp.float32)
    batch = a.shape[:n]
    tall_a = a.astype(dtype).reshape(*batch, math.prod(a.shape[n:-1]), rank)
    wide_b = b.astype(dtype).reshape(*batch, rank, math.prod(b.shape[n + 1 :]))
    r_a = jnp.linalg.qr(tall_a, mode="r")
    r_b = jnp.linalg.qr(wide_b.mT, mode="r")
    values = jnp.linalg.svd(jnp.matmul(r_a, r_b.mT, precision=lax.Precision.HIGHEST), compute_uv=False)
    return jnp.abs(jnp.asarray(_scaling(alpha, rank), dtype)) * values


def _parts(adapter: Any) -> tuple[jax.Array, jax.Array]:
    if not isinstance(adapter, Mapping) or set(adapter) != {"A", "B"}:
        found = f"a mapping of {sorted(map(str, adapter))}" if isinstance(adapter, Mapping) else type(adapter).__name__
        raise AdapterError(f"found {found}: wanted an adapter, {{'A': (in, r), 'B': (r, out)}}")
    adapter = unboxed(adapter)
    return jnp.asarray(adapter["A"]), jnp.asarray(adapter["B"])


def _scaling(alpha: Any, rank: int) -> Any:
    if not isinstance(alpha, int | float) and getattr(alpha, "shape", None) != ():
        found = f"of shape {alpha.shape}" if hasattr(alpha, "shape") else repr(alpha)
        raise AdapterError(f"alpha {found}: wanted a number or a scalar array")
    return alpha / rank


def _scaled_delta(a: jax.Array, b: jax.Array, alpha: Any, split: Factorization) -> jax.Array:
    product = dense_delta(a, b, split)
    return product * jnp.asarray(_scaling(alpha, a.shape[-1]), product.dtype)


def _input_axes(x: jax.Array, weight: jax.Array, split: Factorization) -> tuple[range, int]:
    """The axes of x that are contracted with the weight, and the number of batch axes."""
    leading, ins = split.sizes(weight.shape, "b"), split.sizes(weight.shape, "i")
    batch, first = len(leading), x.ndim - len(ins)
    if first < batch or x.shape[:batch] != leading or x.shape[first:] != ins:
        wanted = ", ".join(map(str, (*leading, "...", *ins)))
        raise AdapterError(f"x {x.shape} does not fit the weight {weight.shape}: wanted ({wanted})")
    return range(first, x.ndim), batch


def _factorization(shape: tuple[int, ...], given: Factorization | str | None) -> Factorization:
    if given is None:
        if len(shape) != 2:
            raise AdapterError(
                f"a weight of shape {shape} has not two axes: pass factorization=, one letter per axis, b (batch), "
                "i (in) or o (out), such as 'bio'"
            )
        return Factorization("io")
    split = given if isinstance(given, Factorization) else Factorization(given)
    split.sizes(shape, "i")
    return split


def _canonical_split(shape: tuple[int, ...], a: jax.Array, b: jax.Array) -> Factorization:
    split = factorization_from_shapes(shape, a.shape, b.shape)
    if not split.is_canonical:
        raise AdapterError(
            f"the weight {shape} with A {a.shape} and B {b.shape} has the axes {split.roles!r}: wanted the order "
            f"batch, in, out; transpose the weight, or pass factorization={split.roles!r} where it is taken"
        )
    return split


def with_delta(
    weight: chex.Array, adapter: Adapter, alpha: Any, given: Factorization | str | None, sign: int
) -> jax.Array:
    """The weight plus or minus the delta, whether or not the sums fit its dtype."""
    a, b = _parts(adapter)
    if (wide := jnp.dtype(weight.dtype)) != jax.dtypes.canonicalize_dtype(wide):
        raise AdapterError(f"a weight of dtype {wide}: set jax_enable_x64, or cast it first")
    weight = jnp.asarray(weight)
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise AdapterError(f"a weight of dtype {weight.dtype}: wanted a floating dtype; cast or dequantize it first")
    if given is None:
        split = _canonical_split(weight.shape, a, b)
    else:
        split = _factorization(weight.shape, given)
        if (a.shape, b.shape) != (wanted := split.adapter_shapes(weight.shape, a.shape[-1])):
            raise AdapterError(
                f"A {a.shape} and B {b.shape} do not fit the weight {weight.shape} with factorization "
                f"{split.roles!r}: wanted A {wanted[0]} and B {wanted[1]}"
            )
    delta = _scaled_delta(a, b, alpha, split)
    total = common_dtype(delta.dtype, weight.dtype)
    return (weight.astype(total) + sign * delta.astype(total)).astype(weight.dtype)


def _broadcast_prefix(alpha: Any, adapters: Any, stop: Callable[[Any], bool]) -> list[Any]:
    """One alpha for each adapter of the tree."""
    alphas: list[Any] = []

    def spread(value: Any, subtree: Any) -> None:
        alphas.extend([value] * len(jax.tree.leaves(subtree, is_leaf=stop)))

    try:
        jax.tree.map(spread, alpha, adapters)
        fits = len(alphas) == len(jax.tree.leaves(adapters, is_leaf=stop))
    except (ValueError, TypeError, KeyError):
        fits = False
    if not fits:
        wanted, found = jax.tree.structure(adapters, is_leaf=stop), jax.tree.structure(alpha)
        raise AdapterError(f"alpha is no prefix of the adapters: found {found}, wanted a prefix of {wanted}")
    return alphas
