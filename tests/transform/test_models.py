"""Whole models of several libraries, adapted without an edit, against the model with the dense updates added."""

import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.marks import some
from tests.reference import as64, assert_close, randomize
from tests.transform.models import CASES, KEY, Case
from tests.transform.test_random_programs import axes_of, delta_of, grads_of

ALPHA, RANK = 3.0, 2
some_models = pytest.mark.parametrize("make", some({make.__name__: make for make in CASES}))
every_model = pytest.mark.parametrize("make", CASES, ids=[make.__name__ for make in CASES])


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)


class Compiled:
    """A function of arrays and other things to arrays and other things, compiled once."""

    def __init__(self, function: Callable[..., Any]) -> None:
        def outputs(arrays: Any, others: Any) -> Any:
            arrays, self.others = eqx.partition(function(*eqx.combine(arrays, others.tree)), is_array)
            return arrays

        self.jitted = jax.jit(outputs, static_argnums=1)

    def __call__(self, *args: Any) -> Any:
        arrays, others = eqx.partition(args, is_array)
        return eqx.combine(self.jitted(arrays, Static(others)), self.others)


class Static:
    """The one value of a static argument."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static)


class Made:
    """A case with its configuration, its adapters with B zero and random, and its compiled functions."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.config = jlora.LoraConfig(rank=RANK, alpha=ALPHA)
        self.begun = jlora.init_lora(KEY, case.params, self.config, fn=case.fn, args=case.args, kwargs=case.kwargs)
        self.adapters = randomize(np.random.default_rng(9), self.begun)
        self.args = case.args, case.kwargs
        self._adapted = Compiled(self._grad(jlora.lora(case.fn, self.config), 1))
        self._base = Compiled(self._grad(case.fn, 0))

    @staticmethod
    def _grad(function: Callable[..., Any], argument: int) -> Callable[..., Any]:
        """The outputs of the function, and the gradient of a loss in which each of them has a weight of its own."""

        def outputs(trees: Any, args: Any, kwargs: Any) -> Any:
            moving, rest = eqx.partition(trees[argument], is_array)

            def loss(moving: Any) -> Any:
                own = [*trees]
                own[argument] = eqx.combine(moving, rest)
                y = function(*own, *args, **kwargs)
                rests.append(eqx.filter(y, is_array, inverse=True))
                return total(y), eqx.filter(y, is_array)

            rests: list[Any] = []
            (_, y), grads = jax.value_and_grad(loss, has_aux=True)(moving)
            return eqx.combine(y, rests[0]), grads

        return outputs

    def adapted(self, adapters: Any) -> tuple[Any, Any]:
        """The outputs with these adapters, and the gradient by them."""
        return self._adapted((self.case.params, adapters), *self.args)

    def base(self, params: Any) -> tuple[Any, Any]:
        """The outputs of the model itself, and the gradient by its params."""
        return self._base((params,), *self.args)


@functools.cache
def made(make: Callable[[], Case]) -> Made:
    return Made(make())


def by_path(tree: Any) -> dict[str, Any]:
    """The adapters, or the weights, of a tree by path."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=jlora.is_adapter)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def densely(made: Made) -> Any:
    """The params with the dense updates added in float64, by hand."""
    adapters = by_path(made.adapters)

    def at(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in made.case.roles:
            return leaf
        return jnp.asarray(as64(leaf) + delta_of(adapters[name], made.case.roles[name], ALPHA), leaf.dtype)

    return jax.tree_util.tree_map_with_path(at, made.case.params)


def arrays(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def total(outputs: Any) -> jax.Array:
    return sum(jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)) for y in arrays(outputs))


def assert_outputs(found: Any, wanted: Any, factor: float = 10) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if is_array(other):
            assert one.dtype == other.dtype
            assert_close(one, as64(other), factor=factor)
        else:
            assert one == other


@every_model
def test_adapters_have_the_axes_of_the_use(make):
    case, begun = made(make).case, by_path(made(make).begun)
    assert set(begun) == set(case.roles)
    weights = by_path(case.params)
    for path, roles in case.roles.items():
        batch, ins, outs = ([weights[path].shape[axis] for axis in axes] for axes in axes_of(roles))
        assert begun[path]["A"].shape == (*batch, *ins, RANK), path
        assert begun[path]["B"].shape == (*batch, RANK, *outs), path
        assert begun[path]["A"].any()
        assert not begun[path]["B"].any()


@some_models
def test_at_zero_b_the_model_is_unchanged(make):
    own = made(make)
    assert_outputs(own.adapted(own.begun)[0], own.base(own.case.params)[0], factor=1)


@every_model
def test_value_and_gradient_are_those_of_the_dense_update(make):
    own = made(make)
    (y, grads), (wanted, dense) = own.adapted(own.adapters), own.base(densely(own))
    assert_outputs(y, wanted)
    base = own.base(own.case.params)[0]
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(arrays(y), arrays(base), strict=True)) > 1e-2
    found, dense, adapters = by_path(grads), by_path(dense), by_path(own.adapters)
    assert set(found) == set(own.case.roles)
    for path, roles in own.case.roles.items():
        of_path = grads_of(dense[path], adapters[path], roles, ALPHA)
        assert all(np.abs(grad).max() > 0 for grad in of_path.values()), path
        for part in "AB":
            assert_close(found[path][part], of_path[part], factor=30)


@every_model
def test_strict_refuses_what_is_merged_alone(make):
    case, own = made(make).case, made(make)

    def strict(*args: Any) -> Any:
        return arrays(jlora.lora(case.fn, own.config, strict=True)(*args, *case.args, **case.kwargs))

    if not case.merged:
        adapted = jax.eval_shape(lambda adapters: strict(case.params, adapters), own.adapters)
        assert [y.shape for y in adapted] == [y.shape for y in arrays(own.base(case.params)[0])]
        return
    with pytest.raises(jlora.AdapterError, match=f"^{case.merged[0]}: "):
        strict(case.params, own.adapters)


@every_model
def test_merged_params_are_params_of_the_model(make):
    own = made(make)
    merged = jlora.merge_params(own.case.params, own.adapters, own.config)
    assert jax.tree.structure(merged) == jax.tree.structure(own.case.params)
    assert_outputs(own.base(merged)[0], own.adapted(own.adapters)[0])
    for found, wanted in zip(arrays(merged), arrays(densely(own)), strict=True):
        assert_close(found, as64(wanted))


@some_models
def test_training_moves_the_adapters_alone(make):
    own = made(make)
    params, rest = eqx.partition(own.case.params, is_array)
    before = jax.tree.map(np.array, params)
    adapted = jlora.lora(own.case.fn, own.config)
    optimizer = optax.sgd(1e-2)
    targets = [y + 0.1 for y in arrays(own.base(own.case.params)[0])]

    def loss(adapters: Any, params: Any) -> Any:
        found = arrays(adapted(eqx.combine(params, rest), adapters, *own.case.args, **own.case.kwargs))
        return sum(jnp.mean((y - target) ** 2) for y, target in zip(found, targets, strict=True))

    def step(adapters: Any, state: Any, params: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(adapters, params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    jitted = jax.jit(step)
    adapters, state, values = own.begun, optimizer.init(own.begun), []
    for _ in range(5):
        adapters, state, value = jitted(adapters, state, params)
        values.append(float(value))
    assert jitted._cache_size() == 1
    assert math.isfinite(values[-1])
    assert values[-1] < values[0]
    jax.tree.map(np.testing.assert_array_equal, params, before)
