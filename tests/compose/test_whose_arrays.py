"""Results are arrays of NumPy where they were made of such, of JAX where of JAX's, and hold the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import LoraConfig
from jlora.compose import combine, extract_weight, resize
from tests.compose import is_jax, random_of
from tests.reference import assert_close, x64

CONFIG = LoraConfig(rank=3, alpha=5, target_modules="w", factorizations={"w": "ioo"})


def resized(one, _):
    return resize({"w": one}, CONFIG, 2)[0]["w"]


def combined(one, other, **options):
    return combine([({"w": one}, CONFIG), ({"w": other}, CONFIG)], **options)[0]["w"]


def by_rank(one, other):
    return combined(one, other, method="svd", rank=2)


def by_deltas(one, other):
    return combined(one, other, method="ties_svd", rank=2, density=0.5)


def extracted(one, other):
    return extract_weight(one["A"], other["A"], "io", rank=1, dtype=one["A"].dtype)[0]


FUNCTIONS = [resized, combined, by_rank, by_deltas, extracted]


def adapters(rng, dtype):
    return [{name: np.asarray(part, dtype) for name, part in random_of(rng, "ioo", 3).items()} for _ in range(2)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_of_numpy_stay_so_and_hold_the_numbers_of_those_of_jax(rng, function, dtype):
    one, other = adapters(rng, jnp.dtype(dtype))
    found, on_device = function(one, other), function(jax.tree.map(jnp.asarray, one), jax.tree.map(jnp.asarray, other))
    for name in "AB":
        assert isinstance(found[name], np.ndarray)
        assert is_jax(on_device[name])
        assert found[name].dtype == on_device[name].dtype == dtype
        np.testing.assert_array_equal(found[name], on_device[name])


@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_one_array_of_jax_makes_the_result_one(rng, function):
    one, other = adapters(rng, "float32")
    assert is_jax(function(one, jax.tree.map(jnp.asarray, other))["A"])
    assert is_jax(function(jax.tree.map(jnp.asarray, one), other)["B"])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float64_is_numpy_where_jax_would_narrow_it(rng, function):
    one, other = adapters(rng, "float64")
    assert function(one, other)["A"].dtype == np.float64
    with x64():
        on_device = [jax.tree.map(jnp.asarray, part) for part in (one, other)]
        found = function(*on_device)
        assert is_jax(found["A"])
        assert_close(found["A"], function(one, other)["A"])
    kept = function(*on_device)
    assert isinstance(kept["A"], np.ndarray)
    assert kept["A"].dtype == np.float64
