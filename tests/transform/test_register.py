"""Rules for primitives of one's own: for what moves a weight about, and for what multiplies it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jlora import AdapterError, CostModel, LoraConfig, explain, lora, resolve_config
from jlora.transform import Moves, Multiplies, _registry, register
from jlora.transform._rules import MOVED
from tests.marks import some
from tests.reference import as64, assert_close, random_adapter, random_array
from tests.transform.test_numerics import equations

CONFIG = LoraConfig(rank=2, alpha=3)
NEVER_MERGED = CostModel(merge_from=float("inf"))


@pytest.fixture(autouse=True)
def no_rule_stays(monkeypatch):
    monkeypatch.setattr(_registry, "_at_hand", _registry.registry())


def primitive(name: str, fn: Callable[..., Any], *, several: bool = False) -> Primitive:
    """A primitive that computes what `fn` does, with all that JAX wants of it."""
    made = Primitive(name)
    made.multiple_results = several

    def shapes(*avals: Any, **params: Any) -> Any:
        found = jax.eval_shape(lambda *operands: fn(*operands, **params), *avals)
        return jax.tree.map(lambda shape: jax.core.ShapedArray(shape.shape, shape.dtype), found)

    def derivative(primals: Any, tangents: Any, **params: Any) -> Any:
        filled = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
        _, moved = jax.jvp(lambda *operands: fn(*operands, **params), tuple(primals), filled)
        return made.bind(*primals, **params), moved

    def batched(operands: Any, axes: Any, **params: Any) -> Any:
        found = jax.vmap(lambda *operands: fn(*operands, **params), axes)(*operands)
        return found, jax.tree.map(lambda _: 0, found)

    made.def_impl(fn)
    made.def_abstract_eval(shapes)
    mlir.register_lowering(made, mlir.lower_fun(fn, multiple_results=several))
    ad.primitive_jvps[made] = derivative
    batching.primitive_batchers[made] = batched
    return made


def weights(rng: np.random.Generator, shape: tuple[int, int] = (5, 7)) -> tuple[Any, Any]:
    params = {"w": random_array(rng, shape)}
    return params, {"w": random_adapter(rng, (shape[0], 2), (2, shape[1]))}


def updated(params: Any, adapters: Any) -> np.ndarray:
    """W + alpha / rank A@B."""
    entry = adapters["w"]
    return as64(params["w"]) + CONFIG.alpha / CONFIG.rank * as64(entry["A"]) @ as64(entry["B"])


def normed(x: Any) -> Any:
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True))


def kernel(x: Any, w: Any, gate: Any, *, scale: float) -> Any:
    """The root mean square of x divided away, times w, gated: linear in w alone."""
    return scale * (normed(x) @ w) * gate


def rule_of_kernel(x: Any, w: Any, gate: Any, *, scale: float) -> Multiplies:
    return Multiplies("...k,kn->...n", lambda x, a, b, gate: scale * ((normed(x) @ a) @ b) * gate)


def flat_kernel() -> Primitive:
    made = primitive("fused", kernel)
    register(made, rule_of_kernel)
    return made


PLACES: dict[str, Callable[[Any], Any]] = {
    "top": lambda fn: fn,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda fn: lambda w, x, gate: lax.scan(lambda c, x: (c, fn(w, x, gate)), 0, jnp.stack([x, 2 * x]))[1][0],
    "vmap": lambda fn: lambda w, x, gate: jax.vmap(fn, (None, 0, None))(w, x, gate),
    "cond": lambda fn: lambda w, x, gate: lax.cond(x.sum() < 1e9, fn, lambda w, x, gate: x @ w, w, x, gate),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_product_is_that_of_the_merged_weight_and_so_are_its_derivatives(rng, place):
    made = flat_kernel()
    params, adapters = weights(rng)
    x, gate, cotangent = (random_array(rng, shape) for shape in ((11, 5), (7,), (11, 7)))
    fn = PLACES[place](lambda w, x, gate: made.bind(x, w, gate, scale=1.7))
    model = lora(lambda p, x, gate: fn(p["w"], x, gate), CONFIG, strict=True)

    def found(params, adapters, x, gate):
        return model(params, adapters, x, gate)

    def wanted(params, adapters, x, gate):
        w = params["w"] + CONFIG.alpha / CONFIG.rank * adapters["w"]["A"] @ adapters["w"]["B"]
        return kernel(x, w, gate, scale=1.7)

    rms = np.sqrt(np.mean(as64(x) ** 2, -1, keepdims=True))
    assert_close(
        found(params, adapters, x, gate), 1.7 * (as64(x) / rms) @ updated(params, adapters) * as64(gate), factor=3
    )
    primals = params, adapters, x, gate
    pulled = [jax.jit(lambda *primals, fn=fn: jax.vjp(fn, *primals)[1](cotangent))(*primals) for fn in (found, wanted)]
    jax.tree.map(lambda one, other: assert_close(one, as64(other), factor=5), *pulled)


def test_no_dense_delta_is_computed(rng):
    made = flat_kernel()
    params, adapters = weights(rng)
    model = lora(lambda p, x: made.bind(x, p["w"], jnp.ones(7), scale=1.0), CONFIG)
    for rows in (3, 1000):
        step = jax.value_and_grad(lambda adapters, x: model(params, adapters, x).sum())
        program = jax.make_jaxpr(step)(adapters, jnp.ones((rows, 5)))
        assert not [eqn for eqn in equations(program) for var in eqn.outvars if var.aval.shape in ((5, 7), (7, 5))]


def test_the_axes_are_read_from_the_rule():
    """Of a weight that is kept as (out, in)."""
    made = primitive("turned", lambda x, w: x @ w.T)
    register(made, lambda x, w: Multiplies("mk,nk->mn"))
    params, x = {"w": jax.ShapeDtypeStruct((7, 5), "float32")}, jax.ShapeDtypeStruct((3, 5), "float32")
    fn = lambda p, x: made.bind(x, p["w"])  # noqa: E731
    assert resolve_config(fn, CONFIG, params, x).factorizations == (("w", "oi"),)
    (use,) = explain(fn, CONFIG, params, x).uses
    assert (use.primitive, use.roles, use.factored, use.base_flops) == ("turned", "oi", True, 2 * 3 * 5 * 7)


@pytest.mark.parametrize("weight_first", [False, True])
def test_without_an_update_it_is_the_einsum_and_the_weight_stands_on_either_side(rng, weight_first):
    fn = lambda x, w: jnp.einsum("etd,edf->tef", x, w)  # noqa: E731
    made = primitive("experts", (lambda w, x: fn(x, w)) if weight_first else fn)
    register(made, lambda *operands: Multiplies("etd,edf->tef"))
    params = {"w": random_array(rng, (3, 5, 7))}
    adapters = {"w": random_adapter(rng, (3, 5, 2), (3, 2, 7))}
    x = random_array(rng, (3, 11, 5))
    config = CONFIG.replace(factorizations={"w": "bio"})

    def bound(p, x):
        return made.bind(*((p["w"], x) if weight_first else (x, p["w"])))

    found = lora(bound, config, strict=True)(params, adapters, x)
    delta = 1.5 * np.einsum("edr,erf->edf", as64(adapters["w"]["A"]), as64(adapters["w"]["B"]))
    assert_close(found, np.einsum("etd,edf->tef", as64(x), as64(params["w"]) + delta), factor=3)


def test_its_parameters_may_have_any_names(rng):
    names = dict.fromkeys(("weight", "x", "rest", "flatten", "weight_first", "run", "eqn", "inputs"), 2)
    made = primitive("fused", lambda *operands, **params: params["x"] * jnp.matmul(*operands))
    register(made, lambda *operands, **params: Multiplies("mk,kn->mn", lambda x, a, b: params["x"] * (x @ a) @ b))
    params, adapters = weights(rng)
    x = random_array(rng, (3, 5))
    found = lora(lambda p, x: made.bind(x, p["w"], **names), CONFIG, strict=True)(params, adapters, x)
    assert_close(found, 2 * as64(x) @ updated(params, adapters), factor=3)


def test_the_input_of_the_update_has_dropout(rng):
    made = flat_kernel()
    params, adapters = weights(rng)
    x = random_array(rng, (11, 5))
    model = lora(lambda p, x: made.bind(x, p["w"], jnp.ones(7), scale=1.0), CONFIG.replace(dropout=0.5))
    ys = [model(params, adapters, x, dropout_key=key) for key in (None, *map(jax.random.key, (0, 0, 1)))]
    np.testing.assert_array_equal(ys[1], ys[2])
    assert len({np.asarray(y).tobytes() for y in ys}) == 3


def pallas_product(x: Any, w: Any) -> Any:
    def body(x, w, y):
        y[...] = x[...] @ w[...]

    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pallas.pallas_call(body, out_shape=shape, interpret=True)(x, w)


def test_a_pallas_kernel(rng):
    params, adapters = weights(rng)
    x = random_array(rng, (3, 5))
    made = jax.make_jaxpr(pallas_product)(x, params["w"]).eqns[0].primitive
    register(made, lambda *_, **__: Multiplies("mk,kn->mn"), replace=True)
    found = lora(lambda p, x: pallas_product(x, p["w"]), CONFIG, strict=True)(params, adapters, x)
    assert_close(found, as64(x) @ updated(params, adapters), factor=3)


# Moves


def tiled(w: Any, *, tile: int) -> Any:
    """(tiles, in, tile) of the out axis, as a kernel may want it."""
    return w.reshape(w.shape[0], -1, tile).transpose(1, 0, 2)


MOVES: dict[str, tuple[Callable[..., Any], bool, Callable[..., Any], Callable[..., Any]]] = {
    "tiled": (
        lambda w: tiled(w, tile=3),
        False,
        lambda p, w, x: jnp.einsum("td,ndf->tnf", x, p.bind(w)),
        lambda w, x: np.einsum("td,ndf->tnf", x, w.reshape(5, 2, 3).transpose(1, 0, 2)),
    ),
    "halves": (
        lambda w: [w[:, :2], 2 * w[:, 2:]],
        True,
        lambda p, w, x: (lambda one, other: (x @ other)[:, :2] + x @ one)(*p.bind(w)),
        lambda w, x: 2 * (x @ w[:, 2:])[:, :2] + x @ w[:, :2],
    ),
    "lookup": (
        lambda w, ids: w[ids],
        False,
        lambda p, w, x: p.bind(w, jnp.array([[3, 0, 1], [3, 2, 4]])),
        lambda w, x: w[[[3, 0, 1], [3, 2, 4]]],
    ),
    "joined": (
        lambda one, other: jnp.concatenate([one, 2 * other], 1),
        False,
        lambda p, w, x: x @ p.bind(w, w),
        lambda w, x: x @ np.concatenate([w, 2 * w], 1),
    ),
}


@pytest.mark.parametrize("name", some({name: name for name in MOVES}, 3))
def test_what_moves_a_weight_moves_its_factors(rng, name):
    like, several, use, wanted = MOVES[name]
    made = primitive(name, like, several=several)
    register(made, lambda *operands: Moves(like))
    params, adapters = weights(rng, (5, 6))
    x = random_array(rng, (11, 5))
    fn = lambda p, x: use(made, p["w"], x)  # noqa: E731
    model = lora(fn, CONFIG, strict=True, cost_model=NEVER_MERGED)
    reference = wanted(updated(params, adapters), as64(x))
    for found in (model(params, adapters, x), jax.jit(model)(params, adapters, x)):
        assert_close(found, reference, factor=3)

    def dense(params, adapters, x):
        return fn({"w": params["w"] + 1.5 * adapters["w"]["A"] @ adapters["w"]["B"]}, x)

    grads = [jax.grad(lambda *primals, fn=fn: jnp.sin(fn(*primals)).sum(), (1, 2)) for fn in (model, dense)]
    jax.tree.map(lambda one, other: assert_close(one, as64(other), factor=5), *(g(params, adapters, x) for g in grads))
    assert all(use.factored for use in explain(fn, CONFIG, params, x, cost_model=NEVER_MERGED).uses)


def test_the_axes_of_what_was_moved_are_read_from_the_use():
    made = primitive("turned", lambda w: w.T)
    register(made, lambda w: Moves(jnp.transpose))
    shape = jax.ShapeDtypeStruct
    params, x = {"w": shape((7, 5), "float32")}, shape((3, 5), "float32")
    resolved = resolve_config(lambda p, x: x @ made.bind(p["w"]), CONFIG, params, x)
    assert resolved.factorizations == (("w", "oi"),)


@pytest.mark.parametrize("like", [jnp.sin, lambda w: w @ jnp.ones((7, 7)), lambda w: jnp.flip(w) * w])
def test_what_is_no_move_is_merged_and_strict_says_so(rng, like):
    made = primitive("mixed", like)
    register(made, lambda w: Moves(like))
    params, adapters = weights(rng)
    x = random_array(rng, (3, 5))
    fn = lambda p, x: x @ made.bind(p["w"])  # noqa: E731
    found = lora(fn, CONFIG)(params, adapters, x)
    assert_close(found, as64(x) @ as64(like(jnp.asarray(updated(params, adapters)))), factor=5)
    with pytest.raises(AdapterError, match=f"^w: mixed at .* cannot be factored: {MOVED}; leave"):
        lora(fn, CONFIG, strict=True)(params, adapters, x)


# Rules that do not fit


REASONS: dict[str, tuple[Callable[..., Any], Any, Callable[..., Any], str]] = {
    "its own": (
        jnp.matmul,
        lambda *_: "the kernel has it in eight bits",
        lambda p, w, x: p.bind(x, w),
        "the kernel has",
    ),
    "another split": (
        lambda x, w: jnp.einsum("mab,abn->mn", x, w),
        lambda *_: Multiplies("mab,abn->mn"),
        lambda p, w, x: p.bind(x[:, :, None] * jnp.arange(7.0), w[:, :, None]),
        "A and B split the axes of the weight in another way",
    ),
    "summed": (
        lambda x, w: (x @ w).sum(-1),
        lambda *_: Multiplies("mk,kn->m"),
        lambda p, w, x: p.bind(x, w),
        "it sums over an axis that only the weight has",
    ),
    "third": (
        lambda x, y, w: (x + y) @ w,
        lambda *_: Multiplies("mk,kn->mn"),
        lambda p, w, x: p.bind(x, x, w),
        "the weight is none of its first two operands",
    ),
    "alone": (
        lambda w: w.sum(0),
        lambda *_: Multiplies("k,kn->n"),
        lambda p, w, x: p.bind(w),
        "the weight is none of its first two operands",
    ),
    "integers": (
        lambda x, w: x.astype(w.dtype) @ w,
        lambda *_: Multiplies("mk,kn->mn"),
        lambda p, w, x: p.bind(x.astype(jnp.int32), w),
        "its other operand has no floating-point numbers",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_where_a_rule_cannot_follow_the_weight_is_merged_and_strict_says_why(rng, name):
    fn, rule, use, why = REASONS[name]
    made = primitive("fused", fn)
    register(made, rule)
    params, adapters = weights(rng)
    x = random_array(rng, (3, 5))
    model = lambda p, x: use(made, p["w"], x)  # noqa: E731
    dense = {"w": jnp.asarray(updated(params, adapters), jnp.float32)}
    assert_close(lora(model, CONFIG)(params, adapters, x), as64(model(dense, x)), factor=5)
    with pytest.raises(AdapterError, match=f"^w: fused at .* cannot be factored: {why}"):
        lora(model, CONFIG, strict=True)(params, adapters, x)


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (lambda x, w: None, "found NoneType, wanted Moves, Multiplies, or the reason why"),
    "a shape": (lambda x, w: Multiplies("mk,kn->mn", lambda x, a, b: x @ a), r"its update returns the shape \(3, 2\)"),
    "an equation": (lambda x, w: Multiplies("k,kn->n"), "einsum 'k,kn->n': the input 'k' does not have 2 axes"),
    "a move": (
        lambda x, w: Moves(lambda x, w: w),
        r"its function of Moves returns the shapes \[\(5, 7\)\], the primitive",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_that_is_wrong_is_an_error_that_names_the_primitive(rng, name):
    rule, message = WRONG[name]
    made = primitive("fused", jnp.matmul)
    register(made, rule)
    with pytest.raises(AdapterError, match=f"^the rule that is registered for fused: {message}"):
        lora(lambda p, x: made.bind(x, p["w"]), CONFIG)(*weights(rng), jnp.ones((3, 5)))


def test_a_product_has_one_result(rng):
    made = primitive("fused", lambda x, w: [x @ w, x], several=True)
    register(made, lambda x, w: Multiplies("mk,kn->mn"))
    with pytest.raises(AdapterError, match=r"^the rule that is registered for fused: found Multiplies for 2 results"):
        lora(lambda p, x: made.bind(x, p["w"])[0], CONFIG)(*weights(rng), jnp.ones((3, 5)))
