"""The models of the tests of `LoRA`, and what merges and compares them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import LoraConfig
from tests.reference import as64, random_array, randomize

CONFIG = LoraConfig(rank=2, alpha=3)
KEY = jax.random.key(0)


def of_key(key, shape, dtype):
    """An initializer that compiles fast and differs from key to key."""
    return jnp.full(shape, 1e-4 * jnp.sum(jax.random.key_data(key) % 997), dtype)


INIT = {"kernel_init": of_key}


class Block(nn.Module):
    """Attention and an MLP, in the form that nn.scan takes."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, name="attention", **INIT)(y)
        return x + nn.Dense(7, name="down", **INIT)(nn.tanh(nn.Dense(5, name="up", **INIT)(x))), None


class Transformer(nn.Module):
    """Two blocks, a convolution before them, and the embedding as the head."""

    block: type[nn.Module] = Block
    stacked: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 7, embedding_init=of_key, name="embed")
        x = nn.Conv(7, (3,), name="conv", **INIT)(embed(tokens))
        for name in ("blocks",) if self.stacked else ("block_0", "block_1"):
            x, _ = self.block(name=name)(x, None)
        return embed.attend(x)


class Ensemble(nn.Module):
    """Blocks side by side, of the same input."""

    @nn.compact
    def __call__(self, x, _=None):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "axis_size": 3}
        return jnp.mean(nn.vmap(Block, in_axes=None, **axes)(name="members")(x)[0], 0), None


def scan(block):
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=3)


class Coder(nn.Module):
    """Written with setup, and with methods of its own."""

    def setup(self):
        self.encoder = nn.Sequential([nn.Dense(5), nn.tanh, nn.Sequential([nn.Dense(3), jnp.sin])])
        self.decoder = nn.DenseGeneral((2, 5), name="decode_heads")

    def encode(self, x, *, scale=1.0):
        return scale * self.encoder(x)

    def __call__(self, x):
        return self.decoder(self.encode(x))


class Given(nn.Module):
    """A module that is given its parts, and calls one of them twice."""

    first: nn.Module
    second: nn.Module

    def __call__(self, x):
        return self.second(self.first(self.first(x)))


class Experts(nn.Module):
    """Einsums without a bias, whose params do not tell the equation."""

    @nn.compact
    def __call__(self, x):
        x = nn.Einsum((3, 7, 5), "BTD,NDH->BTNH", use_bias=False, name="split")(x)
        x = nn.Einsum((3, 5, 7), name="join")(jnp.sin(x), "BTNH,NHD->BTD")
        return nn.DenseGeneral((3, 2), use_bias=False, name="heads")(x)


class Shifted(nn.Dense):
    """A layer derived from one of Flax's."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x) + 1


JitBlock = nn.jit(Block)
TOKENS, VECTORS = (2, 4), (2, 4, 7)
MODELS = {
    "transformer": (Transformer(), TOKENS),
    "remat": (Transformer(nn.remat(Block)), TOKENS),
    "jit": (Transformer(JitBlock), TOKENS),
    "scan": (Transformer(scan(Block), True), TOKENS),
    "scan of remat": (Transformer(scan(nn.remat(Block)), True), TOKENS),
    "vmap": (Transformer(Ensemble, True), TOKENS),
    "setup": (Coder(), VECTORS),
    "given": (Given(nn.Dense(7), nn.Sequential([nn.LayerNorm(), Shifted(5)])), VECTORS),
    "experts": (Experts(), VECTORS),
    "a layer alone": (nn.Conv(5, (3,)), VECTORS),
    "derived layer": (Shifted(5), VECTORS),
    "recurrent": (nn.RNN(nn.GRUCell(5), split_rngs={"params": False, "dropout": True}), VECTORS),
}
every_model = pytest.mark.parametrize(("model", "shape"), MODELS.values(), ids=MODELS)
DELTAS = {"decode_heads": "ir,rhk->ihk", "split": "ir,rnh->nih", "join": "nhr,rd->nhd", "heads": "ir,rhk->ihk"}
DELTAS |= dict.fromkeys(("query", "key", "value"), "ir,rhk->ihk") | {"out": "hkr,ro->hko"}


def inputs(rng, shape):
    return jnp.asarray(rng.integers(0, 11, shape)) if shape == TOKENS else random_array(rng, shape)


def draw(rng, module, *args, **kwargs):
    """The params of a module, all of them random."""
    init = functools.partial(module.init, **kwargs)
    return {"params": randomize(rng, jax.eval_shape(init, KEY, *args)["params"])}


def merged(params, scaling=lambda path: 1.5, path=()):
    """The base's params with each dense delta, formed in float64, added to its weight."""
    base = {
        name: merged(node, scaling, (*path, name)) if isinstance(node, dict) else node
        for name, node in params.items()
        if name != "lora"
    }
    if "lora" in params:
        (name,) = {"kernel", "embedding"} & set(params)
        a, b = (as64(params["lora"][part]) for part in "AB")
        window = (
            base[name].ndim - (base["bias"].ndim + 1 if "bias" in base else 2) if path[-1:] in [(), ("conv",)] else 0
        )
        operands = DELTAS.get(path[-1] if path else "", f"{'xyz'[:window]}ir,ro->{'xyz'[:window]}io")
        equation = "..." + operands.replace(",", ",...").replace("->", "->...")
        base[name] = jnp.asarray(as64(base[name]) + scaling("/".join((*path, name))) * np.einsum(equation, a, b))
    return base


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def same(found, wanted):
    """Two trees have the same structure and the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
