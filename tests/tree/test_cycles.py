"""A thousand merges and unmerges.

With the residual the base is there every time. Without it U(M(W)), M(W) = round(W + D) and U(V) = round(V - D), differs
from W, but it is idempotent: the bits after one cycle are those after any number. For let V = M(W), W1 = U(V).
Where W1 is coarser than V, V - D is within a quarter of W1's spacing of W, so that W1 = W. Where it is finer, W1 + D is
within a quarter of V's spacing of V, so that M(W1) = V. Where both are the same, it is within half of it: M(W1) = V but
for a tie, which goes to an even number both times, the first of which is the last.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jlora import LoraConfig, merge_params, unmerge_params
from tests.reference import random_array

CYCLES = 1000
CONFIG = LoraConfig(rank=2, alpha=2, factorizations={"w": "io"})
DTYPES = ["bfloat16", "float16", "float32"]

# Two programs: in one, XLA may leave out the rounding between merge and unmerge.
MERGE, UNMERGE = (jax.jit(partial(fold, config=CONFIG)) for fold in (merge_params, unmerge_params))


def bits(array: Any) -> Any:
    return np.asarray(array).view(f"u{array.dtype.itemsize}")


def made(rng: np.random.Generator, dtype: str, std: float, shape: tuple[int, int] = (128, 131)) -> tuple[Any, Any]:
    """A weight of std 0.02, and an adapter whose delta has the given one."""
    a = random_array(rng, (shape[0], 2))
    b = random_array(rng, (2, shape[1]), std=std / 2**0.5)
    return {"w": random_array(rng, shape, dtype, 0.02)}, {"w": {"A": a, "B": b}}


def share_off(found: Any, base: Any) -> float:
    return float(np.mean(bits(found["w"]) != bits(base["w"])))


@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=() if dtype == "bfloat16" else pytest.mark.slow) for dtype in DTYPES]
)
def test_with_the_residual_the_base_is_there_every_time(rng, dtype):
    base, _ = made(rng, dtype, 0.005, (17, 13))
    several = [made(rng, dtype, std, (17, 13))[1] for std in (0.0005, 0.005, 0.02, 1.0)]
    params = base
    for cycle in range(CYCLES):
        adapters = several[cycle % len(several)]
        merged, residual = merge_params(params, adapters, CONFIG, return_residual=True)
        params = unmerge_params(merged, adapters, CONFIG, residual=residual)
        assert np.array_equal(bits(params["w"]), bits(base["w"]))


@pytest.mark.parametrize("std", [0.0005, 0.005, 0.02, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_it_nothing_moves_after_the_first_cycle(rng, dtype, std):
    base, adapters = made(rng, dtype, std)
    first = params = UNMERGE(MERGE(base, adapters), adapters)
    for _ in range(CYCLES - 1):
        params = UNMERGE(MERGE(params, adapters), adapters)
    assert np.array_equal(bits(params["w"]), bits(first["w"]))
    expected = {0.0005: 0.05, 0.005: 0.19, 0.02: 0.36, 1.0: 0.95}
    assert 0.01 < share_off(first, base) < expected[std]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_every_number_is_where_it_was_after_one_cycle(rng, dtype):
    numbers = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        numbers = numbers[np.isfinite(numbers)]
    exact = 2.0 ** rng.integers(-12, 6, 48) * rng.integers(1, 1024, 48) / 1024 * rng.choice([-1, 1], 48)
    deltas = np.concatenate([exact, np.nextafter(exact, 0, dtype=np.float32), rng.standard_normal(32)])
    base = {"w": jnp.asarray(np.broadcast_to(numbers[:, None], (numbers.size, deltas.size)))}
    a, b = jnp.ones((numbers.size, 2)), jnp.asarray(np.stack([deltas, 0 * deltas]), jnp.float32)
    adapters = {"w": {"A": a.at[:, 1].set(0), "B": b}}
    first = UNMERGE(MERGE(base, adapters), adapters)
    second = UNMERGE(MERGE(first, adapters), adapters)
    assert np.array_equal(bits(second["w"]), bits(first["w"]))
