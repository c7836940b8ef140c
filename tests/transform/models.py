"""Whole models, each with its function, its params and the axes of its weights."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.reference import random_array, randomize

KEY = jax.random.key(5)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model as a function of its params.

    Attributes:
      fn: called as fn(params, *args, **kwargs).
      roles: of the adapted weights, by path, as the model uses them.
      merged: the paths of those that are no product, which strict refuses.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    roles: dict[str, str]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    merged: tuple[str, ...] = ()


def drawn(seed: int, tree: Any) -> Any:
    """Random params of these shapes, small enough for a deep model; what is no array stays."""
    arrays, rest = eqx.partition(tree, lambda leaf: hasattr(leaf, "shape"))
    return eqx.combine(randomize(np.random.default_rng(seed), arrays, 0.4), rest)


def linen(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Callable[..., Any], Any]:
    """The apply function of a Linen module, and random params."""
    shapes = jax.eval_shape(functools.partial(module.init, **kwargs), KEY, *args)["params"]
    return lambda params, *args, **kwargs: module.apply({"params": params}, *args, **kwargs), drawn(1, shapes)


def array(seed: int, *shape: int) -> jax.Array:
    return random_array(np.random.default_rng(seed), shape)


ATTENTION = {"query/kernel": "ioo", "key/kernel": "ioo", "value/kernel": "ioo", "out/kernel": "iio"}


def self_attention() -> Case:
    x = array(2, 2, 5, 7)
    fn, params = linen(nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=6, out_features=11), x)
    return Case(fn, params, (x,), ATTENTION)


def cross_attention() -> Case:
    """With a mask, and dropout of its own that is switched by a keyword."""
    x, memory = array(2, 2, 5, 7), array(3, 2, 3, 13)
    mask = jnp.asarray(np.random.default_rng(4).random((2, 1, 5, 3)) > 0.3).at[..., 0].set(True)
    module = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=6, dropout_rate=0.5)
    kwargs = {"mask": mask, "deterministic": False}
    _, params = linen(module, x, memory, deterministic=True)

    def fn(params, x, memory, **kwargs):
        return module.apply({"params": params}, x, memory, **kwargs, rngs={"dropout": jax.random.key(3)})

    return Case(fn, params, (x, memory), ATTENTION, kwargs)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, name="attention")(
            y, mask=nn.make_causal_mask(x[..., 0])
        )
        return x + nn.Dense(7, name="down")(nn.gelu(nn.Dense(13, name="up")(x))), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 7, name="embed")
        blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = blocks(name="blocks")(embed(tokens), None)
        return embed.attend(nn.LayerNorm(name="norm")(x))


STACKED = {f"blocks/attention/{path}": f"b{roles}" for path, roles in ATTENTION.items()}
STACKED |= {"blocks/up/kernel": "bio", "blocks/down/kernel": "bio", "embed/embedding": "io"}


def tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(6).integers(0, 11, (2, 5)))


def scanned_transformer() -> Case:
    fn, params = linen(Transformer(), tokens())
    return Case(fn, params, (tokens(),), STACKED)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(7, (3, 2), strides=2, name="first")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Conv(14, (2, 2), feature_group_count=7, padding="VALID", name="depthwise")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def conv_net() -> Case:
    """The running mean and variance come back beside the output."""
    x = array(2, 2, 11, 7, 5)
    variables = drawn(3, jax.eval_shape(functools.partial(ConvNet().init, train=True), KEY, x))
    state = jax.tree.map(jnp.abs, variables["batch_stats"])

    def fn(params, x, state, *, train):
        variables = {"params": params, "batch_stats": state}
        return ConvNet().apply(variables, x, train, mutable=["batch_stats"])

    roles = {"first/kernel": "iiio", "depthwise/kernel": "iiio", "head/kernel": "io"}
    return Case(fn, variables["params"], (x, state), roles, {"train": True})


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=6, qkv_features=10, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(6, 7, rngs=rngs), nnx.Linear(7, 6, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.silu(self.up(x)))


class NnxTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.first, self.second = NnxBlock(rngs), NnxBlock(rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.second(self.first(self.embed(tokens))))


def nnx_transformer() -> Case:
    """The params are an nnx.State, whose leaves are called value."""
    graph, params, rest = nnx.split(NnxTransformer(nnx.Rngs(0)), nnx.Param, ...)
    block = {f"attention/{path}": roles for path, roles in ATTENTION.items()} | {"up/kernel": "io", "down/kernel": "io"}
    roles = {f"{name}/{path}/value": roles for name in ("first", "second") for path, roles in block.items()}

    def fn(params, tokens):
        return nnx.merge(graph, params, rest)(tokens)

    return Case(fn, drawn(1, params), (tokens(),), roles | {"embed/embedding/value": "io"})


def haiku_mlp() -> Case:
    model = hk.transform(
        lambda x, is_training: hk.nets.MLP([7, 11, 3], name="mlp")(
            x, 0.5 if is_training else None, hk.next_rng_key() if is_training else None
        )
    )
    x = array(2, 3, 5)
    params = drawn(1, jax.eval_shape(functools.partial(model.init, is_training=False), KEY, x))
    return Case(
        model.apply,
        params,
        (jax.random.key(1), x, True),
        {f"mlp/~/linear_{n}/w": "io" for n in range(3)},
    )


def equinox_mlp() -> Case:
    """The params are the module itself, with the functions among its leaves; weights are (out, in)."""
    model = drawn(1, eqx.nn.MLP(5, 3, width_size=7, depth=1, key=KEY))
    roles = {f"layers/{n}/weight": "oi" for n in range(2)}
    return Case(lambda model, x: jax.vmap(model)(x), model, (array(2, 3, 5),), roles)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["up", "down"], meta_fields=["name"])
@dataclasses.dataclass
class Layer:
    up: Any
    down: tuple[Any, Any]
    name: str


def hand_written() -> Case:
    """Lists, tuples and dataclasses; einsum letters in an order of their own; a matrix that is used reshaped."""
    params = [
        Layer(array(1, 7, 5), (array(2, 7, 11), array(3, 11)), "first"),
        (array(4, 3, 11, 2), {"gate": array(5, 6, 5)}),
    ]

    def fn(params, x):
        layer, (heads, last) = params
        hidden = jnp.tanh(jnp.einsum("oi,ti->to", layer.up, x) @ layer.down[0] + layer.down[1])
        mixed = jnp.einsum("td,hdk->htk", hidden, heads)
        gate = last["gate"].reshape(3, 2, 5)
        return {layer.name: jnp.einsum("htk,hkd->td", mixed, gate), "count": 7, "none": None}

    roles = {"0/up": "oi", "0/down/0": "io", "1/0": "oio", "1/1/gate": "io"}
    return Case(fn, params, (array(6, 2, 5),), roles)


def static_arguments() -> Case:
    """Strings, flags, None, numbers and functions reach the function as they are."""
    params = {"first": array(1, 5, 7), "second": array(2, 7, 3), "powers": array(3, 3, 5)}

    def fn(params, x, kind, count, *, scale=1, bias=None, flag, act):
        assert (kind, count, scale, bias, flag) == ("deep", 2, 0.5, None, True)
        assert [type(count), type(scale)] == [int, float]
        for _ in range(count):
            x = act(x @ params["first"] * scale) @ params[{"deep": "second"}[kind]] @ params["powers"]
        return (x if flag else None), bias, kind

    kwargs = {"scale": 0.5, "bias": None, "flag": True, "act": jnp.tanh}
    return Case(fn, params, (array(4, 2, 5), "deep", 2), dict.fromkeys(params, "io"), kwargs)


def merged_uses() -> Case:
    """Weight normalization takes the weight as a whole; strict refuses it."""
    params = {"v": array(1, 5, 7), "g": array(2, 7), "up": array(3, 7, 3)}

    def fn(params, x):
        w = params["g"] * params["v"] / jnp.linalg.norm(params["v"], axis=0)
        return jnp.tanh(x @ w) @ params["up"]

    return Case(fn, params, (array(4, 2, 5),), {"v": "io", "up": "io"}, merged=("v",))


CASES = [
    self_attention,
    cross_attention,
    scanned_transformer,
    conv_net,
    nnx_transformer,
    haiku_mlp,
    equinox_mlp,
    hand_written,
    static_arguments,
    merged_uses,
]
