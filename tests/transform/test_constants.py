"""What a function closes over lives as long as the function."""

import gc
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from jlora.linen import LoRA as LinenLoRA
from jlora.nnx import LoRA as NnxLoRA

SHAPE = (331, 7)  # of no other array
CONFIG = jlora.LoraConfig(rank=2, alpha=3, target_modules="**")


def encoder(jitted=True):
    """x -> x @ an array of that shape, which it closes over."""
    frozen = jnp.asarray(np.random.default_rng(3).standard_normal(SHAPE), jnp.float32)
    encode = lambda x: x @ frozen  # noqa: E731
    return jax.jit(encode) if jitted else encode


def function(jitted=True):
    encode = encoder(jitted)
    product = lambda w, x: encode(x) @ w  # noqa: E731
    product = jax.jit(product) if jitted else product
    params = {"w": jnp.ones((7, 5))}
    fn = lambda params, x: product(params["w"], x)  # noqa: E731
    return jlora.lora(fn, CONFIG), params, jlora.init_lora(None, params, CONFIG)


def call(jitted):
    model, params, adapters = function(jitted)
    model(params, adapters, jnp.ones((3, 331)))


def call_under_jit():
    model, params, adapters = function()
    jax.jit(model)(params, adapters, jnp.ones((3, 331)))


def differentiate():
    model, params, adapters = function()
    jax.grad(lambda adapters: model(params, adapters, jnp.ones((3, 331))).sum())(adapters)


def explain():
    encode = encoder()
    product = jax.jit(lambda w, x: encode(x) @ w)
    jlora.explain(lambda params, x: product(params["w"], x), CONFIG, {"w": jnp.ones((7, 5))}, jnp.ones((3, 331)))


class NnxModel(nnx.Module):
    def __init__(self, encode):
        self.encode = encode
        self.head = nnx.Linear(7, 5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jax.jit(lambda kernel, x: self.encode(x) @ kernel)(self.head.kernel[...], x)


def call_nnx():
    x = jnp.ones((3, 331))
    NnxLoRA(NnxModel(encoder()), jlora.LoraConfig(rank=2, target_modules="head/kernel"), args=(x,))(x)


class LinenModel(nn.Module):
    encode: Any

    @nn.compact
    def __call__(self, x):
        return nn.jit(nn.Dense)(5)(self.encode(x))


def call_linen():
    x = jnp.ones((3, 331))
    model = LinenLoRA(LinenModel(encoder()), CONFIG)
    jax.jit(model.apply)(model.init(jax.random.key(0), x), x)


USES = {
    "as it is": lambda: call(jitted=False),
    "a jitted function": lambda: call(jitted=True),
    "under jit": call_under_jit,
    "grad": differentiate,
    "explain": explain,
    "nnx": call_nnx,
    "linen": call_linen,
}


def alive():
    gc.collect()
    return sum(array.shape == SHAPE for array in jax.live_arrays())


@pytest.mark.parametrize("use", USES)
def test_constants_are_freed_with_the_function(use):
    encode = encoder()
    assert alive() == 1
    del encode
    USES[use]()
    jax.clear_caches()
    assert alive() == 0
