"""What an array is, told without importing JAX.

Commands on files compute with NumPy, and take less time than JAX takes to be imported. Whoever holds an array of JAX
has imported it, so that there is nothing to tell where it is not loaded.
"""

import dataclasses
import functools
import sys
from typing import Any

import ml_dtypes
import numpy as np

__all__ = [
    "ShapeDtype",
    "is_floating",
    "is_jax_array",
    "is_jax_shape",
    "is_number",
    "is_tracer",
    "loaded_jax",
    "on_device",
]


@dataclasses.dataclass(frozen=True)
class ShapeDtype:
    """The shape and dtype of an array that is not at hand, as `jax.ShapeDtypeStruct` is."""

    shape: tuple[int, ...]
    dtype: Any


def loaded_jax() -> Any:
    """JAX where this program has imported it, else None."""
    if "jax" not in sys.modules:
        return None
    import jax  # which waits where another thread is at it

    return jax


def is_jax_array(node: Any) -> bool:
    """Whether a node is an array of JAX; tracers are."""
    jax = loaded_jax()
    return jax is not None and isinstance(node, jax.Array)


def is_tracer(node: Any) -> bool:
    """Whether a node stands for an array in a function that JAX traces."""
    jax = loaded_jax()
    return jax is not None and isinstance(node, jax.core.Tracer)


def is_jax_shape(node: Any) -> bool:
    """Whether a node is a `jax.ShapeDtypeStruct`."""
    jax = loaded_jax()
    return jax is not None and isinstance(node, jax.ShapeDtypeStruct)


def on_device(array: np.ndarray[Any, Any]) -> Any:
    """The same numbers as an array of JAX; None where JAX would narrow their dtype, as float64 without x64."""
    import jax  # for callers who want its arrays

    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return None
    return jax.numpy.asarray(np.ascontiguousarray(array))


def is_floating(dtype: Any) -> bool:
    """Whether a dtype is one of floats, bfloat16 and float8 too; those that NumPy does not know, as of keys, are not.

    >>> is_floating("bfloat16"), is_floating(np.complex64)
    (True, False)
    """
    try:
        return _is_floating(np.dtype(dtype))
    except TypeError:
        return False


def is_number(dtype: Any) -> bool:
    """Whether a dtype is one of numbers, also of four bits or in bfloat16; bool is not.

    >>> is_number("int4"), is_number("bool")
    (True, False)
    """
    try:
        known = np.dtype(dtype)
    except TypeError:
        return False
    return known.kind in "iufc" or known.type.__module__ == "ml_dtypes"


@functools.cache
def _is_floating(dtype: np.dtype[Any]) -> bool:
    if dtype.kind != "V":
        return dtype.kind == "f"
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:
        return False
    return True
