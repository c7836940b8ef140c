"""Layers whose weight is in a box, as `nn.with_partitioning` makes it: A and B are in boxes too."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jlora.linen import AInit, LoRAConv, LoRADense, LoRADenseGeneral, LoRAEinsum, LoRAEmbed

KERNEL = nn.initializers.lecun_normal()
named = nn.with_partitioning
LAYERS = {
    "dense": (
        LoRADense(2, wrapped=nn.Dense(7, kernel_init=named(KERNEL, ("in", "out")))),
        (3, 5),
        (P("in", None), P(None, "out")),
    ),
    "logical": (
        LoRADense(2, wrapped=nn.Dense(7, kernel_init=nn.with_logical_partitioning(KERNEL, ("in", "out")))),
        (3, 5),
        (P("in", None), P(None, "out")),
    ),
    "heads": (
        LoRADenseGeneral(2, wrapped=nn.DenseGeneral((2, 7), kernel_init=named(KERNEL, ("in", "heads", "kv")))),
        (3, 5),
        (P("in", None), P(None, "heads", "kv")),
    ),
    "einsum": (
        LoRAEinsum(2, wrapped=nn.Einsum((2, 5, 7), "TD,NDH->TNH", kernel_init=named(KERNEL, ("n", "d", "h")))),
        (3, 5),
        (P("d", None), P(None, "n", "h")),
    ),
    "conv": (
        LoRAConv(2, wrapped=nn.Conv(7, (3,), kernel_init=named(KERNEL, ("window", "in", "out")))),
        (2, 4, 5),
        (P("window", "in", None), P(None, "out")),
    ),
    "no box": (LoRADense(2, wrapped=nn.Dense(7)), (3, 5), (P(), P())),
    "a box of its own": (
        LoRADense(2, wrapped=nn.Dense(7, kernel_init=named(KERNEL, ("in", "out"))), a_init=named(AInit(), ("x", "y"))),
        (3, 5),
        (P("x", "y"), P(None, "out")),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_and_b_take_over_the_names_of_the_weights_axes(name):
    layer, shape, (a, b) = LAYERS[name]
    x = jnp.ones(shape)
    variables = layer.init(jax.random.key(0), x)
    specs = nn.get_partition_spec(variables)["params"]["lora"]
    assert (specs["A"], specs["B"]) == (a, b)
    y = layer.apply(variables, x)
    np.testing.assert_array_equal(y, layer.apply(nn.unbox(variables), x))
    np.testing.assert_array_equal(y, layer.wrapped.apply(variables, x))


def test_an_embedding_and_its_head():
    layer = LoRAEmbed(2, wrapped=nn.Embed(11, 5, embedding_init=named(nn.initializers.normal(), ("vocab", "embed"))))
    variables = layer.init(jax.random.key(0), jnp.arange(3))
    specs = nn.get_partition_spec(variables)["params"]["lora"]
    assert specs == {"A": P("vocab", None), "B": P(None, "embed")}
    assert layer.apply(variables, jnp.ones((2, 5)), method="attend").shape == (2, 11)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        def body(_, x):
            dense = nn.Dense(5, kernel_init=named(KERNEL, ("in", "out")), name="up")
            return LoRADense(2, wrapped=dense)(x), None

        split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(body, **split, length=3, metadata_params={nn.PARTITION_NAME: "layers"})(self, x)[0]


def test_a_scan_adds_its_name():
    variables = Stack().init(jax.random.key(0), jnp.ones((3, 5)))
    specs = nn.get_partition_spec(variables)["params"]["up"]["lora"]
    assert specs == {"A": P("layers", "in", None), "B": P("layers", None, "out")}
    assert Stack().apply(variables, jnp.ones((3, 5))).shape == (3, 5)
