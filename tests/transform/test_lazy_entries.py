"""Lazy bases in boxes, in bfloat16, and under entries of every kind: the same numbers as those of the dense base."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from jlora import LoraConfig
from jlora.transform import explain, lora, resolve_config
from tests.lazy_bases import densified, packed
from tests.reference import as64, assert_close, random_array, randomize

LAYERS, IN, ROWS, RANK = 3, 5, 11, 2
STACK = (LAYERS, IN, IN)
KINDS = {
    "adapter": ("A", "B"),
    "value": ("value",),
    "offset": ("offset",),
    "offset and adapter": ("offset", "A", "B"),
    "value and adapter": ("value", "A", "B"),
    "DoRA": ("A", "B", "magnitude"),
    "DoRA of all": ("value", "offset", "A", "B", "magnitude"),
}


def scanned(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def contents(params):
    """The params out of their boxes, as a model of Flax takes them."""
    return nn.unbox(params)


def boxed(params):
    return {"w": nn.Partitioned(params["w"], names=("layer", "in", "out"))}


def entry_of(rng, kind, dtype="float32"):
    shapes = {
        "value": STACK,
        "offset": STACK,
        "A": (LAYERS, IN, RANK),
        "B": (LAYERS, RANK, IN),
        "magnitude": (LAYERS, IN),
    }
    return {name: random_array(rng, shapes[name], dtype) for name in KINDS[kind]}


def loss_and_gradients(fn, config):
    model = lora(fn, config)

    def loss(entries, params, x):
        y = model(params, entries, x)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 2)))


def reference(params, entry, config, x):
    """The output in float64: every weight merged, one layer after the other."""
    scaling = config.alpha / config.rank
    own = {name: as64(part) for name, part in entry.items()}
    total = own.get("value", as64(params["w"])) + scaling * own.get("offset", 0)
    if "A" in own:
        total = total + scaling * own["A"] @ own["B"]
    if "magnitude" in own:
        total = total * (own["magnitude"] / np.linalg.norm(total, axis=1))[:, None]
    x = as64(x)
    for weight in total:
        x = np.tanh(x @ weight)
    return x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_of_any_kind_does_to_a_lazy_base_what_it_does_to_a_dense_one(rng, kind, dtype):
    params, x = {"w": packed(1, *STACK, dtype=dtype)}, random_array(rng, (ROWS, IN), dtype)
    config = LoraConfig(rank=RANK, factorizations={"w": "bio"})
    entries = {"w": entry_of(rng, kind)}
    y = lora(scanned, config)(params, entries, x)
    assert y.dtype == jnp.dtype(dtype)
    assert_close(y, reference(densified(params), entries["w"], config, x), dtype, factor=4)
    step = loss_and_gradients(scanned, config)
    found, wanted = (step(entries, base, x) for base in (params, densified(params)))
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda leaf: leaf.dtype, wanted)
    jax.tree.map(lambda one, other: assert_close(one, as64(other), dtype, factor=4), found, wanted)
    merged, of_dense = (jlora.merge_params(base, entries, config)["w"] for base in (params, densified(params)))
    np.testing.assert_array_equal(merged, of_dense)
    assert merged.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_of_16_bits(rng, dtype):
    params, x = {"w": packed(1, *STACK, dtype=dtype)}, random_array(rng, (ROWS, IN), dtype)
    config = LoraConfig(rank=RANK, alpha=3, factorizations={"w": "bio"}, dtype="bfloat16")
    adapters = randomize(rng, jlora.init_lora(None, params, config))
    assert adapters["w"]["A"].dtype == jnp.bfloat16
    step = loss_and_gradients(scanned, config)
    found, wanted = (step(adapters, base, x) for base in (params, densified(params)))
    jax.tree.map(lambda one, other: assert_close(one, as64(other), "bfloat16", factor=4), found, wanted)


def test_a_lazy_base_in_a_box(rng):
    params, x = boxed({"w": packed(1, *STACK, exact=True)}), random_array(rng, (ROWS, IN))
    dense = boxed({"w": contents(params)["w"].dense()})

    def fn(params, x):
        return scanned(contents(params), x)

    config = resolve_config(fn, LoraConfig(rank=RANK), params, x)
    assert config == resolve_config(fn, LoraConfig(rank=RANK), dense, x)
    adapters = randomize(rng, jlora.init_lora(None, params, config))
    names = {name: part.names for name, part in adapters["w"].items()}
    assert names == {"A": ("layer", "in", None), "B": ("layer", None, "out")}
    step = loss_and_gradients(fn, config)
    jax.tree.map(np.testing.assert_array_equal, step(adapters, params, x), step(adapters, dense, x))
    merged, of_dense = (jlora.merge_params(base, adapters, config)["w"] for base in (params, dense))
    assert merged.names == of_dense.names == ("layer", "in", "out")
    np.testing.assert_array_equal(merged.value, of_dense.value)
    assert jlora.summary(params, adapters, config).rows() == jlora.summary(dense, adapters, config).rows()
    assert explain(fn, config, params, x).base_bytes == {"w": LAYERS * (IN * IN + 4 * IN)}
    assert set(jax.tree.leaves(jlora.lora_labels({"base": params, "lora": adapters}))) == {"frozen", "lora"}
