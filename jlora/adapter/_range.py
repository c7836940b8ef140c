"""Whether a sum fits the dtype that it is rounded to: looked at where the numbers are there, not while tracing."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.boxes import unboxed
from jlora.errors import AdapterError


def count_lost(before: Any, after: jax.Array, parts: Mapping[str, Any]) -> jax.Array | int:
    """How many numbers were finite and are no longer, after `parts` were added or taken out; of a value all were.

    Under jit, grad and vmap there are no numbers to look at: 0.
    """
    if isinstance(after, jax.core.Tracer):
        return 0
    return _lost(np.True_ if "value" in parts else jnp.isfinite(jnp.asarray(before)), after)


def range_problem(count: int, after: jax.Array, parts: Mapping[str, Any]) -> str:
    """What is wrong with a sum that has lost numbers."""
    if wrong := [name for name, part in parts.items() if not _is_finite(unboxed(part))]:
        return f"a NaN or an infinity in {' and '.join(wrong)}: the update is no number; merge another one"
    sums = f"{count:,} of {after.size:,} sums"
    return f"{after.dtype} does not hold {sums}; lower alpha, or cast the weight to a wider dtype first"


def check_range(before: Any, after: jax.Array, parts: Mapping[str, Any]) -> None:
    """Raises an AdapterError where numbers that were finite are not finite after `parts` were added or taken out."""
    if count := int(count_lost(before, after, parts)):
        raise AdapterError(range_problem(count, after, parts))


@jax.jit
def _lost(were_finite: Any, after: jax.Array) -> jax.Array:
    return jnp.sum(were_finite & ~jnp.isfinite(after))


def _is_finite(part: Any) -> bool:
    """Of an array of NumPy in its own dtype, which JAX may narrow."""
    return bool((np.isfinite(part) if isinstance(part, np.ndarray) else jnp.isfinite(part)).all())
