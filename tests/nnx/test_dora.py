"""`nnx.LoRA` with magnitudes (DoRA): factored, with the value and the gradients of the merged model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jlora
from jlora.nnx import LoRA
from tests.reference import as64, assert_close, random_array, randomize


def test_it_is_the_merged_model_and_trains_every_part(rng):
    model = nnx.Sequential(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(7, 3, rngs=nnx.Rngs(1)))
    x = random_array(rng, (2, 5))
    config = jlora.LoraConfig(rank=2, alpha=3, target_modules="layers/*")
    adapters = randomize(rng, LoRA(model, config, args=(x,)).adapters)
    for number, size in ((0, 7), (2, 3)):
        adapters["layers"][number]["kernel"]["magnitude"] = jnp.asarray(rng.uniform(0.5, 2, size), jnp.float32)
    lora = LoRA(model, config, args=(x,), adapters=adapters)
    assert all(use.factored for use in lora.explain(x).uses)
    assert_close(lora(x), as64(lora.merge()(x)), factor=10)

    def loss(lora: Any) -> Any:
        return jnp.mean(lora(x) ** 2)

    def merged_loss(adapters: Any) -> Any:
        graphdef, state, rest = nnx.split(model, nnx.Param, ...)
        nnx.replace_by_pure_dict(state, jlora.merge_params(lora.params, adapters, lora.config))
        return jnp.mean(nnx.merge(graphdef, state, rest)(x) ** 2)

    found = nnx.to_pure_dict(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(lora))["lora"]
    wanted = jax.grad(merged_loss)(adapters)
    for new, old in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert_close(new, as64(old), factor=20)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found))


def test_it_begins_unchanged_with_the_norms_of_the_weights(rng):
    model = nnx.Sequential(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(7, 3, rngs=nnx.Rngs(1)))
    x = random_array(rng, (2, 5))
    lora = LoRA(model, jlora.LoraConfig(kind="dora", rank=2, target_modules="layers/*"), args=(x,))
    magnitudes = [lora.adapters["layers"][number]["kernel"]["magnitude"] for number in (0, 2)]
    for layer, magnitude in zip((model.layers[0], model.layers[2]), magnitudes, strict=True):
        np.testing.assert_allclose(magnitude, np.linalg.norm(layer.kernel[...], axis=0), rtol=1e-6)
    np.testing.assert_allclose(lora(x), model(x), rtol=1e-5, atol=1e-6)
