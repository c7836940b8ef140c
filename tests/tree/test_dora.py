"""DoRA from scratch: a magnitude at the norms of each weight, so that the model is unchanged, and then trained."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import LoraConfig, TargetError

# How the axes of weights split, and the axes over which the norm of each is: all its in axes.
WEIGHTS = {
    "dense": ((5, 7), "io"),
    "torch": ((7, 5), "oi"),
    "heads": ((5, 2, 3), "ioo"),
    "back": ((2, 3, 5), "iio"),
    "layers": ((11, 5, 7), "bio"),
    "experts": ((3, 7, 5), "boi"),
    "conv": ((2, 3, 5, 7), "iiio"),
    "odd": ((5, 3, 7), "obi"),
}
CONFIG = LoraConfig(kind="dora", rank=2, alpha=3, factorizations={name: roles for name, (_, roles) in WEIGHTS.items()})


def params_of(rng, dtype=np.float32):
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, (shape, _) in WEIGHTS.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_magnitude_begins_at_the_norms(rng, dtype):
    params = params_of(rng, dtype)
    adapters = jlora.init_lora(jax.random.key(0), params, CONFIG)
    for name, (shape, roles) in WEIGHTS.items():
        assert set(adapters[name]) == {"A", "B", "magnitude"}
        weight = np.asarray(params[name], np.float64)
        ins = tuple(axis for axis in range(len(shape)) if roles[axis] == "i")
        order = [axis for role in "bo" for axis in range(len(shape)) if roles[axis] == role]
        norms = np.sqrt((weight**2).sum(ins))
        kept = [axis for axis in range(len(shape)) if axis not in ins]
        wanted = norms.transpose([kept.index(axis) for axis in order])
        assert adapters[name]["magnitude"].dtype == jnp.float32
        np.testing.assert_allclose(adapters[name]["magnitude"], wanted, rtol=1e-6)


def test_the_model_is_unchanged_to_rounding_and_a_and_b_are_those_of_plain_lora(rng):
    params = params_of(rng)
    adapters = jlora.init_lora(jax.random.key(0), params, CONFIG)
    merged = jlora.merge_params(params, adapters, CONFIG)
    plain = jlora.init_lora(jax.random.key(0), params, CONFIG.replace(kind="lora"))
    for name in WEIGHTS:
        np.testing.assert_allclose(merged[name], params[name], rtol=1e-6)
        assert all((adapters[name][part] == plain[name][part]).all() for part in "AB")


def test_its_shapes_need_no_numbers_and_its_numbers_do(rng):
    params = params_of(rng)
    shapes = jax.eval_shape(lambda params: params, params)
    found = jax.eval_shape(lambda params: jlora.init_lora(None, params, CONFIG), shapes)
    made = jlora.init_lora(None, params, CONFIG)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, made)
    config = CONFIG.replace(target_modules="dense", factorizations={"dense": "io"})
    table = jlora.explain(lambda params, x: x @ params["dense"], config, shapes, shapes["torch"])
    assert [(use.path, use.factored) for use in table.uses] == [("dense", True)]
    with pytest.raises(TargetError, match=re.escape("back: kind = 'dora': the magnitude begins at the norms of the")):
        jlora.init_lora(None, shapes, CONFIG)


def test_every_part_is_placed_as_the_axes_of_its_weight(rng):
    mesh = jax.make_mesh((1,), ("model",))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    params = {"dense": jax.device_put(params_of(rng)["dense"], columns)}
    config = CONFIG.replace(target_modules="dense", factorizations={})
    wanted = jlora.adapter_shardings(params, config)["dense"]
    found = jlora.init_lora(None, params, config)["dense"]
    assert wanted["magnitude"].spec == jax.sharding.PartitionSpec("model")
    assert {part: array.sharding for part, array in found.items()} == wanted


def test_it_is_boxed_as_its_weight(rng):
    kernel = nn.Partitioned(params_of(rng)["dense"], ("embed", "mlp"))
    entry = jlora.init_lora(None, {"kernel": kernel}, LoraConfig(kind="dora", rank=2))["kernel"]
    assert entry["magnitude"].names == ("mlp",)
    assert entry["magnitude"].value.shape == (7,)


def test_training_moves_all_three_and_the_base_stays(rng):
    params = {"up": params_of(rng)["dense"]}
    x, y = (jnp.asarray(rng.standard_normal((13, size)), jnp.float32) for size in (5, 7))
    config = LoraConfig(kind="dora", rank=2, factorizations={"up": "io"})
    adapted, adapters, config, report = jlora.adapt(lambda params, x: x @ params["up"], config, params, x, strict=True)
    assert "magnitude" in adapters["up"]
    assert jlora.count_params(adapters) == 5 * 2 + 2 * 7 + 7
    assert "31" in str(report)
    np.testing.assert_allclose(adapted(params, adapters, x), x @ params["up"], rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda adapters: jnp.square(adapted(params, adapters, x) - y).mean())(adapters)["up"]
    assert all(np.abs(grads[part]).max() > 0 for part in ("B", "magnitude"))
    assert jlora.lora_labels(adapters)["up"] == {"A": "lora", "B": "lora", "magnitude": "lora"}
