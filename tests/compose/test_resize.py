"""Adapters of another rank."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from jlora import AdapterError, ConfigError, LoraConfig, merge_params
from jlora.compose import resize
from tests.compose import SHAPES, best, deltas, is_jax, matrices, random_of
from tests.reference import as64, assert_close, random_array, x64

ROLES = {"a/w": "io", "b/w": "bio", "c/w": "ioo"}


def one(
    rng: np.random.Generator, roles: str, rank: int, dtype: Any = "float64", **fields: Any
) -> tuple[Any, LoraConfig]:
    config = LoraConfig(rank=rank, alpha=3, factorizations={"w": roles}, target_modules="w", **fields)
    return {"w": random_of(rng, roles, rank, dtype)}, config


def several(rng: np.random.Generator, dtype: Any = "float64", **fields: Any) -> tuple[Any, LoraConfig]:
    """Three weights of ranks 3, 4 and 3, alphas 5, 5 and 2, and a place without an adapter."""
    given = {"rank": 3, "alpha": 5, "rank_pattern": {"b": 4}, "alpha_pattern": {"c": 2}}
    config = LoraConfig(**given, factorizations=ROLES, **fields)
    tree = {path[0]: {"w": random_of(rng, roles, config.rank_of(path), dtype)} for path, roles in ROLES.items()}
    return {**tree, "norm": {"scale": None}}, config


@pytest.mark.parametrize("roles", SHAPES)
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_it_is_the_truncated_svd_of_the_delta(rng, roles, scaling, rank):
    adapters, config = one(rng, roles, 4, scaling=scaling)
    small, resized = resize(adapters, config, rank)
    wanted = best(deltas(adapters, config, {"w": roles})["w"], rank)
    assert_close(deltas(small, resized, {"w": roles})["w"], wanted)
    assert resized == config.replace(rank=rank)


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_patterns_of_rank_and_alpha(rng, scaling):
    adapters, config = several(rng, scaling=scaling)
    new = {"a": 1, "**/w": 2}
    small, resized = resize(adapters, config, 3, rank_pattern=new)
    assert resized == config.replace(rank_pattern=new)
    before, after = deltas(adapters, config, ROLES), deltas(small, resized, ROLES)
    for path, rank in {"a/w": 1, "b/w": 2, "c/w": 2}.items():
        assert small[path[0]]["w"]["A"].shape[-1] == rank
        assert_close(after[path], best(before[path], rank))
    assert small["norm"] == {"scale": None}


def test_the_roots_of_the_singular_values_go_to_both_sides(rng):
    adapters, config = one(rng, "io", 4)
    small, _ = resize(adapters, config, 2)
    a, b = small["w"]["A"], small["w"]["B"]
    values = np.linalg.svd(deltas(adapters, config, {"w": "io"})["w"][0])[1][:2] / (3 / 2)
    np.testing.assert_allclose(a.T @ a, np.diag(values), atol=1e-12)
    np.testing.assert_allclose(b @ b.T, np.diag(values), atol=1e-12)


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("roles", ["io", "bio", "iiio"])
def test_a_larger_rank_keeps_the_delta_and_adds_zeros(rng, roles, scaling):
    adapters, config = one(rng, roles, 2, scaling=scaling)
    large, resized = resize(adapters, config, 5)
    assert_close(deltas(large, resized, {"w": roles})["w"], deltas(adapters, config, {"w": roles})["w"])
    a, b = large["w"]["A"], np.moveaxis(large["w"]["B"], roles.count("b"), -1)
    assert a.shape[-1] == b.shape[-1] == 5
    assert not np.any(a[..., 2:])
    assert not np.any(b[..., 2:])
    np.testing.assert_array_equal(a[..., :2], adapters["w"]["A"])


def test_the_same_rank_changes_no_bit(rng):
    adapters, config = several(rng, "bfloat16")
    same, resized = resize(adapters, config, 3, rank_pattern=config.rank_pattern)
    assert resized == config
    jax.tree.map(np.testing.assert_array_equal, same, adapters)


def test_there_and_back_is_the_delta(rng):
    adapters, config = several(rng)
    there = resize(*resize(adapters, config, 5), 3, rank_pattern={"b": 4})
    before, after = deltas(adapters, config, ROLES), deltas(*there, ROLES)
    assert there[1] == config
    for path in ROLES:
        assert_close(after[path], before[path])


def test_an_alpha_of_zero_keeps_the_factors_for_another_alpha(rng):
    adapters, config = one(rng, "io", 4)
    zero, resized = resize(adapters, config.replace(alpha=0), 2)
    wanted, _ = resize(adapters, config, 2)
    assert not np.any(deltas(zero, resized, {"w": "io"})["w"])
    jax.tree.map(np.testing.assert_array_equal, zero, wanted)


def test_a_negative_alpha(rng):
    adapters, config = one(rng, "io", 4)
    config = config.replace(alpha=-3)
    small = resize(adapters, config, 2)
    assert_close(deltas(*small, {"w": "io"})["w"], best(deltas(adapters, config, {"w": "io"})["w"], 2))


def test_a_b_of_zero_stays_zero(rng):
    adapters, config = one(rng, "bio", 3)
    adapters["w"]["B"] = np.zeros_like(adapters["w"]["B"])
    small, resized = resize(adapters, config, 2)
    assert not np.any(deltas(small, resized, {"w": "bio"})["w"])


def test_a_rank_that_the_adapter_does_not_have_is_filled_with_zeros(rng):
    adapters, config = one(rng, "io", 4)
    column, row = adapters["w"]["A"][:, :1], adapters["w"]["B"][:1]
    adapters["w"] = {"A": np.repeat(column, 4, axis=1), "B": np.repeat(row, 4, axis=0)}
    small, resized = resize(adapters, config, 3)
    assert_close(deltas(small, resized, {"w": "io"})["w"], deltas(adapters, config, {"w": "io"})["w"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_are_kept_and_rounded_once(rng, dtype):
    adapters, config = several(rng, dtype)
    small, resized = resize(adapters, config, 2)
    wide, _ = resize(jax.tree.map(as64, adapters), config, 2)
    for found, wanted in zip(jax.tree.leaves(small), jax.tree.leaves(wide), strict=True):
        assert is_jax(found)
        assert found.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(as64(found), as64(np.float32(wanted).astype(jnp.dtype(dtype))))
    assert resized.rank == 2


def test_float8_goes_in_and_out(rng):
    adapters, config = one(rng, "io", 3, "float8_e4m3fn")
    small, resized = resize(adapters, config, 2)
    assert small["w"]["A"].dtype == small["w"]["B"].dtype == jnp.float8_e4m3fn
    wanted = best(matrices(jax.tree.map(lambda x: x.astype("float32"), adapters)["w"], 1.0, "io"), 2)
    found = matrices(jax.tree.map(lambda x: x.astype("float32"), small)["w"], resized.alpha / 2, "io")
    np.testing.assert_allclose(found, wanted, atol=0.15 * np.max(np.abs(wanted)))


def test_float64_is_kept_as_numpy_where_jax_would_narrow_it(rng):
    adapters, config = one(rng, "io", 4)
    small, _ = resize(adapters, config, 2)
    assert isinstance(small["w"]["A"], np.ndarray)
    assert small["w"]["A"].dtype == np.float64


def test_the_result_is_the_same_under_x64(rng):
    adapters, config = several(rng, "float32")
    plain, _ = resize(adapters, config, 2)
    with x64():
        wide, _ = resize(adapters, config, 2)
    jax.tree.map(np.testing.assert_array_equal, plain, wide)


def test_the_structure_is_kept_and_the_result_merges(rng):
    adapters, config = several(rng, "float32")
    params = {
        **{path[0]: {"w": random_array(rng, SHAPES[roles])} for path, roles in ROLES.items()},
        "norm": {"scale": jnp.ones(3)},
    }
    small, resized = resize(freeze(adapters), config, 2)
    assert jax.tree.structure(small) == jax.tree.structure(freeze(adapters))
    merged = merge_params(freeze(params), small, resized)
    for path, change in deltas(adapters, config, ROLES).items():
        wanted = as64(params[path[0]]["w"]) + best(change, 2).reshape(SHAPES[ROLES[path]])
        assert_close(merged[path[0]]["w"], wanted)


def test_one_adapter_alone_is_a_tree(rng):
    adapter = random_of(rng, "io", 4)
    small, _ = resize(adapter, LoraConfig(rank=4, alpha=4), 2)
    assert_close(matrices(small, 2.0, "io"), best(matrices(adapter, 1.0, "io"), 2))


def test_batch_axes_that_two_readings_fit_are_told_by_the_factorization(rng):
    adapters = {"w": {"A": rng.standard_normal((2, 5, 2)), "B": rng.standard_normal((2, 2, 7))}}
    with pytest.raises(
        AdapterError, match=r"w: .*0 or 1 batch axes; give the configuration factorizations=\{'w': 'bio'"
    ):
        resize(adapters, LoraConfig(rank=2), 1)
    config = LoraConfig(rank=2, alpha=2, factorizations={"w": "bio"})
    small, resized = resize(adapters, config, 1)
    assert_close(deltas(small, resized, {"w": "bio"})["w"], best(matrices(adapters["w"], 1.0, "bio"), 1))


def test_problems_are_named_all_at_once(rng):
    adapters, config = several(rng)
    with pytest.raises(AdapterError) as error:
        resize(adapters, config, 9, rank_pattern={"b": 8, "nowhere": 2})
    text = str(error.value)
    assert text.startswith("3 problems:")
    assert "rank_pattern: 'nowhere' matches nothing that is adapted; nearest paths: " in text
    assert "a/w: rank 9 is larger than the smaller side 7; lower it, or give rank_pattern={'a/w': 7}" in text
    assert "b/w: rank 8 is larger than the smaller side 7" in text


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "2"])
def test_a_rank_is_a_whole_number(rng, rank):
    with pytest.raises(ConfigError, match=r"rank = .*wanted a whole number of at least 1"):
        resize(*several(rng), rank)


def bad(name: str, rng: np.random.Generator) -> Any:
    good = random_of(rng, "io", 3)
    return {
        "dora": {**good, "m": np.ones(7)},
        "half": {"A": good["A"]},
        "array": good["A"],
        "integer": {name: np.ones_like(array, np.int8) for name, array in good.items()},
        "infinite": {**good, "B": np.where(good["B"] == good["B"][1, 2], np.inf, good["B"])},
        "misfit": {"A": good["A"], "B": good["B"][:2]},
        "rank": random_of(rng, "io", 2),
        "empty": {"A": good["A"], "B": good["B"][:, :0]},
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "dora",
            r"found a mapping of 'A', 'B', 'm', wanted an entry of 'A' and 'B', 'value', 'offset' or 'magnitude'",
        ),
        ("half", r"found a mapping of 'A', wanted an entry of 'A' and 'B'"),
        ("array", r"found an array \(11, 3\), wanted an entry of 'A' and 'B'"),
        ("integer", r"A is of dtype int8: wanted a floating dtype"),
        ("infinite", r"B holds values that are not finite"),
        ("misfit", r"A \(11, 3\) and B \(2, 7\) do not fit"),
        ("rank", r"A \(11, 2\) does not have the rank 3 of the configuration"),
        ("empty", r"B \(3, 0\) is empty"),
    ],
)
def test_what_is_no_adapter_is_named_with_its_path(rng, name, message):
    with pytest.raises(AdapterError, match=f"^up/kernel: {message}"):
        resize({"up": {"kernel": bad(name, rng)}, "down": random_of(rng, "io", 3)}, LoraConfig(rank=3), 2)


def test_a_factorization_that_does_not_fit_is_named(rng):
    with pytest.raises(
        AdapterError, match=r"w: A \(11, 3\) and B \(3, 7\) do not fit the factorization 'ioo' given by"
    ):
        resize({"w": random_of(rng, "io", 3)}, LoraConfig(rank=3, factorizations={"w": "ioo"}), 2)


def test_values_beyond_the_dtype_are_an_error(rng):
    adapters = {"w": {"A": jnp.full((5, 2), 6e4, "float16"), "B": jnp.full((2, 7), 1e-3, "float16")}}
    large, _ = resize(adapters, LoraConfig(rank=2), 4)
    assert np.isfinite(large["w"]["A"]).all()
    adapters["w"]["B"] = jnp.full((2, 7), 6e4, "float16")
    with pytest.raises(AdapterError, match=r"w: values up to 1.2e\+05 do not fit the dtype float16"):
        resize(adapters, LoraConfig(rank=2), 4)


def test_the_configuration_is_one(rng):
    with pytest.raises(ConfigError, match="config: found dict, wanted a LoraConfig"):
        resize({"w": random_of(rng, "io", 3)}, {"rank": 3}, 2)
