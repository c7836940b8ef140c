"""VeRA: what it makes of vectors and a shared pair, in every kind of weight, and that nothing else is trained."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jlora
from jlora import ConfigError, LoraConfig, TargetError, variants
from jlora.variants import vera
from tests.lazy_bases import densified, packed
from tests.reference import as64, assert_close, random_array, randomize, x64
from tests.variants.weights import CONFIG, ROLES, apply, as_matrices, random_params, vera_update

VERA = CONFIG.replace(kind="vera")
TOKENS = np.arange(4)


def test_the_update_of_each_kind_of_weight(rng):
    params = random_params(rng)
    trained, frozen = randomize(rng, vera.init(None, params, VERA))
    merged = jlora.merge_params(params, vera.adapters(trained, frozen, params, VERA), VERA)
    assert trained.keys() == params.keys()
    for path, weight in params.items():
        base = as_matrices(path, weight)
        wanted = base + vera_update(trained[path], frozen, *base.shape[1:])
        assert_close(jnp.asarray(as_matrices(path, merged[path]), "float32"), wanted)


def test_outputs_and_gradients_are_those_of_the_merged_model(rng):
    with x64():
        params = random_params(rng, "float64")
        trained, frozen = randomize(rng, vera.init(None, params, VERA))
        model = jlora.lora(apply, VERA, strict=True)

        def factored(trained):
            return jnp.sum(jnp.sin(model(params, vera.adapters(trained, frozen, params, VERA), TOKENS)))

        def merged(trained):
            adapters = vera.adapters(trained, frozen, params, VERA)
            return jnp.sum(jnp.sin(apply(jlora.merge_params(params, adapters, VERA), TOKENS)))

        (found, grads), (wanted, others) = (jax.jit(jax.value_and_grad(fn))(trained) for fn in (factored, merged))
        assert_close(found, np.asarray(wanted))
        for path in params:
            for part in "bd":
                assert np.abs(others[path][part]).max() > 0
                assert_close(grads[path][part], as64(others[path][part]), factor=100)


def test_the_model_is_unchanged_at_the_start(rng):
    params = random_params(rng)
    trained, frozen = vera.init(jax.random.key(1), params, VERA)
    adapters = vera.adapters(trained, frozen, params, VERA)
    assert bool((jlora.lora(apply, VERA)(params, adapters, TOKENS) == apply(params, TOKENS)).all())
    for path, vectors in trained.items():
        assert np.unique(vectors["d"]).tolist() == [np.float32(0.1)]
        assert not np.any(vectors["b"]), path


def test_the_pair_stands_once_and_is_as_large_as_the_largest_weight(rng):
    params = random_params(rng)
    trained, frozen = vera.init(None, params, VERA)
    assert {name: part.shape for name, part in frozen.items()} == {"A": (13, 3), "B": (3, 11)}
    counts = {"table": 5, "dense": 7, "query": 6, "out": 11, "torch": 6, "conv": 6, "experts": 14, "layers": 21}
    of_rank = {path: 3 * (2 if path == "experts" else 3 if path == "layers" else 1) for path in ROLES}
    assert jlora.count_params(trained) == sum(counts.values()) + sum(of_rank.values())
    bounds = np.sqrt(6 / 13), np.sqrt(6 / 3)
    large = vera.random_pair(None, {"up": np.zeros((13, 2000), "f4")}, LoraConfig(rank=3, kind="vera"))
    assert np.abs(frozen["A"]).max() < bounds[0]
    assert 0.98 * bounds[1] < np.abs(large["B"]).max() < bounds[1]


def test_the_key_draws_the_pair_and_the_seed_stands_for_it(rng):
    params = random_params(rng)
    of_seed = vera.init(None, params, VERA.replace(seed=7))[1]
    of_key = vera.init(jax.random.key(7), params, VERA)[1]
    other = vera.init(None, params, VERA)[1]
    assert np.array_equal(of_seed["A"], of_key["A"])
    assert not np.array_equal(of_seed["B"], other["B"])


def test_the_scaling_has_no_effect(rng):
    params = random_params(rng)
    trained, frozen = randomize(rng, vera.init(None, params, VERA))
    deltas = []
    for config in (VERA, VERA.replace(alpha=3), VERA.replace(alpha=0.25, scaling="rslora")):
        merged = jlora.merge_params(params, vera.adapters(trained, frozen, params, config), config)
        deltas.append(as64(merged["query"]))
    assert_close(deltas[1], deltas[0], "float32")
    assert_close(deltas[2], deltas[0], "float32")


def test_a_rank_above_the_sides_of_a_weight(rng):
    params = {"up": np.ones((5, 7), np.float32)}
    config = LoraConfig(rank=17, kind="vera", factorizations={"up": "io"})
    trained, frozen = randomize(rng, vera.init(None, params, config))
    merged = jlora.merge_params(params, vera.adapters(trained, frozen, params, config), config)
    assert_close(merged["up"], 1 + vera_update(trained["up"], frozen, 5, 7)[0])


def test_explain_and_shardings_know_the_adapters(rng):
    params = random_params(rng)
    config = VERA.replace(rank=17)  # above some sides
    explained = str(jlora.explain(apply, config, params, TOKENS))
    assert all(path in explained for path in params)
    found = jlora.adapter_shardings(params, config)
    assert {path: sorted(entry) for path, entry in found.items()} == {path: ["A", "B"] for path in params}


def test_no_gradient_of_a_is_computed(rng):
    params = {"up": random_params(rng)["dense"]}
    plain = LoraConfig(rank=3, factorizations={"up": "io"})
    config = plain.replace(kind="vera")
    trained, frozen = vera.init(None, params, config)
    x = jnp.ones((64, 5))
    model = jlora.lora(lambda params, x: x @ params["up"], plain)
    adapters = jlora.init_lora(None, params, plain)
    of_lora = jax.grad(lambda adapters: jnp.sum(model(params, adapters, x) ** 2))
    of_vera = jax.grad(lambda t: jnp.sum(model(params, vera.adapters(t, frozen, params, config), x) ** 2))
    flops = [
        jax.jit(fn).lower(tree).compile().cost_analysis()["flops"]
        for fn, tree in ((of_lora, adapters), (of_vera, trained))
    ]
    assert flops[1] < flops[0] - 64 * 5 * 3


def test_sixteen_bit_weights_have_vectors_in_32(rng):
    params = random_params(rng, "bfloat16")
    trained, frozen = vera.init(None, params, VERA)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((trained, frozen))} == {"float32"}
    short = vera.init(None, params, VERA.replace(dtype="bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(short)} == {"bfloat16"}
    out = jlora.lora(apply, VERA)(params, vera.adapters(*short, params, VERA), TOKENS)
    assert bool((out == apply(params, TOKENS)).all())


def test_several_sets_of_vectors_side_by_side(rng):
    params = random_params(rng)
    trained, frozen = vera.init(None, params, VERA)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf + 0.3, leaf - 0.2]), trained)
    model = jlora.lora(apply, VERA)

    def run(vectors):
        return model(params, vera.adapters(vectors, frozen, params, VERA), TOKENS)

    both = jax.vmap(run)(two)
    for place in range(2):
        one = run(jax.tree.map(lambda leaf, place=place: leaf[place], two))
        assert_close(both[place], as64(one), factor=4)


@pytest.mark.parametrize("kind", variants.KINDS)
def test_lazy_bases_are_adapted_as_the_dense_ones(kind, rng):
    params = {"up": packed(0, 5, 7)}
    config = LoraConfig(rank=3, kind=kind, factorizations={"up": "io"})
    trained, frozen = variants.init(None, params, config)
    trained = randomize(rng, trained)
    model, x = jlora.lora(lambda params, x: x @ params["up"], config), random_array(rng, (4, 5))
    found = model(params, variants.adapters(trained, frozen, params, config), x)
    dense = densified(params)
    wanted = jlora.merge_params(dense, variants.adapters(trained, frozen, dense, config), config)
    assert_close(found, as64(x) @ as64(wanted["up"]))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="down")(nn.relu(nn.Dense(7, name="up")(x)))


def falls(apply, params, config, x, steps=30):
    """The loss before and after a few steps of what a variant trains, and whether the frozen part was left alone."""
    trained, frozen = variants.init(None, params, config)
    model, optimizer = jlora.lora(apply, config, strict=True), optax.adam(0.05)

    @jax.jit
    def step(trained, state, frozen, params):
        def loss(trained):
            return jnp.mean((model(params, variants.adapters(trained, frozen, params, config), x) - 1) ** 2)

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(trained, updates), state, value

    state, values = optimizer.init(trained), []
    for _ in range(steps):
        trained, state, value = step(trained, state, frozen, params)
        values.append(float(value))
    assert step._cache_size() == 1
    return values[0], values[-1]


@pytest.mark.parametrize("kind", variants.KINDS)
def test_a_linen_module_is_trained(kind, rng):
    module, x = Net(), jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)
    params = module.init(jax.random.key(0), x)["params"]
    first, last = falls(lambda p, x: module.apply({"params": p}, x), params, LoraConfig(rank=3, kind=kind), x)
    assert last < 0.7 * first


@pytest.mark.parametrize("kind", variants.KINDS)
def test_an_nnx_model_is_trained(kind, rng):
    net = nnx.Sequential(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(7, 3, rngs=nnx.Rngs(1)))
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    x = jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)
    first, last = falls(lambda p, x: nnx.merge(graph, p, rest)(x), params, LoraConfig(rank=3, kind=kind), x)
    assert last < 0.7 * first


def test_vectors_in_boxes_follow_the_names_of_the_weights(rng):
    weight = nn.Partitioned(jnp.ones((5, 7)), names=("embed", "mlp"))
    config = LoraConfig(rank=3, kind="vera", factorizations={"up": "io"})
    params = {"up": weight}
    made = vera.adapters(*vera.init(None, params, config), params, config)
    assert made["up"]["A"].names == ("embed", None)
    assert made["up"]["B"].names == (None, "mlp")


def test_what_does_not_fit_is_told_at_once(rng):
    params = {"up": np.ones((5, 7), np.float32), "down": np.ones((7, 3), np.float32)}
    config = LoraConfig(rank=3, kind="vera", factorizations={"**": "io"})
    trained, frozen = vera.init(None, params, config)
    wrong = {"upp": trained["up"], "down": {"b": trained["down"]["b"]}}
    with pytest.raises(
        TargetError, match=r"(?s)upp: is trained, and is no weight.*up.*down.*wanted b \(3,\) and d \(3,\)"
    ):
        vera.adapters(wrong, frozen, params, config)
    small = {"A": frozen["A"][:6], "B": frozen["B"]}
    with pytest.raises(TargetError, match=r"shared pair A \(6, 3\) and B \(3, 7\): wanted A \(in, 3\).*in at least 7"):
        vera.adapters(trained, small, params, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lora"}, r"kind = 'lora': jlora.variants.vera wants a LoraConfig with kind='vera'"),
        ({"rank_pattern": {"up": 2}}, r"rank_pattern: all weights share the pair of VeRA"),
        ({"alpha": 0}, r"alpha = 0: the update of VeRA is not scaled"),
    ],
)
def test_configurations_that_are_refused(change, message):
    config = LoraConfig(rank=3, kind="vera", factorizations={"up": "io"}).replace(**change)
    with pytest.raises(ConfigError, match=message):
        vera.init(None, {"up": np.ones((5, 7), np.float32)}, config)


@pytest.mark.parametrize("kind", variants.KINDS)
def test_init_lora_names_what_makes_them(kind):
    params = {"up": {"kernel": np.ones((5, 7), np.float32)}}
    with pytest.raises(ConfigError, match=rf"kind = '{kind}'.*jlora.variants.init makes"):
        jlora.init_lora(None, params, LoraConfig(rank=2, kind=kind))
    with pytest.raises(ConfigError, match=r"jlora\.variants\.init makes"):
        jlora.linen.LoRA(nn.Dense(3), LoraConfig(rank=2, kind=kind)).init(jax.random.key(0), jnp.ones((2, 5)))
    with pytest.raises(ConfigError, match=r"jlora\.variants\.init makes"):
        jlora.nnx.LoRA(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), LoraConfig(rank=2, kind=kind))
    with pytest.raises(ConfigError, match=r"jlora\.variants\.init makes"):
        jlora.adapt(
            lambda params, x: x @ params["up"]["kernel"], LoraConfig(rank=2, kind=kind), params, np.ones((2, 5))
        )
    with pytest.raises(ConfigError, match="kind = 'lora': has no smaller tree"):
        variants.init(None, params, LoraConfig(rank=2))
