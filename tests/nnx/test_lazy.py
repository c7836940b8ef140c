"""`jlora.nnx.LoRA` of a model whose kernels are lazy bases: the same numbers as with the dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from jlora import LoraConfig
from jlora.nnx import LoRA
from tests.lazy_bases import Int8, packed
from tests.reference import random_array, randomize

IN, WIDTH, OUT, ROWS = 5, 7, 3, 11
CONFIG = LoraConfig(rank=2, alpha=3)


class Model(nnx.Module):
    def __init__(self, *, is_lazy: bool) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(IN, WIDTH, rngs=rngs)
        self.down = nnx.Linear(WIDTH, OUT, rngs=rngs)
        for layer in (self.up, self.down):
            kernel = packed(layer.out_features, *layer.kernel.shape, exact=True)
            layer.kernel = nnx.Param(kernel if is_lazy else kernel.dense())

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def kernel_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))["up"]["kernel"]


def pair(rng, *, with_magnitude=False):
    """The same adapters on the lazy and on the dense model."""
    x = random_array(rng, (ROWS, IN))
    first = LoRA(Model(is_lazy=True), CONFIG, args=(x,))
    adapters = randomize(rng, first.adapters)
    if with_magnitude:
        adapters["up"]["kernel"]["magnitude"] = random_array(rng, (WIDTH,))
    models = [LoRA(Model(is_lazy=is_lazy), first.config, adapters=adapters) for is_lazy in (True, False)]
    return *models, x


@nnx.jit
def step(model, x):
    def loss(model, x):
        y = model(x)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum()

    return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x)


def test_the_output_and_the_gradients_are_those_of_the_dense_kernels(rng):
    lazy, dense, x = pair(rng)
    assert lazy.config == LoRA(Model(is_lazy=False), CONFIG, args=(x,)).config
    jax.tree.map(np.testing.assert_array_equal, step(lazy, x), step(dense, x))
    table = lazy.explain(x)
    assert table.base_bytes == {"down/kernel": WIDTH * OUT + 4 * OUT, "up/kernel": IN * WIDTH + 4 * WIDTH}
    assert (table.uses, table.unpacked) == (dense.explain(x).uses, ())


def test_the_kernels_stay_packed_and_untrained(rng):
    lazy, _, x = pair(rng)
    step(lazy, x)
    numbers = packed(WIDTH, IN, WIDTH, exact=True).numbers
    assert isinstance(kernel_of(lazy.model), Int8)
    np.testing.assert_array_equal(kernel_of(lazy.model).numbers, numbers)


@pytest.mark.parametrize("with_magnitude", [False, True], ids=["adapter", "DoRA"])
def test_merging_makes_a_dense_model(rng, with_magnitude):
    lazy, dense, x = pair(rng, with_magnitude=with_magnitude)
    merged = lazy.merge()
    assert isinstance(kernel_of(merged), jax.Array)
    np.testing.assert_array_equal(kernel_of(merged), kernel_of(dense.merge()))
    np.testing.assert_allclose(lazy(x), merged(x), rtol=2e-5, atol=2e-5)
    assert isinstance(kernel_of(lazy.model), Int8)
    assert jlora.count_params(lazy.params) == jlora.count_params(dense.params)
