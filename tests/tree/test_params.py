"""Adapters over a params tree: made, merged and taken out again."""

import math
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze, unfreeze

from jlora import ConfigError, LoraConfig, TargetError, init_lora, merge_params, unmerge_params
from tests.reference import as64, assert_close, random_adapter, random_array, randomize

WEIGHTS = {
    "io": (5, 7),
    "ioo": (5, 3, 7),
    "iio": (3, 7, 5),
    "bio": (2, 5, 7),
    "biio": (2, 3, 5, 7),
    "iiio": (3, 2, 5, 7),
}
REORDERED = {"oi": (5, 7), "oio": (3, 5, 7), "ibo": (5, 2, 7), "oib": (7, 5, 2), "ioi": (3, 7, 5), "obio": (7, 2, 5, 3)}
CASES = WEIGHTS | REORDERED


def a_and_b(roles: str, sizes: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    batch, ins, outs = (tuple(n for n, r in zip(sizes, roles, strict=True) if r == role) for role in "bio")
    return (*batch, *ins, rank), (*batch, rank, *outs)


def slow_delta(adapter: dict[str, Any], roles: str, sizes: tuple[int, ...], scaling: float) -> np.ndarray:
    """scaling * A@B, one element of the weight after another."""
    a, b = as64(adapter["A"]), as64(adapter["B"])
    delta = np.zeros(sizes)
    for index in np.ndindex(sizes):
        batch, ins, outs = (tuple(n for n, r in zip(index, roles, strict=True) if r == role) for role in "bio")
        delta[index] = scaling * sum(a[(*batch, *ins, r)] * b[(*batch, r, *outs)] for r in range(a.shape[-1]))
    return delta


def one_weight(rng: np.random.Generator, roles: str, of: Any = "float32", **fields: Any) -> tuple[Any, Any, Any]:
    """Params, adapters with a random B, and their configuration, for a weight of this factorization."""
    config = LoraConfig(rank=2, alpha=3, target_modules="m/w", factorizations={"m/w": roles}, **fields)
    params = {"m": {"w": random_array(rng, CASES[roles], of), "bias": random_array(rng, (11,), of)}}
    return params, randomize(rng, init_lora(jax.random.key(0), params, config)), config


@flax.struct.dataclass
class Layer:
    kernel: Any
    bias: Any


def tree(rng: np.random.Generator, dtype: Any = "float32") -> dict[str, Any]:
    """Two layers in float32 and an embedding table in `dtype`."""
    return {
        "embed": {"embedding": random_array(rng, (13, 5), dtype)},
        "layers": {str(i): {"kernel": random_array(rng, (5, 7)), "bias": random_array(rng, (7,))} for i in range(2)},
    }


def in_list(params: Any) -> Any:
    return {**params, "layers": list(params["layers"].values())}


def in_dataclass(params: Any) -> Any:
    return {**params, "layers": tuple(Layer(**layer) for layer in params["layers"].values())}


CONTAINERS = {"dict": lambda params: params, "frozen": freeze, "list": in_list, "dataclass": in_dataclass}
CONFIG = LoraConfig(rank=2, alpha=3, rank_pattern={"layers/1": 3}, alpha_pattern={"embed": 5})


def by_path(nodes: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(nodes)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def assert_same(found: Any, wanted: Any) -> None:
    """The same paths, dtypes and bits, in whatever containers."""
    found, wanted = by_path(found), by_path(wanted)
    assert found.keys() == wanted.keys()
    for path, leaf in found.items():
        assert leaf.dtype == wanted[path].dtype
        np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_adapters_stand_at_the_targets_and_none_elsewhere(rng, key, container):
    params = CONTAINERS[container](tree(rng))
    adapters = init_lora(key, params, CONFIG)
    shapes = {path: leaf.shape for path, leaf in by_path(adapters).items()}
    assert shapes == {
        "embed/embedding/A": (13, 2),
        "embed/embedding/B": (2, 5),
        "layers/0/kernel/A": (5, 2),
        "layers/0/kernel/B": (2, 7),
        "layers/1/kernel/A": (5, 3),
        "layers/1/kernel/B": (3, 7),
    }
    marked = jax.tree.map(lambda _, adapter: adapter is not None, params, adapters)
    assert jax.tree.structure(marked) == jax.tree.structure(params)
    assert {path for path, adapted in by_path(marked).items() if adapted} == {path[:-2] for path in shapes}


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_container_does_not_change_adapters_or_merge(rng, key, container):
    params = tree(rng)
    wanted = init_lora(key, params, CONFIG)
    assert_same(init_lora(key, CONTAINERS[container](params), CONFIG), wanted)
    random = randomize(rng, wanted)
    merged = merge_params(CONTAINERS[container](params), CONTAINERS[container](random), CONFIG)
    wanted = merge_params(params, random, CONFIG)
    assert_same(merged, wanted)
    assert jax.tree.structure(merged) == jax.tree.structure(CONTAINERS[container](params))


@pytest.mark.parametrize("container", CONTAINERS)
def test_adapters_made_under_jit_are_the_same_but_for_rounding(rng, key, container):
    params = CONTAINERS[container](tree(rng))
    wanted = init_lora(key, params, CONFIG)
    found = jax.jit(init_lora, static_argnums=2)(key, params, CONFIG)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda new, old: assert_close(new, as64(old)), found, wanted)


def test_shapes_are_enough(rng, key):
    params = tree(rng, "bfloat16")
    shapes = jax.eval_shape(lambda: params)
    assert_same(init_lora(key, shapes, CONFIG), init_lora(key, params, CONFIG))
    abstract = jax.eval_shape(partial(init_lora, config=CONFIG), key, shapes)
    assert abstract["embed"]["embedding"]["A"] == jax.ShapeDtypeStruct((13, 2), jnp.float32)
    assert jax.tree.structure(abstract) == jax.tree.structure(init_lora(key, params, CONFIG))


def test_b_is_zero_and_merging_at_init_changes_no_bit(rng, key):
    params = tree(rng, "bfloat16")
    adapters = init_lora(key, params, CONFIG)
    for path, leaf in by_path(adapters).items():
        assert np.any(leaf) == path.endswith("A")
    assert_same(merge_params(params, adapters, CONFIG), params)


def test_every_adapter_has_its_own_key(rng, key):
    params = {name: {"kernel": random_array(rng, (5, 7))} for name in ("a", "b", "c")}
    drawn = by_path(init_lora(key, params, CONFIG.replace(rank_pattern={}, alpha_pattern={})))
    draws = {leaf.tobytes() for path, leaf in drawn.items() if path.endswith("A")}
    assert len(draws) == 3


def test_the_seed_is_the_key_where_none_is_passed(rng, key):
    params, config = tree(rng), CONFIG.replace(seed=11)
    assert_same(init_lora(None, params, config), init_lora(jax.random.key(11), params, config))
    assert_same(init_lora(key, params, config), init_lora(key, params, CONFIG))
    seeds = [init_lora(None, params, CONFIG.replace(seed=seed))["embed"]["embedding"]["A"] for seed in (0, 1)]
    assert not np.array_equal(*seeds)


@pytest.mark.parametrize(("dtype", "wanted"), [(None, "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")])
def test_adapters_have_32_bits_or_the_dtype_of_the_configuration(rng, key, dtype, wanted):
    params = {"kernel": random_array(rng, (5, 7), "bfloat16")}
    adapters = init_lora(key, params, LoraConfig(rank=2, dtype=dtype))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapters)} == {wanted}
    assert merge_params(params, randomize(rng, adapters), LoraConfig(rank=2))["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("fields", "std", "most"),
    [
        ({"init": "gaussian"}, 0.01, None),
        ({"init": "gaussian", "init_std": 0.3}, 0.3, None),
        ({"init": "kaiming_uniform"}, 1 / math.sqrt(3 * 101), 1 / math.sqrt(101)),
        ({"init": "normal"}, 1 / 53, None),
    ],
)
def test_a_is_drawn_as_the_init_says_and_layers_are_no_fan_in(key, fields, std, most):
    params = {"kernel": jax.ShapeDtypeStruct((17, 101, 59), jnp.float32)}
    a = init_lora(key, params, LoraConfig(rank=53, factorizations={"kernel": "bio"}, **fields))["kernel"]["A"]
    assert a.shape == (17, 101, 53)
    assert np.std(as64(a)) == pytest.approx(std, rel=0.02)
    assert abs(np.mean(as64(a))) < 0.02 * std
    assert most is None or 0.99 * most < np.max(np.abs(a)) <= np.float32(most)


@pytest.mark.parametrize("roles", CASES)
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_merge_adds_the_scaled_product_and_unmerge_takes_it_out(rng, roles, scaling):
    params, adapters, config = one_weight(rng, roles, scaling=scaling)
    factor = 3 / 2 if scaling == "standard" else 3 / math.sqrt(2)
    adapter = adapters["m"]["w"]
    assert (adapter["A"].shape, adapter["B"].shape) == a_and_b(roles, CASES[roles], 2)
    merged = merge_params(params, adapters, config)
    assert_close(merged["m"]["w"], as64(params["m"]["w"]) + slow_delta(adapter, roles, CASES[roles], factor))
    assert_close(unmerge_params(merged, adapters, config)["m"]["w"], as64(params["m"]["w"]), factor=4)


@pytest.mark.parametrize("roles", WEIGHTS)
def test_merge_reads_the_usual_orders_off_the_adapter(rng, roles):
    params, adapters, config = one_weight(rng, roles)
    wanted = merge_params(params, adapters, config)
    assert_same(merge_params(params, adapters, config.replace(factorizations={}, target_modules="**")), wanted)


def test_rank_and_alpha_patterns_scale_each_weight(rng, key):
    params = tree(rng)
    adapters = randomize(rng, init_lora(key, params, CONFIG))
    merged = merge_params(params, adapters, CONFIG)
    for path, alpha, rank in (("embed/embedding", 5, 2), ("layers/0/kernel", 3, 2), ("layers/1/kernel", 3, 3)):
        weight, adapter = by_path(params)[path], {part: by_path(adapters)[f"{path}/{part}"] for part in "AB"}
        assert_close(by_path(merged)[path], as64(weight) + slow_delta(adapter, "io", weight.shape, alpha / rank))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("adapter_dtype", [None, "float32"])
@pytest.mark.parametrize(("fold", "sign"), [(merge_params, 1), (unmerge_params, -1)])
def test_low_precision_is_rounded_once(rng, dtype, adapter_dtype, fold, sign):
    params, adapters, config = one_weight(rng, "ioo", dtype, dtype=adapter_dtype)
    delta = sign * slow_delta(adapters["m"]["w"], "ioo", CASES["ioo"], 3 / 2)
    once = jnp.asarray(as64(params["m"]["w"]) + delta, jnp.float32).astype(dtype)
    twice = params["m"]["w"] + jnp.asarray(delta, jnp.float32).astype(dtype)
    np.testing.assert_array_equal(fold(params, adapters, config)["m"]["w"], once)
    assert np.any(as64(once) != as64(twice))


@pytest.mark.parametrize("fold", [merge_params, unmerge_params])
def test_leaves_without_an_adapter_are_the_same_objects(rng, key, fold):
    params = {**tree(rng), "step": jnp.int32(3), "text": np.arange(5), "none": None}
    config = CONFIG.replace(target_modules="layers/1", rank_pattern={}, alpha_pattern={})
    folded = fold(params, randomize(rng, init_lora(key, params, config)), config)
    assert folded["layers"]["1"]["kernel"] is not params["layers"]["1"]["kernel"]
    folded["layers"]["1"]["kernel"] = params["layers"]["1"]["kernel"]
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    assert all(new is old for new, old in zip(jax.tree.leaves(folded), jax.tree.leaves(params), strict=True))


@pytest.mark.parametrize("fold", [merge_params, unmerge_params])
def test_folding_under_jit_uses_the_memory_of_the_donated_params(rng, key, fold):
    params = tree(rng)
    adapters = randomize(rng, init_lora(key, params, CONFIG))
    wanted = jax.tree.map(as64, fold(params, adapters, CONFIG))
    folded = jax.jit(fold, static_argnums=2, donate_argnums=0)(params, adapters, CONFIG)
    jax.tree.map(assert_close, folded, wanted)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_an_equal_configuration_does_not_retrace(rng, key):
    params = tree(rng)
    adapters = init_lora(key, params, CONFIG)
    traced = []

    def fold(params: Any, adapters: Any, config: LoraConfig) -> Any:
        traced.append(config)
        return merge_params(params, adapters, config)

    jitted = jax.jit(fold, static_argnums=2)
    for config in (CONFIG, LoraConfig.from_dict(CONFIG.to_dict())):
        jitted(params, adapters, config)
    assert len(traced) == 1


@pytest.mark.parametrize("convert", [(freeze, unfreeze), (unfreeze, freeze)], ids=["frozen params", "frozen adapters"])
def test_params_and_adapters_may_be_in_different_containers(rng, key, convert):
    plain = tree(rng)
    adapters = randomize(rng, init_lora(key, plain, CONFIG))
    params = convert[0](plain)
    merged = merge_params(params, convert[1](adapters), CONFIG)
    assert isinstance(merged, FrozenDict) == isinstance(params, FrozenDict)
    assert_same(merged, merge_params(plain, adapters, CONFIG))


def test_adapters_may_leave_out_what_is_not_adapted(rng):
    params = tree(rng)
    adapters = {"layers": {"0": {"kernel": random_adapter(rng, (5, 2), (2, 7))}}}
    merged = merge_params(params, adapters, LoraConfig(rank=2, target_modules="layers/0"))
    assert merged["embed"]["embedding"] is params["embed"]["embedding"]
    assert not np.array_equal(merged["layers"]["0"]["kernel"], params["layers"]["0"]["kernel"])


def test_an_override_for_a_module_leaves_its_other_leaves_to_the_next(rng, key):
    params = {"m": {"kernel": random_array(rng, (3, 5, 7)), "bias": random_array(rng, (5, 7))}}
    config = LoraConfig(rank=2, alpha=2, target_modules=("m", "m/bias"), factorizations={"m": "ioo", "m/bias": "io"})
    adapters = randomize(rng, init_lora(key, params, config))
    merged = merge_params(params, adapters, config)
    assert_close(merged["m"]["bias"], as64(params["m"]["bias"]) + slow_delta(adapters["m"]["bias"], "io", (5, 7), 1))


AB = {"A": (5, 2), "B": (2, 7)}


@pytest.mark.parametrize(
    ("adapters", "fields", "messages"),
    [
        ({"kernell": AB}, {}, ["kernell: an adapter where params has no leaf; nearest paths: kernel"]),
        ({"kernel": {"A": (5, 2)}}, {}, ["kernel/A: found ", "wanted an adapter {'A', 'B'} or None"]),
        ({"kernel": (5, 7)}, {}, ["kernel: found ", "wanted an adapter"]),
        ({"kernel": AB}, {"rank": 3}, ["kernel: A (5, 2) does not have the rank 3 of the configuration"]),
        ({"kernel": AB}, {"rank_pattern": {"ker*": 1}}, ["kernel: A (5, 2) does not have the rank 1"]),
        ({"kernel": {"A": (7, 2), "B": (2, 5)}}, {}, ["kernel: A (7, 2) and B (2, 5) do not fit the weight (5, 7)"]),
        ({"kernel": {"A": (5, 2), "B": (3, 7)}}, {}, ["kernel: A (5, 2) and B (3, 7) do not fit the weight (5, 7)"]),
        ({"bias": AB}, {}, ["bias: A (5, 2) and B (2, 7) do not fit the weight (7,)"]),
        (
            {"kernel": AB},
            {"factorizations": {"kernel": "oi"}},
            ["kernel: A (5, 2) and B (2, 7) do not fit", "factorization 'oi': wanted A (7, 2) and B (2, 5)"],
        ),
        (
            {"kernel": {"A": (5, 1), "B": (1, 7)}, "other": AB, "bias": (7,)},
            {},
            ["3 problems:", "bias: found", "kernel: A (5, 1) does not have the rank 2", "other: an adapter where"],
        ),
    ],
)
@pytest.mark.parametrize("fold", [merge_params, unmerge_params])
def test_adapters_that_do_not_fit_are_refused_with_their_paths(rng, fold, adapters, fields, messages):
    params = {"kernel": random_array(rng, (5, 7)), "bias": random_array(rng, (7,))}
    arrays = jax.tree.map(
        lambda sizes: random_array(rng, sizes), adapters, is_leaf=lambda node: isinstance(node, tuple)
    )
    with pytest.raises(TargetError) as caught:
        fold(params, arrays, LoraConfig(**{"rank": 2, **fields}))
    assert [text for text in messages if text not in str(caught.value)] == []


def test_weights_that_are_not_floating_are_refused_all_at_once(rng, key):
    params = {name: jnp.ones((5, 7), jnp.int8) for name in ("first", "second")}
    with pytest.raises(TargetError, match=r"(?s)first.*int8.*second.*int8"):
        init_lora(key, params, LoraConfig(rank=2))
    adapters = {name: random_adapter(rng, (5, 2), (2, 7)) for name in params}
    with pytest.raises(TargetError, match=r"(?s)first.*int8.*second.*int8"):
        merge_params(params, adapters, LoraConfig(rank=2))


@pytest.mark.parametrize("key", [None, jax.random.PRNGKey(7)], ids=["none", "raw"])
def test_every_kind_of_key_is_taken(rng, key):
    assert np.any(init_lora(key, tree(rng), CONFIG)["embed"]["embedding"]["A"])


@pytest.mark.parametrize(
    "call",
    [
        lambda params, config: init_lora(None, params, config),
        lambda params, config: merge_params(params, {}, config),
    ],
    ids=["init", "merge"],
)
def test_what_is_no_configuration_is_refused(call):
    params = {"kernel": jnp.ones((5, 7))}
    with pytest.raises(ConfigError, match=r"^config: found dict, wanted a LoraConfig; LoraConfig\.from_dict reads"):
        call(params, {"rank": 2})


def test_merging_without_the_adapters_of_a_pattern_names_it():
    with pytest.raises(
        TargetError, match=r"^target_modules: '\*\*' adapts nothing: .* without an adapter .*\(kernel\)$"
    ):
        merge_params({"kernel": jnp.ones((5, 7))}, {}, LoraConfig(rank=2))


NARROW = ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float32"]


class TestOverflow:
    """A number of the base that was finite and is not any more."""

    @staticmethod
    def made(dtype, size):
        """A weight with its largest number at the end, beside one that is not finite where the dtype has one."""
        weight = np.zeros((5, 7), jnp.dtype(dtype))
        weight[4, 6] = jnp.finfo(dtype).max
        weight[0, 0] = np.nan
        entry = {"A": np.ones((5, 1), np.float32), "B": np.full((1, 7), size, np.float32)}
        return {"a": jnp.zeros((5, 7)), "b": {"w": jnp.asarray(weight)}}, {"a": None, "b": {"w": entry}}

    @pytest.mark.parametrize("dtype", NARROW)
    def test_it_is_refused_with_its_path(self, dtype):
        config = LoraConfig(rank=1, target_modules="b")
        params, adapters = self.made(dtype, float(jnp.finfo(dtype).max) / 2)
        with pytest.raises(TargetError, match=rf"^b/w: {dtype} does not hold 34 of 35 sums; lower alpha"):
            merge_params(params, adapters, config)
        params, adapters = self.made(dtype, 0.0)
        found = merge_params(params, adapters, config)["b"]["w"]
        np.testing.assert_array_equal(as64(found), as64(params["b"]["w"]))

    @pytest.mark.parametrize("odd", [np.nan, np.inf])
    def test_an_adapter_that_is_not_finite_is_refused(self, odd):
        params, adapters = self.made("float32", odd)
        with pytest.raises(TargetError, match=r"^b/w: a NaN or an infinity in B: the update is no number"):
            merge_params(params, adapters, LoraConfig(rank=1, target_modules="b"))

    def test_values_and_offsets_are_looked_at_too(self):
        params = {"w": jnp.ones((5,), "float16")}
        for part, large, what in (
            ("value", np.inf, "an infinity in value"),
            ("offset", 7e4, "float16 does not hold 5"),
        ):
            with pytest.raises(TargetError, match=rf"^w: .*{what}"):
                merge_params(params, {"w": {part: np.full(5, large, np.float32)}}, LoraConfig(rank=1))

    def test_under_jit_it_becomes_an_infinity(self):
        params, adapters = self.made("float16", 6e4)
        merge = jax.jit(partial(merge_params, config=LoraConfig(rank=1, target_modules="b")))
        assert jnp.isinf(merge(params, adapters)["b"]["w"][4, 6])
