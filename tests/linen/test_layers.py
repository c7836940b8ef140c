"""Flax's layers with an adapter beside them: the output is the layer's own with the merged weight."""

import dataclasses
import functools
import operator
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import (
    AdapterError,
    ConfigError,
    LoraConfig,
    combine_params,
    count_params,
    lora_labels,
    merge_params,
    split_params,
    summary,
)
from jlora.linen import LoRAConv, LoRADense, LoRADenseGeneral, LoRAEinsum, LoRAEmbed
from tests.marks import some
from tests.reference import as64, assert_close, random_array, randomize

ALPHA, STACK = 3.0, 3
LORA = {
    nn.Dense: LoRADense,
    nn.DenseGeneral: LoRADenseGeneral,
    nn.Einsum: LoRAEinsum,
    nn.Conv: LoRAConv,
    nn.Embed: LoRAEmbed,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer of Flax's, the shape of its input, and the einsum of A and B that is its delta."""

    make: Callable[..., nn.Module]
    x_shape: tuple[int, ...]
    delta: str = "ir,ro->io"
    method: str = "__call__"
    rank: int = 2

    def base(self, **options):
        return self.make(**options)

    def layer(self, options=(), **of_base):
        return LORA[self.make.func](self.rank, wrapped=self.base(**of_base), alpha=ALPHA, **dict(options))

    def x(self, rng, stack=()):
        if self.make.func is nn.Embed and self.method == "__call__":
            return jnp.asarray(rng.integers(0, self.base().num_embeddings, stack + self.x_shape))
        return random_array(rng, stack + self.x_shape)

    @property
    def roles(self):
        """The factorization of the weight, read off the letters of the einsum."""
        inputs, weight = self.delta.split("->")
        a, b = inputs.split(",")
        return "".join("b" if c in a and c in b else "i" if c in a else "o" for c in weight)

    @property
    def weight(self):
        return "embedding" if self.make.func is nn.Embed else "kernel"

    @property
    def config(self):
        return LoraConfig(rank=self.rank, alpha=ALPHA, factorizations={"**": self.roles})

    def merged(self, params):
        """The base's params with the delta added to the weight, in float32."""
        adapter = params["lora"]
        merged = {name: as64(leaf) for name, leaf in params.items() if name != "lora"}
        merged[self.weight] += ALPHA / self.rank * np.einsum(self.delta, as64(adapter["A"]), as64(adapter["B"]))
        return jax.tree.map(lambda leaf: jnp.asarray(leaf.astype(np.float32)), merged)

    def reference(self, params, x):
        """The output of Flax's own layer, computed in float32 with the merged weight."""
        return as64(self.output(self.base(), self.merged(params), x))

    def output(self, layer, params, x):
        """The output of a layer, compiled as one program."""
        return jax.jit(functools.partial(layer.apply, method=self.method))({"params": params}, x)

    def draw(self, rng, layer, x):
        """The params of a layer, all of them random."""
        init = functools.partial(layer.init, method=self.method)
        return randomize(rng, jax.eval_shape(init, jax.random.key(0), x)["params"])


def dense(x_shape=(13, 5), **options):
    return Case(functools.partial(nn.Dense, 7, **options), x_shape)


def general(x_shape, delta, features, axis=-1, batch_dims=(), **options):
    return Case(functools.partial(nn.DenseGeneral, features, axis, batch_dims, **options), x_shape, delta)


def einsum(x_shape, delta, shape, equation, **options):
    return Case(functools.partial(nn.Einsum, shape, equation, **options), x_shape, delta)


def conv(x_shape, window, features=5, **options):
    axes = "hwd"[: 1 if isinstance(window, int) else len(window)]
    make = functools.partial(nn.Conv, features, window, **options)
    return Case(make, x_shape, f"{axes}ir,ro->{axes}io")


def embed(method="__call__", x_shape=(3, 5), vocabulary=11, features=7):
    return Case(functools.partial(nn.Embed, vocabulary, features), x_shape, method=method)


CASES = {
    "dense": dense(),
    "dense, no bias": dense((5,), use_bias=False),
    "dense, precision": dense((2, 13, 5), precision="highest"),
    "heads": general((13, 5), "ir,rop->iop", (3, 7)),
    "heads to features": general((13, 3, 7), "ijr,ro->ijo", 5, (-2, -1)),
    "gap": general((5, 13, 11, 3), "ijr,rop->ijop", (2, 7), (0, -1), use_bias=False),
    "axes in another order": general((13, 5, 3), "ijr,ro->ijo", 7, (2, 1)),
    "experts": general((3, 13, 5), "eir,ero->eio", 7, -1, (0,)),
    "experts with a gap": general((3, 5, 13, 2), "eijr,erop->eijop", (7, 2), (1, 3), (0,)),
    "einsum": einsum((13, 5), "ir,ro->io", (5, 7), "...i,io->...o"),
    "einsum heads": einsum((2, 13, 5), "Dr,rNH->NDH", (3, 5, 7), "BTD,NDH->BTNH"),
    "einsum to features": einsum((2, 13, 3, 7), "NHr,rD->NHD", (3, 7, 5), "BTNH,NHD->BTD", use_bias=False),
    "einsum experts": einsum((13, 3, 5), "EDr,ErF->DEF", (5, 3, 7), "BED,DEF->BEF"),
    "einsum, out axes apart": einsum((2, 13, 5), "Fr,rNH->NFH", (3, 5, 7), "BTF,NFH->BNTH"),
    "conv": conv((2, 11, 3), 3),
    "conv, no batch axis": conv((11, 3), (3,), padding="VALID", use_bias=False),
    "conv, strides": conv((2, 11, 7, 3), (3, 2), strides=(2, 1), padding="VALID"),
    "conv, dilation": conv(
        (2, 3, 11, 7, 3), (3, 2), strides=2, kernel_dilation=(2, 1), input_dilation=(1, 2), padding=1
    ),
    "conv, groups": conv((2, 11, 7, 6), (3, 2), 9, feature_group_count=3, padding=((1, 0), (2, 1))),
    "conv, depthwise": conv((2, 11, 3), (3,), 6, feature_group_count=3),
    "conv, three axes": conv((2, 5, 4, 3, 2), (3, 2, 1)),
    "conv, circular": conv((2, 11, 7, 3), (3, 2), padding="CIRCULAR", kernel_dilation=2),
    "conv, causal": conv((2, 11, 3), (3,), padding="CAUSAL"),
    "embed": embed(),
    "embed, one row": dataclasses.replace(embed(vocabulary=1), rank=1),
    "embed, a number": embed(x_shape=()),
    "attend": embed("attend", (2, 13, 7)),
}
some_cases = pytest.mark.parametrize("case", some(CASES))
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Block(nn.Module):
    """A layer that is made within another module, as the body of a scan."""

    make: Callable[[], nn.Module]
    method: str

    @nn.compact
    def __call__(self, carry, x):
        return carry, getattr(self.make(), self.method)(x)


def scan(block):
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=STACK)


def unstacked(tree):
    return [jax.tree.map(operator.itemgetter(position), tree) for position in range(STACK)]


LIFTS = {
    "block": (Block, ()),
    "jit": (nn.jit(Block), ()),
    "remat": (nn.remat(Block), ()),
    "scan": (scan(Block), (STACK,)),
    "scan of remat": (scan(nn.remat(Block)), (STACK,)),
}
NUMBERS = {
    "bfloat16": {"dtype": jnp.bfloat16},
    "float16 params": {"param_dtype": jnp.float16},
}


def same(found, wanted):
    """Two trees have the same structure and the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def of_key(key, shape, dtype):
    """An initializer that compiles fast and differs from key to key."""
    return jnp.full(shape, jnp.sum(jax.random.key_data(key) % 997), dtype)


# ---------------------------------------------------------------- the output


@every_case
def test_output_is_the_bases_with_the_merged_weight(case, rng):
    x, layer = case.x(rng), case.layer()
    params = case.draw(rng, layer, x)
    assert_close(case.output(layer, params, x), case.reference(params, x), factor=2)


@some_cases
@pytest.mark.parametrize("lift", [pytest.param("remat", marks=pytest.mark.slow), "scan"])
def test_output_within_lifted_modules(case, lift, rng):
    block, stack = LIFTS[lift]
    block, x = block(case.layer, case.method), case.x(rng, stack)
    params = randomize(rng, jax.eval_shape(block.init, jax.random.key(0), None, x)["params"])
    _, found = jax.jit(block.apply)({"params": params}, None, x)
    ((_, inner),) = params.items()
    slices = zip(*map(unstacked, (inner, x)), strict=True) if stack else [(inner, x)]
    assert_close(found, np.reshape([case.reference(*one) for one in slices], found.shape), factor=2)


@some_cases
@pytest.mark.parametrize("numbers", ["bfloat16", pytest.param("float16 params", marks=pytest.mark.slow)])
def test_output_keeps_the_dtype_of_the_bases(case, numbers, rng):
    x, layer, base = case.x(rng), case.layer(**NUMBERS[numbers]), case.base(**NUMBERS[numbers])
    params = case.draw(rng, layer, x)
    own, adapters = split_params(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(own)} == {jnp.dtype(base.param_dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    found = case.output(layer, params, x)
    assert found.dtype == case.output(base, own, x).dtype
    assert_close(found, case.reference(params, x), factor=2)


@some_cases
def test_gradients_of_a_and_b_are_those_through_the_merged_weight(case, rng):
    x, layer = case.x(rng), case.layer()
    params = case.draw(rng, layer, x)
    adapter, merged = params["lora"], case.merged(params)
    direction = random_array(rng, case.reference(params, x).shape)

    def loss(params, module):
        return jnp.vdot(direction, module.apply({"params": params}, x, method=case.method))

    found = jax.jit(jax.grad(loss), static_argnums=1)(params, layer)
    through = jax.jit(jax.grad(loss), static_argnums=1)(merged, case.base())
    weight = ALPHA / case.rank * as64(through[case.weight])
    operands, letters = case.delta.split("->")
    a, b = operands.split(",")
    assert_close(found["lora"]["A"], np.einsum(f"{letters},{b}->{a}", weight, as64(adapter["B"])), factor=5)
    assert_close(found["lora"]["B"], np.einsum(f"{letters},{a}->{b}", weight, as64(adapter["A"])), factor=5)
    for name in merged:
        assert_close(found[name], as64(through[name]), factor=5)


# ---------------------------------------------------------------- the base is as it was


@some_cases
def test_a_new_layer_has_the_bases_params_and_bitwise_its_output(case, rng, key):
    init = {"embedding_init" if case.weight == "embedding" else "kernel_init": of_key}
    x, base = case.x(rng), case.base(**init)
    layer = case.layer({"a_init": of_key}, **init)
    found, variables = jax.jit(functools.partial(layer.init_with_output, method=case.method))(key, x)
    wanted, plain = jax.jit(functools.partial(base.init_with_output, method=case.method))(key, x)
    same(split_params(variables["params"])[0], plain["params"])
    np.testing.assert_array_equal(found, wanted)
    assert np.any(as64(variables["params"]["lora"]["A"]))


@pytest.mark.parametrize("lift", LIFTS)
@pytest.mark.parametrize("name", ["heads"])
def test_a_new_lifted_layer_has_the_bases_params_and_bitwise_its_output(name, lift, rng, key):
    case, (block, stack) = CASES[name], LIFTS[lift]
    x = case.x(rng, stack)
    (_, found), variables = block(case.layer, case.method).init_with_output(key, None, x)
    (_, wanted), plain = block(case.base, case.method).init_with_output(key, None, x)
    same(split_params(variables["params"])[0], plain["params"])
    np.testing.assert_array_equal(found, wanted)


class Holder(nn.Module):
    """A module that is given its layer, as the body of a scan."""

    layer: nn.Module

    def __call__(self, carry, x):
        return carry, self.layer(x)


@pytest.mark.parametrize("lift", [lambda module: module, nn.jit, nn.remat, scan], ids=["plain", "jit", "remat", "scan"])
def test_a_layer_given_to_a_lifted_module_keeps_the_paths_of_the_base(lift, rng, key):
    x = random_array(rng, (STACK, 13, 5))
    both = lift(Holder)(LoRADense(2, wrapped=nn.Dense(7))).init(key, None, x)["params"]
    same(split_params(both)[0], lift(Holder)(nn.Dense(7)).init(key, None, x)["params"])


@some_cases
def test_a_checkpoint_of_the_base_loads_and_is_merged_into_one(case, rng, key):
    x, base, layer = case.x(rng), case.base(), case.layer()
    checkpoint = case.draw(rng, base, x)
    adapters = split_params(case.draw(rng, layer, x))[1]
    both = combine_params(checkpoint, adapters)
    assert set(both) == {*checkpoint, "lora"}
    merged = jax.jit(functools.partial(merge_params, config=case.config))(checkpoint, adapters)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, checkpoint)
    assert_close(case.output(base, merged, x), as64(case.output(layer, both, x)), factor=3)


@every_case
def test_labels_and_summary_tell_the_adapter_from_the_base(case, rng):
    params = case.draw(rng, case.layer(), case.x(rng))
    labels = dict.fromkeys(params, "frozen") | {"lora": {"A": "lora", "B": "lora"}}
    assert lora_labels(params) == labels
    base, adapters = split_params(params)
    assert set(adapters) == set(base)
    (target,) = (found := summary(base, adapters, case.config)).targets
    assert (target.path, target.factorization.roles, target.rank) == (case.weight, case.roles, case.rank)
    assert found.parameters == (count_params(params["lora"]),)


# ---------------------------------------------------------------- one layer, called as often as wanted


class Twice(nn.Module):
    layer: nn.Module

    def __call__(self, x):
        return self.layer(x) - self.layer(3 * x)


class Tied(nn.Module):
    embed: nn.Module

    def __call__(self, indices):
        return self.embed.attend(self.embed(indices))


@pytest.mark.parametrize(
    ("name", "module", "path"),
    [("dense", Twice, "layer"), ("einsum heads", Twice, "layer"), ("conv", Twice, "layer"), ("embed", Tied, "embed")],
)
def test_calls_share_one_adapter(name, module, path, rng):
    case = CASES[name]
    x, both = case.x(rng), module(case.layer())
    params = case.draw(rng, both, x)
    assert jax.tree.map(jnp.shape, params) == {path: jax.tree.map(jnp.shape, case.draw(rng, case.layer(), x))}
    wanted = module(case.base()).apply({"params": {path: case.merged(params[path])}}, x)
    assert_close(both.apply({"params": params}, x), as64(wanted), factor=2)


def test_an_equation_is_given_in_the_call(rng):
    equation, case = "BTD,NDH->BTNH", CASES["einsum heads"]
    x, late = case.x(rng), LoRAEinsum(case.rank, wrapped=nn.Einsum((3, 5, 7)), alpha=ALPHA)
    params = case.draw(rng, case.layer(), x)
    assert_close(late.apply({"params": params}, x, equation), case.reference(params, x), factor=2)


def test_a_wrapped_layer_may_be_of_a_derived_class(rng):
    class Shifted(nn.Dense):
        def __call__(self, x):
            return super().__call__(x) + 1

    case = CASES["dense"]
    x, layer = case.x(rng), LoRADense(2, wrapped=Shifted(7), alpha=ALPHA)
    params = case.draw(rng, layer, x)
    assert_close(layer.apply({"params": params}, x), case.reference(params, x) + 1, factor=2)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("name", ["dense", "gap", "einsum heads", "conv", "attend"])
def test_dropout_changes_the_adapters_output_alone(name, rng, key):
    case = CASES[name]
    x, layer, dropping = case.x(rng), case.layer(), case.layer({"dropout": 0.5})
    params = case.draw(rng, layer, x)

    def call(layer, params, rngs=None):
        return layer.apply({"params": params}, x, method=case.method, rngs=rngs)

    np.testing.assert_array_equal(call(dropping, params), call(layer, params))
    assert np.any(call(dropping, params, {"dropout": key}) != call(layer, params))
    params["lora"]["B"] *= 0
    np.testing.assert_array_equal(call(dropping, params, {"dropout": key}), call(layer, params))


def test_alpha_none_is_no_scaling_and_param_dtype_is_of_the_adapter_alone(rng):
    x = random_array(rng, (13, 5))
    layer = LoRADense(2, wrapped=nn.Dense(7), param_dtype=jnp.bfloat16)
    params = CASES["dense"].draw(rng, layer, x)
    assert {name: leaf.dtype for name, leaf in params["lora"].items()} == {"A": jnp.bfloat16, "B": jnp.bfloat16}
    assert params["kernel"].dtype == jnp.float32
    adapter = {"A": params["lora"]["A"] * 2, "B": params["lora"]["B"].astype(jnp.float32) / ALPHA}
    scaled = params | {"lora": adapter}
    assert_close(layer.apply({"params": params}, x), CASES["dense"].reference(scaled, x), factor=2)


@every_case
def test_output_has_the_dtype_of_the_bases_where_the_adapters_is_wider(case, rng):
    x, layer = case.x(rng), case.layer({"param_dtype": jnp.float32}, param_dtype=jnp.float16)
    x = x.astype(jnp.float16) if x.dtype == jnp.float32 else x
    params = case.draw(rng, layer, x)
    found = jax.eval_shape(functools.partial(layer.apply, method=case.method), {"params": params}, x)
    assert (params["lora"]["A"].dtype, found.dtype) == (jnp.float32, jnp.float16)


def test_initializers_reach_the_adapter(key):
    make = nn.initializers.constant
    layer = LoRADense(2, wrapped=nn.Dense(7), a_init=make(3.0), b_init=make(5.0))
    adapter = layer.init(key, jnp.ones((13, 5)))["params"]["lora"]
    assert (set(np.ravel(adapter["A"])), set(np.ravel(adapter["B"]))) == ({3.0}, {5.0})


@pytest.mark.parametrize("kind", LORA.values())
def test_a_layer_of_another_kind_is_refused(kind, key):
    message = rf"{kind.__name__}: found wrapped=LayerNorm, wanted nn.{kind.__name__[4:]}\n"
    with pytest.raises(AdapterError, match=message):
        kind(2, wrapped=nn.LayerNorm()).init(key, jnp.ones((13, 5)))


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (
            LoRADense(6, wrapped=nn.Dense(7)),
            AdapterError,
            r"lora: rank 6 is larger than the smaller side 5 of \(5, 7\)",
        ),
        (LoRADense(0, wrapped=nn.Dense(7)), ConfigError, "rank = 0: wanted a whole number of at least 1"),
        (LoRADense(2, wrapped=nn.Dense(7), dropout=1.5), ConfigError, "dropout = 1.5: wanted 0 <= dropout < 1"),
        (LoRAEinsum(2, wrapped=nn.Einsum((13, 5), "ai,ai->a")), AdapterError, "einsum 'ai,ai->a' cannot be factored"),
    ],
)
def test_what_does_not_fit_is_refused(layer, error, message, key):
    with pytest.raises(error, match=message):
        layer.init(key, jnp.ones((13, 5)))


@pytest.mark.parametrize("part", ["magnitude", "value", "offset"])
def test_parts_that_a_layer_does_not_apply_are_refused(part, rng):
    layer, x = LoRADense(2, wrapped=nn.Dense(7)), random_array(rng, (3, 5))
    params = layer.init(jax.random.key(0), x)["params"]
    params["lora"][part] = jnp.ones(7)
    with pytest.raises(
        AdapterError, match=rf"^lora: found {part} beside A and B, which this layer does not apply; jlora"
    ):
        layer.apply({"params": params}, x)
