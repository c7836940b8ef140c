"""Adapters from a base and its fine-tuned copy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from jlora import AdapterError, ConfigError, LoraConfig, TargetError, init_lora, merge_params
from jlora.compose import Extraction, combine, extract, extract_weight, resize
from tests.compose import SHAPES, best, deltas, is_jax, matrices
from tests.reference import as64, assert_close, random_array, randomize, x64


def stack_of(array: Any, roles: str) -> np.ndarray:
    """A weight as a stack of matrices (n, in, out), one element after another."""
    array = as64(array)
    sizes = {role: [n for n, r in zip(array.shape, roles, strict=True) if r == role] for role in "bio"}
    result = np.zeros([math.prod(sizes[role]) for role in "bio"])
    for index in np.ndindex(array.shape):
        place = []
        for role in "bio":
            own = [i for i, r in zip(index, roles, strict=True) if r == role]
            place.append(int(np.ravel_multi_index(own, sizes[role])) if own else 0)
        result[tuple(place)] = array[index]
    return result


def pair(rng: np.random.Generator, roles: str, dtype: Any = "float64") -> tuple[Any, Any]:
    base, change = rng.standard_normal(SHAPES[roles]), 0.1 * rng.standard_normal(SHAPES[roles])
    return tuple(w if dtype == "float64" else jnp.asarray(w, dtype) for w in (base, base + change))


def low_rank(rng: np.random.Generator, shape: tuple[int, ...], values: np.ndarray) -> np.ndarray:
    """A matrix of these singular values."""
    u, v = (np.linalg.qr(rng.standard_normal((n, len(values)))).Q for n in shape)
    return (u * values) @ v.T


@pytest.mark.parametrize("roles", SHAPES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_the_truncated_svd_of_the_difference(rng, roles, dtype, rank):
    base, tuned = pair(rng, roles, dtype)
    adapter, found = extract_weight(base, tuned, roles, rank=rank)
    change = stack_of(tuned, roles) - stack_of(base, roles)
    wanted = best(change, rank)
    assert_close(matrices(adapter, 1.0, roles), wanted, dtype, factor=4)
    norm = np.linalg.norm(change)
    assert (found.path, found.shape, found.rank) == ("", SHAPES[roles], rank)
    assert found.norm == pytest.approx(norm, rel=1e-5)
    assert found.error == pytest.approx(np.linalg.norm(change - wanted) / norm, rel=1e-5)
    assert found.energy == pytest.approx(np.sum(wanted**2) / norm**2, rel=1e-5)
    assert is_jax(adapter["A"]) == (dtype != "float64")


def test_the_roots_of_the_singular_values_go_to_both_sides(rng):
    base, tuned = pair(rng, "io")
    adapter, _ = extract_weight(base, tuned, "io", rank=3)
    values = np.linalg.svd(tuned - base)[1][:3]
    np.testing.assert_allclose(adapter["A"].T @ adapter["A"], np.diag(values), atol=1e-12)
    np.testing.assert_allclose(adapter["B"] @ adapter["B"].T, np.diag(values), atol=1e-12)


@pytest.mark.parametrize("roles", ["io", "bio", "ioo"])
@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99, 1.0])
def test_the_smallest_rank_that_keeps_the_energy(rng, roles, energy):
    base, tuned = pair(rng, roles)
    _, found = extract_weight(base, tuned, roles, energy=energy)
    values = np.linalg.svd(stack_of(tuned, roles) - stack_of(base, roles))[1]
    kept = np.cumsum(np.sum(values**2, axis=0)) / np.sum(values**2)
    assert found.rank == 1 + int(np.argmax(kept >= energy - 1e-12))
    assert found.energy == pytest.approx(kept[found.rank - 1], abs=1e-12)


def test_the_rank_bounds_what_energy_asks_for(rng):
    base, tuned = pair(rng, "io")
    assert extract_weight(base, tuned, "io", rank=2, energy=1.0)[1].rank == 2
    assert extract_weight(base, tuned, "io", rank=5, energy=1e-6)[1].rank == 1


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_all_energy_of_a_low_rank_difference_is_its_rank(rng, dtype):
    change = low_rank(rng, (61, 47), np.array([3.0, 2.0, 1.0])).astype(dtype)
    adapter, found = extract_weight(np.zeros_like(change), change, "io", energy=1.0)
    assert found.rank == 3
    assert found.error < {"float64": 1e-14, "float32": 1e-6}[dtype]
    assert adapter["A"].dtype == dtype


def test_a_tiny_error_is_not_lost_to_cancellation(rng):
    values = np.array([1.0, 0.5, 1e-9])
    _, found = extract_weight(np.zeros((31, 23)), low_rank(rng, (31, 23), values), "io", rank=2)
    assert found.error == pytest.approx(1e-9 / np.linalg.norm(values), rel=1e-5)


def test_the_error_counts_the_rounding_of_the_adapter(rng):
    base, tuned = pair(rng, "io", "float32")
    exact = extract_weight(base, tuned, "io", rank=7)[1]
    adapter, found = extract_weight(base, tuned, "io", rank=7, dtype="bfloat16")
    assert adapter["A"].dtype == adapter["B"].dtype == jnp.bfloat16
    change = as64(tuned) - as64(base)
    wanted = np.linalg.norm(change - as64(adapter["A"]) @ as64(adapter["B"])) / np.linalg.norm(change)
    assert exact.error < 1e-6 < 1e-4 < found.error
    assert found.error == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_low_precision_weights_are_subtracted_in_float32(rng, dtype):
    base, tuned = pair(rng, "io", dtype)
    adapter, found = extract_weight(base, tuned, "io", rank=7)
    assert adapter["A"].dtype == jnp.float32
    wanted = as64(tuned.astype("float32")) - as64(base.astype("float32"))
    assert_close(matrices(adapter, 1.0, "io")[0], wanted, "float32")
    assert found.error < 1e-6


def test_no_difference_is_a_zero_adapter(rng):
    base, _ = pair(rng, "bio")
    adapter, found = extract_weight(base, base, "bio", rank=2)
    assert adapter["A"].shape == (2, 11, 2)
    assert not np.any(adapter["A"])
    assert (found.energy, found.error, found.norm) == (1.0, 0.0, 0.0)
    assert extract_weight(base, base, "bio", energy=0.5)[1].rank == 1


def test_a_large_matrix_is_sketched_nearly_as_well_as_the_best(rng, monkeypatch):
    values = 1 / np.arange(1.0, 601.0)
    change = low_rank(rng, (601, 701), values).astype("float32")
    sizes = []
    svd = np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda x, **kw: (sizes.append(min(x.shape)), svd(x, **kw))[1])
    adapter, found = extract_weight(np.zeros_like(change), change, "io", rank=20)
    assert max(sizes) < 50
    assert found.error == pytest.approx(np.linalg.norm(values[20:]) / np.linalg.norm(values), rel=1e-3)
    assert_close(matrices(adapter, 1.0, "io")[0], best(change[None], 20)[0], "bfloat16")
    again, _ = extract_weight(np.zeros_like(change), change, "io", rank=20)
    other, _ = extract_weight(np.zeros_like(change), change, "io", rank=20, seed=1)
    assert np.array_equal(again["A"], adapter["A"])
    assert not np.array_equal(other["A"], adapter["A"])


@pytest.mark.parametrize(("energy", "sketched"), [(0.93, True), (0.995, True), (0.99965, False)])
def test_the_sketch_grows_until_the_energy_is_kept(rng, monkeypatch, energy, sketched):
    values = 1 / np.arange(1.0, 601.0)
    change = low_rank(rng, (601, 701), values)
    sizes = []
    svd = np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda x, **kw: (sizes.append(min(x.shape)), svd(x, **kw))[1])
    _, found = extract_weight(np.zeros_like(change), change, "io", energy=energy)
    kept = np.cumsum(values**2) / np.sum(values**2)
    wanted = 1 + int(np.argmax(kept >= energy))
    assert (max(sizes) < 601) == sketched
    assert wanted <= found.rank <= wanted + max(1, wanted // 50)
    assert found.energy >= energy - 1e-9


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_all_energy_of_a_large_low_rank_difference_is_found_in_the_sketch(rng, monkeypatch, dtype):
    change = low_rank(rng, (601, 701), np.arange(50.0, 0.0, -1.0)).astype(dtype)
    svd = np.linalg.svd
    sizes = []
    monkeypatch.setattr(np.linalg, "svd", lambda x, **kw: (sizes.append(min(x.shape)), svd(x, **kw))[1])
    _, found = extract_weight(np.zeros_like(change), change, "io", energy=1.0)
    assert found.rank == 50
    assert found.error < {"float64": 1e-14, "float32": 1e-6}[dtype]
    assert max(sizes) < 100


CONFIG = LoraConfig(rank=3, rank_pattern={"query": 2}, alpha=7, dropout=0.25, factorizations={"turned": "oi"})
ROLES = {"up/kernel": "io", "query/kernel": "ioo", "stack/kernel": "bio", "turned": "oi"}


def params_of(rng: np.random.Generator) -> Any:
    shapes = {
        "up": {"kernel": (11, 7), "bias": (7,)},
        "query": {"kernel": (11, 3, 5), "bias": (3, 5)},
        "stack": {"kernel": (2, 11, 7), "bias": (2, 7)},
        "turned": (5, 13),
        "norm": {"scale": (7,)},
    }
    return jax.tree.map(lambda shape: random_array(rng, shape), shapes, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_adapters_that_were_merged_come_back(rng, key, scaling):
    params, config = params_of(rng), CONFIG.replace(scaling=scaling)
    adapters = randomize(rng, init_lora(key, params, config))
    tuned = merge_params(params, adapters, config)
    found, result, report = extract(params, tuned, config)
    before, after = deltas(adapters, config, ROLES), deltas(found, result, ROLES)
    assert before.keys() == after.keys()
    for path, delta in before.items():
        assert_close(after[path], delta, "float32")
        assert result.effective_alpha_of(path) == result.rank_of(path) == config.rank_of(path)
    jax.tree.map(lambda x, y: assert_close(x, as64(y), factor=2), merge_params(params, found, result), tuned)
    assert report.left_out == report.unchanged == ()
    assert report.error < 1e-5


def test_the_configuration_names_what_was_found(rng):
    base, tuned = params_of(rng), params_of(rng)
    adapters, result, report = extract(base, tuned, CONFIG)
    assert result == LoraConfig(
        rank=3,
        alpha=3,
        dropout=0.25,
        target_modules=("query/kernel", "stack/kernel", "turned", "up/kernel"),
        rank_pattern={"query/kernel": 2},
        alpha_pattern={"query/kernel": 2},
        factorizations={"query/kernel": "ioo", "stack/kernel": "bio", "turned": "oi"},
    )
    assert jax.tree.structure(adapters) == jax.tree.structure(init_lora(None, base, result))
    assert report.left_out == ("norm/scale", "query/bias", "stack/bias", "up/bias")
    for one in report.weights:
        change = stack_of(leaf_at(tuned, one.path), ROLES[one.path]) - stack_of(
            leaf_at(base, one.path), ROLES[one.path]
        )
        left = np.linalg.norm(change - deltas(adapters, result, ROLES)[one.path]) / np.linalg.norm(change)
        assert one.error == pytest.approx(left, rel=1e-4)


def leaf_at(tree: Any, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def test_each_weight_has_the_rank_that_its_energy_needs(rng):
    base = {name: {"kernel": np.zeros((31, 23), np.float32)} for name in ("a", "b", "c")}
    values = {"a": [1.0], "b": [1.0, 0.9, 0.8], "c": np.ones(20)}
    tuned = {n: {"kernel": low_rank(rng, (31, 23), np.array(v)).astype("float32")} for n, v in values.items()}
    adapters, result, report = extract(base, tuned, LoraConfig(rank=7), energy=0.9)
    assert [result.rank_of(f"{name}/kernel") for name in "abc"] == [1, 3, 7]
    assert [one.energy >= 0.9 for one in report.weights] == [True, True, False]
    assert adapters["c"]["kernel"]["A"].shape == (31, 7)


def test_what_did_not_change_is_left_out(rng):
    base, tuned = params_of(rng), params_of(rng)
    tuned["up"], tuned["stack"]["bias"] = base["up"], base["stack"]["bias"]
    adapters, result, report = extract(freeze(base), freeze(tuned), CONFIG)
    assert adapters["up"] == freeze({"kernel": None, "bias": None})
    assert report.unchanged == ("up/kernel",)
    assert report.left_out == ("norm/scale", "query/bias")
    assert "up/kernel" not in result.target_modules
    merge_params(freeze(base), adapters, result)


def test_the_result_goes_on_to_resize_and_combine(rng):
    base, tuned = params_of(rng), params_of(rng)
    found = extract(base, tuned, CONFIG)[:2]
    both = combine([found, found], [0.5, 0.5], method="cat")
    small = resize(*both, 3, rank_pattern={"query": 2})
    before, after = deltas(*found, ROLES), deltas(*small, ROLES)
    for path in ROLES:
        assert_close(after[path], before[path], "float32")


def test_the_dtype_is_that_of_the_configuration(rng):
    adapters, result, _ = extract(params_of(rng), params_of(rng), CONFIG.replace(dtype="bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapters)} == {"bfloat16"}
    assert result.dtype == "bfloat16"


def test_the_result_is_the_same_under_x64(rng):
    base, tuned = params_of(rng), params_of(rng)
    plain = extract(base, tuned, CONFIG)[0]
    with x64():
        wide = extract(base, tuned, CONFIG)[0]
    jax.tree.map(np.testing.assert_array_equal, plain, wide)


def test_the_report_is_a_table(rng):
    base = {"up": {"kernel": np.zeros((3, 2), np.float32), "<b>": np.zeros(2)}, "down": {"kernel": np.zeros((2, 3))}}
    change = np.array([[4, 0], [0, 3], [0, 0]], np.float32)
    tuned = {"up": {"kernel": change, "<b>": np.ones(2)}, "down": {"kernel": 2.0 * change.T}}
    report = extract(base, tuned, LoraConfig(rank=1, rank_pattern={"down": 2}))[2]
    assert isinstance(report, Extraction)
    assert str(report).splitlines() == [
        "path         shape  rank   energy  error left",
        "───────────  ─────  ────  ───────  ──────────",
        f"down/kernel  2x3       2  100.00%{report.weights[0].error:>12.2e}",
        "up/kernel    3x2       1   64.00%    6.00e-01",
        "───────────  ─────  ────  ───────  ──────────",
        "2 weights                  92.80%    2.68e-01",
        "1 changed, but not adapted, and so not in the adapters (no weight of known axes): up/<b>",
    ]
    assert repr(report) == str(report)
    assert report._repr_html_().endswith("(no weight of known axes): up/&lt;b&gt;</p>")
    assert report.error == pytest.approx(3 / math.hypot(4, 3, 8, 6))


def test_trees_that_differ_are_an_error_with_every_path(rng):
    base, tuned = params_of(rng), params_of(rng)
    del tuned["norm"]
    tuned["up"]["kernel"] = tuned["up"]["kernel"].T
    tuned["extra"] = jnp.ones(3)
    with pytest.raises(TargetError) as error:
        extract(base, tuned, CONFIG)
    text = str(error.value)
    assert text.startswith("3 problems:")
    assert "extra: in tuned, not in base; nearest paths: " in text
    assert "norm/scale: in base, not in tuned; nearest paths: " in text
    assert "up/kernel: shape (11, 7) in base, (7, 11) in tuned" in text


def test_what_is_carried_whole_is_the_tuned_leaf(rng):
    base, tuned = params_of(rng), params_of(rng)
    base["count"], tuned["count"] = np.array(3), np.array(2**40)
    base["mask"], tuned["mask"] = np.array([True, False]), np.array([True, True])
    tuned["stack"]["bias"] = base["stack"]["bias"]
    adapters, result, report = extract(base, tuned, CONFIG, whole=("**",))
    assert report.whole == ("count", "mask", "norm/scale", "query/bias", "up/bias")
    assert report.left_out == ()
    assert report.why == {}
    assert adapters["stack"]["bias"] is None
    for path in report.whole:
        entry, leaf = leaf_at(adapters, path), leaf_at(tuned, path)
        assert entry["value"] is not leaf
        assert type(entry["value"]) is type(leaf)
        np.testing.assert_array_equal(entry["value"], leaf)
    merged = merge_params({k: v for k, v in base.items() if k not in ("count", "mask")}, without(adapters), result)
    for path in ("norm/scale", "query/bias", "up/bias"):
        np.testing.assert_array_equal(leaf_at(merged, path), leaf_at(tuned, path))
    assert str(report).splitlines()[-1] == f"5 carried whole: {', '.join(report.whole)}"


def without(adapters: Any) -> Any:
    return {name: node for name, node in adapters.items() if name not in ("count", "mask")}


def test_leaves_of_other_shapes_are_carried_or_left_out(rng):
    base, tuned = params_of(rng), params_of(rng)
    tuned["norm"] = {"scale": jnp.ones(13)}
    tuned["turned"] = random_array(rng, (5, 17))
    tuned["extra"] = jnp.ones(3)
    base["gone"] = jnp.ones(3)
    left = {"norm/scale": "of another shape", "gone": "in one of the two alone", "extra": "in one of the two alone"}
    config = CONFIG.replace(exclude_modules=("extra", "gone", "norm"))
    adapters, result, report = extract(base, tuned, config, whole="turned")
    np.testing.assert_array_equal(adapters["turned"]["value"], tuned["turned"])
    assert report.whole == ("turned",)
    assert {path: report.why[path] for path in left} == left
    assert set(report.left_out) == {*left, "query/bias", "stack/bias", "up/bias"}
    assert "turned" not in result.target_modules
    assert report.notes[0] == "1 carried whole: turned"
    told = "1 changed, but not adapted, and so not in the adapters (of another shape): norm/scale"
    assert told in report.warning.splitlines()
    assert str(report).splitlines()[-4:] == list(report.notes)
    with pytest.raises(TargetError, match=r"turned: shape .*: exclude_modules leaves it out, whole carries it"):
        extract(base, tuned, config)
    with pytest.raises(TargetError, match="whole: 'up/skale' matches nothing; nearest paths: "):
        extract(base, tuned, config, whole=("turned", "up/skale"))


def test_values_that_are_not_finite_are_named(rng):
    base, tuned = params_of(rng), params_of(rng)
    tuned["query"]["kernel"] = tuned["query"]["kernel"].at[1, 2, 3].set(jnp.nan)
    with pytest.raises(AdapterError, match=r"^query/kernel: the difference of tuned and base is not finite"):
        extract(base, tuned, CONFIG)


def test_trees_that_are_the_same_are_an_error(rng):
    base = params_of(rng)
    with pytest.raises(AdapterError, match="none of the targeted weights changed"):
        extract(base, base, CONFIG)


def test_leaves_that_are_no_numbers_are_passed_over(rng, key):
    base = {**params_of(rng), "key": key, "flag": np.array(True), "gap": np.array([np.nan, 1])}
    tuned = {**base, **params_of(rng), "key": jax.random.key(9)}
    assert "gap" not in extract(base, tuned, CONFIG)[2].left_out


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ConfigError, "give rank=, energy=, or both"),
        ({"rank": 8}, AdapterError, r"rank 8 is larger than the smaller side 7 of the weight \(11, 7\)"),
        ({"rank": 0}, ConfigError, "rank = 0"),
        ({"energy": 0}, ConfigError, "energy = 0: wanted a share 0 < energy <= 1"),
        ({"energy": 1.1}, ConfigError, "energy = 1.1: wanted a share"),
        ({"energy": "all"}, ConfigError, "energy = 'all': wanted a share"),
        ({"rank": 2, "seed": -1}, ConfigError, "seed = -1"),
        ({"rank": 2, "dtype": "int8"}, ConfigError, "dtype = 'int8': wanted a floating dtype"),
    ],
)
def test_arguments_that_are_not_allowed(rng, options, error, message):
    with pytest.raises(error, match=message):
        extract_weight(*pair(rng, "io"), "io", **options)


def test_weights_that_do_not_go_together(rng):
    base, tuned = pair(rng, "io")
    with pytest.raises(AdapterError, match=r"base is of shape \(11, 7\), the tuned weight of \(7, 11\)"):
        extract_weight(base, tuned.T, "io", rank=2)
    with pytest.raises(AdapterError, match="dtype int8 is not floating; cast or dequantize"):
        extract_weight(base.astype(np.int8), tuned, "io", rank=2)
    with pytest.raises(AdapterError, match="factorization 'bio' is for weights of 3 axes"):
        extract_weight(base, tuned, "bio", rank=2)
