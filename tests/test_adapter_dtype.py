"""Which dtype adapters have, and what 16-bit bases with float32 adapters compute."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import jlora
from jlora import LoraConfig
from jlora.linen import LoRA, LoRADense
from jlora.nnx import LoRA as NNXLoRA
from tests.reference import as64, assert_close, random_array, randomize, reference_delta, x64

CONFIG = LoraConfig(rank=2, alpha=3)


def by_the_transform(rng, dtype, config):
    """The adapters of a weight (5, 7), and the function of the weight, the adapters and an input."""
    params = {"kernel": jnp.zeros((5, 7), dtype)}
    adapted = jlora.lora(lambda params, x: x @ params["kernel"], config)
    adapters = jlora.init_lora(None, params, config)
    return adapters["kernel"], lambda w, adapter, x: adapted({"kernel": w}, {"kernel": adapter}, x)


def by_a_linen_model(rng, dtype, config):
    module = LoRA(nn.Dense(7, use_bias=False, param_dtype=dtype), config)
    params = module.init(jax.random.key(0), jnp.ones((1, 5), dtype))["params"]
    return params["lora"], lambda w, adapter, x: module.apply({"params": {"kernel": w, "lora": adapter}}, x)


def by_a_linen_layer(rng, dtype, config):
    layer = LoRADense(2, wrapped=nn.Dense(7, use_bias=False, param_dtype=dtype), alpha=3.0, param_dtype=config.dtype)
    params = layer.init(jax.random.key(0), jnp.ones((1, 5), dtype))["params"]
    return params["lora"], lambda w, adapter, x: layer.apply({"params": {"kernel": w, "lora": adapter}}, x)


def by_an_nnx_model(rng, dtype, config):
    model = nnx.Linear(5, 7, use_bias=False, param_dtype=dtype, rngs=nnx.Rngs(0))
    lora = NNXLoRA(model, config)
    graphdef, state = nnx.split(lora)
    structure = jax.tree.structure(state)  # lora/kernel/A, lora/kernel/B, model/kernel
    return lora.adapters["kernel"], lambda w, adapter, x: nnx.merge(
        graphdef, structure.unflatten([adapter["A"], adapter["B"], w])
    )(x)


def by_a_layer(rng, dtype, config):
    layer = jlora.LoRALayer(jnp.zeros((5, 7), dtype), 2, 3.0, key=jax.random.key(0), dtype=config.dtype)
    structure = jax.tree.structure(layer)
    return layer.adapter, lambda w, adapter, x: jax.tree.unflatten(structure, [w, adapter["A"], adapter["B"]])(x)


every_face = pytest.mark.parametrize(
    "face", [by_the_transform, by_a_linen_model, by_a_linen_layer, by_an_nnx_model, by_a_layer]
)


@every_face
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_adapters_are_float32_whatever_the_base(face, dtype, rng):
    adapter, _ = face(rng, jnp.dtype(dtype), CONFIG)
    assert {part.dtype for part in adapter.values()} == {jnp.dtype("float32")}


def test_adapters_of_a_float8_base_are_float32():
    params = {"kernel": jnp.zeros((5, 7), "float8_e4m3fn")}
    assert {leaf.dtype for leaf in jax.tree.leaves(jlora.init_lora(None, params, CONFIG))} == {jnp.dtype("float32")}


@every_face
def test_adapters_of_a_wider_base_are_as_wide(face, rng):
    with x64():
        adapter, _ = face(rng, jnp.dtype("float64"), CONFIG)
    assert {part.dtype for part in adapter.values()} == {jnp.dtype("float64")}


@every_face
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("given", ["bfloat16", "float16", "float32"])
def test_the_configuration_says_another_dtype(face, dtype, given, rng):
    adapter, _ = face(rng, jnp.dtype(dtype), CONFIG.replace(dtype=given))
    assert {part.dtype for part in adapter.values()} == {jnp.dtype(given)}


def test_one_adapter_has_the_dtype_of_its_weight(rng, key):
    adapter = jlora.init_lora_adapter(key, random_array(rng, (5, 7), "bfloat16"), 2)
    assert {part.dtype for part in adapter.values()} == {jnp.dtype("bfloat16")}


@every_face
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_base_computes_as_it_did_and_adds_a_float32_update(face, dtype, rng):
    adapter, call = face(rng, jnp.dtype(dtype), CONFIG)
    weight, x, adapter = random_array(rng, (5, 7), dtype), random_array(rng, (3, 5), dtype), randomize(rng, adapter)
    y = call(weight, adapter, x)
    assert y.dtype == dtype
    assert_close(y, as64(x) @ (as64(weight) + reference_delta(adapter, 3)))
    silent = {"A": adapter["A"], "B": jnp.zeros_like(adapter["B"])}
    np.testing.assert_array_equal(call(weight, silent, x), x @ weight)


@every_face
def test_the_bases_product_stays_in_16_bits(face, rng):
    """Forward and backward; the weight is nowhere made wider, and its gradient is not formed."""
    adapter, call = face(rng, jnp.dtype("bfloat16"), CONFIG)
    weight, x = random_array(rng, (5, 7), "bfloat16"), random_array(rng, (3, 5), "bfloat16")

    def loss(adapter, x):
        return call(weight, adapter, x).astype(jnp.float32).var()

    grads = jax.grad(loss, (0, 1))
    assert jax.tree.map(lambda leaf: leaf.dtype.name, grads(adapter, x)[0]) == {"A": "float32", "B": "float32"}
    program = jax.jit(grads).lower(adapter, x).as_text()
    shapes = {tuple(re.findall(r"tensor<([^>]*)>", line)) for line in program.splitlines() if "dot_general" in line}
    assert ("3x5xbf16", "5x7xbf16", "3x7xbf16") in shapes
    assert not re.search("tensor<(5x7|7x5)xf32>", program)


def test_small_updates_of_a_16_bit_base_are_not_lost(rng):
    """The same steps on a float32 base, and on a bfloat16 one with adapters of either dtype."""
    weight, hidden = random_array(rng, (7, 5), "bfloat16"), random_array(rng, (7, 2)) @ random_array(rng, (2, 5))
    x = random_array(rng, (64, 7), "bfloat16")
    y = x.astype(jnp.float32) @ (weight.astype(jnp.float32) + hidden)

    def trained(dtype, adapter_dtype):
        config = LoraConfig(rank=2, alpha=2, init="kaiming_uniform", dtype=adapter_dtype)
        params, inputs = {"w": weight.astype(dtype)}, x.astype(dtype)
        adapters = jlora.init_lora(jax.random.key(0), params, config)
        adapted = jlora.lora(lambda params, x: x @ params["w"], config)
        optimizer = optax.adam(1e-3)

        def loss(adapters):
            return jnp.mean((adapted(params, adapters, inputs).astype(jnp.float32) - y) ** 2)

        def step(carry, _):
            adapters, state = carry
            updates, state = optimizer.update(jax.grad(loss)(adapters), state, adapters)
            return (optax.apply_updates(adapters, updates), state), None

        (after, _), _ = lax.scan(step, (adapters, optimizer.init(adapters)), length=1000)
        return float(loss(after) / loss(adapters))

    reached = trained("float32", None)
    assert reached < 0.3
    assert trained("bfloat16", None) == pytest.approx(reached, rel=0.02)
    assert trained("bfloat16", "bfloat16") > 1.5 * reached


@pytest.mark.parametrize(
    ("dtypes", "word"),
    [
        ((None, None), "2 weights of 70 parameters"),
        (("bfloat16", "bfloat16"), "2 weights of 70 parameters, adapters in bfloat16"),
        (("float16", None), "2 weights of 70 parameters, adapters in float16 and float32"),
    ],
)
def test_the_table_names_another_dtype(dtypes, word, rng):
    params = {name: random_array(rng, (5, 7)) for name in ("down", "up")}
    adapters = {}
    for name, dtype in zip(params, dtypes, strict=True):
        adapters[name] = jlora.init_lora(None, params, CONFIG.replace(dtype=dtype))[name]
    for tree in (adapters, jax.eval_shape(lambda: adapters)):
        assert jlora.summary(params, tree, CONFIG).rows()[-1][0] == word


def test_the_dtype_is_in_every_file(rng, tmp_path):
    params = {"up": random_array(rng, (5, 7), "bfloat16")}
    for dtype, found in ((None, "float32"), ("float16", "float16")):
        config = CONFIG.replace(dtype=dtype)
        folder = tmp_path / found
        jlora.save_adapters(folder, jlora.init_lora(None, params, config), config)
        adapters, read = jlora.load_adapters(folder, params=params)
        assert read == config
        assert {leaf.dtype.name for leaf in jax.tree.leaves(adapters)} == {found}
