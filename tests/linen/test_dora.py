"""`linen.LoRA` of kind "dora": init makes the magnitudes beside A and B, and the model is unchanged."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.linen import LoRA
from tests.reference import random_array


class Stack(nn.Module):
    """A matrix, and heads."""

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((2, 3), name="heads")(nn.Dense(7, name="up")(x))


def test_init_makes_magnitudes_at_the_norms_and_leaves_the_model_as_it_is(rng):
    x = random_array(rng, (2, 5))
    config = jlora.LoraConfig(kind="dora", rank=2)
    module = LoRA(Stack(), config)
    variables = module.init(jax.random.key(0), x)
    base, adapters = jlora.split_params(variables["params"])
    for name, axes in (("up", 0), ("heads", 0)):
        magnitude = adapters[name]["kernel"]["magnitude"]
        np.testing.assert_allclose(magnitude, np.linalg.norm(base[name]["kernel"], axis=axes), rtol=1e-6)
    wanted = Stack().apply({"params": base}, x)
    np.testing.assert_allclose(module.apply(variables, x), wanted, rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda params: jnp.square(module.apply({"params": params}, x)).sum())(variables["params"])
    assert np.abs(jlora.split_params(grads)[1]["up"]["kernel"]["magnitude"]).max() > 0
