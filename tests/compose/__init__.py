"""What the tests of the algebra of adapters compare with: plain float64 NumPy."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora import LoraConfig
from jlora.paths import leaves_by_path
from tests.reference import random_adapter, reference_delta

SHAPES = {
    "io": (11, 7),
    "oi": (5, 13),
    "ioo": (11, 3, 5),
    "iio": (3, 5, 7),
    "bio": (2, 11, 7),
    "iiio": (3, 2, 5, 7),
    "bioo": (2, 11, 3, 5),
}


def adapter_shapes(roles: str, rank: int, shape: tuple[int, ...] | None = None) -> tuple[Any, Any]:
    sizes = SHAPES[roles] if shape is None else shape
    batch, ins, outs = (tuple(n for n, r in zip(sizes, roles, strict=True) if r == role) for role in "bio")
    return (*batch, *ins, rank), (*batch, rank, *outs)


def random_of(rng: np.random.Generator, roles: str, rank: int, dtype: Any = "float64") -> dict[str, Any]:
    """A random adapter for a weight of SHAPES; NumPy where JAX has no such dtype."""
    shapes = adapter_shapes(roles, rank)
    if dtype == "float64":
        return {name: rng.standard_normal(shape) for name, shape in zip("AB", shapes, strict=True)}
    return random_adapter(rng, *shapes, dtype)


def matrices(adapter: dict[str, Any], scaling: float, roles: str) -> np.ndarray:
    """scaling * A@B as a stack of matrices (n, in, out)."""
    batch = roles.count("b")
    delta = reference_delta(adapter, scaling * np.shape(adapter["A"])[-1], batch)
    ins = math.prod(np.shape(adapter["A"])[batch:-1])
    return delta.reshape(math.prod(delta.shape[:batch]), ins, -1)


def best(stack: np.ndarray, rank: int) -> np.ndarray:
    """The truncated SVD of each matrix."""
    u, s, vh = np.linalg.svd(stack, full_matrices=False)
    return np.einsum("nir,nr,nro->nio", u[..., :rank], s[..., :rank], vh[..., :rank, :])


def deltas(adapters: Any, config: LoraConfig, roles: dict[str, str]) -> dict[str, np.ndarray]:
    """The scaled deltas by path, the scaling computed here from alpha, rank and mode."""
    found = leaves_by_path(adapters, is_leaf=lambda node: isinstance(node, dict) and set(node) == {"A", "B"})
    result = {}
    for path, adapter in found.items():
        rank = np.shape(adapter["A"])[-1]
        assert rank == config.rank_of(path)
        divisor = rank if config.scaling == "standard" else math.sqrt(rank)
        result[path] = matrices(adapter, config.alpha_of(path) / divisor, roles[path])
    return result


def is_jax(leaf: Any) -> bool:
    return isinstance(leaf, jnp.ndarray)
