"""Several adapters of one base as one, by formulas written out here; beside PEFT in test_combine_peft."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from jlora import AdapterError, ConfigError, LoraConfig, merge_params
from jlora.compose import METHODS, combine
from jlora.paths import path_number
from tests.compose import SHAPES, best, deltas, matrices, random_of
from tests.reference import as64, assert_close, random_array

WEIGHTS = (0.7, -1.3, 0.4)
PRUNING = [method for method in METHODS if method not in ("linear", "cat", "svd")]


def density_of(method: str) -> float | None:
    return 0.6 if method in PRUNING else None


def parts_of(rng: np.random.Generator, roles: str, ranks: tuple[int, ...], dtype: Any = "float64") -> list[Any]:
    """Parts of different alpha and scaling mode, alpha 5 of the second by a pattern."""
    fields = [{"alpha": 3}, {"alpha": 1, "alpha_pattern": {"w": 5}, "scaling": "rslora"}, {"alpha": 2}]
    return [
        ({"w": random_of(rng, roles, rank, dtype)}, LoraConfig(rank=rank, factorizations={"w": roles}, **field))
        for rank, field in zip(ranks, fields, strict=False)
    ]


def weighted_sum(parts: list[Any], weights: tuple[float, ...], roles: str) -> np.ndarray:
    each = [deltas(*part, {"w": roles})["w"] for part in parts]
    return sum(weight * delta for weight, delta in zip(weights, each, strict=True))


def scalings(*ranks: int) -> list[float]:
    return [3 / ranks[0], 5 / math.sqrt(ranks[1]), 2 / ranks[2]]


def roots(scale: float) -> dict[str, float]:
    """What A and what B are weighted with where both are combined for themselves."""
    return {"A": math.copysign(math.sqrt(abs(scale)), scale), "B": math.sqrt(abs(scale))}


def found_delta(result: Any, roles: str) -> np.ndarray:
    """The delta of the result, whose scaling has to be 1."""
    adapters, config = result
    assert config.effective_alpha_of("w") == config.rank_of("w") == np.shape(adapters["w"]["A"])[-1]
    return matrices(adapters["w"], 1.0, roles)


@pytest.mark.parametrize("roles", SHAPES)
def test_cat_is_the_sum_and_the_ranks_add(rng, roles):
    parts = parts_of(rng, roles, (1, 3, 2))
    result = combine(parts, WEIGHTS, method="cat")
    assert_close(found_delta(result, roles), weighted_sum(parts, WEIGHTS, roles))
    assert result[1].rank == 6


@pytest.mark.parametrize("roles", SHAPES)
@pytest.mark.parametrize("rank", [None, 1, 4])
def test_svd_is_the_best_of_its_rank(rng, roles, rank):
    parts = parts_of(rng, roles, (1, 3, 2))
    result = combine(parts, WEIGHTS, method="svd", rank=rank)
    assert_close(found_delta(result, roles), best(weighted_sum(parts, WEIGHTS, roles), rank or 3))
    assert result[1].rank == (rank or 3)


def test_svd_is_cut_to_the_smaller_side_and_is_then_exact(rng):
    parts = parts_of(rng, "io", (5, 6, 7))
    result = combine(parts, WEIGHTS, method="svd", rank=50)
    assert result[1].rank == 7
    assert_close(found_delta(result, "io"), weighted_sum(parts, WEIGHTS, "io"))


@pytest.mark.parametrize("roles", SHAPES)
def test_linear_weighs_both_factors_with_the_root(rng, roles):
    parts = parts_of(rng, roles, (2, 2, 2))
    scales = [weight * scaling for weight, scaling in zip(WEIGHTS, scalings(2, 2, 2), strict=True)]
    a, b = (sum(roots(s)[n] * part[0]["w"][n] for s, part in zip(scales, parts, strict=True)) for n in "AB")
    assert_close(found_delta(combine(parts, WEIGHTS), roles), matrices({"A": a, "B": b}, 1.0, roles))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("roles", ["io", "ioo", "bio"])
def test_one_part_that_is_not_pruned_stays_itself(rng, method, roles):
    parts = parts_of(rng, roles, (3,))
    result = combine(parts, [-0.7], method=method, density=1 if method in PRUNING else None)
    assert_close(found_delta(result, roles), weighted_sum(parts, (-0.7,), roles))


def test_one_part_is_pruned_and_cut_too(rng):
    parts = parts_of(rng, "io", (4,))
    whole = weighted_sum(parts, (1.0,), "io")
    assert_close(found_delta(combine(parts, method="svd", rank=2), "io"), best(whole, 2))
    kept = combine(parts, method="magnitude_prune", density=0.5)[0]["w"]
    assert [np.count_nonzero(kept[name]) for name in "AB"] == [22, 14]


def test_ranks_of_most_weights_need_no_pattern(rng):
    ranks = {"a": 4, "b": 2, "c": 2}
    config = LoraConfig(rank=2, rank_pattern={"a": 4})
    _, result = combine([({n: random_of(rng, "io", r) for n, r in ranks.items()}, config)])
    assert (result.rank, result.alpha, dict(result.rank_pattern)) == (2, 2.0, {"a": 4})


@pytest.mark.parametrize("svd", ["", "_svd"])
@pytest.mark.parametrize("pruning", ["magnitude_prune", "dare_linear"])
def test_a_density_of_1_is_linear_or_svd(rng, pruning, svd):
    parts = parts_of(rng, "ioo", (2, 2, 2))
    found = combine(parts, WEIGHTS, method=pruning + svd, density=1)
    wanted = combine(parts, WEIGHTS, method=svd.strip("_") or "linear")
    assert_close(found_delta(found, "ioo"), found_delta(wanted, "ioo"))


def largest(array: np.ndarray, density: float, batch: int) -> np.ndarray:
    """The largest `density` of each entry of the batch axes, found by sorting in plain loops."""
    result = np.zeros_like(array)
    for index in np.ndindex(array.shape[:batch]):
        places = sorted(np.ndindex(array[index].shape), key=lambda place: -abs(array[index][place]))
        for place in places[: int(density * len(places))]:
            result[index][place] = array[index][place]
    return result


def elected(arrays: list[np.ndarray], weights: list[float], majority_sign: str) -> np.ndarray:
    """One scalar after another: the mean of the weighted ones that have the majority's sign."""
    result = np.zeros_like(arrays[0])
    for place in np.ndindex(result.shape):
        values = [array[place] for array in arrays]
        votes = sum(values) if majority_sign == "total" else sum(np.sign(values))
        agreed = [(w * v) for w, v in zip(weights, values, strict=True) if v and (v > 0) == (votes >= 0)]
        result[place] = sum(agreed) / max(1, len(agreed))
    return result


@pytest.mark.parametrize("roles", ["io", "bio", "iiio"])
@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("method", ["magnitude_prune", "ties"])
@pytest.mark.parametrize("on_deltas", [False, True])
def test_pruning_by_magnitude_and_electing_a_sign(rng, roles, majority_sign, method, on_deltas):
    parts = parts_of(rng, roles, (2, 2, 2))
    batch = roles.count("b")

    def joined(arrays: list[np.ndarray], weights: list[float], dims: int) -> np.ndarray:
        kept = [largest(array, 0.6, dims) for array in arrays]
        if method == "ties":
            return elected(kept, weights, majority_sign)
        return sum(weight * array for weight, array in zip(weights, kept, strict=True))

    if on_deltas:
        wanted = best(joined([deltas(*part, {"w": roles})["w"] for part in parts], list(WEIGHTS), 1), 2)
    else:
        scales = [weight * scaling for weight, scaling in zip(WEIGHTS, scalings(2, 2, 2), strict=True)]
        a, b = (
            joined([part[0]["w"][name] for part in parts], [roots(s)[name] for s in scales], batch) for name in "AB"
        )
        wanted = matrices({"A": a, "B": b}, 1.0, roles)
    name = method + "_svd" * on_deltas
    found = combine(parts, WEIGHTS, method=name, density=0.6, majority_sign=majority_sign)
    assert_close(found_delta(found, roles), wanted)


def test_dare_keeps_a_share_and_rescales_it(rng):
    config = LoraConfig(rank=13, alpha=13)
    part = {"w": {"A": rng.uniform(1, 2, (1009, 13)), "B": rng.uniform(1, 2, (13, 997))}}, config
    a, b = (combine([part], method="dare_linear", density=0.3)[0]["w"][name] for name in "AB")
    for found, whole in ((a, part[0]["w"]["A"]), (b, part[0]["w"]["B"])):
        kept = found != 0
        np.testing.assert_allclose(found[kept], (whole / 0.3)[kept], rtol=1e-12)
        assert abs(np.mean(kept) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / kept.size)


def test_dare_keeps_the_expectation(rng):
    parts = parts_of(rng, "io", (2, 2, 2))
    draws = [combine(parts, WEIGHTS, method="dare_linear_svd", density=0.5, rank=7, seed=i) for i in range(400)]
    found = np.array([found_delta(draw, "io") for draw in draws])
    wanted = weighted_sum(parts, WEIGHTS, "io")
    assert np.all(np.abs(found.mean(0) - wanted) < 5 * found.std(0) / math.sqrt(len(draws)))


@pytest.mark.parametrize("method", [m for m in PRUNING if m.startswith("dare")])
def test_each_path_each_part_and_each_seed_has_its_own_stream(rng, method):
    adapter = random_of(rng, "io", 3)
    config = LoraConfig(rank=3, alpha=3)
    nothing = {"A": np.zeros((11, 3)), "B": np.zeros((3, 7))}

    def drawn(path: str, place: int, seed: int) -> bytes:
        own = [{path: nothing}] * 2
        own[place] = {path: adapter}
        result, _ = combine([(tree, config) for tree in own], method=method, density=0.5, rank=None, seed=seed)
        return (result[path]["A"] @ result[path]["B"]).tobytes()

    draws = {drawn(*case) for case in itertools.product(("u", "v"), (0, 1), (0, 1))}
    assert len(draws) == 8
    assert drawn("u", 0, 0) == drawn("u", 0, 0)


def test_the_stream_is_the_documented_one(rng):
    (part,) = parts_of(rng, "io", (3,))
    found, _ = combine([part], method="dare_linear", density=0.4, seed=5)
    stream = np.random.default_rng([5, path_number("w"), 0])
    for name in "AB":
        kept = stream.random(part[0]["w"][name].shape) < 0.4
        np.testing.assert_allclose(found["w"][name], np.where(kept, part[0]["w"][name] / 0.4, 0), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_dtypes_are_kept_and_the_work_is_in_float64(rng, dtype, method):
    parts = parts_of(rng, "io", (2, 2, 2), dtype)
    wide = [(jax.tree.map(as64, adapters), config) for adapters, config in parts]
    options = {"method": method, "density": density_of(method)}
    (found, config), (wanted, _) = combine(parts, WEIGHTS, **options), combine(wide, WEIGHTS, **options)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {dtype}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wanted)} == {"float64"}
    assert_close(matrices(found["w"], 1.0, "io"), matrices(wanted["w"], 1.0, "io"), dtype, factor=2)
    assert config.effective_alpha_of("w") == config.rank


def test_parts_of_different_dtypes_give_float32(rng):
    parts = [parts_of(rng, "io", (2,), dtype)[0] for dtype in ("bfloat16", "float16", "float8_e5m2")]
    found, _ = combine(parts, method="cat")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}
    mixed, _ = combine([parts[0], parts_of(rng, "io", (2,))[0]], method="cat")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(mixed)} == {"float64"}


def tree(rng: np.random.Generator, dtype: Any = "float32", **ranks: int) -> dict[str, Any]:
    names = {"up": "io", "down": "oi", "query": "ioo"}
    given = {n: {"w": random_of(rng, roles, ranks[n], dtype) if n in ranks else None} for n, roles in names.items()}
    return {**given, "norm": {"scale": None}}


ROLES = {"up/w": "io", "down/w": "oi", "query/w": "ioo"}


@pytest.mark.parametrize("wrap", [lambda x: x, freeze], ids=["dict", "frozen"])
def test_a_weight_that_some_parts_adapt_is_combined_from_those(rng, wrap):
    one, two = tree(rng, up=2, query=3), tree(rng, up=1, down=2)
    given = {"factorizations": {"query": "ioo"}, "target_modules": "query", "exclude_modules": "down"}
    first = LoraConfig(rank=3, rank_pattern={"up": 2}, alpha=4, dropout=0.25, init="normal", seed=3, **given)
    second = LoraConfig(rank=2, rank_pattern={"up": 1}, alpha=3, factorizations={"down": "oi"})
    adapters, config = combine([(wrap(one), first), (wrap(two), second)], [1, -2], method="cat")
    assert jax.tree.structure(adapters) == jax.tree.structure(wrap(tree(rng, up=1, query=1, down=1)))
    assert config == LoraConfig(
        rank=3,
        alpha=3,
        dropout=0.25,
        init="normal",
        seed=3,
        target_modules=("query/w", "up/w", "down/w"),
        rank_pattern={"down/w": 2},
        alpha_pattern={"down/w": 2},
        factorizations={"query/w": "ioo", "down/w": "oi"},
    )
    before = [deltas(one, first, ROLES), deltas(two, second, ROLES)]
    wanted = {
        "up/w": before[0]["up/w"] - 2 * before[1]["up/w"],
        "down/w": -2 * before[1]["down/w"],
        "query/w": before[0]["query/w"],
    }
    params = {name: {"w": random_array(rng, SHAPES[ROLES[f"{name}/w"]])} for name in ("up", "down", "query")}
    merged = merge_params({**params, "norm": {"scale": jnp.ones(3)}}, adapters, config)
    for path, change in wanted.items():
        name = path.split("/")[0]
        shaped = change[0].T if ROLES[path] == "oi" else change[0].reshape(SHAPES[ROLES[path]])
        assert_close(merged[name]["w"], as64(params[name]["w"]) + shaped)


def test_the_largest_rank_is_taken_at_each_weight(rng):
    parts = [
        (tree(rng, up=2, query=3), LoraConfig(rank=3, rank_pattern={"up": 2})),
        (tree(rng, up=1), LoraConfig(rank=1)),
    ]
    _, config = combine(parts, method="svd")
    assert (config.rank_of("up/w"), config.rank_of("query/w")) == (2, 3)


def test_other_structures_are_joined_to_nested_dicts(rng):
    adapter, config = random_of(rng, "io", 2), LoraConfig(rank=2, alpha=2)
    one = {"blocks": [{"w": adapter, "v": None}], "head": {"w": None}}
    two = freeze({"head": {"w": adapter}, "tail": {"w": adapter}})
    found, result = combine([(one, config), (two, config), ({"blocks": None}, config)], method="cat")
    shapes = jax.tree.map(lambda leaf: 1, found)
    whole = {"A": 1, "B": 1}
    assert shapes == {"blocks": [{"w": whole, "v": None}], "head": {"w": whole}, "tail": {"w": whole}}
    assert result.target_modules == ("blocks/0/w", "head/w", "tail/w")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"m": {"w": {"deep": "adapter"}}}, r"m/w: the parts are built differently here \(an adapter, a dict\)"),
        ({"m": ["adapter"]}, r"m: the parts are built differently here \(a dict, a list\)"),
    ],
)
def test_a_leaf_in_one_and_a_module_in_another_is_an_error(rng, other, message):
    adapter, config = random_of(rng, "io", 2), LoraConfig(rank=2)
    other = jax.tree.map(lambda _: adapter, other)
    with pytest.raises(AdapterError, match=message):
        combine([({"m": {"w": adapter}}, config), (other, config)])


def test_one_adapter_alone_is_a_tree(rng):
    adapter, config = random_of(rng, "io", 2), LoraConfig(rank=2, alpha=2)
    found, result = combine([(adapter, config), (adapter, config)], method="cat")
    assert_close(matrices(found, 1.0, "io"), 2 * matrices(adapter, 1.0, "io"))
    assert result.target_modules == ("**",)


def test_parts_that_do_not_go_together_are_named(rng):
    one = {
        "a": random_of(rng, "io", 2),
        "b": random_of(rng, "io", 2),
        "c": {"A": np.ones((5, 2)), "B": np.ones((2, 5))},
    }
    two = {"a": random_of(rng, "io", 3), "b": random_of(rng, "oi", 2), "c": one["c"]}
    configs = [
        LoraConfig(rank=2, factorizations={"c": "io"}),
        LoraConfig(rank=2, rank_pattern={"a": 3}, factorizations={"c": "oi"}),
    ]
    with pytest.raises(AdapterError) as error:
        combine([(one, configs[0]), (two, configs[1])])
    text = str(error.value)
    assert text.startswith("3 problems:")
    assert "a: found ranks 2 in parts[0], 3 in parts[1]; wanted one rank, or method='cat' or 'svd'" in text
    assert "b: the parts are of different weights: parts[0] batch (), in (11,), out (7,); parts[1]" in text
    assert "c: the parts have different factorizations: 'io', 'oi'" in text


def test_what_is_no_adapter_is_named_with_its_part(rng):
    good = {"up": random_of(rng, "io", 2)}
    bad = {"up": {**good["up"], "m": np.ones(7)}}
    with pytest.raises(AdapterError, match=r"^parts\[1\], up: found a mapping of 'A', 'B', 'm', wanted an entry of"):
        combine([(good, LoraConfig(rank=2)), (bad, LoraConfig(rank=2))])
    with pytest.raises(AdapterError, match=r"^parts\[0\], up: A \(11, 2\) does not have the rank 5"):
        combine([(good, LoraConfig(rank=5))])
    with pytest.raises(AdapterError, match="none of them holds an adapter"):
        combine([({"up": None}, LoraConfig())])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tie"}, r"method = 'tie': .*did you mean 'ties'"),
        ({"method": "ties"}, r"density = None: wanted a share 0 < density <= 1 with method='ties'"),
        ({"method": "dare_linear", "density": 0}, r"density = 0: wanted a share"),
        ({"method": "ties_svd", "density": 1.5}, r"density = 1.5: wanted a share"),
        ({"method": "svd", "density": 0.5}, r"density = 0.5: wanted none with method='svd'"),
        ({"method": "cat", "rank": 2}, r"rank = 2: wanted none with method='cat'"),
        ({"method": "svd", "rank": 0}, r"rank = 0: wanted a whole number"),
        ({"method": "ties", "density": 0.5, "majority_sign": "most"}, r"majority_sign = 'most'"),
        ({"weights": [1]}, r"weights: found 1 for 2 parts"),
        ({"weights": [1, float("nan")]}, r"weights\[1\] = nan"),
        ({"seed": -1}, r"seed = -1"),
    ],
)
def test_arguments_that_are_not_allowed(rng, options, message):
    with pytest.raises(ConfigError, match=message):
        combine(parts_of(rng, "io", (2, 2)), **options)


@pytest.mark.parametrize(
    ("parts", "message"), [([], "at least one"), ([{}], r"parts\[0\]: found dict"), ([({}, {})], "wanted a LoraConfig")]
)
def test_parts_are_pairs(parts, message):
    with pytest.raises((AdapterError, ConfigError), match=message):
        combine(parts)
