"""Dtypes, scales, what is computed and what is not, dropout, and how often anything is traced."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from jlora import LoraConfig
from tests.marks import some
from tests.reference import assert_close, reference_delta
from tests.transform.table import RANK
from tests.transform.test_places import NAMES, PLACES
from tests.transform.test_primitives import (
    ALPHA,
    CONVOLUTIONS,
    FACTORED,
    LOOKUPS,
    MERGED,
    PRODUCTS,
    PROGRAMS,
    Program,
    arguments,
    assert_trees_close,
    cast,
    config_of,
    of_params,
    reference,
    x64,
)

LINEAR = ["matmul", "einsum BTD,NDH->BTNH", "take", "conv 1d", "experts by dot_general", "ragged_dot"]
DTYPES = {
    ("bfloat16", "float32"): 2e-2,
    ("bfloat16", "bfloat16"): 4e-2,
    ("float32", "bfloat16"): 1e-5,
    ("float16", "float32"): 4e-3,
    ("float32", "float32"): 1e-5,
}
PREFERRED = Program(
    "preferred_element_type",
    lambda w, x: lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32),
    (5, 11),
    (7, 5),
)


@pytest.mark.parametrize("form", [FACTORED, MERGED], ids=["factored", "merged"])
@pytest.mark.parametrize("program", [*(PROGRAMS[name] for name in LINEAR), PREFERRED], ids=str)
def test_every_mixture_of_dtypes_keeps_those_of_the_base_and_of_the_adapters(rng, program, form):
    fn, wanted_fn = jlora.lora(of_params(program.fn), config_of(program), cost_model=form), of_params(program.fn)

    def everything(primals):
        found = {}
        for dtypes in DTYPES:
            params, adapters, x = cast(primals, *dtypes)
            y, pullback = jax.vjp(lambda adapters, params=params, x=x: fn(params, adapters, x), adapters)
            found[dtypes] = y, pullback(jnp.ones_like(y))[0]
        return found

    primals = arguments(program, rng)
    exact = PROGRAMS["matmul"] if program is PREFERRED else program
    with x64():
        wanted = jax.jit(reference(exact.fn, program.roles))(*primals)
        found = jax.jit(everything)(primals)
    for dtypes, (y, grads) in found.items():
        params, adapters, x = cast(primals, *dtypes)
        assert y.dtype == jax.eval_shape(wanted_fn, params, x).dtype
        assert_trees_close(np.asarray(y, np.float64), np.asarray(wanted), DTYPES[dtypes])
        assert jax.tree.map(lambda a: a.dtype, grads) == jax.tree.map(lambda a: a.dtype, adapters)


def test_at_b_zero_products_convolutions_and_lookups_are_bitwise_those_of_the_base(rng):
    programs = [program for program in [*PRODUCTS, *CONVOLUTIONS, *LOOKUPS] if program.factored]
    primals = [arguments(program, rng, np.float32) for program in programs]
    for _, adapters, _ in primals:
        adapters["w"]["B"] *= 0
    models = [jlora.lora(of_params(program.fn), config_of(program), cost_model=FACTORED) for program in programs]
    found = jax.jit(lambda primals: [fn(*args) for fn, args in zip(models, primals, strict=True)])(primals)
    pairs = [(params["w"], x) for params, _, x in primals]
    base = jax.jit(lambda pairs: [p.fn(*pair) for p, pair in zip(programs, pairs, strict=True)])(pairs)
    trees = zip(programs, found, base, strict=True)
    assert [program.name for program, *pair in trees if not np.array_equal(*map(np.asarray, pair))] == []


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_every_path_has_its_rank_and_alpha(rng, scaling):
    config = LoraConfig(
        rank=2, alpha=3.0, scaling=scaling, rank_pattern={"b": 3}, alpha_pattern={"c": 7.0}, exclude_modules="d"
    )
    shapes = {"a": (5, 11), "b": (11, 7), "c": (7, 13), "d": (13, 3)}
    ranks, alphas = {"a": 2, "b": 3, "c": 2}, {"a": 3.0, "b": 3.0, "c": 7.0}
    params = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    adapters = {
        name: {"A": rng.standard_normal((shapes[name][0], r)), "B": rng.standard_normal((r, shapes[name][1]))}
        for name, r in ranks.items()
    } | {"d": None}

    def fn(params, x):
        return x @ params["a"] @ params["b"] @ params["c"] @ params["d"]

    x = rng.standard_normal((17, 5))
    with x64():
        found = np.asarray(jax.jit(jlora.lora(fn, config))(params, adapters, x))
        for name, alpha in alphas.items():
            factor = math.sqrt(ranks[name]) if scaling == "rslora" else 1.0
            params[name] = params[name] + reference_delta(adapters[name], alpha * factor)
        assert_close(found, fn(params, x))


# What is computed


def equations(program: Any) -> Iterator[Any]:
    """Of a jaxpr and of all that it holds."""

    def holds(value: Any) -> bool:
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    for eqn in getattr(program, "jaxpr", program).eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=holds):
            if holds(value):
                yield from equations(value)


def of_training(name: str, place: str, cost: Any, rng: np.random.Generator) -> tuple[list[Any], Program]:
    """The equations of the value and the gradient by the adapters, and the program at that place."""
    program = PLACES[place].program(PROGRAMS[name])
    fn = jlora.lora(of_params(program.fn), config_of(program), cost_model=cost)
    params, adapters, x = arguments(program, rng, np.float32)

    def loss(adapters: Any, params: Any, x: Any) -> Any:
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(params, adapters, x)))

    return list(equations(jax.make_jaxpr(jax.value_and_grad(loss))(adapters, params, x))), program


INSIDE = ["top", "nested jit", "scan", "scan, constant", "scan, carried", "cond", "checkpoint", "vmap over x"]


def sizes_of_weight(program: Program, place: str) -> set[int]:
    """Of the weight, and of one element of the stack that it is."""
    stacked = PLACES[place].stacked
    return {math.prod(program.weight), *([math.prod(program.weight[1:])] if stacked else [])}


@pytest.mark.parametrize("place", INSIDE)
@pytest.mark.parametrize("name", ["matmul", "einsum BTD,NDH->BTNH", "take", "conv 1d", "experts by dot_general"])
def test_factored_computes_no_array_of_the_size_of_the_weight(rng, name, place):
    eqns, program = of_training(name, place, FACTORED, rng)
    found = [eqn for eqn in eqns for var in eqn.outvars if var.aval.size in sizes_of_weight(program, place)]
    assert len(eqns) > 5
    assert not found


@pytest.mark.parametrize("place", INSIDE)
@pytest.mark.parametrize("name", ["matmul", "einsum BTD,NDH->BTNH", "conv 1d", "experts by dot_general"])
def test_merged_computes_no_dense_gradient_of_the_weight(rng, name, place):
    """The only product of the weight's size is A@B, which contracts the rank."""
    eqns, program = of_training(name, place, MERGED, rng)
    products = [
        eqn
        for eqn in eqns
        if eqn.primitive.name in ("dot_general", "conv_general_dilated")
        and eqn.outvars[0].aval.size in sizes_of_weight(program, place)
    ]
    assert products
    for eqn in products:
        assert eqn.primitive.name == "dot_general"
        (contracted, _), _ = eqn.params["dimension_numbers"]
        assert math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted) == RANK


# Dropout


def linear_scan(fn: Any) -> Any:
    return lambda w, x: lax.scan(lambda c, s: (c, fn(w, c * s)), x, jnp.array([1, 1, 1], x.dtype))[1]


def linear_while(fn: Any) -> Any:
    def run(w: Any, x: Any) -> Any:
        def step(state: Any) -> Any:
            n, ys = state
            return n + 1, ys.at[n].set(fn(w, x))

        return lax.while_loop(lambda state: state[0] < 3, step, (0, jnp.zeros((3, *fn(w, x).shape), x.dtype)))[1]

    return run


DROPPING: dict[str, Callable[[Any], Any]] = {
    "top": lambda fn: fn,
    "jit": jax.jit,
    "scan": linear_scan,
    "while": linear_while,
    "cond": lambda fn: lambda w, x: lax.cond(jnp.sum(x) > 1e3, lambda w, x: x @ w * 0, fn, w, x),
    "checkpoint": jax.checkpoint,
    "checkpoint in scan": lambda fn: linear_scan(jax.checkpoint(fn)),
    "checkpoint in jit, twice": lambda fn: (
        lambda w, x: jax.jit(jax.checkpoint(lambda w, x: fn(w, x) + fn(w, -2 * x)))(w, x)
    ),
    "vmap": lambda fn: lambda w, x: jax.vmap(fn, (None, 0))(w, jnp.stack([x, x])),
    "two uses": lambda fn: lambda w, x: jnp.stack([fn(w, x), fn(w, x)]),
}
RATE = 0.5


def dropping(rng: np.random.Generator, name: str, rate: float = RATE, dtype: Any = np.float64) -> Any:
    program = PROGRAMS["matmul"]
    fn = jlora.lora(of_params(DROPPING[name](program.fn)), config_of(program, dropout=rate))
    return fn, DROPPING[name](program.fn), arguments(program, rng, dtype)


@pytest.mark.parametrize("name", some(DROPPING.keys()))
def test_dropout_keeps_its_mean_and_the_base(rng, name):
    fn, base, (params, adapters, x) = dropping(rng, name, dtype=np.float32)
    keys = jax.random.split(jax.random.key(1), 1500)
    at_zero = {"w": {"A": adapters["w"]["A"], "B": 0 * adapters["w"]["B"]}}

    @jax.jit
    def everything(params, adapters, x):
        dropped = jax.vmap(lambda key: fn(params, adapters, x, dropout_key=key))(keys)
        return (
            (jnp.mean(dropped, 0), jnp.std(dropped, 0), fn(params, adapters, x)),
            (fn(params, at_zero, x, dropout_key=keys[0]), base(params["w"], x)),
        )

    (mean, std, plain), (zero, of_base) = everything(params, adapters, x)
    assert np.all(std > 0)
    assert np.all(np.abs(mean - plain) < 5 * std / math.sqrt(len(keys)))
    np.testing.assert_array_equal(zero, of_base)


def test_a_derivative_of_its_own_leaves_no_room_for_dropout(rng):
    """Its value would be with dropout, its derivative without."""
    product = jax.custom_jvp(lambda w, x: x @ w)
    product.defjvps(lambda dw, y, w, x: x @ dw, lambda dx, y, w, x: dx @ w)
    program = PROGRAMS["matmul"]
    fn = jlora.lora(of_params(product), config_of(program, dropout=0.5))
    params, adapters, x = arguments(program, rng, np.float32)
    ys = []
    for seed in range(2):
        with pytest.warns(jlora.JloraWarning, match=r"^no dropout for the adapters of w: the weights are merged"):
            ys.append(fn(params, adapters, x, dropout_key=jax.random.key(seed)))
    np.testing.assert_array_equal(*ys)


@pytest.mark.parametrize("name", ["top", "jit", "scan", "checkpoint"])
def test_adapters_may_be_constants_of_the_compiled_program(rng, name):
    """XLA folds what it knows: JAX 0.7 did so wrongly with A and B that were turned and kept as they stand."""
    program = PROGRAMS["matmul"]
    fn = jlora.lora(of_params(DROPPING[name](program.fn)), config_of(program))
    params, adapters, x = arguments(program, rng, np.float32)
    wanted = reference(DROPPING[name](program.fn), program.roles)(params, adapters, x)
    found = jax.jit(lambda x: fn(params, adapters, x))(jnp.asarray(x))
    assert_trees_close(found, wanted, 1e-5)


@pytest.mark.parametrize("name", some(DROPPING.keys()))
def test_dropout_is_the_same_forward_and_backward_and_for_the_same_key(rng, name):
    """The value is linear in B: its derivative along a tangent of B is its value at that tangent, without the base."""
    fn, base, (params, adapters, x) = dropping(rng, name)
    key, other = jax.random.key(5), jax.random.key(6)
    tangent = rng.standard_normal(adapters["w"]["B"].shape)

    def everything(params, adapters, x):
        def of_b(b, key=key):
            return fn(params, {"w": {"A": adapters["w"]["A"], "B": b}}, x, dropout_key=key)

        b = adapters["w"]["B"]
        y, along = jax.jvp(of_b, (b,), (tangent,))
        weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        grad = jnp.zeros_like(b) if name == "while" else jax.grad(lambda b: jnp.sum(weights * of_b(b)))(b)
        update = of_b(jnp.asarray(tangent)) - base(params["w"], x)
        return y, of_b(b), of_b(b, other), along, update, jnp.sum(grad * tangent), jnp.sum(weights * along)

    with x64():
        found = map(np.asarray, jax.jit(everything)(params, adapters, x))
    y, again, another, along, update, by_grad, by_jvp = found
    np.testing.assert_array_equal(y, again)
    assert not np.array_equal(y, another)
    assert_trees_close(along, update, 1e-10)
    if name != "while":
        assert_trees_close(by_grad, by_jvp, 1e-10)


@pytest.mark.parametrize("name", ["scan", "while", "checkpoint in scan", "two uses"])
def test_dropout_is_another_one_in_every_step_and_use(rng, name):
    fn, _, (params, adapters, x) = dropping(rng, name, dtype=np.float32)
    ys = jax.jit(fn)(params, adapters, x, dropout_key=jax.random.key(5))
    assert len({np.asarray(y).tobytes() for y in ys}) == len(ys)


def test_dropout_is_another_one_for_every_path(rng):
    params, adapters, x = arguments(PROGRAMS["matmul"], rng, np.float32)
    config = LoraConfig(rank=RANK, alpha=ALPHA, dropout=RATE)
    fns = [lambda p, x: x @ p["a"], lambda p, x: x @ p["b"]]
    model = [jlora.lora(fn, config) for fn in fns]
    key = jax.random.key(0)
    ys = [
        fn({name: params["w"]}, {name: adapters["w"]}, x, dropout_key=key) for name, fn in zip("ab", model, strict=True)
    ]
    assert not np.array_equal(*ys)


@pytest.mark.parametrize(("rate", "key"), [(0.0, 5), (RATE, None)])
def test_there_is_no_dropout_at_rate_zero_or_without_a_key(rng, rate, key):
    fn, _, primals = dropping(rng, "scan", rate, np.float32)
    plain, *_ = dropping(rng, "scan", 0.0, np.float32)
    key = None if key is None else jax.random.key(key)
    np.testing.assert_array_equal(jax.jit(fn)(*primals, dropout_key=key), jax.jit(plain)(*primals))
    names = {eqn.primitive.name for eqn in equations(jax.make_jaxpr(fn)(*primals, dropout_key=key))}
    assert not any(name.startswith(("random", "threefry")) for name in names)


# Traces


def counted(fn: Callable[..., Any]) -> tuple[Callable[..., Any], list[None]]:
    traces: list[None] = []

    def traced(*args: Any) -> Any:
        traces.append(None)
        return fn(*args)

    return traced, traces


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_under_jit_does_not_trace(rng, name):
    program = PROGRAMS[name]
    fn, traces = counted(of_params(program.fn))
    model = jax.jit(jlora.lora(fn, config_of(program)))
    for _ in range(3):
        model(*arguments(program, rng, np.float32))
    assert len(traces) == 1


def test_a_jitted_function_is_traced_once_outside_of_jit(rng):
    program = PROGRAMS["matmul"]
    fn, traces = counted(of_params(program.fn))
    model = jlora.lora(jax.jit(fn), config_of(program))
    found = [model(*arguments(program, rng, np.float32)) for _ in range(3)]
    assert len(traces) == 1
    assert not np.array_equal(found[0], found[1])
