"""`LoRA`: any Linen module with adapters at its targeted layers, by any of its methods and in any place."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import init_lora, merge_params, split_params
from jlora.linen import LoRA, resolve_config
from tests.linen.models import (
    CONFIG,
    KEY,
    MODELS,
    TOKENS,
    VECTORS,
    Coder,
    JitBlock,
    Transformer,
    draw,
    every_model,
    inputs,
    merged,
    same,
    shapes,
)
from tests.marks import some
from tests.reference import as64, assert_close, randomize


@every_model
def test_output_is_the_models_with_the_merged_weights(model, shape, rng):
    x, lora = inputs(rng, shape), LoRA(model, CONFIG)
    variables = draw(rng, lora, x)
    wanted = jax.jit(model.apply)({"params": merged(variables["params"])}, x)
    assert_close(jax.jit(lora.apply)(variables, x), as64(wanted), factor=20)


@every_model
def test_every_kernel_and_embedding_gets_an_adapter(model, shape, rng):
    x = inputs(rng, shape)
    base, adapters = split_params(draw(rng, LoRA(model, CONFIG), x)["params"])
    assert shapes(base) == shapes(draw(rng, model, x)["params"])
    weights = [path[-1].key in ("kernel", "embedding") for path, _ in jax.tree_util.tree_leaves_with_path(base)]
    assert [adapter is not None for adapter in jax.tree.leaves(adapters, is_leaf=is_leaf)] == weights


def is_leaf(node):
    return node is None or set(node) == {"A", "B"}


@pytest.mark.parametrize("name", ["jit", "scan of remat", "given"])
def test_a_new_model_has_the_values_of_the_base_and_bitwise_its_output(name, rng, key):
    model, shape = MODELS[name]
    x = inputs(rng, shape)
    variables, plain = jax.jit(LoRA(model, CONFIG).init)(key, x), jax.jit(model.init)(key, x)
    base, adapters = split_params(variables["params"])
    same(base, plain["params"])
    drawn = [np.ravel(leaf)[0] for leaf in jax.tree.leaves(adapters) if np.any(leaf)]
    assert len(set(drawn)) * 2 == len(jax.tree.leaves(adapters))
    found, wanted = jax.jit(LoRA(model, CONFIG).apply)(variables, x), jax.jit(model.apply)(plain, x)
    np.testing.assert_array_equal(found, wanted)


@every_model
def test_the_resolved_configuration_makes_and_merges_the_same_adapters(model, shape, rng):
    x, lora = inputs(rng, shape), LoRA(model, CONFIG)
    config = resolve_config(model, CONFIG, x)
    base, adapters = split_params(draw(rng, lora, x)["params"])
    assert shapes(init_lora(KEY, base, config)) == shapes(adapters)
    wanted = merged(draw(np.random.default_rng(1), lora, x)["params"])
    base, adapters = split_params(draw(np.random.default_rng(1), lora, x)["params"])
    found = jax.jit(functools.partial(merge_params, config=config))(base, adapters)
    jax.tree.map(lambda f, w: assert_close(f, as64(w), factor=2), found, wanted)


@pytest.mark.parametrize("name", ["transformer", "jit", "scan of remat"])
def test_gradients_reach_every_a_and_b(name, rng):
    model, shape = MODELS[name]
    x, lora = inputs(rng, shape), LoRA(model, CONFIG)
    variables = draw(rng, lora, x)
    grads = jax.jit(jax.grad(lambda variables: jnp.sum(jnp.sin(lora.apply(variables, x)))))(variables)
    assert all(np.any(as64(leaf)) for leaf in jax.tree.leaves(split_params(grads["params"])[1]))


def test_what_nn_jit_compiled_for_one_configuration_is_not_taken_for_another(rng):
    model, x = Transformer(JitBlock), inputs(rng, TOKENS)
    variables = draw(rng, LoRA(model, CONFIG), x)
    plain = {"params": split_params(variables["params"])[0]}
    for alpha in (3, 5, 0, 3):
        wanted = Transformer().apply({"params": merged(variables["params"], lambda _, a=alpha: a / 2)}, x)
        assert_close(LoRA(model, CONFIG.replace(alpha=alpha)).apply(variables, x), as64(wanted), factor=20)
        assert_close(model.apply(plain, x), as64(Transformer().apply(plain, x)), factor=20)


# ---------------------------------------------------------------- methods and places


def test_methods_are_called_by_name_and_by_function(rng):
    x, lora = inputs(rng, VECTORS), LoRA(Coder(), CONFIG)
    variables = draw(rng, lora, x)
    wanted = as64(Coder().apply({"params": merged(variables["params"])}, x, scale=2.0, method="encode"))
    by_function = lora.apply(variables, x, method=lambda module, x: module.encode(x, scale=2.0))
    for found in (
        lora.apply(variables, x, scale=2.0, method="encode"),
        by_function,
        lora.bind(variables).encode(x, scale=2.0),
    ):
        assert_close(found, wanted, factor=5)


def test_a_function_of_the_models_class_may_be_the_method(rng):
    x, lora = inputs(rng, VECTORS), LoRA(Coder(), CONFIG)
    variables = draw(rng, lora, x)
    same(lora.apply(variables, x, method=Coder.encode), lora.apply(variables, x, method="encode"))


class Outer(nn.Module):
    """A model within another, and a layer outside of it."""

    make: type[nn.Module] = Coder

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(self.make(name="part")(x))


class Around(nn.Module):
    """A model that is given to another, and called with its input by name where that is said."""

    part: nn.Module
    name_of_input: str | None = None

    def __call__(self, x):
        return self.part(x) if self.name_of_input is None else self.part(**{self.name_of_input: x})


def adapted(name=None):
    return LoRA(Coder(name=name), CONFIG)


PLACES = {
    "made inside": (Outer(adapted), Outer()),
    "given": (Around(LoRA(Coder(), CONFIG)), Around(Coder())),
    "given to a remat": (nn.remat(Around)(LoRA(Coder(), CONFIG)), Around(Coder())),
    "a remat given": (Around(nn.remat(LoRA)(Coder(), CONFIG)), Around(Coder())),
    "remat": (nn.remat(LoRA)(Coder(), CONFIG), Coder()),
    "jit": (nn.jit(LoRA)(Coder(), CONFIG), Coder()),
    "around": (LoRA(Around(Coder()), CONFIG), Around(Coder())),
}


@pytest.mark.parametrize(("module", "plain"), some(PLACES))
def test_lora_stands_in_any_place_where_the_model_could(module, plain, rng):
    x = inputs(rng, VECTORS)
    variables = draw(rng, module, x)
    assert shapes(split_params(variables["params"])[0]) == shapes(draw(rng, plain, x)["params"])
    wanted = plain.apply({"params": merged(variables["params"])}, x)
    assert_close(module.apply(variables, x), as64(wanted), factor=5)
    assert np.any(as64(plain.apply({"params": split_params(variables["params"])[0]}, x)) != as64(wanted))


def test_a_layer_outside_of_lora_is_not_adapted(rng):
    params = draw(rng, Outer(adapted), inputs(rng, VECTORS))["params"]
    assert set(params["Dense_0"]) == {"kernel", "bias"}


def test_a_layer_within_a_derived_layer_is_adapted_too(rng):
    class Gated(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return super().__call__(x) * nn.Dense(self.features, name="gate")(x)

    x, lora = inputs(rng, VECTORS), LoRA(Gated(5), CONFIG)
    variables = draw(rng, lora, x)
    assert set(variables["params"]["gate"]) == {"kernel", "bias", "lora"}
    assert_close(lora.apply(variables, x), as64(Gated(5).apply({"params": merged(variables["params"])}, x)), factor=5)


@pytest.mark.parametrize("layer", [nn.Dense(5), nn.DenseGeneral(5), nn.Conv(5, (3,))], ids=["dense", "general", "conv"])
def test_a_layer_may_be_given_its_input_by_name(layer, rng):
    x, positional, by_name = inputs(rng, VECTORS), *(LoRA(Around(layer, name), CONFIG) for name in (None, "inputs"))
    variables = draw(rng, positional, x)
    np.testing.assert_array_equal(by_name.apply(variables, x), positional.apply(variables, x))


def test_other_collections_pass_through(rng, key):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))

    x, lora = inputs(rng, VECTORS), LoRA(Normed(), CONFIG)
    variables = lora.init(key, x, train=False)
    variables = variables | {"params": randomize(rng, variables["params"])}
    plain = variables | {"params": merged(variables["params"])}
    found = lora.apply(variables, x, train=True, mutable=["batch_stats"])
    wanted = Normed().apply(plain, x, train=True, mutable=["batch_stats"])
    jax.tree.map(lambda f, w: assert_close(f, as64(w), factor=5), found, wanted)
