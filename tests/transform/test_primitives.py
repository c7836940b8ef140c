"""Every way in which a program may use a weight, against the same program with the dense delta added, in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from jlora import AdapterError, CostModel, LoraConfig
from jlora.contraction import Factorization
from tests.reference import reference_delta, x64
from tests.transform.table import (
    COLUMN_IDS,
    EXPERT_IDS,
    FAR_IDS,
    JOINED,
    MERGED_JOINS,
    ROW_IDS,
    TABLE_IDS,
    Program,
    einsum,
    merged,
    weight_first,
)

ALPHA = 3.0
FACTORED, MERGED = CostModel(float("inf")), CostModel(0.0)


def conv(strides: Any, padding: Any, numbers: Any, lhs: Any = None, rhs: Any = None, **groups: int) -> Any:
    def fn(w: Any, x: Any) -> Any:
        return lax.conv_general_dilated(x, w, strides, padding, lhs, rhs, numbers, **groups)

    return fn


NHC, NHWC, NDHWC = ("NHC", "HIO", "NHC"), ("NHWC", "HWIO", "NHWC"), ("NDHWC", "DHWIO", "NDHWC")
NCHW, CHWN = ("NCHW", "OIHW", "NCHW"), ("CHWN", "IHWO", "HWNC")


def ragged(sizes: tuple[int, ...]) -> Any:
    return lambda w, x: lax.ragged_dot(x, w, jnp.array(sizes, jnp.int32))


def one_device(w: Any) -> Any:
    return lax.with_sharding_constraint(w, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def only_one(w: Any, x: Any) -> Any:
    """Looked up along an axis of one element."""
    return x @ jnp.take(w[:, None], ROW_IDS, axis=1, mode="clip")[:, 2]


def tied(w: Any, x: Any) -> Any:
    return (jnp.take(w, ROW_IDS, axis=0) * x) @ w.T


def fused(w: Any, x: Any) -> Any:
    q, k, v = (x @ part for part in jnp.split(w, [3, 8], axis=1))
    return jnp.tanh(q), k, v


def attention(w: Any, x: Any) -> Any:
    q, k, v = (jnp.einsum("td,dnh->tnh", x, part) for part in jnp.split(w.reshape(5, 3, 21), 3, axis=2))
    return jnp.einsum("nts,snh->tnh", jax.nn.softmax(jnp.einsum("tnh,snh->nts", q, k)), v)


PRODUCTS = [
    Program("matmul", lambda w, x: x @ w, (5, 11), (7, 5)),
    Program("x @ w.T", lambda w, x: x @ w.T, (11, 5), (7, 5), "oi"),
    Program("x @ w.T by A's other side", lambda w, x: x @ w.T, (11, 5), (7, 5), "io"),
    Program("matmul by A's other side", lambda w, x: x @ w, (5, 11), (7, 5), "oi"),
    Program("w @ x", lambda w, x: w @ x, (11, 5), (5, 7), "oi"),
    Program("vector @ w", lambda w, x: x @ w, (5, 11), (5,)),
    Program("w @ vector", lambda w, x: w @ x, (11, 5), (5,), "oi"),
    Program("no rows", lambda w, x: x @ w, (5, 11), (0, 5)),
    Program("one column", lambda w, x: x @ w, (5, 1), (7, 5)),
    Program("two uses", lambda w, x: jnp.tanh(x @ w) @ w.T, (5, 11), (7, 5)),
    Program("einsum BTD,NDH->BTNH", einsum("BTD,NDH->BTNH"), (3, 5, 11), (13, 7, 5), "oio"),
    Program("einsum NDH,BTD->NBHT", weight_first("NDH,BTD->NBHT"), (3, 5, 11), (13, 7, 5), "oio"),
    Program("einsum abd,bdf->abf", einsum("abd,bdf->abf"), (3, 5, 11), (7, 3, 5), "bio"),
    Program("einsum bad,dbf->fab", einsum("bad,dbf->fab"), (5, 3, 11), (3, 7, 5), "ibo"),
    Program("einsum dfb,bad->baf", weight_first("dfb,bad->baf"), (5, 11, 3), (3, 7, 5), "iob"),
    Program("einsum abcd,cdbf->acbf", einsum("abcd,cdbf->acbf"), (3, 5, 7, 11), (13, 7, 3, 5), "bibo"),
    Program("einsum of a sum over x", einsum("tsd,df->tf"), (5, 11), (7, 3, 5)),
    Program("einsum of a sum over w", einsum("td,dfg->tf"), (5, 11, 3), (7, 5), "ioo", factored=False),
    Program("DenseGeneral to two axes", einsum("td,dnh->tnh"), (5, 3, 11), (7, 5), "ioo"),
    Program("attention out", einsum("btnh,nhd->btd"), (3, 11, 5), (13, 7, 3, 11), "iio"),
    Program("one in axis of two", einsum("tn,nhd->thd"), (3, 11, 5), (7, 3), "iio"),
    Program("in and out axes together", einsum("tnhd,nhd->t"), (3, 11, 5), (7, 3, 11, 5), "iio"),
    Program("an in axis as a batch axis", einsum("tnh,nhd->tnd"), (3, 11, 5), (7, 3, 11), "iio"),
    Program("an out axis as a batch axis", einsum("tnd,dnh->tnh"), (5, 3, 11), (7, 3, 5), "ioo"),
    Program("tensordot over two axes", lambda w, x: jnp.tensordot(x, w, 2), (3, 5, 11), (7, 3, 5), "iio"),
    Program(
        "tensordot over axes crossed",
        lambda w, x: jnp.tensordot(x, w, ((1, 2), (1, 0))),
        (3, 5, 11),
        (7, 5, 3),
        "iio",
    ),
    Program(
        "dot_general, x not last",
        lambda w, x: lax.dot_general(x, w, (((0,), (1,)), ((), ()))),
        (3, 5, 11),
        (5, 7, 13),
        "oio",
    ),
    Program(
        "experts by dot_general",
        lambda w, x: lax.dot_general(x, w, (((2,), (1,)), ((0,), (0,)))),
        (3, 5, 11),
        (3, 7, 5),
        "bio",
    ),
    Program("experts as a free axis", einsum("td,edf->tef"), (3, 5, 11), (7, 5), "bio"),
    Program("experts contracted", einsum("tef,efd->td"), (3, 5, 11), (7, 3, 5), "bio"),
    Program("experts summed over", einsum("te,efd->tfd"), (3, 5, 11), (7, 3), "bio", factored=False),
    Program("stacked by vmap", lambda w, x: jax.vmap(jnp.matmul)(x, w), (3, 5, 11), (3, 7, 5), "bio"),
    Program("stacked by vmap over axis 1", jax.vmap(lambda w, x: x @ w, (1, 0)), (5, 3, 11), (3, 7, 5), "ibo"),
    Program("ragged_dot", ragged((2, 0, 5)), (3, 5, 11), (7, 5), "bio"),
    Program("ragged_dot, rows left over", ragged((2, 1, 1)), (3, 5, 11), (7, 5), "bio"),
    Program("ragged_dot by A's other side", ragged((1, 4, 2)), (3, 5, 11), (7, 5), "boi"),
    merged("ragged_dot over in axes", ragged((2, 0, 5)), (3, 5, 11), (7, 5), "iio"),
    merged("w @ w", lambda w, x: x @ w @ w + x @ (w @ w), (5, 5)),
]

CONVOLUTIONS = [
    Program("conv 1d", conv((1,), "SAME", NHC), (3, 5, 11), (2, 13, 5), "iio"),
    Program("conv 1d, dilated", conv((2,), ((2, 1),), NHC, rhs=(3,)), (3, 5, 11), (2, 17, 5), "iio"),
    Program("conv 2d", conv((2, 1), "VALID", NHWC), (3, 2, 5, 11), (2, 7, 5, 5), "iiio"),
    Program("conv 2d transposed", conv((1, 1), ((1, 2), (0, 1)), NHWC, lhs=(2, 3)), (3, 2, 5, 7), (2, 5, 3, 5), "iiio"),
    Program("conv 3d", conv((1, 2, 1), "SAME", NDHWC, rhs=(1, 1, 2)), (2, 3, 1, 5, 7), (2, 3, 5, 2, 5), "iiiio"),
    Program("conv OIHW", conv((1, 2), "SAME", NCHW), (11, 5, 3, 2), (2, 5, 7, 3), "oiii"),
    Program("conv CHWN", conv((1, 2), "SAME", CHWN), (5, 3, 2, 11), (5, 7, 3, 2), "iiio"),
    Program("conv, grouped", conv((2,), "SAME", NHC, feature_group_count=3), (3, 5, 21), (2, 13, 15), "iio"),
    Program(
        "conv OIHW, grouped", conv((1, 1), "SAME", NCHW, feature_group_count=3), (21, 5, 3, 2), (2, 15, 7, 3), "oiii"
    ),
    Program("conv, depthwise", conv((1,), "SAME", NHC, feature_group_count=5), (3, 1, 10), (2, 13, 5), "iio"),
    merged("conv, the window stacked", conv((1,), "SAME", NHC), (3, 5, 11), (2, 13, 5), "bio"),
    merged("conv, batch groups", conv((1,), "SAME", NHC, batch_group_count=3), (3, 5, 21), (6, 13, 5), "iio"),
    merged("conv of the weight", lambda w, x: conv((1,), "SAME", NHC)(x, w[None]), (13, 5), (3, 5, 11), "io"),
]

LOOKUPS = [
    Program("take", lambda w, x: jnp.take(w, ROW_IDS, axis=0) * x, (13, 5), (7, 5)),
    Program("take by B's side", lambda w, x: jnp.take(w, ROW_IDS, axis=0) * x, (13, 5), (7, 5), "oi"),
    Program("take columns", lambda w, x: x @ jnp.take(w, ROW_IDS, axis=1), (5, 13), (3, 5)),
    Program("w[ids] of two axes", lambda w, x: w[TABLE_IDS] * x, (13, 5), (2, 3, 5)),
    Program("w[ids], several in axes", lambda w, x: w[COLUMN_IDS, EXPERT_IDS] * x, (5, 3, 11), (7, 11), "iio"),
    Program("w[ids, :, ids]", lambda w, x: w[COLUMN_IDS, :, EXPERT_IDS] * x, (5, 11, 3), (7, 11), "ioi"),
    Program("w[ids], out axes", lambda w, x: w[ROW_IDS] * x, (13, 3, 5), (7, 3, 5), "ioo"),
    Program("w[experts, ids]", lambda w, x: w[EXPERT_IDS, COLUMN_IDS] * x, (3, 5, 11), (7, 11), "bio"),
    Program("w[experts] and a product", lambda w, x: einsum("td,tdf->tf")(w[EXPERT_IDS], x), (3, 5, 11), (7, 5), "bio"),
    Program("ids by vmap", lambda w, x: jax.vmap(lambda i, x: w[i] * x)(ROW_IDS, x), (13, 5), (7, 5)),
    Program("one expert by an array", lambda w, x: x @ w[jnp.asarray(EXPERT_IDS)[0]], (3, 5, 11), (7, 5), "bio"),
    Program("ids out of bounds, clipped", lambda w, x: jnp.take(w, FAR_IDS, axis=0, mode="clip") * x, (13, 5), (7, 5)),
    Program("ids of the only row", lambda w, x: jnp.take(w, ROW_IDS, axis=0, mode="clip") * x, (1, 5), (7, 5)),
    Program("ids of the only column", lambda w, x: x @ jnp.take(w, ROW_IDS, axis=1, mode="clip"), (5, 1), (3, 5)),
    Program(
        "ids of no axis",
        lambda w, x: x @ jnp.take(w[:, None], TABLE_IDS[0], axis=1, mode="clip")[:, 0],
        (5, 11),
        (3, 5),
    ),
    Program(
        "ids out of bounds, filled", lambda w, x: w.at[FAR_IDS].get(mode="fill", fill_value=2.0) * x, (13, 5), (7, 5)
    ),
    Program("tied table", tied, (13, 5), (7, 5)),
    Program("tied table by B's side", tied, (13, 5), (7, 5), "oi"),
    Program(
        "windows of rows",
        lambda w, x: jax.vmap(lambda i: lax.dynamic_slice(w, (i, np.int32(0)), (2, 5)))(ROW_IDS % 12) * x,
        (13, 5),
        (7, 2, 5),
    ),
    merged("w and ids by vmap", lambda w, x: jax.vmap(lambda w, i: w[i])(w, EXPERT_IDS[:5]) * x, (5, 11), (5,)),
]

MOVES = [
    Program("transpose", lambda w, x: jnp.tensordot(x, w.transpose(2, 0, 1), 1), (3, 5, 11), (7, 11), "oio"),
    Program("transpose and back", lambda w, x: x @ w.T.T, (5, 11), (7, 5)),
    Program("reshape joins out axes", lambda w, x: x @ w.reshape(5, 33), (5, 3, 11), (7, 5), "ioo"),
    Program("reshape splits out axes", lambda w, x: jnp.tensordot(x, w.reshape(5, 3, 11), 1), (5, 33), (7, 5)),
    Program("reshape joins in axes", lambda w, x: x @ w.reshape(15, 11), (3, 5, 11), (7, 15), "iio"),
    Program("reshape splits in axes", lambda w, x: jnp.tensordot(x, w.reshape(3, 5, 11), 2), (15, 11), (7, 3, 5)),
    Program(
        "reshape regroups in axes",
        lambda w, x: einsum("tab,abf->tf")(w.reshape(5, 3, 11), x),
        (3, 5, 11),
        (7, 5, 3),
        "iio",
    ),
    Program(
        "reshape joins batch axes",
        lambda w, x: jax.vmap(jnp.matmul)(x, w.reshape(6, 5, 7)),
        (2, 3, 5, 7),
        (6, 11, 5),
        "bbio",
    ),
    Program("reshape drops axes of size 1", lambda w, x: x @ w.reshape(5, 11), (1, 5, 1, 11), (7, 5), "iiio"),
    Program("reshape adds axes of size 1", lambda w, x: x @ w.reshape(1, 5, 1, 11)[0, :, 0], (5, 11), (7, 5)),
    Program(
        "reshape with axes of size 1", lambda w, x: x @ w.reshape(15, 1, 7)[:, 0], (3, 1, 5, 7, 1), (2, 15), "iiioo"
    ),
    Program("squeeze", lambda w, x: x @ jnp.squeeze(w, (0, 2)), (1, 5, 1, 11), (7, 5), "biio"),
    Program("expand_dims", lambda w, x: jnp.matmul(x, jnp.expand_dims(w, 0)), (5, 11), (1, 7, 5)),
    Program("broadcast_to", lambda w, x: jax.vmap(jnp.matmul)(x, jnp.broadcast_to(w, (3, 5, 11))), (5, 11), (3, 7, 5)),
    Program("broadcast_to, an in axis", lambda w, x: x @ jnp.broadcast_to(w, (5, 11)), (1, 11), (7, 5)),
    Program("broadcast_to, an out axis", lambda w, x: x @ jnp.broadcast_to(w, (5, 11)), (5, 1), (7, 5)),
    Program("slice of in and out axes", lambda w, x: x @ w[1:10:2, 2::3], (13, 11), (7, 5)),
    Program("slice of a batch axis", lambda w, x: jax.vmap(jnp.matmul)(x, w[1::2]), (5, 7, 11), (2, 3, 7), "bio"),
    Program("w[i]", lambda w, x: jnp.tanh(x @ w[0]) @ w[-1].T, (3, 5, 11), (7, 5), "bio"),
    Program(
        "dynamic_slice", lambda w, x: x @ lax.dynamic_slice(w, (np.int32(3), np.int32(20)), (5, 4)), (13, 11), (7, 5)
    ),
    Program(
        "dynamic_index_in_dim",
        lambda w, x: x @ lax.dynamic_index_in_dim(w, jnp.int32(2), 0, False),
        (3, 5, 11),
        (7, 5),
        "bio",
    ),
    Program(
        "dynamic_index_in_dim, kept",
        lambda w, x: x[None] @ lax.dynamic_index_in_dim(w, jnp.int32(1)),
        (3, 5, 11),
        (7, 5),
        "bio",
    ),
    Program("split", fused, (5, 13), (7, 5)),
    Program(
        "split in axes",
        lambda w, x: sum(p.sum() for p in jnp.split(x, 3, 1)) * (x[:, :5] @ jnp.split(w, 3)[1]),
        (15, 11),
        (7, 15),
    ),
    Program("reshape, split, attention", attention, (5, 63), (7, 5)),
    Program("rev", lambda w, x: x @ w[::-1] @ jnp.flip(w).T, (5, 11), (7, 5)),
    Program("casts", lambda w, x: x @ w.astype(jnp.float32).astype(x.dtype), (5, 11), (7, 5), tolerance=1e-6),
    Program("stop_gradient of x", lambda w, x: lax.stop_gradient(x) @ w, (5, 11), (7, 5)),
    Program("stop_gradient of w", lambda w, x: x @ lax.stop_gradient(w), (5, 11), (7, 5)),
    Program("jnp.copy", lambda w, x: x @ jnp.copy(w), (5, 11), (7, 5)),
    Program("jnp.array", lambda w, x: x @ jnp.array(w), (5, 11), (7, 5)),
    Program("device_put", lambda w, x: x @ jax.device_put(w), (5, 11), (7, 5)),
    Program("device_put of both", lambda w, x: jnp.matmul(*jax.device_put((w, x))[::-1]), (5, 11), (7, 5)),
    Program("with_sharding_constraint", lambda w, x: x @ one_device(w), (5, 11), (7, 5)),
    Program("optimization_barrier", lambda w, x: jnp.matmul(*lax.optimization_barrier((w, x))[::-1]), (5, 11), (7, 5)),
    Program("a scalar times w", lambda w, x: x @ (0.3 * w), (5, 11), (7, 5)),
    Program("w times a scalar of x", lambda w, x: x @ (w * x[0, 0]), (5, 11), (7, 5)),
    Program("w over a scalar of x", lambda w, x: x @ (w / (2 + x[0, 0] ** 2)), (5, 11), (7, 5)),
    Program("-w", lambda w, x: x @ -w, (5, 11), (7, 5)),
]


WHOLES = [
    merged("w ** 2", lambda w, x: x @ w**2),
    merged("w * w", lambda w, x: x @ (w * w)),
    merged("x + w", lambda w, x: x + w, x=(5, 11)),
    merged("x * w", lambda w, x: x * w, x=(5, 11)),
    merged("1 / w", lambda w, x: x @ (1 / (w + 9)) + 1 / (9 + w[0])),
    merged("a scalar over w", lambda w, x: x @ (1 / w)),
    merged("w / norm(w)", lambda w, x: x @ (w / jnp.linalg.norm(w))),
    merged("softmax", lambda w, x: x @ jax.nn.softmax(w)),
    merged("sort", lambda w, x: x @ jnp.sort(w, axis=0)),
    merged("sum", lambda w, x: jnp.sum(w) * x),
    merged("where", lambda w, x: x @ jnp.where(w > 0, w, 0.1 * w)),
    merged("round", lambda w, x: x @ w + lax.stop_gradient(w).astype(jnp.int32)[0]),
    merged("returned", lambda w, x: (w, x @ w)),
    merged("returned, transposed", lambda w, x: w.T),
    merged("one row times x", lambda w, x: lax.dynamic_index_in_dim(w, jnp.int32(3), 0, False) * x, x=(7, 11)),
    merged("reshape mixes in and out", lambda w, x: x @ w.reshape(11, 5), x=(7, 11)),
    merged("reshape to a vector", lambda w, x: x @ w.reshape(-1), x=(7, 55)),
    merged("reshape mixes batch and in", lambda w, x: x @ w.reshape(15, 11), (3, 5, 11), (7, 15), "bio"),
]

PROGRAMS = {
    program.name: program for program in [*PRODUCTS, *CONVOLUTIONS, *LOOKUPS, *MOVES, *WHOLES, *JOINED, *MERGED_JOINS]
}


def config_of(program: Program, **fields: Any) -> LoraConfig:
    roles = {"w": program.roles}
    return LoraConfig(rank=program.rank, alpha=ALPHA, target_modules="w", factorizations=roles, **fields)


def arguments(program: Program, rng: np.random.Generator, dtype: Any = np.float64) -> tuple[Any, Any, Any]:
    """Random params, adapters and x; all of them are numbers of bfloat16, so that every dtype holds the same."""

    def random(shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape).astype(jnp.bfloat16).astype(dtype)

    a, b = Factorization(program.roles).adapter_shapes(program.weight, program.rank)
    return {"w": random(program.weight)}, {"w": {"A": random(a), "B": random(b)}}, random(program.x)


def of_params(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, x: fn(params["w"], x)


def dense(adapter: Any, roles: str, alpha: Any = ALPHA) -> jax.Array:
    """The delta by one einsum, so that it can be differentiated."""
    w = "abcdefgh"[: len(roles)]
    batch, ins, outs = ("".join(c for c, role in zip(w, roles, strict=True) if role == kind) for kind in "bio")
    return alpha / adapter["A"].shape[-1] * jnp.einsum(f"{batch}{ins}r,{batch}r{outs}->{w}", adapter["A"], adapter["B"])


def reference(fn: Callable[..., Any], roles: str) -> Callable[..., Any]:
    """The function with the dense delta added to its weight."""
    return lambda params, adapters, x: fn(params["w"] + dense(adapters["w"], roles), x)


def derivatives(fn: Callable[..., Any], primals: Any, tangents: Any, modes: str = "value grad jvp") -> dict[str, Any]:
    """The value, the gradients of a weighted sum of it by every argument, and the derivative along the tangents."""
    found = {}
    if "grad" in modes:
        found["value"], pullback = jax.vjp(fn, *primals)
        found["grad"] = pullback(jax.tree.map(cotangent, found["value"]))
    if "jvp" in modes:
        found["value"], found["jvp"] = jax.jvp(fn, primals, tangents)
    return found


def cotangent(y: jax.Array) -> Any:
    if not jnp.issubdtype(y.dtype, jnp.floating):
        return np.zeros(y.shape, jax.dtypes.float0)
    return jnp.cos(1 + jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)


def assert_trees_close(found: Any, wanted: Any, tolerance: float) -> None:
    """Every leaf to a tolerance relative to its largest element."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for path, (one, other) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda *pair: Pair(*map(np.asarray, pair)), found, wanted), is_leaf=lambda n: isinstance(n, Pair)
    ):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if one.dtype != jax.dtypes.float0:
            scale = max(np.max(np.abs(other), initial=0.0), 1e-30)
            np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


class Pair(tuple):
    """Two leaves as one."""

    def __new__(cls, *pair: Any) -> "Pair":
        return super().__new__(cls, pair)


@pytest.mark.parametrize("roles", sorted({program.roles for program in PROGRAMS.values()}))
def test_the_reference_adds_the_delta_of_a_plain_loop(rng, roles):
    _, adapters, _ = arguments(Program("", lambda w, x: w, (3, 5, 7, 11, 13)[: len(roles)], (), roles), rng)
    with x64():
        found = np.asarray(dense(adapters["w"], roles))
        wanted = reference_delta(adapters["w"], ALPHA, roles.count("b"))
    order = [axis for kind in "bio" for axis, role in enumerate(roles) if role == kind]
    np.testing.assert_allclose(found, wanted.transpose(np.argsort(order)), rtol=1e-12, atol=1e-12)


def cast(primals: Any, dtype: str, adapter_dtype: str) -> Any:
    params, adapters, x = primals
    params, x = jax.tree.map(lambda array: array.astype(dtype), (params, x))
    return params, jax.tree.map(lambda array: array.astype(adapter_dtype), adapters), x


SMALL = {"float32": 3e-5, "bfloat16": 4e-2}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=str)
def test_values_and_derivatives_are_those_of_the_dense_delta(rng, program):
    config, wanted_fn = config_of(program), reference(program.fn, program.roles)
    factored = jlora.lora(of_params(program.fn), config, strict=program.factored, cost_model=FACTORED)
    merging = jlora.lora(of_params(program.fn), config, cost_model=MERGED)

    def everything(primals, tangents):
        small = {dtype: factored(*cast(primals, dtype, "float32")) for dtype in SMALL}
        chosen = derivatives(merging, primals, tangents, "grad") if program.factored else {}
        return [derivatives(fn, primals, tangents, program.modes) for fn in (wanted_fn, factored)], chosen, small

    with x64():
        primals = arguments(program, rng)
        (wanted, found), chosen, small = jax.jit(everything)(primals, arguments(program, rng))
    assert_trees_close(found, wanted, program.tolerance)
    assert_trees_close(chosen, {name: wanted[name] for name in chosen}, program.tolerance)
    for dtype, tolerance in SMALL.items():
        assert {y.dtype for y in jax.tree.leaves(small[dtype])} == {jnp.dtype(dtype)}
        wide = jax.tree.map(lambda y: np.asarray(y, np.float64), small[dtype])
        assert_trees_close(wide, wanted["value"], tolerance)


@pytest.mark.parametrize("program", [p for p in PROGRAMS.values() if not p.factored], ids=str)
def test_what_must_be_merged_is_refused_by_strict(rng, program):
    fn = jlora.lora(of_params(program.fn), config_of(program), strict=True, cost_model=FACTORED)
    with pytest.raises(AdapterError, match=r"^w: .* cannot be factored: .*exclude_modules"):
        jax.eval_shape(fn, *arguments(program, rng, np.float32))


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=str)
def test_explain_tells_what_is_merged(rng, program):
    params, _, x = arguments(program, rng, np.float32)
    uses = jlora.explain(of_params(program.fn), config_of(program), params, x, cost_model=FACTORED).uses
    assert uses
    assert all(use.factored for use in uses) == program.factored
    assert all(use.path == "w" and (use.factored or use.why) for use in uses)
