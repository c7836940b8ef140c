"""What tests compare with: NumPy in float64, written without the code under test, and one tolerance for each dtype."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_RELATIVE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}


def x64() -> contextlib.AbstractContextManager[Any]:
    """Float64 in JAX; the name came into `jax` in 0.8."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


def as64(array: Any) -> np.ndarray:
    """Any array as float64 NumPy."""
    return np.asarray(array).astype(np.float64)


def assert_close(found: Any, wanted: np.ndarray, dtype: Any = None, factor: float = 1.0) -> None:
    """`found` is `wanted` to the tolerance of `dtype` (found's own by default), relative to the largest element."""
    assert np.shape(found) == np.shape(wanted)
    name = jnp.dtype(found.dtype if dtype is None else dtype).name
    scale = float(np.max(np.abs(wanted))) if np.size(wanted) else 1.0
    np.testing.assert_allclose(as64(found), wanted, rtol=0, atol=factor * _RELATIVE[name] * max(scale, 1e-30))


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = "float32", std: float = 1.0) -> Any:
    """Normal numbers, rounded by NumPy: JAX would compile a program for every shape."""
    numbers = np.asarray(std * rng.standard_normal(shape)).astype(jnp.dtype(dtype))
    return jax.device_put(numbers)


def random_adapter(
    rng: np.random.Generator, a_shape: tuple[int, ...], b_shape: tuple[int, ...], dtype: Any = "float32"
) -> dict[str, Any]:
    """An adapter whose A and B are both random: a test at B = 0 cannot see a wrong contraction."""
    return {"A": random_array(rng, a_shape, dtype), "B": random_array(rng, b_shape, dtype)}


def randomize(rng: np.random.Generator, tree: Any, std: float = 0.5) -> Any:
    """The tree with every array replaced by a random one of its shape and dtype."""

    return jax.tree.map(lambda leaf: random_array(rng, leaf.shape, leaf.dtype, std), tree)


def reference_delta(adapter: dict[str, Any], alpha: float, batch: int = 0) -> np.ndarray:
    """(alpha / rank) A@B in float64 as a plain loop over the rank and the batch."""
    a, b = as64(adapter["A"]), as64(adapter["B"])
    rank = a.shape[-1]
    flat_a = a.reshape((*a.shape[:batch], -1, rank))
    flat_b = b.reshape((*b.shape[:batch], rank, -1))
    out = np.zeros((*a.shape[:batch], *a.shape[batch:-1], *b.shape[batch + 1 :]))
    for index in np.ndindex(a.shape[:batch]):
        total = sum(np.outer(flat_a[index][:, r], flat_b[index][r, :]) for r in range(rank))
        out[index] = total.reshape(a.shape[batch:-1] + b.shape[batch + 1 :])
    return alpha / rank * out
