"""Starts at the weights: formulas in float64, the model that stays the same, and the way back to the original base."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import AdapterError, ConfigError, LoraConfig, TargetError
from jlora.interop.peft import write_peft
from jlora.starts import Begin

WEIGHTS = {
    "dense": ((5, 7), "io"),
    "torch": ((7, 5), "oi"),
    "heads": ((5, 2, 3), "ioo"),
    "layers": ((2, 5, 7), "bio"),
    "experts": ((3, 7, 5), "boi"),
    "conv": ((2, 3, 5, 7), "iiio"),
}
ROLES = {name: roles for name, (_, roles) in WEIGHTS.items()}
CHANGING, KEEPING = ("pissa", "olora"), ("mica", "orthogonal")


def config_of(init, **fields):
    return LoraConfig(rank=2, alpha=3, init=init, factorizations=ROLES, **fields)


def params_of(rng, dtype=np.float32):
    tree = {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, (shape, _) in WEIGHTS.items()}
    return tree | {"bias": jnp.zeros(3, int)}


def matrices(name, weight):
    """The weight as matrices (n, in, out) in float64."""
    shape, roles = WEIGHTS[name]
    order = [axis for role in "bio" for axis in range(len(shape)) if roles[axis] == role]
    sizes = [int(np.prod([shape[axis] for axis in range(len(shape)) if roles[axis] == role])) for role in "bio"]
    return np.asarray(weight, np.float64).transpose(order).reshape(sizes)


def factors(name, entry):
    """A (n, in, r) and B (n, r, out) in float64."""
    n, ins, outs = matrices(name, np.zeros(WEIGHTS[name][0])).shape
    a, b = (np.asarray(entry[part], np.float64) for part in "AB")
    return a.reshape(n, ins, -1), b.reshape(n, -1, outs)


@pytest.mark.parametrize("init", [*CHANGING, *KEEPING])
def test_the_model_is_the_same_and_what_is_not_changed_is_the_same_object(rng, init):
    params = params_of(rng)
    started = jlora.start(jax.random.key(3), params, config_of(init))
    merged = jlora.merge_params(started.params, started.adapters, started.config)
    for name in WEIGHTS:
        np.testing.assert_allclose(merged[name], params[name], rtol=1e-5, atol=2e-6)
        assert (started.params[name] is params[name]) == (init in KEEPING)
        assert started.params[name].dtype == params[name].dtype
    assert started.params["bias"] is params["bias"]
    assert started.adapters["bias"] is None


def test_pissa_takes_the_largest_singular_values(rng):
    params = params_of(rng)
    started = jlora.start(None, params, config_of("pissa"))
    for name in WEIGHTS:
        a, b = factors(name, started.adapters[name])
        for matrix, rest, one, two in zip(
            matrices(name, params[name]), matrices(name, started.params[name]), a, b, strict=True
        ):
            u, s, vh = np.linalg.svd(matrix, full_matrices=False)
            np.testing.assert_allclose(1.5 * one @ two, (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(one, axis=0), np.linalg.norm(two, axis=1), rtol=1e-4)
            np.testing.assert_allclose(np.linalg.svd(rest)[1][: len(s) - 2], s[2:], rtol=1e-3, atol=1e-4)


def test_olora_takes_the_first_columns_of_qr(rng):
    params = params_of(rng)
    started = jlora.start(None, params, config_of("olora"))
    for name in WEIGHTS:
        for matrix, one, two in zip(matrices(name, params[name]), *factors(name, started.adapters[name]), strict=True):
            q, r = np.linalg.qr(matrix.T)
            np.testing.assert_allclose(one @ two, (q[:, :2] @ r[:2]).T, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(two @ two.T, np.eye(2), atol=1e-5)


def test_mica_has_the_smallest_singular_vectors_in_b(rng):
    params = params_of(rng)
    started = jlora.start(None, params, config_of("mica"))
    for name in WEIGHTS:
        for matrix, one, two in zip(matrices(name, params[name]), *factors(name, started.adapters[name]), strict=True):
            s, vh = np.linalg.svd(matrix, full_matrices=False)[1:]
            assert not one.any()
            np.testing.assert_allclose(np.abs(two @ vh[-2:].T), np.eye(2), atol=1e-3 + 1e-5 / (s[-2] - s[-1]))


def test_orthogonal_factors_are_not_zero_and_their_product_is(rng):
    started = jlora.start(jax.random.key(5), params_of(rng), config_of("orthogonal"))
    other = jlora.start(jax.random.key(6), params_of(rng), config_of("orthogonal"))
    for name in WEIGHTS:
        a, b = factors(name, started.adapters[name])
        assert 0.02 < np.abs(a).mean() < 0.3
        assert np.abs(b).min() > 0
        np.testing.assert_allclose(a @ b, 0, atol=1e-7)
        assert (started.adapters[name]["A"] != other.adapters[name]["A"]).any()
    a, _ = factors("layers", started.adapters["layers"])
    assert (a[0] != a[1]).any()


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("init", CHANGING)
def test_the_way_back_is_plain_lora_of_twice_the_rank_over_the_original(rng, tmp_path, init, scaling):
    params = params_of(rng)
    patterns = {"rank_pattern": {"heads": 1}, "alpha_pattern": {"conv": 5.0}}
    started = jlora.start(None, params, config_of(init, scaling=scaling, **patterns))
    moved = jax.tree.map(lambda part: part + 0.1 * rng.standard_normal(part.shape), started.adapters)
    plain, config = started.plain(moved)
    assert (config.rank, config.init, config.changes_base) == (4, "gaussian", False)
    assert plain["heads"]["A"].shape[-1] == 2
    wanted = jlora.merge_params(started.params, moved, started.config)
    found = jlora.merge_params(params, plain, config)
    for name in WEIGHTS:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=5e-6)
    jlora.save_adapters(tmp_path / "own", plain, config)
    again, read = jlora.load_adapters(tmp_path / "own", params=params)
    assert read == config
    np.testing.assert_array_equal(again["conv"]["B"], plain["conv"]["B"])


@pytest.mark.parametrize("init", KEEPING)
def test_a_start_that_leaves_the_base_needs_no_way_back(rng, tmp_path, init):
    started = jlora.start(None, params_of(rng), config_of(init))
    assert started.plain(started.adapters) == (started.adapters, started.config)
    jlora.save_adapters(tmp_path, started.adapters, started.config)
    assert jlora.load_adapters(tmp_path)[1].init == init


@pytest.mark.parametrize("init", CHANGING)
def test_adapters_alone_are_not_written(rng, tmp_path, init):
    started = jlora.start(None, params_of(rng), config_of(init))
    for write in (jlora.save_adapters, write_peft):
        with pytest.raises(ConfigError, match=re.escape(f"init = '{init}': the start took a part out of the base")):
            write(tmp_path / "out", started.adapters, started.config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("taken", [True, False])
def test_a_start_of_ones_own(rng, tmp_path, taken):
    seen = []

    def corner(stream, weight, rank, scaling):
        seen.append((weight.shape, rank, scaling))
        return Begin(weight[:, :rank] / scaling, np.eye(rank, weight.shape[1], dtype=np.float32), taken)

    params = {"dense": params_of(rng)["dense"]}
    config = LoraConfig(rank=2, alpha=3, factorizations={"dense": "io"})
    started = jlora.start(None, params, config, init=corner)
    assert seen == [((5, 7), 2, 1.5)]
    assert started.config.changes_base == taken
    np.testing.assert_allclose(started.params["dense"][:, :2], 0 if taken else params["dense"][:, :2], atol=1e-6)
    if taken:
        plain, config = started.plain(started.adapters)
        np.testing.assert_allclose(jlora.merge_params(params, plain, config)["dense"], params["dense"], atol=1e-6)


def test_bfloat16_is_computed_in_float32_and_rounded_once(rng):
    params = {"dense": params_of(rng, jnp.bfloat16)["dense"]}
    config = LoraConfig(rank=2, alpha=3, init="pissa", factorizations={"dense": "io"})
    started = jlora.start(None, params, config)
    assert started.params["dense"].dtype == jnp.bfloat16
    assert started.adapters["dense"]["A"].dtype == jnp.float32
    a, b = factors("dense", started.adapters["dense"])
    rest = np.asarray(params["dense"], np.float64) - 1.5 * (a @ b)[0]
    np.testing.assert_allclose(started.params["dense"].astype(np.float32), rest, rtol=4e-3, atol=1e-3)


def test_boxes_and_places_are_kept(rng):
    mesh = jax.make_mesh((1,), ("model",))
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    kernel = nn.Partitioned(jax.device_put(params_of(rng)["dense"], columns), ("embed", "mlp"))
    started = jlora.start(None, {"kernel": kernel}, LoraConfig(rank=2, init="pissa"))
    assert started.params["kernel"].names == ("embed", "mlp")
    assert started.params["kernel"].value.sharding == columns
    assert started.adapters["kernel"]["B"].names == (None, "mlp")
    assert started.adapters["kernel"]["B"].value.sharding.spec == jax.sharding.PartitionSpec(None, "model")


def test_what_does_not_fit_says_what_to_do(rng):
    params = params_of(rng)
    shapes = jax.eval_shape(lambda: params)
    bad = params | {"conv": params["conv"].at[0, 0, 0, 0].set(jnp.nan)}
    plain = LoraConfig(rank=2, factorizations=ROLES)
    cases = [
        (ConfigError, "init = 'gaussian': needs nothing of the weights: init_lora is for it", params, plain),
        (
            ConfigError,
            "kind = 'dora': a start from the weights is for kind 'lora'",
            params,
            config_of("pissa", kind="dora"),
        ),
        (TargetError, ": a shape: the adapters begin at the numbers of the weight", shapes, config_of("pissa")),
        (TargetError, "conv: holds a NaN or an infinity", bad, config_of("olora")),
        (TargetError, "rank 3: an orthogonal start gives", params, config_of("orthogonal").replace(rank=3)),
        (TargetError, "give an alpha above 0", params, config_of("pissa").replace(alpha=0)),
    ]
    for error, message, tree, config in cases:
        with pytest.raises(error, match=re.escape(message)):
            jlora.start(None, tree, config)
    with pytest.raises(
        ConfigError, match=re.escape("init = 'pissa': begins at the weights, and may change them: jlora.start(")
    ):
        jlora.init_lora(None, params, config_of("pissa"))
    with pytest.raises(
        TargetError, match=re.escape("the start returned A (1, 2) and B (2, 2): wanted A (5, 2) and B (2, 7)")
    ):
        jlora.start(
            None,
            {"dense": params["dense"]},
            LoraConfig(rank=2, factorizations={"dense": "io"}),
            init=lambda *_: Begin(np.ones((1, 2)), np.eye(2), False),
        )
    started = jlora.start(None, params, config_of("pissa"))
    with pytest.raises(AdapterError, match="found other paths than this start has"):
        started.plain({"dense": started.adapters["dense"]})
