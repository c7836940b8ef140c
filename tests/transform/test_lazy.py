"""Lazy bases: the same numbers as those of the dense base, to the bit, and no dense copy of a stack."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import jlora
from jlora import LoraConfig
from jlora.errors import AdapterError
from jlora.transform import lora, resolve_config
from tests.lazy_bases import Int8, densified, packed


def drawn(adapters, seed=5):
    leaves, treedef = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    )


def ones(*shape):
    return jax.random.normal(jax.random.key(3), shape)


LAYERS, IN, HIDDEN, ROWS = 3, 5, 7, 11
W, STACK = (IN, HIDDEN), (LAYERS, IN, IN)


def scanned(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def scanned_and_moved(params, x):
    stack = -params["w"].transpose(0, 2, 1).reshape(LAYERS, IN, 1, IN)[:, :, :, ::-1]
    return lax.scan(lambda x, w: (jnp.tanh(x @ w.squeeze(1)[:, :]), None), x, stack)[0]


def fori(params, x):
    return lax.fori_loop(0, LAYERS, lambda i, x: jnp.tanh(x @ params["w"][i]), x)


def while_(params, x):
    def body(state):
        i, x = state
        return i + 1, jnp.tanh(x @ lax.dynamic_index_in_dim(params["w"], i, keepdims=False))

    return lax.while_loop(lambda state: state[0] < LAYERS, body, (0, x))[1]


def taken(params, x):
    return lax.scan(lambda x, i: (jnp.tanh(x @ jnp.take(params["w"], i, axis=0)), None), x, jnp.arange(LAYERS))[0]


def listed(params, x):
    for n in range(LAYERS):
        x = jnp.tanh(x @ params["w"][n])
    return x


def unstacked(params, x):
    for w in jnp.unstack(params["w"].transpose(0, 2, 1)):
        x = jnp.tanh(x @ w)
    return x


def halves(params, x):
    first, second = jnp.split(params["w"], [1])
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, first)
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, second[::1])[0]


def rematerialised(params, x):
    return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["w"])[0]


def branching(params, x):
    return lax.cond(x[0, 0] > 0, lambda w: jnp.tanh(x @ w), lambda w: x @ (2 * w), params["w"])


@jax.custom_jvp
def relu(x, w):
    return jnp.maximum(x @ w, 0)


@relu.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    y = x @ w
    return jnp.maximum(y, 0), jnp.where(y > 0, dx @ w + x @ dw, 0)


PROGRAMS = {
    "product": (lambda params, x: x @ params["w"], W, (ROWS, IN)),
    "jit": (lambda params, x: jax.jit(lambda w, x: x @ w)(params["w"], x), W, (ROWS, IN)),
    "reshape": (lambda params, x: x @ params["w"].reshape(IN, HIDDEN, 1)[..., 0], W, (ROWS, IN)),
    "transpose": (lambda params, x: x @ params["w"].T, (HIDDEN, IN), (ROWS, IN)),
    # by powers of two: XLA of JAX 0.7 multiplies the scales of the weight with the constant first
    "scaled": (lambda params, x: x @ (params["w"] * 8.0 / 2.0), W, (ROWS, IN)),
    "slices": (lambda params, x: x @ params["w"][:, 2:5], W, (ROWS, IN)),
    "vmap": (lambda params, x: jax.vmap(lambda x: x @ params["w"])(x), W, (2, ROWS, IN)),
    "vmap of a stack": (lambda params, x: jax.vmap(jnp.matmul, (None, 0))(x, params["w"]), STACK, (ROWS, IN)),
    "einsum": (lambda params, x: jnp.einsum("btd,hdk->bthk", x, params["w"]), (2, IN, HIDDEN), (3, ROWS, IN)),
    "embedding": (lambda params, x: params["w"][(x * 2).astype(int) % HIDDEN], (HIDDEN, IN), (2, ROWS)),
    "sum": (lambda params, x: x @ params["w"] + params["w"].sum(0), W, (ROWS, IN)),
    "concatenate": (lambda params, x: x @ jnp.concatenate([params["w"], params["w"]], 1), W, (ROWS, IN)),
    "cond": (branching, W, (ROWS, IN)),
    "custom": (lambda params, x: relu(x, params["w"]), W, (ROWS, IN)),
    "scan": (scanned, STACK, (ROWS, IN)),
    "scan, moved": (scanned_and_moved, STACK, (ROWS, IN)),
    "fori": (fori, STACK, (ROWS, IN)),
    "take": (taken, STACK, (ROWS, IN)),
    "list": (listed, STACK, (ROWS, IN)),
    "halves": (halves, STACK, (ROWS, IN)),
    "unstack": (unstacked, STACK, (ROWS, IN)),
    "remat": (rematerialised, STACK, (ROWS, IN)),
}


# Where XLA multiplies with another kernel, on processors without AVX-512: a transposed slice that it copies or not.
OTHER_KERNELS = {"unstack"}


def step_of(fn, config):
    model = lora(fn, config) if config else fn

    def loss(adapters, params, x):
        y = model(params, adapters, x) if config else fn(params, x)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 2)))


def assert_same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_loss_and_the_gradients_are_those_of_the_dense_base_to_the_bit(name):
    fn, shape, of_x = PROGRAMS[name]
    params, x = {"w": packed(1, *shape, exact=name == "embedding")}, ones(*of_x)  # rows + A@B is one elementwise loop
    config = resolve_config(fn, LoraConfig(rank=2), params, x)
    assert config == resolve_config(fn, LoraConfig(rank=2), densified(params), x)
    adapters = drawn(jlora.init_lora(None, params, config))
    step = step_of(fn, config)
    found, wanted = step(adapters, params, x), step(adapters, densified(params), x)
    if name in OTHER_KERNELS:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12), found, wanted)
    else:
        assert_same(found, wanted)


@pytest.mark.parametrize("name", ["scan", "cond", "embedding", "sum"])
def test_a_lazy_base_without_an_adapter_works_as_well(name):
    fn, shape, of_x = PROGRAMS[name]
    params, x = {"w": packed(1, *shape), "up": packed(2, 7, 13)}, ones(*of_x)

    def both(params, x):
        return (fn(params, x).sum() + ones(11, 7)) @ params["up"]

    config = LoraConfig(rank=2, target_modules="up", factorizations={"up": "io"})
    adapters = drawn(jlora.init_lora(None, params, config))
    step = step_of(both, config)
    assert adapters["w"] is None
    assert_same(step(adapters, params, x), step(adapters, densified(params), x))


MESH = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def mapped(params, x):
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("d")), "out_specs": PartitionSpec("d")}
    return jax.shard_map(lambda w, x: x @ w, mesh=MESH, **specs)(params["w"], x)


def nested(params, x):
    def inner(x, w):
        return jnp.tanh(x @ w), None

    return lax.scan(lambda x, stack: (lax.scan(inner, x, stack)[0], None), x, params["w"])[0]


def carried(params, x):
    def step(carry, _):
        w, x = carry
        return (w * 0.5, jnp.tanh(x @ w)), None

    return lax.scan(step, (params["w"], x), None, length=3)[0][1]


ELSEWHERE = {
    "shard_map": (mapped, W, "io"),
    "nested scans": (nested, (2, *STACK), "bbio"),
    "carried": (carried, (IN, IN), "io"),
    "returned": (lambda params, x: params["w"] * x[0, 0], W, "io"),
    "chosen": (lambda params, x: x @ jnp.where(x[0, 0] > 0, params["w"][0], params["w"][1]), STACK, "bio"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_where_it_becomes_dense_the_numbers_are_those_of_the_dense_base(name):
    fn, shape, roles = ELSEWHERE[name]
    params, x = {"w": packed(1, *shape)}, ones(ROWS, IN)
    config = LoraConfig(rank=2, factorizations={"w": roles})
    step = step_of(fn, config)
    adapters = drawn(jlora.init_lora(None, params, config))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, step(adapters, params, x), step(adapters, densified(params), x))


def test_a_while_loop():
    params, x = {"w": packed(1, *STACK)}, ones(ROWS, IN)
    config = resolve_config(while_, LoraConfig(rank=2), params, x)
    adapters = drawn(jlora.init_lora(None, params, config))
    model = jax.jit(lora(while_, config))
    assert_same(model(params, adapters, x), model(densified(params), adapters, x))


def test_an_index_beyond_the_stack_gives_what_a_dense_stack_gives():
    params, x = {"w": packed(1, *STACK)}, ones(ROWS, IN)
    config = LoraConfig(rank=2, factorizations={"w": "bio"})
    adapters = drawn(jlora.init_lora(None, params, config))
    for index in (LAYERS, 1):
        model = jax.jit(lora(lambda params, x, i: x @ jnp.take(params["w"], i, axis=0), config))
        assert_same(model(params, adapters, x, index), model(densified(params), adapters, x, index))


@pytest.mark.parametrize(("fn", "shape"), [(PROGRAMS["product"][0], W), (scanned, STACK)])
def test_dora_on_a_lazy_base(fn, shape):
    params, x = {"w": packed(1, *shape)}, ones(ROWS, IN)
    config = resolve_config(fn, LoraConfig(rank=2), params, x)
    adapters = drawn(jlora.init_lora(None, params, config))
    adapters["w"]["magnitude"] = 1 + jax.random.uniform(jax.random.key(7), (*shape[:-2], shape[-1]))
    step = step_of(fn, config)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(close, step(adapters, params, x), step(adapters, densified(params), x))


def test_strict_accepts_what_it_accepts_of_a_dense_base():
    params, x = {"w": packed(1, *STACK)}, ones(ROWS, IN)
    config = LoraConfig(rank=2, factorizations={"w": "bio"})
    adapters = drawn(jlora.init_lora(None, params, config))
    model = jax.jit(lora(rematerialised, config, strict=True))
    assert_same(model(params, adapters, x), model(densified(params), adapters, x))
    with pytest.raises(AdapterError, match=r"w: reduce_sum at .*: it sums over axes of the weight"):
        lora(lambda params, x: x + params["w"].sum(), config, strict=True)(params, adapters, x)


def test_a_jitted_layer_is_compiled_once_for_all_lazy_bases():
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))

    def fn(params, x):
        for w in params.values():
            x = layer(w, x)
        return x

    params, x = {f"w{n}": packed(n, IN, IN) for n in range(LAYERS)}, ones(ROWS, IN)
    config = resolve_config(fn, LoraConfig(rank=2), params, x)
    adapters = drawn(jlora.init_lora(None, params, config))
    text = jax.jit(lora(fn, config)).lower(params, adapters, x).as_text()
    assert (text.count("call @"), text.count("func.func private")) == (LAYERS, 1)


def test_the_tree_functions_see_one_leaf():
    params = {"w": packed(1, *W), "other": packed(2, 3, 2)}
    config = LoraConfig(rank=2, target_modules="w", factorizations={"w": "io"})
    adapters = drawn(jlora.init_lora(None, params, config))
    assert jax.tree.map(jnp.shape, adapters) == {"other": None, "w": {"A": (IN, 2), "B": (2, HIDDEN)}}
    assert jlora.summary(params, adapters, config).rows() == jlora.summary(densified(params), adapters, config).rows()
    merged = jlora.merge_params(params, adapters, config)
    assert merged["other"] is params["other"]
    assert_same(merged["w"], jlora.merge_params(densified(params), adapters, config)["w"])


def test_the_base_has_no_gradient():
    params, x = {"w": packed(1, *W)}, ones(ROWS, IN)
    config = LoraConfig(rank=2, factorizations={"w": "io"})
    adapters = drawn(jlora.init_lora(None, params, config))
    model = lora(PROGRAMS["product"][0], config)
    found = jax.grad(lambda scale: model({"w": Int8(params["w"].numbers, scale)}, adapters, x).sum())(params["w"].scale)
    assert not found.any()


def test_a_class_that_does_not_keep_its_word_is_an_error():
    @functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=[])
    @dataclasses.dataclass(frozen=True)
    class Wrong:
        array: jax.Array
        shape = (5, 7)
        dtype = jnp.dtype("float32")

        def dense(self):
            return self.array

    config = LoraConfig(rank=2, factorizations={"w": "io"})
    params = {"w": Wrong(jnp.ones((7, 5)))}
    adapters = jlora.init_lora(None, params, config)
    with pytest.raises(
        AdapterError, match=r"w: dense\(\) of its Wrong gives float32 \(7, 5\), but it says .* \(5, 7\)"
    ):
        lora(PROGRAMS["product"][0], config)(params, adapters, ones(ROWS, IN))


def test_an_array_is_an_array_at_no_cost():
    params, x = densified({"w": packed(1, *STACK)}), ones(ROWS, IN)
    config = LoraConfig(rank=2, factorizations={"w": "bio"})
    adapters = drawn(jlora.init_lora(None, params, config))
    names = str(jax.make_jaxpr(lora(scanned, config))(params, adapters, x))
    assert not re.search("remat|checkpoint|stop_gradient|optimization_barrier", names)


DEPTH, WIDTH, TOKENS = 8, 256, 64


@pytest.mark.parametrize("fn", [scanned, lambda params, x: rematerialised(params, x)], ids=["scan", "remat"])
@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "not adapted"])
def test_a_step_holds_no_dense_copy_of_the_stack(fn, adapted):
    stack = packed(1, DEPTH, WIDTH, WIDTH)
    params = {"w": stack, "last": packed(2, WIDTH, 3)}

    def model(params, x):
        x = x if adapted else x @ params["first"]
        return fn(params, x) @ params["last"]

    if not adapted:
        params["first"] = packed(3, WIDTH, WIDTH)
    target = "w" if adapted else "first"
    config = LoraConfig(rank=2, target_modules=target, factorizations={"w": "bio"} if adapted else {"first": "io"})
    adapters = drawn(jlora.init_lora(None, params, config))
    step = step_of(model, config)
    x = ones(TOKENS, WIDTH)
    compiled = step.lower(adapters, params, x).compile()
    text = compiled.as_text()
    assert not re.search(rf"(f32|bf16|f16)\[{DEPTH},{WIDTH},{WIDTH}\]", text)
    layer, inputs = 4 * WIDTH * WIDTH, 4 * DEPTH * TOKENS * WIDTH
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * layer + 2 * inputs + stack.numbers.size
    dense = step.lower(adapters, densified(params), x).compile()
    assert re.search(rf"f32\[{DEPTH},{WIDTH},{WIDTH}\]", dense.as_text())
