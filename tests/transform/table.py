"""Programs of one weight: what a table of them holds; those that join it with others, scale it or add to it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jlora.contraction import Factorization

RANK = 2

ROW_IDS = np.array([3, 0, 12, 3, 7, 1, 5], np.int32)  # of 13 rows
TABLE_IDS = np.array([[3, 0, 12], [4, 4, 9]], np.int32)
FAR_IDS = np.array([3, 99, 12, -1, 7, -99, 5], np.int32)
EXPERT_IDS = np.array([2, 0, 1, 2, 2, 0, 1], np.int32)  # of 3 experts
COLUMN_IDS = np.array([4, 4, 0, 1, 3, 2, 0], np.int32)  # of 5 columns


@dataclasses.dataclass(frozen=True)
class Program:
    """`fn(w, x)`, the sizes of its arguments, its derivatives; `tolerance` is relative, of a run in float64."""

    name: str
    fn: Callable[[Any, Any], Any]
    weight: tuple[int, ...]
    x: tuple[int, ...]
    roles: str = "io"
    factored: bool = True
    tolerance: float = 1e-10
    modes: str = "grad jvp"

    def __str__(self) -> str:
        return self.name

    @property
    def rank(self) -> int:
        return min(RANK, Factorization(self.roles).max_rank(self.weight))


def merged(name: str, fn: Callable[..., Any], weight: Any = (5, 11), x: Any = (7, 5), roles: str = "io") -> Program:
    return Program(name, fn, weight, x, roles, factored=False)


def einsum(equation: str) -> Any:
    return lambda w, x: jnp.einsum(equation, x, w)


def weight_first(equation: str) -> Any:
    return lambda w, x: jnp.einsum(equation, w, x)


def stacked_again(w: Any, x: Any) -> Any:
    """Layers taken apart, as lists of them are, and stacked for a scan."""
    return lax.scan(lambda c, wi: (jnp.tanh(c @ wi), None), x, jnp.stack([w[2], w[0], 2 * w[1]]))[0]


def unstacked(w: Any, x: Any) -> Any:
    first, second, third = jnp.unstack(w, axis=1)
    return jnp.tanh(x @ first) @ second.T @ third


def own_vjp(w: Any, x: Any) -> Any:
    """The weight out of a function with another derivative than its own."""
    twice = jax.custom_vjp(lambda w: 2 * w)
    twice.defvjp(lambda w: (2 * w, None), lambda _, g: (3 * g,))
    return x @ twice(w)


def own_jvp(w: Any, x: Any) -> Any:
    pair = jax.custom_jvp(lambda w, x: (2 * w.T, jnp.sin(x)))
    pair.defjvp(lambda primals, tangents: (pair(*primals), (tangents[0].T, 3 * tangents[1])))
    transposed, y = pair(w, x)
    return y @ transposed.T


def chosen(w: Any, x: Any) -> Any:
    """Out of a branch: a weight in another scale, in more ranks, and no weight at all."""
    ones = jnp.ones((5, 7), x.dtype)
    branches = [lambda w: w, lambda w: w[::-1] + 3 * w, lambda w: ones]
    ws = [lax.switch(jnp.sum(x > 99).astype(jnp.int32) + n, branches, w) for n in range(3)]
    return sum(jnp.sin((n + x) @ w) for n, w in enumerate(ws))


def centred(w: Any, x: Any) -> Any:
    return x @ (w - w.mean(0)) / 3


JOINED = [
    Program("checkpoint_name", lambda w, x: x @ checkpoint_name(w.T, "w").T, (5, 11), (7, 5)),
    Program("reduce_precision", lambda w, x: x @ lax.reduce_precision(w, 11, 52), (5, 11), (7, 5)),
    Program("stack", stacked_again, (3, 5, 5), (7, 5), "bio"),
    Program(
        "stack, last", lambda w, x: einsum("tbec,abec->tbea")(jnp.stack([w, -w], 2), x), (2, 5, 3), (7, 5, 2, 3), "obi"
    ),
    Program("unstack", unstacked, (5, 3, 5), (7, 5), "ibo"),
    Program("tile", lambda w, x: x @ jnp.tile(w, (2, 3)), (5, 11), (7, 10)),
    Program(
        "tile, a batch axis", lambda w, x: jax.vmap(jnp.matmul)(x, jnp.tile(w, (2, 1, 1))), (3, 5, 7), (6, 2, 5), "bio"
    ),
    Program(
        "concatenate out axes", lambda w, x: x @ jnp.concatenate([w[0], w[1], w[0] / 2], 1), (2, 7, 11), (3, 7), "bio"
    ),
    Program("concatenate in axes", lambda w, x: x @ jnp.concatenate([w[1], w[0]], 0), (2, 5, 11), (7, 10), "bio"),
    Program(
        "concatenate batch axes",
        lambda w, x: jax.vmap(jnp.matmul)(x, jnp.concatenate([w[1:], w])),
        (3, 5, 7),
        (5, 2, 5),
        "bio",
    ),
    Program(
        "concatenate with zeros",
        lambda w, x: x @ jnp.concatenate([w, jnp.zeros((5, 2), w.dtype), w], 1),
        (5, 11),
        (7, 5),
    ),
    Program(
        "concatenate with zeros in a batch",
        lambda w, x: jax.vmap(jnp.matmul)(x, jnp.concatenate([w, jnp.ones((2, 5, 7), w.dtype)])),
        (3, 5, 7),
        (5, 2, 5),
        "bio",
    ),
    Program("roll", lambda w, x: jnp.roll(x @ jnp.roll(w, 2, 1), 1, 1) @ jnp.roll(w, -1, 0).T, (5, 11), (7, 5)),
    Program("pad", lambda w, x: x @ jnp.pad(w, ((1, 1), (0, 2)), constant_values=3), (5, 11), (7, 7)),
    Program(
        "pad a batch, and inside",
        lambda w, x: jax.vmap(jnp.matmul)(x, lax.pad(w, jnp.ones((), w.dtype), ((1, 0, 1), (-1, 0, 0), (0, 0, 2)))),
        (2, 6, 3),
        (4, 7, 5),
        "bio",
    ),
    Program(
        "where by a scalar",
        lambda w, x: x @ jnp.where(x[0, 0] > 0, w, 2 * w[::-1]) + x @ jnp.where(x[0, 0] < 0, w, 3),
        (5, 11),
        (7, 5),
    ),
    Program("select_n", lambda w, x: x @ lax.select_n(jnp.int32(1), w, w.T, -w), (5, 5), (7, 5)),
    Program("w times a scale of out axes", lambda w, x: x @ (w * jnp.arange(11, dtype=w.dtype)), (5, 11), (7, 5)),
    Program("a scale of in axes times w", lambda w, x: x @ (jnp.sin(x[0])[:, None] * w), (5, 11), (7, 5)),
    Program(
        "w over a scale of in and batch",
        lambda w, x: einsum("td,edf->etf")(w / (2 + x[:3, :, None] ** 2), x),
        (3, 5, 11),
        (7, 5),
        "bio",
    ),
    Program("w plus a scalar", lambda w, x: x @ (w + 0.1) + x @ (1 - w), (5, 11), (7, 5)),
    Program("w plus a scalar of x", lambda w, x: x @ (w + x[0, 0]), (5, 11), (7, 5)),
    Program(
        "w minus a matrix", lambda w, x: x @ (w - jnp.arange(55, dtype=w.dtype).reshape(5, 11) / 9), (5, 11), (7, 5)
    ),
    Program("w plus a vector, spread", lambda w, x: x @ (w + jnp.arange(5, dtype=w.dtype)[:, None]), (1, 11), (7, 5)),
    Program("w + w.T", lambda w, x: x @ (w + w.T), (7, 7), (3, 7)),
    Program("w plus what it is merged for", centred, (5, 11), (7, 5), factored=False),
    Program(
        "add_any",
        lambda w, x: x @ jax.vjp(lambda v: (v, v), x.T)[1]((w[:, :7], w[::-1, :7]))[0],
        (5, 11),
        (7, 5),
    ),
    Program("w.at[].add", lambda w, x: x @ w.at[1:3, 2].add(0.5).at[ROW_IDS % 5].subtract(0.3), (5, 11), (7, 5)),
    Program("a custom_jvp returns w", own_jvp, (5, 11), (7, 5)),
    Program("a custom_vjp returns w", own_vjp, (5, 11), (7, 5), modes="grad"),
    Program("a cond returns w", chosen, (5, 7), (3, 5)),
]


def complex_product(w: Any, x: Any) -> Any:
    """Written with lax.complex: JAX 0.7 warns of its own derivative of 1j * im."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    re, im, x_re = (array.astype(wide) for array in (w[0], w[1], x))
    return jnp.abs(lax.complex(x_re, jnp.zeros_like(x_re)) @ lax.complex(re, im)).astype(x.dtype)


MERGED_JOINS = [
    merged("concatenate with x", lambda w, x: x @ jnp.concatenate([w, x.T], 1)),
    merged(
        "concatenate, too many ranks",
        lambda w, x: x @ jnp.concatenate([w[n] for n in range(3)], 1),
        (3, 5, 11),
        (7, 5),
        "bio",
    ),
    merged("plus x", lambda w, x: x.T @ (w + x), x=(5, 11)),
    merged("where by a scalar, with x", lambda w, x: x.T @ jnp.where(x[0, 0] > 9, x, w), x=(5, 11)),
    merged("w + w.T of a stack", lambda w, x: x @ (w + w.T)[0], (5, 5, 5), (7, 5), "bio"),
    merged(
        "times a matrix",
        lambda w, x: x @ (w * jnp.arange(55, dtype=w.dtype).reshape(5, 11)),
    ),
    merged("reduce_sum", lambda w, x: x @ w.sum(1), (5, 2, 11), (7, 5), "ioo"),
    merged("dynamic_update_slice", lambda w, x: x @ lax.dynamic_update_slice(w, jnp.ones((1, 11), w.dtype), (0, 0))),
    merged("re + 1j im", complex_product, (2, 5, 11), roles="bio"),
    merged("weight norm", lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0))),
    merged(
        "vmap of switch",
        lambda w, x: jax.vmap(lambda n, x: x @ lax.switch(n, [lambda: w, lambda: 2 * w]))(COLUMN_IDS % 2, x),
    ),
]
