"""Every function under every transform: one grid of values and dtypes, no retrace, no dense delta, exact at B = 0."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import (
    lora_delta,
    lora_linear,
    lora_singular_values,
    merge_lora_weight,
    tree_lora_delta,
    unmerge_lora_weight,
)
from tests.reference import as64, assert_close, random_array, reference_delta

ALPHA, STACK = 3.0, 13
MATRIX = {"A": (5, 2), "B": (2, 7)}
LAYERS = {"A": (3, 5, 2), "B": (3, 2, 7, 11)}
TREE = {"up": MATRIX, "down": [LAYERS, None]}
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Row:
    """A function of operands and alpha, the shapes of the operands, and the function again in NumPy."""

    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    reference: Callable[..., Any]

    def draw(self, rng, dtype="float32"):
        is_shape = lambda node: isinstance(node, tuple) and all(isinstance(size, int) for size in node)  # noqa: E731
        return jax.tree.map(lambda shape: random_array(rng, shape, dtype), self.shapes, is_leaf=is_shape)

    def found(self, operands, alpha):
        return self.function(*operands, alpha)

    def wanted(self, operands, alpha):
        return self.reference(*operands, as64(alpha))


def _svd(adapter, alpha):
    return np.linalg.svd(reference_delta(adapter, alpha), compute_uv=False)[:2]


def _tree(adapters, alpha):
    return {
        "up": reference_delta(adapters["up"], alpha),
        "down": [reference_delta(adapters["down"][0], alpha, 1), None],
    }


ROWS = {
    "lora_delta": Row(lora_delta, (MATRIX,), reference_delta),
    "lora_linear": Row(
        lora_linear,
        ((17, 5), (5, 7), MATRIX),
        lambda x, weight, adapter, alpha: as64(x) @ (as64(weight) + reference_delta(adapter, alpha)),
    ),
    "lora_linear of layers": Row(
        lora_linear,
        ((3, 17, 5), (3, 5, 7, 11), LAYERS),
        lambda x, weight, adapter, alpha: np.einsum(
            "bti,bijk->btjk", as64(x), as64(weight) + reference_delta(adapter, alpha, 1)
        ),
    ),
    "merge_lora_weight": Row(
        merge_lora_weight,
        ((5, 7), MATRIX),
        lambda weight, adapter, alpha: as64(weight) + reference_delta(adapter, alpha),
    ),
    "unmerge_lora_weight": Row(
        unmerge_lora_weight,
        ((5, 7), MATRIX),
        lambda weight, adapter, alpha: as64(weight) - reference_delta(adapter, alpha),
    ),
    "tree_lora_delta": Row(tree_lora_delta, (TREE,), _tree),
    "lora_singular_values": Row(lora_singular_values, (MATRIX,), _svd),
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def finite_difference(function, tree):
    """The gradient of a scalar function of a tree, one element at a time, in float64."""
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [np.array(as64(leaf)) for leaf in leaves]
    grads = [np.empty_like(leaf) for leaf in leaves]
    for leaf, grad in zip(leaves, grads, strict=True):
        for index in np.ndindex(leaf.shape):
            center = leaf[index]
            ends = []
            for step in (1e-4, -1e-4):
                leaf[index] = center + step
                ends.append(function(jax.tree.unflatten(treedef, leaves)))
            leaf[index] = center
            grad[index] = (ends[0] - ends[1]) / 2e-4
    return jax.tree.unflatten(treedef, grads)


def _stack(trees):
    return jax.tree.map(lambda *leaves: (jnp if isinstance(leaves[0], jax.Array) else np).stack(leaves), *trees)


def _eager(row, rng, dtype):
    operands = row.draw(rng, dtype)
    return row.found(operands, ALPHA), row.wanted(operands, ALPHA)


def _jit(row, rng, dtype):
    operands = row.draw(rng, dtype)
    return jax.jit(row.found)(operands, jnp.float32(ALPHA)), row.wanted(operands, ALPHA)


def _grad(row, rng, dtype):
    operands, alpha = row.draw(rng, dtype), jnp.float32(ALPHA)
    cotangents = [rng.standard_normal(leaf.shape) for leaf in jax.tree.leaves(row.wanted(operands, ALPHA))]

    def weighted(xp, out):
        return sum(xp.vdot(xp.asarray(c, "float32"), y) for c, y in zip(cotangents, jax.tree.leaves(out), strict=True))

    def loss(args):
        return weighted(jnp, jax.tree.map(lambda leaf: leaf.astype("float32"), row.found(*args)))

    return jax.jit(jax.grad(loss))((operands, alpha)), finite_difference(
        lambda args: weighted(np, row.wanted(*args)), (operands, alpha)
    )


def _vmap_of_operands(row, rng, dtype):
    draws = [row.draw(rng, dtype) for _ in range(STACK)]
    wanted = _stack([row.wanted(operands, ALPHA) for operands in draws])
    return jax.jit(jax.vmap(row.found, (0, None)))(_stack(draws), ALPHA), wanted


def _vmap_of_alpha(row, rng, dtype):
    operands, alphas = row.draw(rng, dtype), random_array(rng, (STACK,))
    return jax.jit(jax.vmap(row.found, (None, 0)))(operands, alphas), _stack(
        [row.wanted(operands, alpha) for alpha in alphas]
    )


def _scan(row, rng, dtype):
    draws = [row.draw(rng, dtype) for _ in range(STACK)]
    _, found = jax.lax.scan(lambda alpha, operands: (alpha, row.found(operands, alpha)), ALPHA, _stack(draws))
    return found, _stack([row.wanted(operands, ALPHA) for operands in draws])


TRANSFORMS = {
    "eager": _eager,
    "jit": _jit,
    "grad": _grad,
    "vmap of operands": _vmap_of_operands,
    "vmap of alpha": _vmap_of_alpha,
    "scan": _scan,
}


@pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@every_row
def test_value_and_dtype_under_every_transform(row, transform, dtype, rng):
    with jax.numpy_dtype_promotion("strict"):
        found, wanted = transform(row, rng, dtype)
    if transform is _grad:
        found, (found_alpha, wanted_alpha) = found[0], (found[1], wanted[1])
        wanted = wanted[0]
        assert_close(found_alpha, wanted_alpha, dtype, factor=20)
    jax.tree.map(lambda f, w: assert_close(f, w, dtype, factor=2), found, wanted)
    is_svd = row.function is lora_singular_values and transform is not _grad
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32" if is_svd else dtype}


@every_row
def test_other_values_and_another_alpha_do_not_retrace(row, rng):
    traces = []

    @jax.jit
    def step(operands, alpha):
        traces.append(alpha)
        return row.found(operands, alpha)

    for alpha in (2.0, 3.0):
        operands = row.draw(rng)
        jax.tree.map(assert_close, step(operands, alpha), row.wanted(operands, alpha))
    assert len(traces) == 1


PREFIXES = {
    "number": (3.0, 3.0, 3.0),
    "array": (np.float32(3), 3.0, 3.0),
    "one per branch": ({"up": 2.0, "down": 5.0}, 2.0, 5.0),
    "one per adapter": ({"up": 2.0, "down": [5.0, None]}, 2.0, 5.0),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("alpha", "up", "down"), PREFIXES.values(), ids=PREFIXES)
def test_tree_delta_takes_any_prefix_as_alpha(alpha, up, down, jit, rng):
    (adapters,) = ROWS["tree_lora_delta"].draw(rng)
    wanted = {"up": reference_delta(adapters["up"], up), "down": [reference_delta(adapters["down"][0], down, 1), None]}
    jax.tree.map(assert_close, (jax.jit(tree_lora_delta) if jit else tree_lora_delta)(adapters, alpha), wanted)


def test_each_alpha_of_a_prefix_has_its_gradient(rng):
    (adapters,) = ROWS["tree_lora_delta"].draw(rng)
    total = lambda alphas: sum(map(jnp.sum, jax.tree.leaves(tree_lora_delta(adapters, alphas))))  # noqa: E731
    found = jax.jit(jax.grad(total))({"up": 2.0, "down": [5.0, None]})
    wanted = jax.tree.map(np.sum, _tree(adapters, 1.0))
    jax.tree.map(lambda f, w: assert_close(f, w, factor=20), found, wanted)


# ---------------------------------------------------------------- no dense delta


def output_sizes(jaxpr):
    """The number of elements of every value that a jaxpr computes, those within its calls and loops too."""
    for equation in jaxpr.eqns:
        yield from (math.prod(out.aval.shape) for out in equation.outvars)
        for parameter in equation.params.values():
            for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from output_sizes(inner)


def _backward(function):
    return jax.grad(lambda x, weight, adapter, alpha: jnp.sum(jnp.sin(function(x, weight, adapter, alpha))), (0, 2, 3))


def _merged_linear(x, weight, adapter, alpha):
    merged = merge_lora_weight(weight, adapter, alpha)
    return x @ merged if merged.ndim == 2 else jnp.einsum("bti,bijk->btjk", x, merged)


PROGRAMS = {
    "forward": lambda function: function,
    "backward": _backward,
    "jitted backward": lambda f: jax.jit(_backward(f)),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("name", ["lora_linear", "lora_linear of layers"])
def test_linear_builds_no_dense_delta(name, program, rng):
    operands = ROWS[name].draw(rng)
    sizes, merged = (
        set(output_sizes(jax.make_jaxpr(program(function))(*operands, ALPHA).jaxpr))
        for function in (lora_linear, _merged_linear)
    )
    assert operands[1].size not in sizes
    assert operands[1].size in merged


# ---------------------------------------------------------------- at B = 0


def _base(*arrays):
    x, weight = (None, *arrays)[-2:]
    if x is None:
        return weight
    return x @ weight if weight.ndim == 2 else jax.vmap(lambda x, weight: jnp.tensordot(x, weight, 1))(x, weight)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["lora_linear", "lora_linear of layers", "merge_lora_weight", "unmerge_lora_weight"])
def test_with_b_zero_the_output_is_bitwise_the_bases(name, dtype, jit, rng):
    transform = jax.jit if jit else lambda function: function
    *arrays, adapter = ROWS[name].draw(rng, dtype)
    adapter |= {"B": jnp.zeros_like(adapter["B"])}
    with jax.numpy_dtype_promotion("strict"):
        found = transform(ROWS[name].function)(*arrays, adapter, ALPHA)
    wanted = transform(_base)(*arrays)
    assert found.dtype == wanted.dtype
    assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()


def test_with_b_zero_the_gradient_reaches_b_alone(rng):
    x, weight, adapter = ROWS["lora_linear"].draw(rng)
    grads = jax.grad(lambda adapter: lora_linear(x, weight, adapter, ALPHA).sum())(
        adapter | {"B": jnp.zeros_like(adapter["B"])}
    )
    assert not np.any(grads["A"])
    assert np.all(as64(grads["B"]) != 0)
