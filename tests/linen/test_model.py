"""`LoRA`: any Linen module with adapters at its targeted layers, and the configuration that says how they split."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import AdapterError, LoraConfig, TargetError, init_lora, merge_params, split_params
from jlora.linen import LoRA, resolve_config
from tests.reference import as64, assert_close, random_array, randomize

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


# ---------------------------------------------------------------- any model


@every_model
def test_output_is_the_models_with_the_merged_weights(model, shape, rng):
    x, lora = inputs(rng, shape), LoRA(model, CONFIG)
    variables = draw(rng, lora, x)
    wanted = jax.jit(model.apply)({"params": merged(variables["params"])}, x)
    assert_close(jax.jit(lora.apply)(variables, x), as64(wanted), factor=20)


@every_model
def test_every_kernel_and_embedding_gets_an_adapter(model, shape, rng):
    x = inputs(rng, shape)
    base, adapters = split_params(draw(rng, LoRA(model, CONFIG), x)["params"])
    assert shapes(base) == shapes(draw(rng, model, x)["params"])
    weights = [path[-1].key in ("kernel", "embedding") for path, _ in jax.tree_util.tree_leaves_with_path(base)]
    assert [adapter is not None for adapter in jax.tree.leaves(adapters, is_leaf=is_leaf)] == weights


def is_leaf(node):
    return node is None or set(node) == {"A", "B"}


@pytest.mark.parametrize("name", ["jit", "scan of remat", "given"])
def test_a_new_model_has_the_values_of_the_base_and_bitwise_its_output(name, rng, key):
    model, shape = MODELS[name]
    x = inputs(rng, shape)
    variables, plain = jax.jit(LoRA(model, CONFIG).init)(key, x), jax.jit(model.init)(key, x)
    base, adapters = split_params(variables["params"])
    same(base, plain["params"])
    drawn = [np.ravel(leaf)[0] for leaf in jax.tree.leaves(adapters) if np.any(leaf)]
    assert len(set(drawn)) * 2 == len(jax.tree.leaves(adapters))
    np.testing.assert_array_equal(LoRA(model, CONFIG).apply(variables, x), model.apply(plain, x))


@every_model
def test_the_resolved_configuration_makes_and_merges_the_same_adapters(model, shape, rng):
    x, lora = inputs(rng, shape), LoRA(model, CONFIG)
    config = resolve_config(model, CONFIG, x)
    base, adapters = split_params(draw(rng, lora, x)["params"])
    assert shapes(init_lora(KEY, base, config)) == shapes(adapters)
    wanted = merged(draw(np.random.default_rng(1), lora, x)["params"])
    base, adapters = split_params(draw(np.random.default_rng(1), lora, x)["params"])
    jax.tree.map(lambda f, w: assert_close(f, as64(w), factor=2), merge_params(base, adapters, config), wanted)


@pytest.mark.parametrize("name", ["transformer", "jit", "scan of remat"])
def test_gradients_reach_every_a_and_b(name, rng):
    model, shape = MODELS[name]
    x, lora = inputs(rng, shape), LoRA(model, CONFIG)
    variables = draw(rng, lora, x)
    grads = jax.jit(jax.grad(lambda variables: jnp.sum(jnp.sin(lora.apply(variables, x)))))(variables)
    assert all(np.any(as64(leaf)) for leaf in jax.tree.leaves(split_params(grads["params"])[1]))


def test_what_nn_jit_compiled_for_one_configuration_is_not_taken_for_another(rng):
    model, x = Transformer(JitBlock), inputs(rng, TOKENS)
    variables = draw(rng, LoRA(model, CONFIG), x)
    plain = {"params": split_params(variables["params"])[0]}
    for alpha in (3, 5, 0, 3):
        wanted = Transformer().apply({"params": merged(variables["params"], lambda _, a=alpha: a / 2)}, x)
        assert_close(LoRA(model, CONFIG.replace(alpha=alpha)).apply(variables, x), as64(wanted), factor=20)
        assert_close(model.apply(plain, x), as64(Transformer().apply(plain, x)), factor=20)


# ---------------------------------------------------------------- methods and places


def test_methods_are_called_by_name_and_by_function(rng):
    x, lora = inputs(rng, VECTORS), LoRA(Coder(), CONFIG)
    variables = draw(rng, lora, x)
    wanted = as64(Coder().apply({"params": merged(variables["params"])}, x, scale=2.0, method="encode"))
    by_function = lora.apply(variables, x, method=lambda module, x: module.encode(x, scale=2.0))
    for found in (
        lora.apply(variables, x, scale=2.0, method="encode"),
        by_function,
        lora.bind(variables).encode(x, scale=2.0),
    ):
        assert_close(found, wanted, factor=5)


def test_a_function_of_the_models_class_may_be_the_method(rng):
    x, lora = inputs(rng, VECTORS), LoRA(Coder(), CONFIG)
    variables = draw(rng, lora, x)
    same(lora.apply(variables, x, method=Coder.encode), lora.apply(variables, x, method="encode"))


class Outer(nn.Module):
    """A model within another, and a layer outside of it."""

    make: type[nn.Module] = Coder

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(self.make(name="part")(x))


class Around(nn.Module):
    """A model that is given to another, and called with its input by name where that is said."""

    part: nn.Module
    name_of_input: str | None = None

    def __call__(self, x):
        return self.part(x) if self.name_of_input is None else self.part(**{self.name_of_input: x})


def adapted(name=None):
    return LoRA(Coder(name=name), CONFIG)


PLACES = {
    "made inside": (Outer(adapted), Outer()),
    "given": (Around(LoRA(Coder(), CONFIG)), Around(Coder())),
    "given to a remat": (nn.remat(Around)(LoRA(Coder(), CONFIG)), Around(Coder())),
    "a remat given": (Around(nn.remat(LoRA)(Coder(), CONFIG)), Around(Coder())),
    "remat": (nn.remat(LoRA)(Coder(), CONFIG), Coder()),
    "jit": (nn.jit(LoRA)(Coder(), CONFIG), Coder()),
    "around": (LoRA(Around(Coder()), CONFIG), Around(Coder())),
}


@pytest.mark.parametrize(("module", "plain"), PLACES.values(), ids=PLACES)
def test_lora_stands_in_any_place_where_the_model_could(module, plain, rng):
    x = inputs(rng, VECTORS)
    variables = draw(rng, module, x)
    assert shapes(split_params(variables["params"])[0]) == shapes(draw(rng, plain, x)["params"])
    wanted = plain.apply({"params": merged(variables["params"])}, x)
    assert_close(module.apply(variables, x), as64(wanted), factor=5)
    assert np.any(as64(plain.apply({"params": split_params(variables["params"])[0]}, x)) != as64(wanted))


def test_a_layer_outside_of_lora_is_not_adapted(rng):
    params = draw(rng, Outer(adapted), inputs(rng, VECTORS))["params"]
    assert set(params["Dense_0"]) == {"kernel", "bias"}


def test_a_layer_within_a_derived_layer_is_adapted_too(rng):
    class Gated(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return super().__call__(x) * nn.Dense(self.features, name="gate")(x)

    x, lora = inputs(rng, VECTORS), LoRA(Gated(5), CONFIG)
    variables = draw(rng, lora, x)
    assert set(variables["params"]["gate"]) == {"kernel", "bias", "lora"}
    assert_close(lora.apply(variables, x), as64(Gated(5).apply({"params": merged(variables["params"])}, x)), factor=5)


@pytest.mark.parametrize("layer", [nn.Dense(5), nn.DenseGeneral(5), nn.Conv(5, (3,))], ids=["dense", "general", "conv"])
def test_a_layer_may_be_given_its_input_by_name(layer, rng):
    x, positional, by_name = inputs(rng, VECTORS), *(LoRA(Around(layer, name), CONFIG) for name in (None, "inputs"))
    variables = draw(rng, positional, x)
    np.testing.assert_array_equal(by_name.apply(variables, x), positional.apply(variables, x))


def test_other_collections_pass_through(rng, key):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))

    x, lora = inputs(rng, VECTORS), LoRA(Normed(), CONFIG)
    variables = lora.init(key, x, train=False)
    variables = variables | {"params": randomize(rng, variables["params"])}
    plain = variables | {"params": merged(variables["params"])}
    found = lora.apply(variables, x, train=True, mutable=["batch_stats"])
    wanted = Normed().apply(plain, x, train=True, mutable=["batch_stats"])
    jax.tree.map(lambda f, w: assert_close(f, as64(w), factor=5), found, wanted)


# ---------------------------------------------------------------- the configuration


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
        ({"target_modules": "**/bias"}, TargetError, r"'\*\*/bias' adapts nothing: what it matches is excluded, or is"),
        ({"exclude_modules": "nothing"}, TargetError, "exclude_modules: 'nothing' matches nothing; nearest paths: "),
        ({"exclude_modules": "**"}, TargetError, r"target_modules: '\*\*' adapts nothing"),
        ({"rank_pattern": {"nothing": 1}}, TargetError, "rank_pattern: 'nothing' matches nothing that is adapted"),
        ({"alpha_pattern": {"nothing": 1}}, TargetError, "alpha_pattern: 'nothing' matches nothing that is adapted"),
        (
            {"rank": 4},
            AdapterError,
            r"encoder/layers_2/layers_0/.*rank 4 is larger than the smaller side 3 of \(5, 3\)",
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


@pytest.mark.parametrize("name", ["jit", "scan", "setup", "recurrent"])
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
        {"rank_pattern": {"block_1": 1}},
        {"alpha_pattern": {"block_1": 7}},
    ],
    ids=str,
)
def test_blocks_that_nn_jit_compiles_once_have_to_be_treated_alike(change, rng):
    x, config = inputs(rng, TOKENS), LoraConfig(rank=2, target_modules=("block_*",)).replace(**change)
    LoRA(Transformer(), config).init(KEY, x)
    with pytest.raises(TargetError, match=r"block_1/.*: nn.jit compiled this module together with another"):
        LoRA(Transformer(JitBlock), config).init(KEY, x)


def test_blocks_that_nn_jit_compiles_once_may_differ_within(rng):
    x, config = inputs(rng, TOKENS), CONFIG.replace(rank_pattern={"**/up": 1}, alpha_pattern={"**/query": 5})
    variables, plain = (draw(np.random.default_rng(3), LoRA(Transformer(*b), config), x) for b in ((JitBlock,), ()))
    assert shapes(variables) == shapes(plain)
    found, wanted = (LoRA(Transformer(*b), config).apply(plain, x) for b in ((JitBlock,), ()))
    assert_close(found, as64(wanted), factor=20)
