"""What entries hold beside A and B, resized and combined: values, offsets, magnitudes."""

import warnings
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jlora import AdapterError, ConfigError, JloraWarning, LoraConfig, merge_params
from jlora.compose import combine, resize
from tests.compose import adapter_shapes, best, is_jax, matrices
from tests.reference import as64, assert_close

SHAPE = (11, 7)
IGNORED = pytest.mark.filterwarnings("ignore:.*values take the place:jlora.JloraWarning")


def entry(rng: np.random.Generator, parts: str, rank: int = 2, dtype: Any = "float64") -> dict[str, Any]:
    """Random parts of a weight (in, out) by their first letters."""
    a, b = adapter_shapes("io", rank)
    shapes = {"A": a, "B": b, "value": SHAPE, "offset": SHAPE, "magnitude": SHAPE[1:]}
    return {
        name: rng.standard_normal(shape).astype(dtype)
        for name, shape in shapes.items()
        if name[0] in parts or name in parts
    }


def config_of(alpha: float, rank: int = 2, **fields: Any) -> LoraConfig:
    return LoraConfig(**{"rank": rank, "alpha": alpha, "factorizations": {"w": "io"}, "target_modules": "w"} | fields)


def delta(held: dict[str, Any], scaling: float) -> np.ndarray:
    """scaling * (A@B + offset)."""
    total = np.zeros(SHAPE)
    if "A" in held:
        total = total + matrices(held, scaling, "io")[0]
    return total + scaling * np.asarray(held.get("offset", 0.0), np.float64)


def merged(base: np.ndarray, held: dict[str, Any], scaling: float) -> np.ndarray:
    """The weight with an entry in it, by the formulas of jlora.adapter."""
    total = np.asarray(held.get("value", base), np.float64) + delta(held, scaling)
    if "magnitude" in held:
        total = total * np.asarray(held["magnitude"], np.float64) / np.linalg.norm(total, axis=0)
    return total


class TestResize:
    @pytest.mark.parametrize("scaling", ["standard", "rslora"])
    @pytest.mark.parametrize("parts", ["ABv", "ABo", "ABm", "ABvom"])
    def test_a_larger_rank_is_the_same_weight(self, rng, parts, scaling):
        held, config, base = entry(rng, parts), config_of(3.0, scaling=scaling), rng.standard_normal(SHAPE)
        large, resized = resize({"w": held}, config, 5)
        assert large["w"]["A"].shape == (11, 5)
        assert large["w"].keys() == held.keys()
        assert_close(
            merged(base, large["w"], resized.scaling_of("w")),
            merged(base, held, 3 / (2 if scaling == "standard" else 2**0.5)),
        )

    def test_a_smaller_rank_is_the_best_a_and_b_and_the_rest_as_it_was(self, rng):
        held, base = entry(rng, "ABvom", rank=4), rng.standard_normal(SHAPE)
        small, config = resize({"w": held}, config_of(3.0, 4), 2)
        for name in ("value", "magnitude"):
            np.testing.assert_array_equal(small["w"][name], held[name])
        near = best(matrices(held, 3 / 4, "io"), 2)[0] + 3 / 4 * held["offset"]
        direction = held["value"] + near
        wanted = held["magnitude"] * direction / np.linalg.norm(direction, axis=0)
        assert_close(merged(base, small["w"], config.scaling_of("w")), wanted)

    def test_the_offset_of_a_bias_goes_by_the_scaling_at_its_own_path(self, rng):
        tree = {
            "up": {"kernel": entry(rng, "AB"), "bias": {"offset": rng.standard_normal(7)}},
            "norm": {"value": np.ones(5)},
        }
        config = config_of(3.0, factorizations={"up/kernel": "io"})
        found, resized = resize(tree, config, 5, rank_pattern={"up/kernel": 3})
        assert (resized.scaling_of("up/kernel"), resized.scaling_of("up/bias")) == (1.0, 3 / 5)
        assert_close(3 / 5 * found["up"]["bias"]["offset"], 3 / 2 * tree["up"]["bias"]["offset"])
        assert_close(matrices(found["up"]["kernel"], 1.0, "io"), matrices(tree["up"]["kernel"], 3 / 2, "io"))
        np.testing.assert_array_equal(found["norm"]["value"], np.ones(5))

    def test_dtypes_and_whose_arrays_are_kept(self, rng):
        held = entry(rng, "ABvom", dtype="float32")
        held = {name: jnp.asarray(part, "bfloat16") for name, part in held.items()}
        held["offset"] = np.asarray(held["offset"]).astype(np.float16)
        found, _ = resize({"w": held}, config_of(3.0), 1)
        assert {name: part.dtype for name, part in found["w"].items()} == {name: p.dtype for name, p in held.items()}
        assert [name for name, part in found["w"].items() if not is_jax(part)] == ["offset"]

    def test_integers_pass_through(self, rng):
        tree = {"w": entry(rng, "AB"), "steps": {"value": np.int64(2**53 + 1)[None]}}
        found, _ = resize(tree, config_of(1.0), 1)
        np.testing.assert_array_equal(found["steps"]["value"], [2**53 + 1])

    def test_nothing_that_has_a_rank_is_an_error(self, rng):
        with pytest.raises(AdapterError, match=r"^head: neither this nor any other entry holds A and B"):
            resize({"head": {"value": np.ones((2, 3))}}, LoraConfig(), 2)

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ({"magnitude": np.ones(11)}, r"w: magnitude \(11,\) does not fit A and B: wanted \(7,\)"),
            (
                {"value": np.ones((11, 5))},
                r"w: value \(11, 5\) does not fit A and B of batch \(\), in \(11,\), out \(7,\)",
            ),
            ({"offset": np.ones((11, 7), int)}, r"w: offset is of dtype int64: wanted a floating dtype"),
            ({"value": np.full(SHAPE, np.nan)}, r"w: value holds values that are not finite"),
        ],
    )
    def test_parts_that_do_not_fit_are_named(self, rng, parts, message):
        with pytest.raises(AdapterError, match=message):
            resize({"w": entry(rng, "AB") | parts}, config_of(1.0), 1)


class TestOffsets:
    @pytest.mark.parametrize("method", ["cat", "svd"])
    def test_they_are_summed_as_the_deltas_are(self, rng, method):
        held, alphas, weights = (
            [entry(rng, "ABo"), entry(rng, "o"), entry(rng, "AB", 3)],
            (3.0, 2.0, 5.0),
            (0.7, -1.3, 0.4),
        )
        ranks = (2, 2, 3)
        parts = [({"w": one}, config_of(alpha, rank)) for one, alpha, rank in zip(held, alphas, ranks, strict=True)]
        found, config = combine(parts, weights, method=method, **({"rank": 5} if method == "svd" else {}))
        wanted = sum(
            w * delta(one, alpha / rank) for one, alpha, rank, w in zip(held, alphas, ranks, weights, strict=True)
        )
        assert_close(delta(found["w"], config.scaling_of("w")), wanted)

    def test_they_are_pruned_and_elected_as_deltas(self, rng):
        offsets, weights = [rng.standard_normal((1, 7)) for _ in range(3)], (1.0, 0.5, 2.0)
        parts = [({"w": entry(rng, "AB") | {"offset": np.tile(o, (11, 1))}}, config_of(3.0)) for o in offsets]
        found, _ = combine(parts, weights, method="ties", density=1.0)
        stack = 3 / 2 * np.concatenate(offsets)
        agreed = np.sign(stack) == np.where(stack.sum(0) >= 0, 1, -1)
        wanted = (np.array(weights)[:, None] * stack * agreed).sum(0) / agreed.sum(0)
        assert_close(found["w"]["offset"], np.tile(wanted, (11, 1)))

    def test_of_different_weights_they_are_named(self, rng):
        parts = [({"w": {"offset": np.ones(n)}}, config_of(1.0)) for n in (3, 5)]
        with pytest.raises(
            AdapterError, match=r"w: the offsets are of different weights: \(3,\) in parts\[0\], \(5,\)"
        ):
            combine(parts)


class TestValues:
    def test_one_parts_value_is_kept_and_the_others_are_added_to_it(self, rng):
        value, plain = entry(rng, "ABv"), entry(rng, "AB")
        parts = [({"w": plain}, config_of(3.0)), ({"w": value}, config_of(5.0))]
        with pytest.warns(JloraWarning, match="^w: values take the place of weights as a whole, whatever the weight"):
            found, config = combine(parts, [0.7, 0.3], method="cat")
        wanted = value["value"] + 0.7 * delta(plain, 3 / 2) + 0.3 * delta({**value}, 5 / 2)
        assert_close(merged(np.zeros(SHAPE), found["w"], config.scaling_of("w")), wanted)

    def test_values_that_agree_are_kept_to_the_bit(self, rng):
        value = rng.standard_normal(SHAPE).astype(ml_dtypes.bfloat16)
        parts = [
            ({"w": {"value": value.astype(dtype)}}, config_of(1.0)) for dtype in (value.dtype, "float32", "float64")
        ]
        found, config = combine(parts, [0.2, 0.3, 5.0])
        assert found["w"]["value"] is parts[0][0]["w"]["value"]
        assert config.target_modules == ("w",)

    @IGNORED
    @pytest.mark.parametrize(
        ("values", "shares"), [("first", (1, 0, 0)), ("last", (0, 0, 1)), ("mean", (-0.5, 1.0, 0.5))]
    )
    def test_values_that_differ(self, rng, values, shares):
        held = [entry(rng, "v", dtype="float32") for _ in shares]
        parts = [({"w": one}, config_of(1.0)) for one in held] + [({"w": entry(rng, "AB")}, config_of(3.0))]
        found, _ = combine(parts, [-1.0, 2.0, 1.0, 0.25], method="cat", values=values)
        wanted = sum(share * as64(one["value"]) for share, one in zip(shares, held, strict=True))
        assert found["w"]["value"].dtype == np.float32
        assert_close(found["w"]["value"], wanted)
        assert_close(delta(found["w"], 1.0), 0.25 * delta(parts[3][0]["w"], 3 / 2))

    def test_they_are_left_out(self, rng):
        tree = {"w": entry(rng, "ABv"), "head": {"value": np.ones((3, 5))}}
        found, config = combine([(tree, config_of(3.0)), ({"w": entry(rng, "v")}, config_of(3.0))], values="leave_out")
        assert found["head"] is None
        assert found["w"].keys() == {"A", "B"}
        assert config.target_modules == ("w",)
        with pytest.raises(AdapterError, match="nothing is left: all that the parts hold is values"):
            combine([({"w": entry(rng, "v")}, config_of(3.0))], values="leave_out")

    @IGNORED
    def test_refusals_say_what_was_found_and_the_way_out(self, rng):
        trees = [
            {"w": {"value": np.ones(shape)}, "n": {"value": np.array([n])}} for n, shape in ((3, (5, 3)), (4, (7, 3)))
        ]
        parts = [(tree, config_of(1.0)) for tree in trees]
        with pytest.raises(AdapterError) as error:
            combine(parts)
        assert "2 problems" in str(error.value)
        assert (
            "w: parts[0], parts[1] replace the weight by different values: (5, 3) in parts[0], (7, 3) in parts[1]; "
            "give values='first' or 'last' to take one, 'mean' for their mean by weight, 'leave_out' for none"
        ) in str(error.value)
        with pytest.raises(AdapterError) as error:
            combine(parts, values="mean")
        assert "w: the values have no mean: (5, 3) in parts[0], (7, 3) in parts[1]; give values='first'" in str(
            error.value
        )
        assert "n: the values have no mean: found int64 in parts[0], wanted floating dtypes" in str(error.value)
        same = [({"w": entry(rng, "v")}, config_of(1.0)) for _ in range(2)]
        with pytest.raises(AdapterError, match=r"w: the values have no mean: their weights sum to 0 in parts\[0\]"):
            combine(same, [0.1, -0.1], values="mean")
        with pytest.raises(
            AdapterError, match=r"w: the value \(13, 7\) does not fit A and B in parts\[0\], .*'leave_out'"
        ):
            combine([({"w": entry(rng, "AB")}, config_of(1.0)), ({"w": {"value": np.ones((13, 7))}}, config_of(1.0))])
        for option, wanted in (("values", "first"), ("magnitudes", "mean")):
            with pytest.raises(ConfigError, match=f"{option} = 'firsts': .*{wanted}"):
                combine(same, **{option: "firsts"})


class TestMagnitudes:
    def test_one_parts_dora_with_weight_1_is_kept(self, rng):
        base, held, plain = rng.standard_normal(SHAPE), entry(rng, "ABm", 3), entry(rng, "AB")
        parts = [
            ({"w": held, "v": None}, config_of(3.0, 3)),
            ({"v": plain}, config_of(5.0, factorizations={"v": "io"}, target_modules="v")),
        ]
        found, config = combine(parts, [1.0, -0.6])
        assert_close(merged(base, found["w"], config.scaling_of("w")), merged(base, held, 1.0))
        assert_close(delta(found["v"], config.scaling_of("v")), -0.6 * delta(plain, 5 / 2))

    def test_the_same_magnitude_and_a_mean_of_the_directions(self, rng):
        base, held = rng.standard_normal(SHAPE), [entry(rng, "ABm") for _ in range(2)]
        held[1]["magnitude"] = held[0]["magnitude"]
        parts = [({"w": one}, config_of(3.0)) for one in held]
        found, config = combine(parts, [0.3, 0.7], method="cat")
        direction = 0.3 * (base + delta(held[0], 3 / 2)) + 0.7 * (base + delta(held[1], 3 / 2))
        wanted = held[0]["magnitude"] * direction / np.linalg.norm(direction, axis=0)
        assert_close(merged(base, found["w"], config.scaling_of("w")), wanted)
        params = {"w": jnp.asarray(base, "float32")}
        assert_close(merge_params(params, found, config)["w"], wanted, factor=4)

    @pytest.mark.parametrize("others", ["ABm", "AB", "v"])
    def test_what_is_no_sum_is_refused_and_has_a_mean(self, rng, others):
        held = [entry(rng, "ABm"), entry(rng, others)]
        parts = [({"w": one}, config_of(3.0)) for one in held]
        found_in = "parts[0], parts[1]" if others == "ABm" else "parts[0], none in parts[1]"
        with pytest.raises(AdapterError) as error:
            combine(parts, [0.5, 0.5], method="cat")
        assert f"w: DoRA cannot be summed: found a magnitude in {found_in}, weights that sum to 1; " in str(error.value)
        assert "Give magnitudes='mean' for the mean of them, or merge it into the base and extract" in str(error.value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", JloraWarning)
            found, _ = combine(parts, [0.5, 1.0], method="cat", magnitudes="mean")
        wanted = (0.5 * held[0]["magnitude"] + held[1]["magnitude"]) / 1.5 if others == "ABm" else held[0]["magnitude"]
        assert_close(found["w"]["magnitude"], wanted)
        assert_close(delta(found["w"], 1.0), 0.5 * delta(held[0], 3 / 2) + delta(held[1], 3 / 2))

    @pytest.mark.parametrize("weight", [0.5, -1.0, 2.0])
    def test_a_weight_that_is_not_1_is_refused(self, rng, weight):
        with pytest.raises(AdapterError, match=f"w: DoRA cannot be summed: .*weights that sum to {weight:g}; wanted"):
            combine([({"w": entry(rng, "ABm")}, config_of(3.0))], [weight])

    def test_weights_that_sum_to_0_have_no_mean(self, rng):
        parts = [({"w": entry(rng, "ABm")}, config_of(3.0)) for _ in range(2)]
        with pytest.raises(AdapterError, match="w: the magnitudes have no mean: their weights sum to 0"):
            combine(parts, [1.0, -1.0], magnitudes="mean")
