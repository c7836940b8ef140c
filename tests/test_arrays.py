"""What is told of arrays and dtypes without JAX, against JAX."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jlora import arrays
from tests.reference import x64

OF_NUMPY = ("bool", "int8", "uint16", "int64", "float16", "float32", "float64", "complex64", "S3", "U1", "O", "M8[s]")
OF_OTHERS = [name for name in dir(ml_dtypes) if isinstance(getattr(ml_dtypes, name), type) and hasattr(jnp, name)]


@pytest.mark.parametrize("name", [*OF_NUMPY, *OF_OTHERS])
def test_dtypes_are_told_as_by_jax(name):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    assert arrays.is_floating(dtype) == jnp.issubdtype(dtype, jnp.floating)
    assert arrays.is_number(dtype) == jnp.issubdtype(dtype, np.number)


def test_keys_of_jax_are_no_numbers():
    dtype = jax.random.key(0).dtype
    assert not arrays.is_floating(dtype)
    assert not arrays.is_number(dtype)


@pytest.mark.parametrize(
    ("node", "is_array", "is_tracer", "is_shape"),
    [
        (np.ones(3), False, False, False),
        (jnp.ones(3), True, False, False),
        (jax.random.key(0), True, False, False),
        (jax.ShapeDtypeStruct((3,), "float32"), False, False, True),
        (2.0, False, False, False),
    ],
)
def test_what_is_of_jax(node, is_array, is_tracer, is_shape, monkeypatch):
    told = (arrays.is_jax_array, arrays.is_tracer, arrays.is_jax_shape)
    assert [tell(node) for tell in told] == [is_array, is_tracer, is_shape]
    monkeypatch.delitem(arrays.sys.modules, "jax")
    assert [tell(node) for tell in told] == [False, False, False]


def test_a_tracer_is_told():
    found = []
    jax.jit(lambda x: found.append((arrays.is_tracer(x), arrays.is_jax_array(x))))(jnp.ones(3))
    assert found == [(True, True)]


def test_arrays_go_to_the_device_where_jax_does_not_narrow_them(rng):
    narrow, wide = rng.normal(size=(3, 5)).astype(np.float32).T, rng.normal(size=3)
    placed = arrays.on_device(narrow)
    assert isinstance(placed, jax.Array)
    np.testing.assert_array_equal(placed, narrow)
    assert arrays.on_device(wide) is None
    with x64():
        assert arrays.on_device(wide).dtype == np.float64
