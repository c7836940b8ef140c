"""`LoRA` of models that use their weights otherwise than by the call of one of Flax's layers."""

import collections
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import CallCompactUnboundModuleError

import jlora
from jlora import AdapterError, combine_params, init_lora, merge_params, split_params
from jlora.linen import LoRA, LoRADense, LoRADenseAdapter, resolve_config
from jlora.paths import literal_pattern
from tests.linen.models import CONFIG, KEY, MODELS, TOKENS, VECTORS, Coder, draw, inputs, merged, same, shapes
from tests.marks import some
from tests.reference import as64, assert_close, random_array, randomize


class Tied(nn.Module):
    """The table of an embedding as the head, by its attribute."""

    def setup(self):
        self.e = nn.Embed(11, 7)
        self.up = nn.Dense(7)

    def __call__(self, tokens):
        return jnp.tanh(self.up(self.e(tokens))) @ self.e.embedding.T

    def decode(self, x):
        return x @ self.e.embedding.T


class ByVariables(nn.Module):
    """A kernel that is read from the module's variables."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(7, name="up")
        return jnp.sin(layer(x)) @ layer.variables["params"]["kernel"].T


class ByName(nn.Module):
    """A kernel that is read by `get_variable`."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(5, name="up")
        return layer(x) @ layer.get_variable("params", "kernel").T


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(5, name="up"))(x)


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.SpectralNorm(nn.Dense(5, name="up"))(x, update_stats=False)


def transposed(params):
    return jax.tree.map(lambda leaf: leaf.T, params)


class Transposed(nn.Module):
    """The params of a layer, rewritten by a lifted transform."""

    @nn.compact
    def __call__(self, x):
        layer = nn.map_variables(nn.Dense, "params", transposed, transposed, init=True)
        return nn.Dense(3)(layer(5, use_bias=False, name="up")(x))


class Applied(nn.Module):
    """A head that is applied to params of another layer."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(5, use_bias=False, name="up")
        head = nn.Dense(7, use_bias=False, parent=None)
        y = layer(x)
        return head.apply({"params": {"kernel": layer.variables["params"]["kernel"].T}}, y)


class Einsum(nn.Module):
    """A layer as gemma has it: a weight of its own, by the name `w`."""

    shape: tuple[int, ...]
    equation: str

    @nn.compact
    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.param("w", nn.initializers.normal(), self.shape))


class Own(nn.Module):
    """Layers of their own, one of them with two weights beside a kernel."""

    @nn.compact
    def __call__(self, x):
        heads = Einsum((3, 7, 5), "BTD,NDH->BTNH", name="up[0]")(x)
        x = Einsum((3, 5, 7), "BTNH,NHD->BTD", name="down")(jnp.sin(heads))
        return x @ self.param("kernel", nn.initializers.normal(), (7, 2)) + Gate(name="gate")(x)


class Gate(nn.Module):
    @nn.compact
    def __call__(self, x):
        left, right = (self.param(name, nn.initializers.normal(), (7, 2)) for name in ("left", "right"))
        return (x @ left) * (x @ right)


class Softmaxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ jax.nn.softmax(self.param("w", nn.initializers.normal(), (7, 5)))


class Lifted(nn.Module):
    """A layer of its own in a scan."""

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, carry, _):
                return carry + jnp.sin(carry @ self.param("w", nn.initializers.normal(), (7, 7))), None

        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
        return nn.scan(Step, **axes)(name="steps")(x, None)[0]


USES = {
    "tied": (Tied(), TOKENS, {"e/lora", "up/lora"}),
    "variables": (ByVariables(), VECTORS, {"up/lora"}),
    "get_variable": (ByName(), VECTORS, {"up/lora"}),
    "weight norm": (Normalized(), VECTORS, {"up/lora"}),
    "spectral norm": (Spectral(), VECTORS, {"up/lora"}),
    "map_variables": (Transposed(), VECTORS, {"up/lora", "Dense_0/lora"}),
    "apply": (Applied(), VECTORS, {"up/lora"}),
    "own": (Own(), VECTORS, {"up[0]/lora/w", "down/lora/w", "lora", "gate/lora/left", "gate/lora/right"}),
    "softmax": (Softmaxed(), VECTORS, {"lora/w"}),
    "scan": (Lifted(), VECTORS, {"steps/lora/w"}),
    "rnn": (nn.RNN(nn.LSTMCell(5)), VECTORS, {f"cell/{a}{b}/lora" for a in "ih" for b in "fgio"}),
}
every_use = pytest.mark.parametrize(("model", "shape", "places"), USES.values(), ids=USES)


def drawn(rng, model, x, config=CONFIG):
    """Variables of a LoRA, its params random, and those of the model with the merged weights."""
    lora = LoRA(model, config)
    variables = jax.jit(lora.init)(KEY, x)
    variables = variables | {"params": randomize(rng, variables["params"])}
    resolved = resolve_config(model, config, x)
    merged = jax.jit(functools.partial(merge_params, config=resolved))(*split_params(variables["params"]))
    return lora, variables, variables | {"params": merged}


@every_use
def test_lora_is_the_model_with_the_merged_weights(model, shape, places, rng):
    x = inputs(rng, shape)
    lora, variables, plain = drawn(rng, model, x)
    compiled = jax.jit(model.apply)
    wanted = as64(compiled(plain, x))
    assert_close(lora.apply(variables, x), wanted, factor=20)
    assert_close(jax.jit(lora.apply)(variables, x), wanted, factor=20)
    base = variables | {"params": split_params(variables["params"])[0]}
    assert np.abs(wanted - as64(compiled(base, x))).max() > 0.01


@pytest.mark.parametrize(("model", "shape", "places"), some(USES))
def test_gradients_are_those_of_the_model_with_the_merged_weights(model, shape, places, rng):
    x = inputs(rng, shape)
    lora, variables, _ = drawn(rng, model, x)
    config = resolve_config(model, CONFIG, x)
    base, adapters = split_params(variables["params"])

    def loss(adapters):
        both = variables | {"params": combine_params(base, adapters)}
        return jnp.sum(jnp.sin(lora.apply(both, x)))

    def merged_loss(adapters):
        return jnp.sum(jnp.sin(model.apply(variables | {"params": merge_params(base, adapters, config)}, x)))

    found, wanted = (jax.jit(jax.grad(function))(adapters) for function in (loss, merged_loss))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found))
    jax.tree.map(lambda f, w: assert_close(f, as64(w), factor=50), found, wanted)


@every_use
def test_adapters_stand_beside_their_weights_and_the_base_is_the_models(model, shape, places, rng):
    x = inputs(rng, shape)
    variables, plain = jax.jit(LoRA(model, CONFIG).init)(KEY, x), jax.jit(model.init)(KEY, x)
    base, adapters = split_params(variables["params"])
    same(base, plain["params"])
    paths = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves(variables["params"])}
    assert {path[:-2] for path in paths if path[-2:] in ("/A", "/B")} == places
    assert shapes(adapters) == shapes(init_lora(KEY, base, resolve_config(model, CONFIG, x)))
    assert all(np.any(leaf) and not np.any(b) for leaf, b in pairs(adapters))
    for name in plain.keys() - {"params"}:
        same(variables[name], plain[name])


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def pairs(adapters):
    """A and B of every adapter."""
    parts = iter(jax.tree.leaves(adapters))
    return list(zip(parts, parts, strict=True))


# ---------------------------------------------------------------- methods


def test_a_method_reads_an_adapter_as_the_call_that_made_it(rng):
    """The table is looked up by the call, and contracted by `decode`."""
    tokens, x = inputs(rng, TOKENS), inputs(rng, VECTORS)
    lora, variables, plain = drawn(rng, Tied(), tokens)
    assert_close(lora.apply(variables, x, method="decode"), as64(Tied().apply(plain, x, method="decode")), factor=20)


@pytest.mark.parametrize("resolved", [False, True])
def test_a_square_weight_is_read_as_the_model_uses_it(resolved, rng):
    model, x = nn.Einsum((7, 7), "BTD,HD->BTH", use_bias=False), inputs(rng, VECTORS)
    config = resolve_config(model, CONFIG, x)
    assert dict(config.factorizations) == {"kernel": "oi"}
    lora, variables, plain = drawn(rng, model, x, config if resolved else CONFIG)
    assert_close(lora.apply(variables, x), as64(model.apply(plain, x)), factor=20)


def test_methods_that_are_initialized_one_after_the_other_add_their_adapters(rng):
    class Both(nn.Module):
        make: type = Tied

        @nn.compact
        def __call__(self, tokens):
            part = self.make(name="part")
            return part.decode(inputs(np.random.default_rng(0), VECTORS)), part(tokens)

    tokens = inputs(rng, TOKENS)
    module = Both(lambda name: LoRA(Tied(name=name), CONFIG))
    variables = module.init(KEY, tokens)
    base, adapters = split_params(variables["params"]["part"])
    same(base, Both().init(KEY, tokens)["params"]["part"])
    assert len(pairs(adapters)) == 2
    same(module.apply(variables, tokens), Both().apply({"params": {"part": base}}, tokens))


@pytest.mark.parametrize(
    "call",
    [
        lambda lora, variables, x: lora.bind(variables).model(x),
        lambda lora, variables, x: lora.bind(variables).model.encode(x),
        lambda lora, variables, x: lora.apply(variables, x, method=lambda module, x: module.model.encode(x)),
    ],
    ids=["call", "method", "within"],
)
def test_the_model_of_a_bound_lora_is_not_called_without_its_adapters(call, rng):
    x, lora = inputs(rng, VECTORS), LoRA(Coder(), CONFIG)
    with pytest.raises(AttributeError, match="only accessible from inside 'init' or 'apply'"):
        call(lora, draw(rng, lora, x), x)
    dense = LoRA(nn.Dense(5), CONFIG)
    with pytest.raises(CallCompactUnboundModuleError, match="unbound"):
        dense.bind(draw(rng, dense, x)).model(x)


# ---------------------------------------------------------------- collections, random numbers, names


def test_a_cache_is_made_and_written(rng):
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, decode=True)
    x = inputs(rng, VECTORS)
    lora, variables, plain = drawn(rng, model, x)
    assert variables.keys() == {"params", "cache"}
    found, wanted = (m.apply(v, x[:, :1], mutable=["cache"]) for m, v in ((lora, variables), (model, plain)))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(leaf, like, rtol=1e-4, atol=1e-5)


def test_statistics_over_an_axis_that_init_does_not_have(rng):
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, axis_name="batch")(nn.Dense(5)(x))

    x = inputs(rng, VECTORS)
    lora, variables, plain = drawn(rng, Normed(), x[0])
    found, wanted = (
        jax.vmap(lambda x, m=m, v=v: m.apply(v, x, mutable=["batch_stats"]), axis_name="batch")(x)
        for m, v in ((lora, variables), (Normed(), plain))
    )
    jax.tree.map(lambda f, w: assert_close(f, as64(w), factor=50), found, wanted)


class Noisy(nn.Module):
    """Random numbers by a layer, and by the module itself."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(5)(x))
        return x * jax.random.bernoulli(self.make_rng("dropout"), 0.5, x.shape)


class Twice(nn.Module):
    make: type = Noisy

    @nn.compact
    def __call__(self, x):
        part = self.make(name="part")
        return part(x), part(x)


@pytest.mark.parametrize("resolved", [False, True])
def test_the_models_own_random_numbers_are_as_without_adapters(resolved, rng):
    x, rngs = inputs(rng, VECTORS), {"params": KEY, "dropout": jax.random.key(3)}
    config = CONFIG.replace(dropout=0.3, factorizations={"**/kernel": "io"} if resolved else {})
    module = Twice(lambda name: LoRA(Noisy(name=name), config))
    y, variables = module.init_with_output(rngs, x)
    wanted, plain = Twice().init_with_output(rngs, x)
    same((y, split_params(variables["params"])[0]), (wanted, plain["params"]))
    same(module.apply(variables, x, rngs=rngs), Twice().apply(plain, x, rngs=rngs))
    assert np.any(y[0] != y[1])


def test_every_collection_may_be_mutable_and_intermediates_are_captured(rng):
    x, lora = inputs(rng, VECTORS), LoRA(Coder(), CONFIG)
    variables = draw(rng, lora, x)
    y, changed = lora.apply(variables, x, mutable=True)
    same((y, changed), (lora.apply(variables, x), variables))
    _, captured = lora.apply(variables, x, capture_intermediates=True)
    same(captured["intermediates"]["encoder"]["__call__"], (lora.apply(variables, x, method="encode"),))


def test_params_that_are_not_there_yet_are_made_by_apply(rng):
    x, lora = inputs(rng, VECTORS), LoRA(Coder(), CONFIG)
    same(lora.apply({}, x, mutable=["params"], rngs={"params": KEY})[1], lora.init(KEY, x))


def test_a_and_b_stand_in_boxes_that_name_their_axes_where_the_weight_does(rng):
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.normal(), ("in", "out"))
            return nn.Dense(3, name="down")(x @ self.param("w", init, (7, 5)))

    x, lora = inputs(rng, VECTORS), LoRA(Boxed(), CONFIG)
    variables = lora.init(KEY, x)
    specs = nn.get_partition_spec(variables)["params"]
    names = jax.sharding.PartitionSpec
    assert (specs["w"], specs["lora"]["w"]) == (names("in", "out"), {"A": names("in", None), "B": names(None, "out")})
    assert specs["down"]["lora"] == {"A": names(), "B": names()}
    leaves, boxes = jax.tree.flatten(variables)
    random = [random_array(rng, leaf.shape) for leaf in leaves]
    boxed, plain = boxes.unflatten(random), jax.tree.structure(nn.unbox(variables)).unflatten(random)
    same(jax.jit(lora.apply)(boxed, x), jax.jit(lora.apply)(plain, x))
    config = resolve_config(Boxed(), CONFIG, x)
    wanted = Boxed().apply({"params": merge_params(*split_params(plain["params"]), config)}, x)
    assert_close(lora.apply(boxed, x), as64(wanted), factor=20)


def test_a_module_outside_is_used_as_it_is(rng):
    class Inside(nn.Module):
        shared: nn.Module

        @nn.compact
        def __call__(self, x):
            return self.shared(nn.Dense(7)(x))

    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(7)(jnp.sin(nn.Dense(3)(x)))

    class Outside(nn.Module):
        adapts: bool = True

        @nn.compact
        def __call__(self, x):
            shared = Shared(name="shared")
            part = Inside(shared, name="part")
            return shared(x), LoRA(part, CONFIG)(x) if self.adapts else part(x)

    x = inputs(rng, VECTORS)
    variables = draw(rng, Outside(), x)
    plain = merged(variables["params"])
    assert set(variables["params"]["shared"]["Dense_0"]) == {"kernel", "bias"}
    wanted = Outside(False).apply({"params": plain}, x)
    jax.tree.map(lambda f, w: assert_close(f, as64(w), factor=20), Outside().apply(variables, x), wanted)


def test_arguments_of_the_model_may_have_any_name(rng):
    class Named(nn.Module):
        @nn.compact
        def __call__(self, module, *, name, use, fn, args, dropout_key, strict):
            assert (name, strict) == ("up", True)
            return nn.Dense(5)(module + use + fn + args["x"] + dropout_key)

    x = inputs(rng, VECTORS)
    more = {"name": "up", "use": x, "fn": x, "args": {"x": x}, "dropout_key": x, "strict": True}
    lora = LoRA(Named(), CONFIG)
    variables = draw(rng, lora, x, **more)
    wanted = nn.Dense(5).apply({"params": merged(variables["params"])["Dense_0"]}, 5 * x)
    assert_close(lora.apply(variables, x, **more), as64(wanted), factor=20)


# ---------------------------------------------------------------- what the transform offers


def test_strict_refuses_what_is_merged_and_explain_says_why(rng):
    x, model = inputs(rng, VECTORS), Softmaxed()
    variables = draw(rng, LoRA(model, CONFIG), x)
    with pytest.raises(AdapterError, match=r"^w: reduce_max at .* cannot be factored: it is not linear"):
        LoRA(model, CONFIG, strict=True).apply(variables, x)
    uses = LoRA(model, CONFIG).explain(variables, x).uses
    assert {(use.path, use.factored) for use in uses} == {("w", False)}
    assert all(use.why for use in uses)


def test_explain_is_of_a_method_and_its_collections(rng):
    x, lora = inputs(rng, VECTORS), LoRA(Coder(), CONFIG)
    variables = draw(rng, lora, x)
    of_all, of_one = lora.explain(jax.eval_shape(lambda: variables), x), lora.explain(variables, x, method="encode")
    paths = ["encoder/layers_0/kernel", "encoder/layers_2/layers_0/kernel", "decode_heads/kernel"]
    assert [use.path for use in of_all.uses] == paths
    assert [use.path for use in of_one.uses] == paths[:2]


def test_layers_with_an_adapter_of_their_own_keep_it(rng):
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = LoRADense(rank=2, wrapped=nn.Dense(7, name="up"), alpha=3.0)(x)
            return nn.Dense(7, name="down")(x) + LoRADenseAdapter(rank=2, features=7, name="lora_extra")(x)

    x = inputs(rng, VECTORS)
    with pytest.raises(AdapterError, match=r"^up/kernel: the layer has an adapter of its own; leave it out with excl"):
        LoRA(Mixed(), CONFIG).init(KEY, x)
    config = CONFIG.replace(exclude_modules="up")
    lora = LoRA(Mixed(), config)
    variables = draw(rng, lora, x)
    params = variables["params"]
    plain = params | {"down": merged(params["down"])}
    assert_close(lora.apply(variables, x), as64(Mixed().apply({"params": plain}, x)), factor=20)
    assert dict(resolve_config(Mixed(), config, x).factorizations) == {"down/kernel": "io"}


def test_a_lora_inside_another_may_adapt_other_weights_only(rng):
    x = inputs(rng, VECTORS)
    with pytest.raises(AdapterError, match=r"^decode_heads/kernel: the layer has an adapter of its own"):
        LoRA(LoRA(Coder(), CONFIG), CONFIG).init(KEY, x)
    inner = LoRA(Coder(), CONFIG.replace(target_modules="encoder"))
    lora = LoRA(inner, CONFIG.replace(target_modules="decode_heads"))
    variables = draw(rng, lora, x)
    wanted = Coder().apply({"params": merged(variables["params"])}, x)
    assert_close(lora.apply(variables, x), as64(wanted), factor=20)


@pytest.mark.parametrize("name", ["jit", "scan of remat"])
def test_a_step_has_the_flops_of_jlora_lora(name, rng):
    """The compiled gradients of the adapters are those of the transform, operation by operation."""
    model, shape = MODELS[name]
    x, lora = inputs(rng, shape), LoRA(model, CONFIG)
    config = resolve_config(model, CONFIG, x)
    base, adapters = split_params(draw(rng, lora, x)["params"])
    adapted = jlora.lora(lambda params, x: model.apply({"params": params}, x), config)

    def by_module(adapters, base, x):
        return jnp.sum(jnp.sin(lora.apply({"params": combine_params(base, adapters)}, x)))

    def by_function(adapters, base, x):
        return jnp.sum(jnp.sin(adapted(base, adapters, x)))

    module, function = (jax.jit(jax.grad(fn)).lower(adapters, base, x).compile() for fn in (by_module, by_function))
    assert module.cost_analysis()["flops"] == function.cost_analysis()["flops"]
    assert operations(module) == operations(function)


@pytest.mark.parametrize("name", ["up[0]", "a]b", "x*", "q?", "{c}", "[!a]"])
def test_a_name_may_hold_what_patterns_are_made_of(rng, name):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(11, name="other")(nn.Dense(7, name=name)(x))

    model, x = Model(), random_array(rng, (3, 5))
    config = resolve_config(model, CONFIG.replace(target_modules=(literal_pattern(name),)), x)
    params = model.init(KEY, x)["params"]
    adapters = randomize(rng, init_lora(KEY, params, config))
    assert adapters["other"]["kernel"] is None
    found = LoRA(model, config).apply({"params": combine_params(params, adapters)}, x)
    assert_close(found, model.apply({"params": merge_params(params, adapters, config)}, x))


def operations(compiled):
    """How often each operation stands in a compiled program."""
    return collections.Counter(re.findall(r" ([a-z-]+)\(", compiled.as_text()))
