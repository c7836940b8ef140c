"""Whole models of several libraries, adapted without an edit, against the model with the dense updates added."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jlora
from tests.reference import as64, assert_close, random_array, randomize
from tests.transform.test_random_programs import axes_of, delta_of, fast, grads_of

ALPHA, RANK = 3.0, 2
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
every_model = pytest.mark.parametrize("make", CASES, ids=[make.__name__ for make in CASES])


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)


class Compiled:
    """A function of arrays and other things to arrays and other things, compiled once."""

    def __init__(self, function: Callable[..., Any]) -> None:
        def outputs(arrays: Any, others: Any) -> Any:
            arrays, self.others = eqx.partition(function(*eqx.combine(arrays, others.tree)), is_array)
            return arrays

        self.jitted = fast(outputs, static_argnums=1)

    def __call__(self, *args: Any) -> Any:
        arrays, others = eqx.partition(args, is_array)
        return eqx.combine(self.jitted(arrays, Static(others)), self.others)


class Static:
    """The one value of a static argument."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static)


class Made:
    """A case with its configuration, its adapters with B zero and random, and its compiled functions."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.config = jlora.LoraConfig(rank=RANK, alpha=ALPHA)
        self.begun = jlora.init_lora(KEY, case.params, self.config, fn=case.fn, args=case.args, kwargs=case.kwargs)
        self.adapters = randomize(np.random.default_rng(9), self.begun)
        self.args = case.args, case.kwargs
        self._adapted = Compiled(self._grad(jlora.lora(case.fn, self.config), 1))
        self._base = Compiled(self._grad(case.fn, 0))

    @staticmethod
    def _grad(function: Callable[..., Any], argument: int) -> Callable[..., Any]:
        """The outputs of the function, and the gradient of a loss in which each of them has a weight of its own."""

        def outputs(trees: Any, args: Any, kwargs: Any) -> Any:
            moving, rest = eqx.partition(trees[argument], is_array)

            def loss(moving: Any) -> Any:
                own = [*trees]
                own[argument] = eqx.combine(moving, rest)
                y = function(*own, *args, **kwargs)
                rests.append(eqx.filter(y, is_array, inverse=True))
                return total(y), eqx.filter(y, is_array)

            rests: list[Any] = []
            (_, y), grads = jax.value_and_grad(loss, has_aux=True)(moving)
            return eqx.combine(y, rests[0]), grads

        return outputs

    def adapted(self, adapters: Any) -> tuple[Any, Any]:
        """The outputs with these adapters, and the gradient by them."""
        return self._adapted((self.case.params, adapters), *self.args)

    def base(self, params: Any) -> tuple[Any, Any]:
        """The outputs of the model itself, and the gradient by its params."""
        return self._base((params,), *self.args)


@functools.cache
def made(make: Callable[[], Case]) -> Made:
    return Made(make())


def by_path(tree: Any) -> dict[str, Any]:
    """The adapters, or the weights, of a tree by path."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=jlora.is_adapter)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def densely(made: Made) -> Any:
    """The params with the dense updates added in float64, by hand."""
    adapters = by_path(made.adapters)

    def at(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in made.case.roles:
            return leaf
        return jnp.asarray(as64(leaf) + delta_of(adapters[name], made.case.roles[name], ALPHA), leaf.dtype)

    return jax.tree_util.tree_map_with_path(at, made.case.params)


def arrays(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def total(outputs: Any) -> jax.Array:
    return sum(jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)) for y in arrays(outputs))


def assert_outputs(found: Any, wanted: Any, factor: float = 10) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if is_array(other):
            assert one.dtype == other.dtype
            assert_close(one, as64(other), factor=factor)
        else:
            assert one == other


@every_model
def test_adapters_have_the_axes_of_the_use(make):
    case, begun = made(make).case, by_path(made(make).begun)
    assert set(begun) == set(case.roles)
    weights = by_path(case.params)
    for path, roles in case.roles.items():
        batch, ins, outs = ([weights[path].shape[axis] for axis in axes] for axes in axes_of(roles))
        assert begun[path]["A"].shape == (*batch, *ins, RANK), path
        assert begun[path]["B"].shape == (*batch, RANK, *outs), path
        assert begun[path]["A"].any()
        assert not begun[path]["B"].any()


@every_model
def test_at_zero_b_the_model_is_unchanged(make):
    own = made(make)
    assert_outputs(own.adapted(own.begun)[0], own.base(own.case.params)[0], factor=1)


@every_model
def test_value_and_gradient_are_those_of_the_dense_update(make):
    own = made(make)
    (y, grads), (wanted, dense) = own.adapted(own.adapters), own.base(densely(own))
    assert_outputs(y, wanted)
    base = own.base(own.case.params)[0]
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(arrays(y), arrays(base), strict=True)) > 1e-2
    found, dense, adapters = by_path(grads), by_path(dense), by_path(own.adapters)
    assert set(found) == set(own.case.roles)
    for path, roles in own.case.roles.items():
        of_path = grads_of(dense[path], adapters[path], roles, ALPHA)
        assert all(np.abs(grad).max() > 0 for grad in of_path.values()), path
        for part in "AB":
            assert_close(found[path][part], of_path[part], factor=30)


@every_model
def test_strict_refuses_what_is_merged_alone(make):
    case, own = made(make).case, made(make)

    def strict(*args: Any) -> Any:
        return arrays(jlora.lora(case.fn, own.config, strict=True)(*args, *case.args, **case.kwargs))

    if not case.merged:
        adapted = jax.eval_shape(lambda adapters: strict(case.params, adapters), own.adapters)
        assert [y.shape for y in adapted] == [y.shape for y in arrays(own.base(case.params)[0])]
        return
    with pytest.raises(jlora.AdapterError, match=f"^{case.merged[0]}: "):
        strict(case.params, own.adapters)


@every_model
def test_merged_params_are_params_of_the_model(make):
    own = made(make)
    merged = jlora.merge_params(own.case.params, own.adapters, own.config)
    assert jax.tree.structure(merged) == jax.tree.structure(own.case.params)
    assert_outputs(own.base(merged)[0], own.adapted(own.adapters)[0])
    for found, wanted in zip(arrays(merged), arrays(densely(own)), strict=True):
        assert_close(found, as64(wanted))


@every_model
def test_training_moves_the_adapters_alone(make):
    own = made(make)
    params, rest = eqx.partition(own.case.params, is_array)
    before = jax.tree.map(np.array, params)
    adapted = jlora.lora(own.case.fn, own.config)
    optimizer = optax.sgd(1e-2)
    targets = [y + 0.1 for y in arrays(own.base(own.case.params)[0])]

    def loss(adapters: Any, params: Any) -> Any:
        found = arrays(adapted(eqx.combine(params, rest), adapters, *own.case.args, **own.case.kwargs))
        return sum(jnp.mean((y - target) ** 2) for y, target in zip(found, targets, strict=True))

    def step(adapters: Any, state: Any, params: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(adapters, params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(adapters, updates), state, value

    jitted = fast(step)
    adapters, state, values = own.begun, optimizer.init(own.begun), []
    for _ in range(5):
        adapters, state, value = jitted(adapters, state, params)
        values.append(float(value))
    assert jitted._cache_size() == 1
    assert math.isfinite(values[-1])
    assert values[-1] < values[0]
    jax.tree.map(np.testing.assert_array_equal, params, before)
