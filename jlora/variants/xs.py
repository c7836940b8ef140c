"""LoRA-XS: A and B from the singular values of each weight, which stay, and a matrix R between them, which is trained.

Of a weight W (in, out) with the singular value decomposition W = U S V, cut to the r largest singular values:

    x @ W  becomes  x @ W + scaling * (x @ U) @ R @ (S V)

Balazy, Banaei, Aberer and Tabor 2024, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv
2405.17604. There R begins at a random 1e-5; here at zero, so that the model is unchanged to the bit. R goes into the
adapter's B, so that no gradient of A is computed.
"""

import math
from typing import Any

import numpy as np

from jlora.boxes import unboxed
from jlora.config import LoraConfig
from jlora.errors import DataError, TargetError
from jlora.lazy import is_lazy
from jlora.paths import leaves_by_path, path_number
from jlora.tree import Target, in_structure
from jlora.variants._weights import Shapes, check_trained, targets_of

__all__ = ["adapters", "factors", "init"]


def init(key: Any, params: Any, config: LoraConfig) -> tuple[Any, Any]:
    """R of each weight, zero, and the A and B that it stands between.

    Args:
      key: PRNG key of the sketch by which large weights are decomposed; `None` for `jax.random.key(config.seed)`.
      params: a pytree of arrays.
      config: what is adapted and how, with kind="xs".

    Returns:
      `(trained, frozen)`: trained is path -> `{'R': (*batch, r, r)}`, frozen path -> `{'A': (*batch, *in, r), 'B':
      (*batch, r, *out)}`: singular vectors, those of out times the singular values.

    Raises:
      ConfigError: another kind.
      TargetError: the configuration does not fit the tree; shapes in place of arrays.
      DataError: a weight that is not finite.

    >>> params = {'up': {'kernel': np.ones((5, 7), np.float32)}}
    >>> trained, frozen = init(None, params, LoraConfig(rank=2, kind="xs"))
    >>> trained['up/kernel']['R'].shape, frozen['up/kernel']['A'].shape, frozen['up/kernel']['B'].shape
    ((2, 2), (5, 2), (2, 7))
    """
    import jax.numpy as jnp  # which those who only read files have no need of

    frozen = factors(key, params, config)
    targets = targets_of(params, config, "xs")
    trained = {}
    for path, target in targets.items():
        trained[path] = {"R": jnp.zeros(_shapes(target)["R"], frozen[path]["B"].dtype)}
    return trained, frozen


def factors(key: Any, params: Any, config: LoraConfig) -> dict[str, dict[str, Any]]:
    """A and B of each weight, `frozen` of `init`."""
    import jax

    from jlora.adapter import adapter_dtype

    root = jax.random.key(config.seed) if key is None else key
    numbers = [int(number) for number in np.ravel(jax.random.key_data(root))]
    leaves = leaves_by_path(params)
    frozen = {}
    for path, target in targets_of(params, config, "xs").items():
        weight = unboxed(leaves[path])
        dtype = adapter_dtype(weight.dtype, config.dtype)
        parts = _factors_of(path, weight, target, [*numbers, path_number(path)])
        frozen[path] = {name: jax.numpy.asarray(part, dtype) for name, part in parts.items()}
    return frozen


def adapters(trained: Any, frozen: Any, params: Any, config: LoraConfig) -> Any:
    """The ordinary adapters, with R @ B in place of B; pure and differentiable.

    Args:
      trained, frozen: as `init` returns them, arrays of JAX or of NumPy.
      params: the params, arrays or shapes.
      config: the configuration of `init`; also that of the adapters.

    Returns:
      A pytree of the structure of params: `{'A': (*batch, *in, r), 'B': (*batch, r, *out)}`, `None` elsewhere.

    Raises:
      ConfigError: another kind.
      TargetError: an R of another shape, or of what is no weight, or without its A and B.

    >>> params = {'up': {'kernel': np.ones((5, 7), np.float32)}}
    >>> config = LoraConfig(rank=2, kind="xs")
    >>> trained, frozen = init(None, params, config)
    >>> bool((adapters(trained, frozen, params, config)['up']['kernel']['B'] == 0).all())
    True
    """
    check_trained(trained, targets_of(params, config, "xs"), _shapes)
    entries = {}
    for path, parts in trained.items():
        if path not in frozen:
            raise TargetError(f"{path}: has an R, and nothing in frozen: wanted its A and B, as init returns them")
        a, b, r = frozen[path]["A"], frozen[path]["B"], parts["R"]
        flat = b.reshape(*r.shape[:-1], -1)  # (*batch, r, out)
        entries[path] = {"A": a, "B": (r @ flat).reshape(b.shape)}
    return in_structure(params, entries, config)


def _factors_of(path: str, weight: Any, target: Target, stream: list[int]) -> dict[str, np.ndarray]:
    """A and B of a weight, one matrix after the other where it is a stack of them."""
    from jlora.compose import leading_triples  # and NumPy's random numbers, which no command on files needs

    split, rank = target.factorization, target.rank
    batch, ins, outs = (split.sizes(target.shape, role) for role in "bio")
    a_shape, b_shape = split.adapter_shapes(target.shape, rank)
    count, rows, columns = math.prod(batch), math.prod(ins), math.prod(outs)
    stack = _on_host(path, weight).transpose(split.order).reshape(count, rows, columns)
    a = np.empty((count, rows, rank), np.float32)
    b = np.empty((count, rank, columns), np.float32)
    for place in range(count):
        matrix = stack[place].astype(np.float32)  # (in, out)
        if not np.isfinite(matrix).all():
            raise DataError(f"{path}: holds a NaN or an infinity, and has no singular values")
        u, s, vh = leading_triples(matrix, rank, np.random.default_rng([*stream, place]))
        a[place], b[place] = u[:, :rank], s[:rank, None] * vh[:rank]
    return {"A": a.reshape(a_shape), "B": b.reshape(b_shape)}


def _on_host(path: str, weight: Any) -> np.ndarray:
    dense = weight.dense() if is_lazy(weight) else weight
    if not hasattr(dense, "__array__"):
        raise TargetError(f"{path}: LoRA-XS begins at the singular values of the weight: wanted an array, not a shape")
    return np.asarray(dense)


def _shapes(target: Target) -> Shapes:
    batch = target.factorization.sizes(target.shape, "b")
    return {"R": (*batch, target.rank, target.rank)}
