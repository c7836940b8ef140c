"""`LoRA` of a model whose kernels are lazy bases: the same numbers as with the dense ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import LoraConfig
from jlora.linen import LoRA
from tests.lazy_bases import densified, is_int8, packed
from tests.reference import as64, assert_close, random_array, randomize

IN, WIDTH, ROWS, LAYERS = 5, 7, 11, 3
CONFIG = LoraConfig(rank=2, alpha=3)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(IN)(jnp.tanh(nn.Dense(WIDTH)(x)))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(IN)(jnp.tanh(nn.Dense(WIDTH)(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return scan()(x, None)[0]


class Named(nn.Module):
    """Its kernels are in boxes, with the names of their axes."""

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return nn.Dense(IN, kernel_init=init)(jnp.tanh(nn.Dense(WIDTH, kernel_init=init)(x)))


def with_lazy_kernels(params):
    """The params with int8 numbers in place of every kernel, in its box."""

    def lazy(path, leaf):
        names = [str(getattr(key, "key", key)) for key in path]
        return packed(len(names[0]), *leaf.shape, exact=True) if "kernel" in names else leaf

    return jax.tree_util.tree_map_with_path(lazy, params)


@pytest.mark.parametrize("model", [Plain(), Scanned(), Named()], ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("is_resolved", [True, False], ids=["resolved", "unresolved"])
def test_the_output_and_the_gradients_are_those_of_the_dense_kernels(rng, model, is_resolved):
    x = random_array(rng, (ROWS, IN))
    config = jlora.linen.resolve_config(model, CONFIG, x) if is_resolved else CONFIG
    lora = LoRA(model, config)
    base, adapters = jlora.split_params(lora.init(jax.random.key(0), x)["params"])
    base, adapters = with_lazy_kernels(base), randomize(rng, adapters)
    lazy = jax.tree.leaves(base, is_leaf=is_int8)
    assert sum(map(is_int8, lazy)) == 2

    @jax.jit
    def step(adapters, base, x):
        def loss(adapters, x):
            y = lora.apply({"params": jlora.combine_params(base, adapters)}, x)
            return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum()

        return jax.value_and_grad(loss, (0, 1))(adapters, x)

    found, wanted = step(adapters, base, x), step(adapters, densified(base), x)
    jax.tree.map(lambda one, other: assert_close(one, as64(other)), found, wanted)
    both = jlora.combine_params(base, adapters)
    table = lora.explain({"params": both}, x)
    assert sorted(table.base_bytes) == sorted(jlora.paths.leaves_by_path(adapters, is_leaf=jlora.adapter.is_entry))
    assert table.unpacked == ()
    again, same = jlora.split_params(both)
    assert jax.tree.structure(again) == jax.tree.structure(base)
    jax.tree.map(np.testing.assert_array_equal, same, adapters)


def test_a_scanned_model_holds_no_dense_copy_of_the_stack(rng):
    width, tokens = 128, 16

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(width)(x)), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            return scan()(x, None)[0]

    x = random_array(rng, (tokens, width))
    lora = LoRA(Deep(), CONFIG)
    base, adapters = jlora.split_params(lora.init(jax.random.key(0), x)["params"])

    def loss(adapters, base, x):
        return (lora.apply({"params": jlora.combine_params(base, adapters)}, x) ** 2).sum()

    step = jax.jit(jax.value_and_grad(loss))
    texts = [step.lower(adapters, params, x).compile().as_text() for params in (with_lazy_kernels(base), base)]
    assert [f"f32[{LAYERS},{width},{width}]" in text for text in texts] == [False, True]


def test_a_dora_entry_of_a_lazy_kernel(rng):
    x = random_array(rng, (ROWS, IN))
    lora = LoRA(Plain(), CONFIG)
    base, adapters = jlora.split_params(lora.init(jax.random.key(0), x)["params"])
    base, adapters = with_lazy_kernels(base), randomize(rng, adapters)
    adapters["Dense_0"]["kernel"]["magnitude"] = random_array(rng, (IN,))
    for name in ("Dense_0", "Dense_1"):
        adapters[name]["bias"] = {"offset": random_array(rng, base[name]["bias"].shape)}
    y, wanted = (
        jax.jit(lora.apply)({"params": jlora.combine_params(params, adapters)}, x) for params in (base, densified(base))
    )
    np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=2e-5)
    merged = jlora.merge_params(base, adapters, lora.config)
    np.testing.assert_allclose(y, Plain().apply({"params": merged}, x), rtol=2e-5, atol=2e-5)
