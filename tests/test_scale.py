"""A scale that no 16-bit number holds is applied in float32: 16-bit adapters of a float32 model, in every face."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from jlora.adapter import LoRALayer, lora_linear
from jlora.linen import LoRA as LinenLoRA
from jlora.linen import LoRAConv, LoRADense, LoRADenseGeneral, LoRAEinsum, LoRAEmbed
from jlora.nnx import LoRA as NnxLoRA
from tests.reference import as64, random_adapter, random_array, x64
from tests.transform.test_primitives import FACTORED, MERGED

RANK, ALPHA = 10, 16.0  # 1.6 is 3e-4 off in bfloat16; B in bfloat16 times it 2e-3
IDS = np.array([3, 0, 12, 3, 7, 1, 5], np.int32)
CONFIG = jlora.LoraConfig(rank=RANK, alpha=ALPHA, target_modules="w", factorizations={"w": "io"})
PROGRAMS = {
    "product": lambda w, x: x @ w,
    "tied": lambda w, x: (w[IDS] @ w[:7].T) @ x,
    "negated": lambda w, x: x @ -w,
    "scaled": lambda w, x: x @ (w * 0.3 / 1.7),
    "convolution": lambda w, x: jax.lax.conv_general_dilated(
        x[None], w[None], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    ),
    "experts": lambda w, x: jax.lax.ragged_dot(x, w[None], jnp.array([7])),
    "under jit": jax.jit(lambda w, x: x @ (w * 0.3)),
    "in turn": lambda w, x: jnp.einsum("tab,abo->tao", x.reshape(7, 1, 13), w[None]),
}


def arrays(rng, dtype):
    return random_array(rng, (13, 11)), random_adapter(rng, (13, RANK), (RANK, 11), dtype), random_array(rng, (7, 13))


def merged(w, adapter):
    return as64(w) + ALPHA / RANK * as64(adapter["A"]) @ as64(adapter["B"])


def assert_exact(found, wanted):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(as64(found), wanted, rtol=0, atol=3e-6 * np.max(np.abs(wanted)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", [FACTORED, MERGED], ids=["factored", "merged"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_transform(rng, name, form, dtype):
    w, adapter, x = arrays(rng, dtype)
    fn = PROGRAMS[name]
    model = jlora.lora(lambda params, x: fn(params["w"], x), CONFIG, cost_model=form)
    found = model({"w": w}, {"w": adapter}, x)
    with x64():
        wanted = np.asarray(fn(jnp.asarray(merged(w, adapter)), jnp.asarray(as64(x))))
    assert_exact(found, wanted)


def by_function(w, adapter, x):
    return lora_linear(x, w, adapter, ALPHA)


def by_layer(w, adapter, x):
    layer = LoRALayer(w, RANK, ALPHA, key=jax.random.key(0))
    return layer.load({"base_weight": w, "lora_a": adapter["A"], "lora_b": adapter["B"]})(x)


def by_nnx(w, adapter, x):
    model = nnx.Linear(13, 11, use_bias=False, rngs=nnx.Rngs(0))
    nnx.update(model, {"kernel": w})
    lora = NnxLoRA(model, jlora.LoraConfig(rank=RANK, alpha=ALPHA, target_modules="kernel"), args=(x,))
    nnx.update(lora.lora, {"kernel": adapter})
    return lora(x)


def by_linen(layer):
    def call(w, adapter, x):
        return layer.apply({"params": {"kernel": w, "lora": adapter}}, x)

    return call


def by_linen_conv(w, adapter, x):
    layer = LoRAConv(RANK, wrapped=nn.Conv(11, (1,), use_bias=False), alpha=ALPHA)
    adapter = {"A": adapter["A"][None], "B": adapter["B"]}
    return layer.apply({"params": {"kernel": w[None], "lora": adapter}}, x)


def by_linen_embed(w, adapter, x):
    layer = LoRAEmbed(RANK, wrapped=nn.Embed(13, 11), alpha=ALPHA)
    rows = layer.apply({"params": {"embedding": w, "lora": adapter}}, jnp.arange(13))
    return x @ rows


def by_linen_head(w, adapter, x):
    layer = LoRAEmbed(RANK, wrapped=nn.Embed(11, 13), alpha=ALPHA)
    adapter = {"A": adapter["B"].T, "B": adapter["A"].T}
    return layer.apply({"params": {"embedding": w.T, "lora": adapter}}, x, method="attend")


def by_linen_model(w, adapter, x):
    config = jlora.LoraConfig(rank=RANK, alpha=ALPHA, target_modules="kernel")
    return by_linen(LinenLoRA(nn.Dense(11, use_bias=False), config))(w, adapter, x)


FACES = {
    "lora_linear": by_function,
    "LoRALayer": by_layer,
    "nnx.LoRA": by_nnx,
    "LoRADense": by_linen(LoRADense(RANK, wrapped=nn.Dense(11, use_bias=False), alpha=ALPHA)),
    "LoRADenseGeneral": by_linen(LoRADenseGeneral(RANK, wrapped=nn.DenseGeneral(11, use_bias=False), alpha=ALPHA)),
    "LoRAEinsum": by_linen(LoRAEinsum(RANK, wrapped=nn.Einsum((13, 11), "ti,io->to", use_bias=False), alpha=ALPHA)),
    "LoRAConv": by_linen_conv,
    "LoRAEmbed": by_linen_embed,
    "LoRAEmbed.attend": by_linen_head,
    "linen.LoRA": by_linen_model,
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FACES)
def test_every_face(rng, name, dtype):
    w, adapter, x = arrays(rng, dtype)
    assert_exact(FACES[name](w, adapter, x), as64(x) @ merged(w, adapter))


@pytest.mark.parametrize("name", ["LoRAConv", "LoRAEmbed", "LoRADense"])
def test_a_scale_of_16_bit_products_is_not_rounded_either(rng, name):
    """The mean over many numbers of how far they are off goes to zero; with 1.6 in bfloat16 it would be 9e-4."""
    w, adapter, x = arrays(rng, "bfloat16")
    w, x = jnp.zeros_like(w, "bfloat16"), x.astype("bfloat16")
    found, wanted = as64(FACES[name](w, adapter, x)), as64(x) @ merged(w, adapter)
    assert abs(np.sum(found * wanted) / np.sum(wanted * wanted) - 1) < 5e-4


def test_a_large_scale_of_float16_adapters_does_not_overflow(rng):
    w, adapter, x = arrays(rng, "float16")
    found = jlora.lora(lambda params, x: x @ params["w"], CONFIG.replace(alpha=1e6))({"w": w}, {"w": adapter}, x)
    wanted = as64(x) @ (as64(w) + 1e5 * as64(adapter["A"]) @ as64(adapter["B"]))
    assert_exact(found, wanted)
