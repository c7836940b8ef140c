"""A model with a weight of each kind of axes, and the updates of VeRA and LoRA-XS in float64, written without jlora."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import LoraConfig
from tests.reference import as64, random_array

ROLES = {
    "table": "io",  # (vocabulary, width)
    "dense": "io",
    "query": "ioo",  # (width, heads, size)
    "out": "iio",
    "torch": "oi",
    "conv": "iiio",
    "experts": "bio",
    "layers": "bio",  # scanned
}
SHAPES = {
    "table": (13, 5),
    "dense": (5, 7),
    "query": (7, 2, 3),
    "out": (2, 3, 11),
    "torch": (6, 11),
    "conv": (2, 3, 1, 6),
    "experts": (2, 6, 7),
    "layers": (3, 7, 7),
}
CONFIG = LoraConfig(rank=3, alpha=5, factorizations=ROLES)


def random_params(rng: np.random.Generator, dtype: Any = "float32") -> dict[str, Any]:
    return {path: random_array(rng, shape, dtype, 0.5) for path, shape in SHAPES.items()}


def apply(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Tokens (n,) -> (2 experts, n, 7)."""
    x = jnp.tanh(params["table"][tokens] @ params["dense"])  # (n, 7)
    heads = jnp.tanh(jnp.einsum("nd,dhk->nhk", x, params["query"]))  # (n, 2, 3)
    y = jnp.tanh(jnp.einsum("nhk,hko->no", heads, params["out"]))  # (n, 11)
    z = jnp.tanh(y @ params["torch"].T)  # (n, 6)
    image = z.reshape(-1, 2, 3, 1)
    dimensions = jax.lax.conv_dimension_numbers(image.shape, params["conv"].shape, ("NHWC", "HWIO", "NHWC"))
    z = z + jax.lax.conv_general_dilated(image, params["conv"], (1, 1), "VALID", dimension_numbers=dimensions)[:, 0, 0]
    mixed = jnp.einsum("nd,edf->enf", z, params["experts"])  # (2, n, 7)
    return jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), mixed, params["layers"])[0]


def as_matrices(path: str, weight: Any) -> np.ndarray:
    """A weight as (batch, in, out) in float64."""
    roles, array = ROLES[path], as64(weight)
    order = [axis for role in "bio" for axis, found in enumerate(roles) if found == role]
    sizes = {role: [array.shape[axis] for axis, found in enumerate(roles) if found == role] for role in "bio"}
    counts = [int(np.prod(sizes[role])) for role in "bio"]
    return array.transpose(order).reshape(counts)


def vera_update(vectors: Any, pair: Any, ins: int, outs: int) -> np.ndarray:
    """One matrix (in, out) after the other, from d (batch, r) and b (batch, out)."""
    a, b = as64(pair["A"]), as64(pair["B"])
    d_all = as64(vectors["d"]).reshape(-1, a.shape[1])
    b_all = as64(vectors["b"]).reshape(len(d_all), outs)
    updates = np.zeros((len(d_all), ins, outs))
    for n in range(len(d_all)):
        for k in range(a.shape[1]):
            updates[n] += d_all[n, k] * np.outer(a[:ins, k], b[k, :outs] * b_all[n])
    return updates
