"""Second derivatives, and other transforms of JAX around the transform."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from tests.marks import some
from tests.transform.test_primitives import (
    FACTORED,
    MERGED,
    PROGRAMS,
    Program,
    arguments,
    assert_trees_close,
    config_of,
    dense,
    derivatives,
    reference,
    x64,
)


@jax.custom_jvp
def softplus(x: Any) -> Any:
    return jnp.logaddexp(x, 0)


softplus.defjvps(lambda dx, y, x: dx * jax.nn.sigmoid(x))


def loss(params: Any, x: Any) -> Any:
    """A product, an activation, and the same weight again, transposed and scanned over."""
    h = softplus(x @ params["w"])
    h, _ = lax.scan(
        lambda h, s: (jnp.tanh(h @ params["w"].T @ params["w"]) * s, None), h, jnp.array([0.5, 2.0], x.dtype)
    )
    return jnp.sum(h**2)


TINY = Program("loss", lambda w, x: loss({"w": w}, x), (3, 5), (7, 3))
FORMS = {"factored": FACTORED, "merged": MERGED}


def tiny(rng: np.random.Generator, form: str = "factored") -> Any:
    fn = jlora.lora(loss, config_of(TINY), cost_model=FORMS[form])
    return fn, reference(TINY.fn, TINY.roles), arguments(TINY, rng)


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives(rng, form):
    *fns, primals = tiny(rng, form)

    def second(fn: Any, primals: Any) -> Any:
        def slope(*args: Any) -> Any:
            return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(jax.grad(fn, (0, 1, 2))(*args)))

        return jax.hessian(fn, 1)(*primals), jax.grad(slope, (0, 1, 2))(*primals), jax.hessian(fn, 2)(*primals)

    with x64():
        found, wanted = jax.jit(lambda primals: [second(fn, primals) for fn in fns])(primals)
    assert_trees_close(found, wanted, 1e-10)


def descended(fn: Any, params: Any, adapters: Any, x: Any) -> Any:
    """Training in a scan."""

    def step(adapters: Any, s: Any) -> Any:
        value, grads = jax.value_and_grad(fn, 1)(params, adapters, x * s)
        return jax.tree.map(lambda a, g: a - 0.01 * g, adapters, grads), value

    return lax.scan(step, adapters, jnp.array([1.0, 0.5, 2.0], x.dtype))


def stacked(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), tree)


AROUND = {
    "jit": lambda fn, p, a, x: jax.jit(fn)(p, a, x),
    "grad": lambda fn, p, a, x: jax.grad(fn, (0, 1, 2))(p, a, x),
    "value_and_grad": lambda fn, p, a, x: jax.value_and_grad(fn, 1)(p, a, x),
    "jvp": lambda fn, p, a, x: jax.jvp(lambda a: fn(p, a, x), (a,), (a,)),
    "linearize": lambda fn, p, a, x: jax.linearize(lambda a: fn(p, a, x), a)[1](a),
    "jacfwd": lambda fn, p, a, x: jax.jacfwd(fn, 1)(p, a, x),
    "vmap over x": lambda fn, p, a, x: jax.vmap(fn, (None, None, 0))(p, a, x),
    "vmap over adapters": lambda fn, p, a, x: jax.vmap(fn, (None, 0, None))(p, stacked(a), x),
    "vmap of grad over all": lambda fn, p, a, x: jax.vmap(jax.grad(fn, (0, 1)))(*map(stacked, (p, a, x))),
    "grad of vmap": lambda fn, p, a, x: jax.grad(lambda a: jnp.sum(jax.vmap(fn, (None, 0, None))(p, a, x)))(stacked(a)),
    "scan": descended,
    "checkpoint": lambda fn, p, a, x: jax.grad(jax.checkpoint(fn), (1, 2))(p, a, x),
    "all of them": lambda fn, p, a, x: jax.jit(
        jax.vmap(lambda a, x: descended(jax.checkpoint(jax.jit(fn)), p, a, x), (0, None))
    )(stacked(a), x),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("around", some(AROUND.keys()))
def test_other_transforms_around_it(rng, around, form):
    *fns, primals = tiny(rng, form)
    with x64():
        found, wanted = jax.jit(lambda *args: [AROUND[around](fn, *args) for fn in fns])(*primals)
    assert_trees_close(found, wanted, 1e-10)


def test_it_runs_outside_of_jit(rng):
    fn, wanted, primals = tiny(rng)
    with x64():
        found = jax.value_and_grad(fn, 1)(*primals)
        assert_trees_close(found, jax.jit(jax.value_and_grad(wanted, 1))(*primals), 1e-10)


def test_donated_adapters_are_used_up_and_the_base_is_not(rng):
    fn, wanted, primals = tiny(rng)
    step = jax.jit(lambda p, a, x: jax.tree.map(jnp.subtract, a, jax.grad(fn, 1)(p, a, x)), donate_argnums=1)
    with x64():
        params, adapters, x = jax.tree.map(jnp.array, primals)
        after = step(params, adapters, x)
        grads = jax.jit(jax.grad(wanted, 1))(*primals)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(adapters))
    assert not params["w"].is_deleted()
    assert_trees_close(after, jax.tree.map(lambda a, g: a - g, primals[1], jax.tree.map(np.asarray, grads)), 1e-10)


def test_two_weights_and_a_bias_of_which_one_is_adapted(rng):
    def fn(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["w"] + params["bias"]) @ params["other"]

    program = PROGRAMS["matmul"]
    with x64():
        params, adapters, x = arguments(program, rng)
        params |= {"bias": rng.standard_normal(11), "other": rng.standard_normal((11, 3))}
        model = jlora.lora(fn, config_of(program), strict=True)
        tree = {"w": adapters["w"], "bias": None, "other": None}

        def wanted(params: Any, adapters: Any, x: Any) -> Any:
            return fn(params | {"w": params["w"] + dense(adapters["w"], "io")}, x)

        primals = params, tree, x
        found, dense_found = jax.jit(lambda *args: [derivatives(fn, args, args) for fn in (model, wanted)])(*primals)
    assert_trees_close(found, dense_found, 1e-10)
