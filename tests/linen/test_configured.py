"""`LoRA` and `resolve_config`: what the configuration says of paths, axes and dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import LoraConfig, TargetError, combine_params, init_lora, split_params
from jlora.linen import LoRA, resolve_config
from tests.linen.models import (
    CONFIG,
    KEY,
    MODELS,
    TOKENS,
    VECTORS,
    Coder,
    Experts,
    JitBlock,
    Transformer,
    draw,
    inputs,
    merged,
    scan,
    shapes,
)
from tests.reference import as64, assert_close


def test_rank_alpha_and_scaling_are_of_each_path(rng):
    config = CONFIG.replace(
        rank_pattern={"encoder/layers_0": 1}, alpha_pattern={"decode_heads": 7}, scaling="rslora", dtype="bfloat16"
    )
    x, lora = inputs(rng, VECTORS), LoRA(Coder(), config)
    variables = draw(rng, lora, x)
    adapters = split_params(variables["params"])[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("bfloat16")}
    assert adapters["encoder"]["layers_0"]["kernel"]["A"].shape == (7, 1)
    scalings = {"encoder/layers_0/kernel": 3.0, "decode_heads/kernel": 7 / np.sqrt(2)}
    wanted = merged(variables["params"], lambda path: scalings.get(path, 3 / np.sqrt(2)))
    found = lora.apply(variables, x)
    assert found.dtype == jnp.float32
    assert_close(found, as64(Coder().apply({"params": wanted}, x)), factor=10)


@pytest.mark.parametrize(("init", "std"), [("gaussian", 0.4), ("kaiming_uniform", 1 / np.sqrt(3 * 11))])
def test_a_begins_as_the_configuration_says(init, std, key):
    config = CONFIG.replace(init=init, init_std=0.4, rank=11)
    adapter = LoRA(nn.Dense(13), config).init(key, jnp.ones((1, 11)))["params"]["lora"]
    assert np.std(as64(adapter["A"])) == pytest.approx(std, rel=0.25)


def test_only_targets_that_are_not_excluded_are_adapted(rng):
    config = CONFIG.replace(target_modules=("**/attention", "conv"), exclude_modules=("**/key", "block_1"))
    _, adapters = split_params(draw(rng, LoRA(Transformer(), config), inputs(rng, TOKENS))["params"])
    found = {"/".join(key.key for key in path[:-2]) for path, _ in jax.tree_util.tree_leaves_with_path(adapters)}
    assert found == {"conv", *(f"block_0/attention/{name}" for name in ("query", "value", "out"))}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target_modules": "encodr"}, TargetError, "target_modules: 'encodr' matches nothing; nearest paths: encoder"),
        (
            {"target_modules": "**/bias"},
            TargetError,
            r"'\*\*/bias' adapts nothing: what it matches is excluded, narrower",
        ),
        ({"exclude_modules": "nothing"}, TargetError, "exclude_modules: 'nothing' matches nothing; nearest paths: "),
        ({"exclude_modules": "**"}, TargetError, r"target_modules: '\*\*' adapts nothing"),
        ({"rank_pattern": {"nothing": 1}}, TargetError, "rank_pattern: 'nothing' matches nothing that is adapted"),
        ({"alpha_pattern": {"nothing": 1}}, TargetError, "alpha_pattern: 'nothing' matches nothing that is adapted"),
        (
            {"rank": 6},
            TargetError,
            r"target_modules: '\*\*' adapts nothing: what it matches is excluded, narrower than",
        ),
        (
            {"rank": 4, "target_modules": "encoder/layers_2/layers_0/kernel"},
            TargetError,
            r"layers_0/kernel' adapts nothing: what it matches is .*narrower than the rank",
        ),
    ],
)
def test_init_refuses_a_configuration_that_does_not_fit(changes, error, message, rng):
    with pytest.raises(error, match=message):
        LoRA(Coder(), CONFIG.replace(**changes)).init(KEY, inputs(rng, VECTORS))


def test_resolve_config_writes_out_every_factorization_and_given_ones_win(rng):
    config = resolve_config(Experts(), CONFIG, jax.ShapeDtypeStruct(VECTORS, jnp.float32))
    assert dict(config.factorizations) == {"split/kernel": "oio", "join/kernel": "iio", "heads/kernel": "ioo"}
    given = CONFIG.replace(factorizations={"heads/kernel": "bio"}, target_modules=("split", "heads"))
    config = resolve_config(Experts(), given, inputs(rng, VECTORS))
    assert dict(config.factorizations) == {"split/kernel": "oio", "heads/kernel": "bio"}
    given = CONFIG.replace(factorizations={"heads": "bio"})
    config = resolve_config(Experts(), given, inputs(rng, VECTORS))
    adapters = init_lora(KEY, draw(rng, Experts(), inputs(rng, VECTORS))["params"], config)
    assert shapes(adapters["heads"]["kernel"]) == {"A": (7, 3, 2), "B": (7, 2, 2)}


@pytest.mark.parametrize(("name", "prefix"), [("scan of remat", "b"), ("vmap", "b"), ("remat", "")])
def test_resolve_config_knows_the_axes_of_stacks(name, prefix, rng):
    model, shape = MODELS[name]
    config = resolve_config(model, CONFIG, inputs(rng, shape))
    found = {path.split("/")[-2]: roles for path, roles in config.factorizations if path.startswith("block")}
    wanted = dict.fromkeys(("query", "key", "value"), "ioo") | {"out": "iio", "up": "io", "down": "io"}
    assert found == {name: prefix + roles for name, roles in wanted.items()}


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize(
    "name", ["scan", "setup", *(pytest.param(n, marks=pytest.mark.slow) for n in ("jit", "recurrent"))]
)
def test_dropout_follows_its_rng_and_is_off_without_one(name, rng, key):
    model, shape = MODELS[name]
    x, dropping = inputs(rng, shape), LoRA(model, CONFIG.replace(dropout=0.5))
    variables = draw(rng, dropping, x)
    apply = jax.jit(dropping.apply)
    once, again, other = (apply(variables, x, rngs={"dropout": k}) for k in (key, key, jax.random.key(8)))
    without = apply(variables, x)
    np.testing.assert_array_equal(without, jax.jit(LoRA(model, CONFIG).apply)(variables, x))
    np.testing.assert_array_equal(once, again)
    assert np.any(once != other)
    assert np.any(once != without)


def test_dropout_differs_from_layer_to_layer_of_a_scan(rng, key):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            return carry, nn.Dense(7, use_bias=False)(x)

    x = jnp.broadcast_to(inputs(rng, VECTORS), (3, *VECTORS))
    lora = LoRA(scan(Layer)(), CONFIG.replace(dropout=0.5))
    variables = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), draw(rng, lora, None, x))
    _, plain = lora.apply(variables, None, x)
    _, found = lora.apply(variables, None, x, rngs={"dropout": key})
    np.testing.assert_array_equal(plain[0], plain[1])
    assert np.any(found[0] != found[1])


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": ("block_0", "block_*/up")},
        {"target_modules": ("**",), "exclude_modules": ("block_0",)},
        {"rank_pattern": {"block_1": 1, "**/up": 2}},
        {"alpha_pattern": {"block_1": 7, "**/query": 5}},
    ],
    ids=str,
)
def test_blocks_that_nn_jit_compiles_once_may_be_treated_apart(change, rng):
    x, config = inputs(rng, TOKENS), LoraConfig(rank=2, target_modules=("block_*",)).replace(**change)
    variables, plain = (draw(np.random.default_rng(3), LoRA(Transformer(*b), config), x) for b in ((JitBlock,), ()))
    assert shapes(variables) == shapes(plain)
    found, wanted = (jax.jit(LoRA(Transformer(*b), config).apply)(plain, x) for b in ((JitBlock,), ()))
    assert_close(found, as64(wanted), factor=20)


def test_params_without_the_adapters_are_refused(rng):
    x, model = inputs(rng, TOKENS), Transformer()
    with pytest.raises(
        TargetError, match=r"^block_0/.*/kernel: the params hold no adapter for it; put adapters in with"
    ):
        LoRA(model, CONFIG).apply(model.init(KEY, x), x)


@pytest.mark.parametrize("resolved", [False, True])
def test_params_without_one_of_the_adapters_are_refused(resolved, rng):
    x, model = inputs(rng, TOKENS), Transformer()
    config = resolve_config(model, CONFIG, x) if resolved else CONFIG
    base, adapters = split_params(draw(rng, LoRA(model, config), x)["params"])
    adapters["block_1"]["up"]["kernel"] = None
    with pytest.raises(TargetError, match=r"^block_1/up/kernel: the params hold no adapter for it"):
        LoRA(model, config).apply({"params": combine_params(base, adapters)}, x)
