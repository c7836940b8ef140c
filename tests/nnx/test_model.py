"""`LoRA`: any NNX model with adapters at its weights, its state written back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.errors import TraceContextError

import jlora
from jlora import AdapterError, ConfigError, LoraConfig, TargetError
from jlora.nnx import LoRA
from tests.nnx.models import (
    CONFIG,
    TOKENS,
    VECTORS,
    Noisy,
    Transformer,
    adapt,
    arrays,
    at,
    call,
    draw,
    every_model,
    inputs,
    merged,
    same,
)
from tests.reference import as64, assert_close, random_array


@every_model
def test_output_is_the_models_with_the_dense_updates(name, rng):
    model, x, einsums = draw(rng, name)
    lora = adapt(rng, model, x)
    wanted = call(merged(model, lora.adapters, einsums), x)
    assert_close(call(lora, x), as64(wanted), factor=20)


@every_model
def test_each_weight_has_two_variables_at_its_path(name, rng):
    model, x, einsums = draw(rng, name)
    lora = LoRA(model, CONFIG, args=(x,))
    assert jlora.count_params(nnx.state(lora, nnx.LoRAParam)) == jlora.count_params(lora.adapters)
    found = {target.path: target for target in jlora.summary(lora.params, lora.adapters, lora.config).targets}
    assert set(found) == set(einsums)
    for path, einsum in einsums.items():
        a, b, weight = einsum.replace("->", ",").split(",")
        roles = "".join("b" if axis in a and axis in b else "i" if axis in a else "o" for axis in weight)
        assert found[path].factorization.roles == roles
        assert set(at(nnx.to_pure_dict(nnx.state(lora.lora)), path)) == {"A", "B"}


@pytest.mark.parametrize("name", ["einsum", "scan", "transformer"])
def test_a_new_lora_has_bitwise_the_output_of_the_model(name, rng):
    model, x, _ = draw(rng, name)
    np.testing.assert_array_equal(LoRA(model, CONFIG, args=(x,), rngs=nnx.Rngs(0))(x), model(x))


@every_model
def test_merge_is_a_copy_with_the_dense_updates(name, rng):
    model, x, einsums = draw(rng, name)
    base = arrays(model, nnx.Param)
    lora = adapt(rng, model, x)
    copy = lora.merge()
    assert type(copy) is type(model)
    wanted = nnx.to_pure_dict(nnx.state(merged(model, lora.adapters, einsums)))
    jax.tree.map(lambda f, w: assert_close(f, as64(w), factor=2), nnx.to_pure_dict(nnx.state(copy)), wanted)
    same(arrays(model, nnx.Param), base)


@pytest.mark.parametrize("name", ["linear", "attention", "transformer"])
def test_without_example_arguments_the_names_say_the_same(name, rng):
    model, x, _ = draw(rng, name)
    traced, named = (LoRA(model, CONFIG, args=args, rngs=nnx.Rngs(3)).adapters for args in [(x,), ()])
    same(named, traced)


def test_methods_are_called_by_name_with_the_adapters(rng):
    model, x, einsums = draw(rng, "transformer")
    lora = adapt(rng, model, x)
    wanted = merged(model, lora.adapters, einsums).encode(x, scale=0.5)
    assert_close(lora.encode(x, scale=0.5), as64(wanted), factor=20)
    with pytest.raises(AttributeError, match="'LoRA' object has no attribute 'decode'"):
        lora.decode(x)


def test_a_method_may_leave_adapters_aside(rng):
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(7, 5, rngs=rngs), nnx.Linear(5, 7, rngs=rngs)

        def encode(self, x):
            return self.up(x)

        def __call__(self, x):
            return self.down(self.up(x))

    x, model = random_array(rng, VECTORS), Two(nnx.Rngs(0))
    lora = adapt(rng, model, x)
    assert_close(lora.encode(x), as64(lora.merge().encode(x)), factor=20)


def test_state_is_written_back_as_the_model_does_it(rng):
    model, x = Noisy(nnx.Rngs(0)), random_array(rng, VECTORS)
    lora = adapt(rng, model, x)
    twin = lora.merge()
    for _ in range(2):
        assert_close(call(lora, x), as64(call(twin, x)), factor=20)
    kinds = nnx.Not(nnx.Param)
    same(arrays(model, nnx.RngState), arrays(twin, nnx.RngState))
    jax.tree.map(lambda f, w: assert_close(f, w, factor=20), arrays(model, nnx.BatchStat), arrays(twin, nnx.BatchStat))
    assert jax.tree.structure(arrays(model, kinds)) == jax.tree.structure(arrays(twin, kinds))
    assert arrays(model, nnx.RngCount)["dropout"]["rngs"]["count"] == 2


class Stepped(nnx.Module):
    """A model that is given a random stream, and one that counts in Python on request."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(7, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.steps = 0

    def __call__(self, x, rngs, *, count=False):
        self.steps += count
        return self.dropout(self.linear(x), rngs=rngs)


def test_objects_among_the_arguments_change_as_the_model_changes_them(rng):
    model, x = Stepped(nnx.Rngs(0)), random_array(rng, VECTORS)
    ours, theirs = nnx.Rngs(3), nnx.Rngs(3)
    lora = LoRA(model, CONFIG)
    for _ in range(2):
        np.testing.assert_array_equal(lora(x, rngs=ours), model(x, theirs))
    same(arrays(ours, ...), arrays(theirs, ...))
    with pytest.raises(AdapterError, match=r"Stepped\.__call__ changes attributes that are no variables while it runs"):
        lora(x, ours, count=True)


def test_a_call_may_close_over_the_lora_where_it_changes_nothing(rng):
    x = random_array(rng, VECTORS)
    lora = adapt(rng, Noisy(nnx.Rngs(0)), x)
    with pytest.raises(TraceContextError):
        jax.jit(lambda x: lora.model.norm(lora.model.first(x)))(x)
    before = arrays(lora, ...)
    with pytest.raises(TraceContextError):
        jax.jit(lambda x: lora(x))(x)
    same(arrays(lora, ...), before)
    model, x, _ = draw(rng, "linear general")
    lora = adapt(rng, model, x)
    rows = jax.vmap(lambda row: lora(row))(x[:, None])[:, 0]
    assert_close(rows, as64(lora(x)), factor=20)


def test_dropout_of_the_adapters_follows_train_and_eval(rng):
    model, x, einsums = draw(rng, "linear")
    lora = adapt(rng, model, x, config=CONFIG.replace(dropout=0.3))
    first, second = lora(x), lora(x)
    assert np.any(first != second)
    lora.eval()
    assert_close(lora(x), as64(merged(model, lora.adapters, einsums)(x)), factor=20)
    np.testing.assert_array_equal(lora(x), lora(x))
    lora.train()
    assert np.any(lora(x) != first)
    assert arrays(lora, nnx.RngCount) == {"rngs": {"count": 3}}


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="Flax before 0.12.4 has no nnx.view")
def test_dropout_of_the_adapters_follows_a_view(rng):
    model, x, einsums = draw(rng, "linear")
    lora = adapt(rng, model, x, config=CONFIG.replace(dropout=0.3))
    evaluated = nnx.view(lora, deterministic=True)
    wanted = as64(merged(model, lora.adapters, einsums)(x))
    assert_close(evaluated(x), wanted, factor=20)
    assert np.any(lora(x) != lora(x))
    assert np.any(nnx.view(evaluated, deterministic=False)(x) != evaluated(x))
    with pytest.raises(ValueError, match="decode"):
        nnx.view(lora, decode=True)
    for name, leaf in nnx.to_flat_state(nnx.state(lora, nnx.LoRAParam)):  # a view has the same variables
        leaf.set_value(jnp.zeros(leaf.shape) if name[-1] == "B" else leaf.get_value())
    np.testing.assert_array_equal(evaluated(x), model(x))


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="Flax before 0.12.4 has no nnx.view")
def test_a_view_reaches_the_model_and_the_adapters(rng):
    """The model has a `set_view` of its own, which is not one of its methods to be run with adapters in it."""
    x = random_array(rng, (2, 3, 7))
    model = nnx.MultiHeadAttention(2, 7, 6, dropout_rate=0.5, deterministic=False, decode=False, rngs=nnx.Rngs(0))
    lora = adapt(rng, model, x, config=CONFIG.replace(dropout=0.3))
    assert np.any(lora(x) != lora(x))
    evaluated = nnx.view(lora, deterministic=True)
    assert evaluated.deterministic
    assert evaluated.model.deterministic
    np.testing.assert_array_equal(evaluated(x), evaluated(x))
    assert not lora.deterministic


@pytest.mark.parametrize("on", [True, False])
def test_dropout_follows_what_flax_called_a_view_before(rng, on):
    lora = LoRA(nnx.Linear(7, 5, rngs=nnx.Rngs(0)), CONFIG.replace(dropout=0.3))
    assert lora.set_mode(deterministic=on, decode=True) == {"decode": True}
    assert lora.deterministic == on
    assert lora.set_mode() == {}
    assert lora.deterministic == on


def test_a_decoding_cache_is_kept(rng):
    model = nnx.MultiHeadAttention(2, 7, 6, rngs=nnx.Rngs(0))
    lora = adapt(rng, model, config=CONFIG)
    twin = lora.merge()
    for each in (model, twin):
        each.decode = True
        each.init_cache((2, 3, 7))
    for _ in range(3):
        x = random_array(rng, (2, 1, 7))
        assert_close(call(lora, x), as64(call(twin, x)), factor=20)
    assert arrays(model, nnx.Cache)["cache_index"] == 3


def test_given_adapters_are_taken_over(rng):
    model, x, _ = draw(rng, "transformer")
    lora = adapt(rng, model, x)
    again = LoRA(model, lora.config, adapters=lora.adapters)
    same(again.adapters, lora.adapters)
    np.testing.assert_array_equal(again(x), lora(x))
    adapters = {"embed": {"embedding": {"A": jnp.ones((11, 2)), "B": jnp.ones((2, 3))}}}
    with pytest.raises(TargetError, match=r"embed/embedding: A \(11, 2\) and B \(2, 3\) do not fit the weight"):
        LoRA(model, lora.config, adapters=adapters)


def test_adapters_are_drawn_from_the_stream_or_the_seed(rng):
    model, _, _ = draw(rng, "attention")
    drawn = LoRA(model, CONFIG, rngs=nnx.Rngs(params=3)).adapters
    same(drawn, jlora.init_lora(nnx.Rngs(params=3).params(), LoRA(model, CONFIG).params, CONFIG))
    same(
        LoRA(model, CONFIG.replace(seed=5)).adapters,
        jlora.init_lora(None, LoRA(model, CONFIG).params, CONFIG.replace(seed=5)),
    )


def test_targets_are_paths_of_the_models_params(rng):
    model, x = Transformer(nnx.Rngs(0), count=2), inputs(rng, TOKENS)
    config = LoraConfig(rank=2, target_modules=("blocks/*/attention/query/kernel", "blocks/1/up"))
    lora = LoRA(model, config, args=(x,))
    found = [target.path for target in jlora.summary(lora.params, lora.adapters, lora.config).targets]
    assert sorted(found) == ["blocks/0/attention/query/kernel", "blocks/1/attention/query/kernel", "blocks/1/up/kernel"]
    assert {use.path for use in lora.explain(x).uses if use.factored} == set(found)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda model: LoRA(model, LoraConfig(target_modules="attn")), TargetError, "'attn' matches nothing"),
        (lambda model: LoRA(LoRA(model, CONFIG), CONFIG), AdapterError, "a LoRA inside another"),
        (lambda model: LoRA(model, CONFIG, args=np.ones(3)), ConfigError, "args: found ndarray, wanted a tuple"),
        (lambda model: LoRA(linen.Dense(5), CONFIG), AdapterError, r"model: found Dense, wanted an nnx\.Module"),
        (lambda model: LoRA(model, {"rank": 2}), jlora.ConfigError, "config: found dict, wanted a LoraConfig"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make(nnx.Linear(7, 5, rngs=nnx.Rngs(0)))


def test_inputs_of_every_dtype_keep_the_models_dtype(rng):
    model = nnx.Linear(7, 5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = inputs(rng, VECTORS).astype(jnp.bfloat16)
    lora = adapt(rng, model, x)
    assert lora(x).dtype == jnp.bfloat16
