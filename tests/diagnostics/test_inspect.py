"""Numbers of one tree of adapters against dense float64 references, and a warning for whatever looks wrong."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jlora import LoraConfig, LoRALayer, TargetError
from jlora.diagnostics import InspectedEntry, Inspection, inspect
from tests.reference import as64, random_adapter, random_array, reference_delta

CONFIG = LoraConfig(rank=3, alpha=5, rank_pattern={"stack": 2}, alpha_pattern={"stack": 7})


def effective(values: np.ndarray) -> float:
    shares = values[values > 0] / values.sum()
    return math.exp(-sum(p * math.log(p) for p in shares))


def only(adapters: Any, config: LoraConfig = CONFIG, **kwargs: Any) -> InspectedEntry:
    (entry,) = inspect(adapters, config, **kwargs).entries
    return entry


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_numbers_of_a_matrix(rng, dtype, scaling):
    numpy_dtype = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    adapter = {
        "A": rng.standard_normal((11, 3)).astype(numpy_dtype),
        "B": rng.standard_normal((3, 7)).astype(numpy_dtype),
    }
    a, b = (np.asarray(adapter[name]).astype(np.float64) for name in "AB")
    scale = 5 / (3 if scaling == "standard" else math.sqrt(3))
    delta = scale * a @ b
    values = np.linalg.svd(delta, compute_uv=False)[:3]
    entry = only({"up": adapter}, CONFIG.replace(scaling=scaling))
    assert (entry.path, entry.parts, entry.dtype, entry.rank, entry.alpha) == ("up", "A+B", dtype, 3, 5.0)
    assert (entry.a_shape, entry.b_shape, entry.parameters, entry.matrices) == ((11, 3), (3, 7), 54, 1)
    found = (entry.scaling, entry.a_norm, entry.b_norm, entry.norm, entry.largest, entry.effective_rank)
    wanted = (scale, np.linalg.norm(a), np.linalg.norm(b), np.linalg.norm(delta), values[0], effective(values))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert (entry.used_rank, entry.side) == (3, 7)


def test_effective_rank_and_norms_are_those_of_a_layer(rng, key):
    layer = LoRALayer(random_array(rng, (11, 7)), rank=3, alpha=5.0, key=key)
    layer = layer.set("lora_b", random_array(rng, (3, 7)))
    wanted = layer.diagnostics()
    entry = only({"w": layer.adapter}, config=LoraConfig(rank=3, alpha=5), params={"w": layer.base_weight})
    found = (entry.norm, entry.relative, entry.effective_rank)
    np.testing.assert_allclose(found, [wanted[k] for k in ("delta_norm", "relative_norm", "effective_rank")], rtol=1e-5)


def test_numbers_of_a_stack_are_over_the_whole(rng):
    adapter = random_adapter(rng, (5, 11, 2), (5, 2, 3, 7))
    delta = reference_delta(adapter, 7, batch=1)
    flat = delta.reshape(5, 11, 21)
    values = np.linalg.svd(flat, compute_uv=False)[:, :2]
    entry = only({"stack": adapter})
    found = (entry.norm, entry.largest, entry.effective_rank)
    wanted = (np.linalg.norm(delta), values.max(), np.mean([effective(row) for row in values]))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert (entry.matrices, entry.side, entry.rank, entry.alpha, entry.scaling) == (5, 11, 2, 7.0, 3.5)


def test_relative_size_and_share_with_params(rng):
    params = {"up": random_array(rng, (11, 3, 7), "bfloat16"), "bias": random_array(rng, (5,))}
    adapters = {"up": random_adapter(rng, (3, 3), (3, 11, 7)), "bias": {"offset": random_array(rng, (5,))}}
    inspection = inspect(adapters, CONFIG.replace(rank_pattern={}, alpha_pattern={}), params=params)
    bias, up = sorted(inspection.entries, key=lambda entry: entry.path)
    delta = reference_delta(adapters["up"], 5)
    assert up.factorization == "oio"
    np.testing.assert_allclose(up.relative, np.linalg.norm(delta) / np.linalg.norm(as64(params["up"])), rtol=1e-6)
    np.testing.assert_allclose(up.share, (9 + 231) / (231 + 5))
    np.testing.assert_allclose(bias.norm, 5 / 3 * np.linalg.norm(as64(adapters["bias"]["offset"])), rtol=1e-6)
    np.testing.assert_allclose(bias.relative, bias.norm / np.linalg.norm(as64(params["bias"])), rtol=1e-6)
    assert (bias.parts, bias.rank, bias.effective_rank) == ("offset", None, None)
    assert inspection.parameters == 245
    np.testing.assert_allclose(inspection.norm, math.hypot(up.norm, bias.norm))


def test_values_and_magnitudes(rng):
    weight = random_array(rng, (5, 7))
    value = random_array(rng, (5, 7))
    params = {"norm": weight, "up": random_array(rng, (11, 7))}
    adapters = {
        "norm": {"value": value},
        "up": {**random_adapter(rng, (11, 3), (3, 7)), "magnitude": random_array(rng, (7,))},
    }
    config = LoraConfig(rank=3, alpha=5)
    norm, up = inspect(adapters, config, params=params).entries
    np.testing.assert_allclose(norm.norm, np.linalg.norm(as64(value) - as64(weight)), rtol=1e-6)
    assert (norm.parts, norm.alpha, norm.scaling) == ("value", None, None)
    assert (up.parts, up.parameters, up.factorization) == ("A+B+magnitude", 33 + 21 + 7, "io")
    assert inspect(adapters, config).entries[0].norm is None
    shapes = inspect(adapters, config, params=jax.eval_shape(lambda: params)).entries
    assert shapes[1].relative is None
    assert shapes[1].share == up.share


def test_the_factorization_of_the_configuration(rng):
    adapter = random_adapter(rng, (3, 5, 3), (3, 3, 7))
    with pytest.raises(
        TargetError, match=r"w: A \(3, 5, 3\) .* can be read with 0 or 1 batch axes; give the configuration fact"
    ):
        inspect({"w": adapter}, LoraConfig(rank=3))
    for roles, batch in (("bio", 1), ("iioo", 0)):
        entry = only({"w": adapter}, LoraConfig(rank=3, alpha=3, factorizations={"w": roles}))
        delta = reference_delta(adapter, 3, batch)
        np.testing.assert_allclose(entry.norm, np.linalg.norm(delta), rtol=1e-6)
        assert entry.factorization == roles


def good(rng: np.random.Generator) -> dict[str, Any]:
    return {f"layer{i}": random_adapter(rng, (11, 3), (3, 7)) for i in range(5)}


def warnings(adapters: Any, config: LoraConfig = CONFIG) -> tuple[str, ...]:
    found = inspect(adapters, config)
    text, markup = str(found), found._repr_html_()
    assert all(f"\nwarning: {warning}" in text for warning in found.warnings)
    assert markup.count("<li>") == len(found.warnings)
    return found.warnings


def test_nothing_is_wrong(rng):
    assert warnings(good(rng)) == ()


def test_untrained(rng):
    adapters = good(rng)
    for name in ("layer1", "layer3"):
        adapters[name]["B"] = jnp.zeros((3, 7))
    assert warnings(adapters) == ("2 of 5 adapters are untrained, B is all zero: layer1, layer3",)
    assert inspect(adapters, CONFIG).entries[1].effective_rank == 0
    embedding = {"embed": {"A": jnp.zeros((11, 3)), "B": random_array(rng, (3, 7))}}
    assert warnings(embedding) == ("1 of 1 adapters is untrained, A is all zero: embed",)


def test_part_of_a_stack_is_zero(rng):
    adapter = random_adapter(rng, (5, 11, 2), (5, 2, 7))
    adapter["B"] = adapter["B"].at[1:3].set(0)
    assert warnings({"stack": adapter}) == ("stack: B is all zero in 2 of 5 matrices",)


def test_no_gradient_is_possible(rng):
    adapters = good(rng) | {"dead": {"A": jnp.zeros((11, 3)), "B": jnp.zeros((3, 7))}}
    assert warnings(adapters) == ("A and B are both all zero, so that no gradient can reach them: dead",)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(rng, value):
    adapters = good(rng)
    adapters["layer2"]["A"] = adapters["layer2"]["A"].at[4, 1].set(value)
    adapters["z_bias"] = {"offset": np.array([1.0, value], np.float32)}
    assert warnings(adapters) == ("NaN or infinity in layer2 (A), z_bias (offset)",)
    entry = inspect(adapters, CONFIG).entries[2]
    assert math.isnan(entry.norm)
    assert math.isnan(entry.effective_rank)
    line = next(line for line in str(inspect(adapters, CONFIG)).splitlines() if line.startswith("layer2"))
    assert "nan" in line


@pytest.mark.parametrize(("factor", "wanted"), [(1e4, "more than 100 times"), (1e-4, "less than 1/100 of")])
def test_uneven_norms(rng, factor, wanted):
    adapters = good(rng)
    adapters["layer4"] = {name: part * (factor if name == "B" else 1) for name, part in adapters["layer4"].items()}
    (warning,) = warnings(adapters)
    entries = inspect(adapters, CONFIG).entries
    middle = float(np.median([entry.norm for entry in entries]))
    assert warning == (f"the norm of the update is {wanted} the median {middle:.3g}: layer4 ({entries[4].norm:.3g})")


def test_ranks_that_are_not_used(rng):
    adapters = good(rng)
    adapters["layer0"]["B"] = adapters["layer0"]["B"].at[2].set(adapters["layer0"]["B"][0])
    (warning,) = warnings(adapters)
    assert warning == "ranks that are not used, singular values below 1e-6 of the largest: layer0 (2 of 3)"
    assert inspect(adapters, CONFIG).entries[0].used_rank == 2


def test_alpha_is_zero(rng):
    config = CONFIG.replace(alpha_pattern={"layer3": 0})
    wanted = "alpha is 0, so that the update is zero whatever A and B are: layer3"
    assert warnings(good(rng), config) == (wanted,)


def test_a_rank_larger_than_the_smaller_side(rng):
    adapters = {"w": random_adapter(rng, (11, 3), (3, 2))}
    assert warnings(adapters) == ("the rank is larger than the smaller side of the weight: w (rank 3, side 2)",)


def test_a_rank_that_is_not_the_configurations(rng):
    wanted = "the rank is not the configuration's: w (A has 2, the configuration 3)"
    assert warnings({"w": random_adapter(rng, (11, 2), (2, 7))}) == (wanted,)


def test_different_dtypes(rng):
    adapters = good(rng) | {"half": random_adapter(rng, (11, 3), (3, 7), "bfloat16")}
    adapters["layer1"]["B"] = adapters["layer1"]["B"].astype(jnp.float16)
    wanted = "float32 in 4 entries; bfloat16 in 1 entry (half); float32/float16 in 1 entry (layer1)"
    assert warnings(adapters) == (f"different dtypes: {wanted}",)


def test_no_adapters():
    assert warnings({}) == ("there are no adapters",)
    assert warnings({"a": None}) == ("there are no adapters",)


def test_long_lists_are_cut():
    zero = {"A": jnp.ones((5, 1)), "B": jnp.zeros((1, 5))}
    (warning,) = warnings({f"w{i:02}": zero for i in range(12)}, LoraConfig(rank=1))
    assert warning.endswith("w00, w01, w02, w03, w04, w05, w06, w07 and 4 more")


def test_sizes_of_zero_do_not_fail():
    adapters = {"a": {"A": np.ones((0, 3)), "B": np.ones((3, 7))}, "b": {"A": np.ones((5, 0)), "B": np.ones((0, 7))}}
    assert [entry.norm for entry in inspect(adapters, CONFIG).entries] == [0.0, 0.0]


def test_a_leaf_that_is_no_adapter(rng):
    with pytest.raises(TargetError, match=r"adapters: bad \(float\), worse/A \(int\): wanted an adapter"):
        inspect({"good": random_adapter(rng, (5, 3), (3, 7)), "bad": 2.5, "worse": {"A": 1}}, CONFIG)
    with pytest.raises(TargetError, match=r"w: A \(5, 2\) and B \(3, 7\) do not fit"):
        inspect({"w": {"A": np.ones((5, 2)), "B": np.ones((3, 7))}}, CONFIG)
    with pytest.raises(TargetError, match="up: an adapter where params has no leaf"):
        inspect({"up": random_adapter(rng, (5, 3), (3, 7))}, CONFIG, params={"down": np.ones((5, 7))})


def small() -> Inspection:
    adapters = {
        "down": {"A": np.ones((3, 2), np.float32), "B": np.zeros((2, 5), np.float32)},
        "up": {"A": 3 * np.eye(5, 2, dtype=np.float32), "B": np.eye(2, 3, dtype=np.float32)},
        "up_bias": {"offset": np.array([3.0, 4.0, 0.0], np.float32)},
    }
    params = {"down": np.ones((3, 5)), "up": np.ones((5, 3)), "up_bias": np.zeros(3)}
    return inspect(adapters, LoraConfig(rank=2, alpha=4), params=params)


GOLDEN = """\
path       parts   axes  A    B    dtype    rank  alpha  scaling   |A|   |B|  update  largest  eff. rank  parameters  update/W    share
─────────  ──────  ────  ───  ───  ───────  ────  ─────  ───────  ────  ────  ──────  ───────  ─────────  ──────────  ────────  ───────
down       A+B     io    3x2  2x5  float32     2      4        2  2.45     0       0        0       0.00          16         0   48.48%
up         A+B     io    5x2  2x3  float32     2      4        2  4.24  1.41    8.49        6       2.00          16      2.19   48.48%
up_bias    offset  -     -    -    float32     -      4        2     -     -      10        -          -           3       inf    9.09%
─────────  ──────  ────  ───  ───  ───────  ────  ─────  ───────  ────  ────  ──────  ───────  ─────────  ──────────  ────────  ───────
3 entries                                                                       13.1                              35            106.06%
warning: 1 of 2 adapters is untrained, B is all zero: down"""  # noqa: E501


def test_the_table():
    assert str(small()) == GOLDEN
    assert repr(small()) == GOLDEN


def test_html_is_escaped_and_has_the_same_cells(rng):
    adapters = {"<b>": {"A": np.ones((5, 3)), "B": np.zeros((3, 7))}}
    markup = inspect(adapters, CONFIG)._repr_html_()
    assert "<b>" not in markup
    assert "<li>1 of 1 adapters is untrained, B is all zero: &lt;b&gt;</li>" in markup
    cells = [cell for row in GOLDEN.splitlines()[2:5] for cell in row.split()]
    assert all(f"<td>{cell}</td>" in small()._repr_html_() for cell in cells)
