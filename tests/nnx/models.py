"""The models of the tests of `LoRA`, and what draws, merges and compares them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jlora import LoraConfig
from jlora.nnx import LoRA
from tests.reference import as64, random_array, randomize

CONFIG = LoraConfig(rank=2, alpha=3)
DENSE = "ir,ro->io"
ATTENTION = dict.fromkeys(("query", "key", "value"), "ir,rhk->ihk") | {"out": "hkr,ro->hko"}


class Block(nnx.Module):
    """Attention and an MLP."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(7, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 7, 6, decode=False, rngs=rngs)
        self.up = nnx.Linear(7, 5, rngs=rngs)
        self.down = nnx.Linear(5, 7, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.tanh(self.up(x)))


class Transformer(nnx.Module):
    """Blocks in a list, a convolution before them, and the embedding as the head."""

    def __init__(self, rngs, count=1):
        self.embed = nnx.Embed(11, 7, rngs=rngs)
        self.conv = nnx.Conv(7, 7, (3,), rngs=rngs)
        self.blocks = nnx.data([Block(rngs) for _ in range(count)])

    def encode(self, tokens, *, scale=1.0):
        x = scale * self.conv(self.embed(tokens))
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return x

    def __call__(self, tokens):
        return self.embed.attend(self.encode(tokens))


class Scanned(nnx.Module):
    """Layers stacked by nnx.vmap and scanned."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs):
            return nnx.Linear(7, 7, rngs=rngs)

        self.layers = stack(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return nnx.tanh(layer(x))

        return run(self.layers, x)


class Noisy(nnx.Module):
    """Batch statistics, a random stream, and a variable that is new with the first call."""

    def __init__(self, rngs):
        self.first = nnx.Linear(7, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(self.norm(self.first(x)))
        self.seen = nnx.Intermediate(x)
        return self.last(x)


def blocks(count):
    weights = {"up": DENSE, "down": DENSE} | {f"attention/{name}": equation for name, equation in ATTENTION.items()}
    return {f"blocks/{n}/{name}/kernel": equation for n in range(count) for name, equation in weights.items()}


TOKENS, VECTORS = (2, 4), (2, 4, 7)
# How to make each model, the shape of its input, and the einsum of A and B for each of its weights.
MODELS = {
    "linear": (lambda rngs: nnx.Linear(7, 5, rngs=rngs), VECTORS, {"kernel": DENSE}),
    "linear general": (
        lambda rngs: nnx.LinearGeneral((4, 7), (3, 5), axis=(-2, -1), rngs=rngs),
        VECTORS,
        {"kernel": "ijr,rop->ijop"},
    ),
    "einsum": (lambda rngs: nnx.Einsum("BTD,NDH->BTNH", (3, 7, 5), rngs=rngs), VECTORS, {"kernel": "dr,rnh->ndh"}),
    "conv": (
        lambda rngs: nnx.Conv(7, 5, (2, 3), strides=2, rngs=rngs),
        (2, 5, 4, 7),
        {"kernel": "xyir,ro->xyio"},
    ),
    "attention": (
        lambda rngs: nnx.MultiHeadAttention(2, 7, 6, decode=False, rngs=rngs),
        VECTORS,
        {f"{name}/kernel": equation for name, equation in ATTENTION.items()},
    ),
    "transformer": (
        Transformer,
        TOKENS,
        {"embed/embedding": DENSE, "conv/kernel": "xir,ro->xio"} | blocks(1),
    ),
    "scan": (Scanned, VECTORS, {"layers/kernel": "lir,lro->lio"}),
}
call = nnx.jit(lambda model, x: model(x))
every_model = pytest.mark.parametrize("name", MODELS)


def inputs(rng, shape):
    return jnp.asarray(rng.integers(0, 11, shape)) if shape == TOKENS else random_array(rng, shape)


def draw(rng, name):
    """A model, all of its params random, an input, and the einsums of its weights."""
    make, shape, einsums = MODELS[name]
    model = make(nnx.Rngs(0))
    nnx.update(model, randomize(rng, nnx.state(model, nnx.Param)))
    return model, inputs(rng, shape), einsums


def adapt(rng, model, *args, config=CONFIG, **options):
    """A LoRA of the model, all of its adapters random."""
    lora = LoRA(model, config, args=args, rngs=nnx.Rngs(1), **options)
    nnx.update(lora, randomize(rng, nnx.state(lora, nnx.LoRAParam)))
    return lora


def merged(model, adapters, einsums, scaling=1.5):
    """A copy of the model with each dense delta, formed in float64, added to its weight."""
    copy = nnx.clone(model)
    for path, einsum in einsums.items():
        weight, adapter = at(nnx.to_pure_dict(nnx.state(model, nnx.Param)), path), at(adapters, path)
        value = as64(weight) + scaling * np.einsum(einsum, as64(adapter["A"]), as64(adapter["B"]))
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        tree = {last: jnp.asarray(value, weight.dtype)}
        for key in reversed(parents):
            tree = {key: tree}
        nnx.update(copy, tree)
    return copy


def at(tree, path):
    """The node of nested dicts at a path."""
    for key in path.split("/"):
        tree = tree[int(key) if key.isdigit() else key]
    return tree


def arrays(node, kind):
    """Copies of the arrays of all variables of a kind, keys as the numbers they hold."""

    def copied(leaf):
        return np.array(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    return jax.tree.map(copied, nnx.to_pure_dict(nnx.state(node, kind)))


def same(found, wanted):
    """Two trees have the same structure and the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
