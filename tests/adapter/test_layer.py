"""`LoRALayer`: the functions on one adapter as an immutable pytree."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import AdapterError, ConfigError, LoRALayer, lora_linear, merge_lora_weight, unmerge_lora_weight
from tests.reference import as64, assert_close, random_array, reference_delta

ALPHA = 3.0
SCALINGS = {"standard": ALPHA / 2, "rslora": ALPHA / math.sqrt(2)}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer of rank 2, the shape of its input, and the einsum of the input and the weight."""

    shape: tuple[int, ...]
    x_shape: tuple[int, ...]
    einsum: str
    factorization: str | None = None
    scaling_mode: str = "standard"
    dtype: str = "float32"

    def layer(self, rng, **options):
        """A layer whose base, A and B are all random."""
        layer = LoRALayer(
            random_array(rng, self.shape, self.dtype),
            2,
            ALPHA,
            key=jax.random.key(0),
            factorization=self.factorization,
            scaling_mode=self.scaling_mode,
            **options,
        )
        for name in ("lora_a", "lora_b"):
            layer = layer.set(name, random_array(rng, getattr(layer, name).shape))
        return layer

    def x(self, rng):
        return random_array(rng, self.x_shape, self.dtype)

    @property
    def batch(self):
        return (self.factorization or "io").count("b")

    def delta(self, layer):
        return reference_delta({"A": layer.lora_a, "B": layer.lora_b}, 2 * SCALINGS[self.scaling_mode], self.batch)

    def output(self, layer, x):
        return np.einsum(self.einsum, as64(x), as64(layer.base_weight) + self.delta(layer))


CASES = {
    "dense": Case((5, 7), (13, 11, 5), "abi,io->abo"),
    "one vector": Case((5, 7), (5,), "i,io->o"),
    "rslora in bfloat16": Case((5, 7), (13, 5), "ai,io->ao", scaling_mode="rslora", dtype="bfloat16"),
    "experts": Case((3, 5, 7), (3, 13, 5), "bai,bio->bao", "bio"),
    "layers of heads": Case((3, 5, 7, 11), (3, 13, 5), "bai,biop->baop", "bioo", "rslora"),
    "projection": Case((5, 7, 11), (13, 5, 7), "aij,ijo->ao", "iio"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
DENSE = CASES["dense"]


def assert_same(found, wanted):
    """Two trees have the same structure, the static fields of a layer included, and the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


# ---------------------------------------------------------------- the call


@every_case
def test_call_is_the_base_plus_the_adapter(case, rng):
    layer, x = case.layer(rng), case.x(rng)
    found = layer(x)
    assert found.dtype == case.dtype
    assert_close(found, case.output(layer, x), factor=2)
    np.testing.assert_array_equal(found, lora_linear(x, layer.base_weight, layer.adapter, 2 * layer.scaling))


@every_case
def test_a_new_layer_gives_bitwise_the_bases_output(case, rng):
    layer, x = case.layer(rng), case.x(rng)
    layer = layer.set("lora_b", jnp.zeros_like(layer.lora_b))
    base = jnp.einsum(case.einsum, x, layer.base_weight)
    np.testing.assert_array_equal(layer(x), base)
    np.testing.assert_array_equal(layer.merge()(x), base)


@pytest.mark.parametrize("mode", SCALINGS)
def test_the_scaling_mode_says_how_rank_divides_alpha(mode, key):
    layer = LoRALayer(jnp.ones((5, 7)), 2, ALPHA, key=key, scaling_mode=mode)
    assert layer.scaling == pytest.approx(SCALINGS[mode])
    assert (layer.rank, layer.alpha, layer.scaling_mode) == (2, ALPHA, mode)


def test_a_new_layer_is_unmerged_frozen_and_has_a_zero_b(key, rng):
    weight = random_array(rng, (5, 7))
    layer = LoRALayer(weight, 2, key=key, init_std=0.5, dtype="bfloat16")
    assert (layer.is_base_frozen, layer.is_merged, layer.alpha) == (True, False, 1.0)
    assert (layer.lora_a.shape, layer.lora_b.shape) == ((5, 2), (2, 7))
    assert layer.lora_a.dtype == layer.lora_b.dtype == jnp.bfloat16
    assert np.all(as64(layer.lora_a) != 0)
    assert not np.any(as64(layer.lora_b))
    np.testing.assert_array_equal(layer.base_weight, weight)


def test_repr_shows_shapes_and_settings_and_no_arrays(key):
    assert repr(LoRALayer(jnp.ones((5, 7)), 2, ALPHA, key=key)) == (
        "LoRALayer(base_weight=(5, 7), lora_a=(5, 2), lora_b=(2, 7), alpha=3.0, scaling_mode='standard', "
        "is_base_frozen=True, is_merged=False)"
    )


# ---------------------------------------------------------------- a pytree


@every_case
def test_a_layer_is_a_pytree_of_its_three_arrays(case, rng):
    layer = case.layer(rng, is_base_frozen=False)
    leaves, treedef = jax.tree.flatten(layer)
    assert_same(jax.tree.unflatten(treedef, leaves), layer)
    paths = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(layer)}
    assert paths == {f".{name}": getattr(layer, name) for name in ("base_weight", "lora_a", "lora_b")}


@pytest.mark.parametrize("change", [{"alpha": 5.0}, {"scaling_mode": "rslora"}, {"is_base_frozen": False}])
def test_layers_with_other_settings_have_another_structure(change, key):
    layer, other = (
        LoRALayer(jnp.ones((5, 7)), 2, key=key, **options) for options in ({"alpha": ALPHA}, {"alpha": ALPHA} | change)
    )
    assert jax.tree.structure(layer) != jax.tree.structure(other)


@every_case
@pytest.mark.parametrize("merged", [False, True])
def test_jit_takes_layers_and_returns_them(case, merged, rng):
    layer, x = case.layer(rng), case.x(rng)
    layer = layer.merge() if merged else layer
    found, y = jax.jit(lambda layer, x: (layer, layer(x)))(layer, x)
    assert_same(found, layer)
    assert_close(y, as64(layer(x)))


def test_other_weights_do_not_retrace(rng):
    traces = []
    step = jax.jit(lambda layer, x: traces.append(None) or layer(x))
    for _ in range(2):
        layer, x = DENSE.layer(rng), DENSE.x(rng)
        assert_close(step(layer, x), DENSE.output(layer, x))
    assert len(traces) == 1


@every_case
@pytest.mark.parametrize("transform", ["vmap", "scan"])
def test_stacked_layers_are_mapped(case, transform, rng):
    layers, xs = [case.layer(rng) for _ in range(3)], jnp.stack([case.x(rng) for _ in range(3)])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    if transform == "vmap":
        found = jax.vmap(lambda layer, x: layer(x))(stacked, xs)
    else:
        found = jax.lax.scan(lambda carry, step: (carry, step[0](step[1])), None, (stacked, xs))[1]
    assert_close(found, np.stack([case.output(*pair) for pair in zip(layers, xs, strict=True)]), factor=2)


def test_vmap_builds_layers(rng):
    weights, keys = random_array(rng, (3, 5, 7)), jax.random.split(jax.random.key(0), 3)
    stacked = jax.vmap(lambda weight, key: LoRALayer(weight, 2, ALPHA, key=key))(weights, keys)
    layers = [LoRALayer(weight, 2, ALPHA, key=key) for weight, key in zip(weights, keys, strict=True)]
    assert_same(stacked, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_stop_at_a_frozen_base_alone(frozen, jit, rng):
    layer, x = DENSE.layer(rng, is_base_frozen=frozen), DENSE.x(rng)
    cotangent = random_array(rng, (13, 11, 7))
    grad = jax.grad(lambda layer, x: jnp.vdot(layer(x), cotangent), (0, 1))
    grads, x_grad = (jax.jit(grad) if jit else grad)(layer, x)
    assert jax.tree.structure(grads) == jax.tree.structure(layer)
    outer = np.einsum("abi,abo->io", as64(x), as64(cotangent))
    assert_close(grads.base_weight, np.zeros((5, 7)) if frozen else outer)
    assert_close(grads.lora_a, ALPHA / 2 * outer @ as64(layer.lora_b).T)
    assert_close(grads.lora_b, ALPHA / 2 * as64(layer.lora_a).T @ outer)
    assert_close(x_grad, as64(cotangent) @ (as64(layer.base_weight) + DENSE.delta(layer)).T)


def test_freeze_base_turns_the_gradient_of_the_base_off_and_on(rng):
    layer, x = DENSE.layer(rng), DENSE.x(rng)
    for frozen in (False, True):
        layer = layer.freeze_base(frozen)
        assert layer.is_base_frozen is frozen
        grads = jax.grad(lambda layer: layer(x).sum())(layer)
        assert np.any(as64(grads.base_weight)) == (not frozen)


def test_trainable_params_are_a_and_b_and_the_base_only_where_it_is_not_frozen(rng):
    layer = DENSE.layer(rng)
    adapter = {"lora_a": layer.lora_a, "lora_b": layer.lora_b}
    assert_same(layer.trainable_params(), adapter)
    assert_same(layer.freeze_base(False).trainable_params(), adapter | {"base_weight": layer.base_weight})


# ---------------------------------------------------------------- merge


@every_case
def test_merge_folds_the_update_into_the_base(case, rng):
    layer, x = case.layer(rng), case.x(rng)
    merged, alpha = layer.merge(), 2 * layer.scaling
    assert (merged.is_merged, layer.is_merged) == (True, False)
    assert merged.base_weight.dtype == case.dtype
    assert_close(merged.base_weight, as64(layer.base_weight) + case.delta(layer))
    assert_close(merged(x), case.output(layer, x), factor=2)
    np.testing.assert_array_equal(merged.base_weight, merge_lora_weight(layer.base_weight, layer.adapter, alpha))
    assert_same(merged.adapter, layer.adapter)


@every_case
def test_unmerge_takes_the_update_out_again(case, rng):
    layer = case.layer(rng)
    merged, alpha = layer.merge(), 2 * layer.scaling
    back = merged.unmerge()
    assert jax.tree.structure(back) == jax.tree.structure(layer)
    np.testing.assert_array_equal(back.base_weight, unmerge_lora_weight(merged.base_weight, layer.adapter, alpha))
    assert_close(back.base_weight, as64(layer.base_weight), factor=np.abs(as64(merged.base_weight)).max())


@every_case
def test_merge_to_base_is_the_plain_weight_of_a_merged_or_unmerged_layer(case, rng):
    layer = case.layer(rng)
    weight = layer.merge_to_base()
    assert isinstance(weight, jax.Array)
    np.testing.assert_array_equal(weight, layer.merge().base_weight)
    np.testing.assert_array_equal(weight, layer.merge().merge_to_base())


def test_merge_and_unmerge_work_under_jit(rng):
    layer = DENSE.layer(rng)
    merged = jax.jit(LoRALayer.merge)(layer)
    assert merged.is_merged
    assert_close(merged.base_weight, as64(layer.base_weight) + DENSE.delta(layer))
    assert_close(jax.jit(LoRALayer.unmerge)(merged).base_weight, as64(layer.base_weight), factor=5)


# ---------------------------------------------------------------- weights by name


@every_case
def test_set_changes_one_weight_and_leaves_the_old_layer_as_it_was(case, rng):
    layer = case.layer(rng)
    for name in ("base_weight", "lora_a", "lora_b"):
        before = getattr(layer, name)
        changed = layer.set(name, np.asarray(before) + 1)
        np.testing.assert_array_equal(getattr(changed, name), before + 1)
        assert getattr(layer, name) is before
        assert getattr(changed, name).dtype == before.dtype
        assert_same(changed.set(name, before), layer)


@pytest.mark.parametrize("frozen", [True, False])
def test_load_takes_what_trainable_params_gave(frozen, rng):
    source, target = (DENSE.layer(rng, is_base_frozen=frozen) for _ in range(2))
    loaded = target.load(source.trainable_params())
    assert_same(loaded.trainable_params(), source.trainable_params())
    np.testing.assert_array_equal(loaded.base_weight, (target if frozen else source).base_weight)


@pytest.mark.parametrize("name", ["alpha", "lora_a", "is_merged", "new"])
def test_a_layer_is_immutable(name, key):
    layer = LoRALayer(jnp.ones((5, 7)), 2, ALPHA, key=key)
    with pytest.raises(AttributeError, match="LoRALayer is immutable"):
        setattr(layer, name, 1.0)
    with pytest.raises(AttributeError, match="LoRALayer is immutable"):
        delattr(layer, name)


def _new(shape=(5, 7), rank=2, alpha=ALPHA, **options):
    return LoRALayer(jnp.ones(shape), rank, alpha, key=jax.random.key(0), **options)


_A, _B = jnp.ones((5, 2)), jnp.ones((2, 7))
ERRORS = {
    "rank 0": (lambda: _new(rank=0), ConfigError, "rank = 0: wanted a whole number of at least 1"),
    "rank too large": (lambda: _new(rank=6), AdapterError, "rank 6 is larger than the smaller side 5"),
    "three axes": (lambda: _new((3, 5, 7)), AdapterError, "pass factorization="),
    "another order": (lambda: _new(factorization="oi"), AdapterError, "axes in the order batch, in, out"),
    "another order of three": (
        lambda: _new((7, 5, 11), factorization="oio"),
        AdapterError,
        "in the order batch, in, out",
    ),
    "unknown scaling mode": (
        lambda: _new(scaling_mode="rs"),
        ConfigError,
        "scaling_mode = 'rs': wanted one of 'standard', 'rslora' (did you mean 'rslora'?)",
    ),
    "alpha not finite": (lambda: _new(alpha=math.nan), ConfigError, "alpha = nan: wanted a finite number"),
    "x of another width": (lambda: _new()(jnp.ones((3, 7))), AdapterError, "x (3, 7) does not fit the weight (5, 7)"),
    "x of another width, merged": (lambda: _new().merge()(jnp.ones((3, 7))), AdapterError, "x (3, 7) does not fit"),
    "merge twice": (lambda: _new().merge().merge(), AdapterError, "the layer is merged already: unmerge() it first"),
    "unmerge of an unmerged layer": (lambda: _new().unmerge(), AdapterError, "the layer is not merged: merge() it"),
    "set another shape": (
        lambda: _new().set("lora_a", _A.T),
        AdapterError,
        "lora_a: found shape (2, 5), wanted (5, 2)",
    ),
    "set an unknown name": (
        lambda: _new().set("lora_c", _A),
        ConfigError,
        "LoRALayer.set: unknown key 'lora_c' (did you mean 'lora_b'?); known keys: base_weight,",
    ),
    "set a merged layer": (lambda: _new().merge().set("lora_a", _A), AdapterError, "lora_a: the layer is merged"),
    "load too little": (lambda: _new().load({"lora_a": _A}), AdapterError, "missing lora_b: found lora_a"),
    "load nothing": (lambda: _new().load({}), AdapterError, "missing lora_a, lora_b: found nothing"),
    "load without the trainable base": (
        lambda: _new(is_base_frozen=False).load({"lora_a": _A, "lora_b": _B}),
        AdapterError,
        "missing base_weight: found lora_a, lora_b",
    ),
    "load an unknown name": (lambda: _new().load({"bias": _B}), ConfigError, "LoRALayer.load: unknown key 'bias'"),
    "load another shape": (
        lambda: _new().load({"lora_a": _A, "lora_b": _A}),
        AdapterError,
        "lora_b: found shape (5, 2)",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_a_call_that_cannot_be_right_says_what_was_found_and_wanted(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


# ---------------------------------------------------------------- diagnostics


@every_case
@pytest.mark.parametrize("merged", [False, True])
def test_diagnostics_are_those_of_the_dense_delta(case, merged, rng):
    layer = case.layer(rng)
    delta = case.delta(layer)
    rows = math.prod(size for size, role in zip(case.shape, case.factorization or "io", strict=True) if role == "i")
    values = np.linalg.svd(delta.reshape(*case.shape[: case.batch], rows, -1), compute_uv=False)[..., :2].ravel()
    shares = values / values.sum()
    wanted = {
        "rank": 2,
        "alpha": ALPHA,
        "scaling": SCALINGS[case.scaling_mode],
        "base_parameters": math.prod(case.shape),
        "lora_parameters": layer.lora_a.size + layer.lora_b.size,
        "delta_norm": np.linalg.norm(delta),
        "relative_norm": np.linalg.norm(delta) / np.linalg.norm(as64(layer.base_weight)),
        "effective_rank": np.exp(-np.sum(shares * np.log(shares))),
    }
    found = (layer.merge() if merged else layer).diagnostics()
    assert json.loads(json.dumps(found)) == found
    assert found == pytest.approx(wanted, rel=1e-2 if merged and case.dtype != "float32" else 1e-5)


def test_diagnostics_of_a_zero_delta_are_zero(key):
    found = LoRALayer(jnp.ones((5, 7)), 2, key=key).diagnostics()
    assert [found[name] for name in ("delta_norm", "relative_norm", "effective_rank")] == [0.0, 0.0, 0.0]
