"""Weights whose metadata name their axes: the variables of A and B name theirs."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jlora
from jlora import LoraConfig
from jlora.nnx import LoRA
from tests.reference import as64, assert_close, random_array

CONFIG = LoraConfig(rank=2, alpha=3)
HAS_EAGER = hasattr(nnx, "use_eager_sharding")


def without_a_mesh():
    """Flax 0.12 places a variable as it is made, unless told otherwise."""
    return nnx.use_eager_sharding(False) if HAS_EAGER else contextlib.nullcontext()


class Model(nnx.Module):
    def __init__(self, rngs):
        heads = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model", None))
        kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("model", "data"))
        self.heads = nnx.LinearGeneral(5, (2, 7), kernel_init=heads, rngs=rngs)
        self.mix = nnx.Linear(7, 3, kernel_init=kernel, rngs=rngs)
        self.plain = nnx.Linear(3, 11, rngs=rngs)

    def __call__(self, x):
        return self.plain(self.mix(self.heads(x).sum(1)))


def specs(lora):
    found = nnx.to_flat_state(nnx.get_partition_spec(nnx.state(lora, nnx.LoRAParam)))
    return {"/".join(map(str, path[1:])): spec_of(spec) for path, spec in found}


def spec_of(node):
    """Flax 0.12 has `get_value`, and warns of `value`."""
    return node.get_value() if hasattr(type(node), "get_value") else getattr(node, "value", node)


WANTED = {
    "heads/kernel/A": P("data", None),
    "heads/kernel/B": P(None, "model", None),
    "mix/kernel/A": P("model", None),
    "mix/kernel/B": P(None, "data"),
    "plain/kernel/A": P(),
    "plain/kernel/B": P(),
}


def test_a_and_b_name_the_axes_that_they_have_of_the_weight(rng):
    x = random_array(rng, (4, 5))
    with without_a_mesh():
        model = Model(nnx.Rngs(0))
    lora = LoRA(model, CONFIG, args=(x,))
    assert specs(lora) == WANTED
    optimizer = nnx.Optimizer(lora, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(lora, optimizer):
        loss, grads = nnx.value_and_grad(lambda lora: lora(x).var(), argnums=nnx.DiffState(0, nnx.LoRAParam))(lora)
        optimizer.update(lora, grads)
        return loss

    losses = [step(lora, optimizer) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert specs(lora) == WANTED
    assert_close(lora(x), as64(lora.merge()(x)), factor=20)
    again = LoRA(model, lora.config, adapters=lora.adapters)
    assert specs(again) == WANTED


def test_other_parts_have_names_too(rng):
    with without_a_mesh():
        model = Model(nnx.Rngs(0))
    dora = {"A": jnp.ones((5, 2)), "B": jnp.ones((2, 2, 7)), "magnitude": jnp.ones((2, 7))}
    adapters = {"heads": {"kernel": dora}, "mix": {"kernel": {"offset": jnp.ones((7, 3))}}}
    config = LoraConfig(rank=2, target_modules=("heads", "mix"), factorizations={"heads/kernel": "ioo"})
    assert specs(LoRA(model, config, adapters=adapters)) == {
        "heads/kernel/A": P("data", None),
        "heads/kernel/B": P(None, "model", None),
        "heads/kernel/magnitude": P("model", None),
        "mix/kernel/offset": P("model", "data"),
    }


@pytest.mark.skipif(not HAS_EAGER, reason="Flax before 0.12 does not place variables")
def test_within_a_mesh_they_are_placed_as_flax_places_variables(rng):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    x = random_array(rng, (4, 5))
    with jax.set_mesh(mesh):
        lora = LoRA(Model(nnx.Rngs(0)), CONFIG, args=(x,))
        part = jax.tree.leaves(lora.lora["heads"]["kernel"]["B"])[0]
        assert (part.sharding.mesh, part.sharding.spec) == (mesh, P(None, "model", None))
        assert lora(x).shape == (4, 11)
    assert specs(lora) == WANTED


def test_the_adapters_are_plain_arrays(rng):
    with without_a_mesh():
        lora = LoRA(Model(nnx.Rngs(0)), CONFIG, args=(random_array(rng, (4, 5)),))
    assert jax.tree.structure(lora.adapters) == jax.tree.structure(jlora.init_lora(None, lora.params, lora.config))
