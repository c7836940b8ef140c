"""VeRA: one random pair of A and B for all weights, which stays, and two vectors of each weight, which are trained.

Of a weight W (in, out), a shared A (largest in, r) and B (r, largest out), of which each weight takes the first rows
and columns, and vectors d (r,) and b (out,):

    x @ W  becomes  x @ W + ((x @ A) * d) @ B * b

Kopiczko, Blankevoort and Asano 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454. The update is
not scaled: `config.alpha` has no effect. Both vectors go into the adapter's B, so that no gradient of A is computed and
nothing is kept for it: A is a part of the shared one, and B is d * B * b / scaling.
"""

import math
from typing import Any

import numpy as np

from jlora.arrays import is_jax_array, loaded_jax
from jlora.boxes import unboxed
from jlora.config import LoraConfig
from jlora.errors import ConfigError, TargetError
from jlora.paths import leaves_by_path
from jlora.tree import Target, in_structure
from jlora.variants._weights import Shapes, check_trained, targets_of

__all__ = ["D_INITIAL", "adapters", "init", "random_pair"]

D_INITIAL = 0.1
"""Where d begins, as in the paper's experiments and in PEFT."""


def init(key: Any, params: Any, config: LoraConfig) -> tuple[Any, Any]:
    """The vectors of each weight, and the pair that they share; b is zero, so that the model is unchanged.

    Args:
      key: PRNG key of the pair; `None` for `jax.random.key(config.seed)`.
      params: a pytree of arrays or shapes.
      config: what is adapted, with kind="vera". The rank may be larger than a weight's sides; all have the same one.

    Returns:
      `(trained, frozen)`: trained is path -> `{'d': (*batch, r), 'b': (*batch, *out)}`, frozen `{'A': (in, r), 'B':
      (r, out)}` for the largest in and out of the weights, several axes counted as one.

    Raises:
      ConfigError: another kind; ranks that differ; an alpha of zero.
      TargetError: the configuration does not fit the tree.

    >>> params = {'up': {'kernel': np.ones((5, 7), 'f4')}, 'down': {'kernel': np.ones((7, 3), 'f4')}}
    >>> trained, frozen = init(None, params, LoraConfig(rank=2, kind="vera"))
    >>> {path: {name: part.shape for name, part in parts.items()} for path, parts in trained.items()}
    {'down/kernel': {'b': (3,), 'd': (2,)}, 'up/kernel': {'b': (7,), 'd': (2,)}}
    >>> frozen['A'].shape, frozen['B'].shape
    ((7, 2), (2, 7))
    """
    import jax.numpy as jnp  # which those who only read files have no need of

    targets, dtypes = _targets(params, config), _dtypes(params, config)
    trained = {}
    for path, target in targets.items():
        shapes = _shapes(target)
        b, d = jnp.zeros(shapes["b"], dtypes[path]), jnp.full(shapes["d"], D_INITIAL, dtypes[path])
        trained[path] = {"b": b, "d": d}
    return trained, random_pair(key, params, config)


def random_pair(key: Any, params: Any, config: LoraConfig) -> dict[str, Any]:
    """The shared A and B, `frozen` of `init`: U(-c, c) with c = sqrt(6 / in) for A and sqrt(6 / r) for B.

    That is Kaiming's uniform distribution for ReLU, as in the paper and in PEFT, which draws other numbers.
    """
    import jax

    targets, dtypes = _targets(params, config), _dtypes(params, config)
    ins, outs = (max(_width(target, role) for target in targets.values()) for role in "io")
    dtype = max((dtypes[path] for path in targets), key=lambda found: found.itemsize)
    key_of_a, key_of_b = jax.random.split(jax.random.key(config.seed) if key is None else key)
    most_of_a, most_of_b = math.sqrt(6 / ins), math.sqrt(6 / config.rank)
    return {
        "A": jax.random.uniform(key_of_a, (ins, config.rank), dtype, -most_of_a, most_of_a),
        "B": jax.random.uniform(key_of_b, (config.rank, outs), dtype, -most_of_b, most_of_b),
    }


def adapters(trained: Any, frozen: Any, params: Any, config: LoraConfig) -> Any:
    """The ordinary adapters of the vectors and the shared pair; pure and differentiable.

    Args:
      trained, frozen: as `init` returns them, arrays of JAX or of NumPy.
      params: the params, arrays or shapes.
      config: the configuration of `init`; also that of the adapters.

    Returns:
      A pytree of the structure of params: `{'A': (*batch, *in, r), 'B': (*batch, r, *out)}`, `None` elsewhere.

    Raises:
      ConfigError: as for `init`.
      TargetError: vectors of other shapes, or of what is no weight; a shared pair that is too small.

    >>> params = {'up': {'kernel': np.ones((5, 7), np.float32)}}
    >>> config = LoraConfig(rank=2, kind="vera")
    >>> made = adapters(*init(None, params, config), params, config)
    >>> made['up']['kernel']['A'].shape, bool((made['up']['kernel']['B'] == 0).all())
    ((5, 2), True)
    """
    targets = _targets(params, config)
    check_trained(trained, targets, _shapes)
    _check_pair(frozen, {path: targets[path] for path in trained}, config.rank)
    entries = {}
    for path, vectors in trained.items():
        entries[path] = _entry(vectors, frozen, targets[path], config.scaling_of(path))
    return in_structure(params, entries, config)


def _entry(vectors: Any, pair: Any, target: Target, scaling: float) -> dict[str, Any]:
    split, rank = target.factorization, pair["A"].shape[-1]
    batch, ins, outs = (split.sizes(target.shape, role) for role in "bio")
    a = pair["A"][: math.prod(ins)].reshape(*ins, rank)  # (*in, r)
    b = pair["B"][:, : math.prod(outs)].reshape(rank, *outs)  # (r, *out)
    of_rank = vectors["d"].reshape(*batch, rank, *(1 for _ in outs))  # (*batch, r, 1...)
    of_out = vectors["b"].reshape(*batch, 1, *outs) / scaling  # (*batch, 1, *out)
    return {"A": _broadcast(a, (*batch, *a.shape)), "B": of_rank * b.astype(of_rank.dtype) * of_out}


def _broadcast(array: Any, shape: tuple[int, ...]) -> Any:
    jax = loaded_jax()
    return jax.numpy.broadcast_to(array, shape) if is_jax_array(array) else np.broadcast_to(array, shape)


def _targets(params: Any, config: LoraConfig) -> dict[str, Target]:
    targets = targets_of(params, config, "vera")
    if config.rank_pattern:
        raise ConfigError("rank_pattern: all weights share the pair of VeRA, and so its rank: give rank alone")
    if any(config.scaling_of(path) == 0 for path in targets):
        raise ConfigError("alpha = 0: the update of VeRA is not scaled: leave alpha out")
    return targets


def _dtypes(params: Any, config: LoraConfig) -> dict[str, Any]:
    from jlora.adapter import adapter_dtype  # which computes with JAX

    leaves = {path: unboxed(leaf) for path, leaf in leaves_by_path(params).items()}
    return {path: adapter_dtype(leaf.dtype, config.dtype) for path, leaf in leaves.items() if hasattr(leaf, "dtype")}


def _shapes(target: Target) -> Shapes:
    batch, outs = (target.factorization.sizes(target.shape, role) for role in "bo")
    return {"b": (*batch, *outs), "d": (*batch, target.rank)}


def _width(target: Target, role: str) -> int:
    return math.prod(target.factorization.sizes(target.shape, role))


def _check_pair(pair: Any, targets: dict[str, Target], rank: int) -> None:
    """Raises a TargetError where the shared pair has no place for a weight."""
    a, b = (tuple(np.shape(pair[name])) for name in "AB")
    ins, outs = (max((_width(target, role) for target in targets.values()), default=1) for role in "io")
    if len(a) != 2 or len(b) != 2 or a[1] != rank or b[0] != rank or a[0] < ins or b[1] < outs:
        raise TargetError(
            f"the shared pair A {a} and B {b}: wanted A (in, {rank}) and B ({rank}, out), in at least {ins} and out at "
            f"least {outs}, the largest of the weights"
        )
