"""What a pattern spans and cannot adapt: left out with a reason, an error where it is named, refused by strict."""

import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import LoraConfig, TargetError, init_lora, lora, merge_params, summary
from jlora.tree import find_targets, survey
from tests.reference import random_array, randomize

CONFIG = LoraConfig(rank=2, alpha=3)
TOO_NARROW = "rank 2 is larger than the smaller side 1; lower it, or give rank_pattern={'odd/kernel': 1}"
LETTERS = "one letter per axis, b (batch), i (in) or o (out), as factorizations={'odd/kernel': 'i...o'}"
FUNCTION = "the function that uses it (jlora.adapt, or init_lora with fn= and args=), or "


def shape(*sizes: int, dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def of_dtype(dtype: Any) -> tuple[Any, str]:
    return shape(5, 7, dtype=dtype), f"dtype {jnp.dtype(dtype).name} is not floating, nothing can be added to it"


KEYS = jax.random.split(jax.random.key(0), (5, 7))
ODD = {
    "permutation": of_dtype("int32"),
    "quantized": of_dtype("int8"),
    "mask": of_dtype(bool),
    "complex": of_dtype("complex64"),
    "stack of integers": (shape(3, 5, 7, dtype="uint8"), of_dtype("uint8")[1]),
    "keys": (KEYS, "dtype key<fry> is not floating, nothing can be added to it"),
    "value head": (shape(7, 1), TOO_NARROW),
    "attention vector": (shape(1, 7), TOO_NARROW),
    "several readings": (shape(3, 5, 7), f"can be read as ioo, iio, bio: give {FUNCTION}{LETTERS}"),
}
NOT_OF_INTEREST = {
    "bias": shape(5, 7, dtype="int32"),
    "scale": shape(5, 7),
    "counts": shape(7, dtype="int32"),
    "step": shape(dtype="int32"),
    "keys": jax.random.split(jax.random.key(0), 3),
    "positions": shape(1, 11, 5),
    "row": shape(1, 7),
    "name": len,
}


def tree_of(leaf: Any) -> dict[str, Any]:
    return {"odd": {"kernel": leaf}, "up": {"kernel": shape(5, 7), "bias": shape(7)}}


@pytest.mark.parametrize("pattern", ["**", "*", ("odd", "up")])
@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("case", ODD)
def test_what_a_pattern_only_spans_is_left_out_with_the_reason(case, dtype, pattern):
    leaf, why = ODD[case]
    config = CONFIG.replace(dtype=dtype, target_modules=pattern)
    if "odd" in pattern:
        with pytest.raises(TargetError) as caught:
            survey(tree_of(leaf), config).checked()
        assert str(caught.value) == f"target_modules: 'odd' adapts nothing:\n    odd/kernel {leaf.shape}: {why}"
        return
    found = survey(tree_of(leaf), config).checked()
    assert [*found.targets] == ["up/kernel"]
    assert [(one.path, one.shape, one.why) for one in found.left_out] == [("odd/kernel", leaf.shape, why)]


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("case", ODD)
def test_what_a_pattern_names_is_an_error_with_the_reason_and_the_way_out(case, dtype):
    leaf, why = ODD[case]
    with pytest.raises(TargetError) as caught:
        find_targets(tree_of(leaf), CONFIG.replace(dtype=dtype, target_modules=("**", "odd/kernel")))
    wanted = f"odd/kernel {leaf.shape}, named by 'odd/kernel': {why}; or leave it out with exclude_modules"
    assert str(caught.value) == wanted


@pytest.mark.parametrize("case", ODD)
def test_strict_refuses_and_an_exclusion_satisfies_it(case):
    leaf, why = ODD[case]
    with pytest.raises(TargetError) as caught:
        init_lora(None, tree_of(leaf), CONFIG, strict=True)
    assert str(caught.value) == f"strict, and not adapted: odd/kernel {leaf.shape}: {why}"
    adapters = init_lora(None, tree_of(leaf), CONFIG.replace(exclude_modules="odd"), strict=True)
    assert adapters["odd"] == {"kernel": None}


def test_biases_scales_and_vectors_are_not_listed():
    found = survey({"up": shape(5, 7), **NOT_OF_INTEREST}, CONFIG)
    assert (found.left_out, found.problems, [*found.targets]) == ((), (), ["up"])
    found.checked(strict=True)


def test_strict_lists_all_that_is_left_out_at_once():
    params = {name: leaf for name, (leaf, _) in ODD.items()}
    params = {name: {"kernel": leaf} for name, leaf in params.items()} | {"up": shape(5, 7)}
    with pytest.raises(TargetError, match=rf"^{len(ODD)} problems:") as caught:
        init_lora(None, params, CONFIG, strict=True)
    lines = str(caught.value).splitlines()[1:]
    assert {re.match(r"  strict, and not adapted: (.*)/kernel \(", line)[1] for line in lines} == set(ODD)


def test_a_tree_full_of_odd_leaves_is_adapted_merged_and_run(rng):
    params = {
        "mask": np.array(rng.integers(0, 2, (5, 7)), bool),
        "order": rng.permutation(25).reshape(5, 5),
        "phase": random_array(rng, (3, 5)) + 1j,
        "value": {"kernel": random_array(rng, (7, 1))},
        "experts": random_array(rng, (3, 5, 7)),
        "up": {"kernel": random_array(rng, (5, 7)), "bias": random_array(rng, (7,))},
    }

    def fn(p, x):
        h = x[:, p["order"][0] % 5] @ jnp.where(p["mask"], p["up"]["kernel"], 0.0) + p["up"]["bias"]
        return h @ p["value"]["kernel"] + jnp.einsum("td,edf->te", x, p["experts"]).sum() + p["phase"].real.sum()

    adapters = randomize(rng, init_lora(jax.random.key(1), params, CONFIG))
    adapted = [path for path, leaf in jax.tree_util.tree_leaves_with_path(adapters)]
    assert len(adapted) == 2
    merged = merge_params(params, adapters, CONFIG)
    up = params["up"]["kernel"] + 1.5 * adapters["up"]["kernel"]["A"] @ adapters["up"]["kernel"]["B"]
    np.testing.assert_allclose(merged["up"]["kernel"], up, rtol=1e-5)
    x = random_array(rng, (11, 5))
    np.testing.assert_allclose(lora(fn, CONFIG)(params, adapters, x), fn(merged, x), rtol=1e-3, atol=1e-3)
    table = summary(params, adapters, CONFIG)
    assert {one.path for one in table.left_out} == {"mask", "order", "phase", "value/kernel", "experts"}


@pytest.mark.parametrize(("field", "value"), [("rank_pattern", 2), ("alpha_pattern", 2), ("factorizations", "io")])
def test_a_pattern_for_what_is_left_out_says_why(field, value):
    config = CONFIG.replace(**{field: {"odd": value}})
    wanted = f"{field}: 'odd' matches nothing that is adapted:\n    odd/kernel (7, 1): {TOO_NARROW}"
    with pytest.raises(TargetError) as caught:
        find_targets(tree_of(shape(7, 1)), config)
    assert str(caught.value) == wanted
    with pytest.raises(TargetError) as caught:
        summary(tree_of(shape(7, 1)), init_lora(None, tree_of(shape(7, 1)), CONFIG), config)
    assert str(caught.value) == wanted


def test_reasons_are_counted_and_cut():
    params = {f"m{n}": {"kernel": shape(3, 5, 7)} for n in range(9)}
    with pytest.raises(
        TargetError, match=r"(?s)^target_modules: '\*\*' adapts nothing:.*m2/kernel .*\n    and 6 more$"
    ):
        find_targets(params, CONFIG)


def test_where_only_no_weights_are_left_the_error_calls_them_what_they_are():
    with pytest.raises(TargetError, match=r"adapts nothing: what it matches is excluded, or is a bias, .* \(pos\)$"):
        find_targets({"pos": shape(1, 11, 5)}, CONFIG)


TABLE = """
path                       shape  factorization  rank  alpha  parameters   share
─────────────────────────  ─────  ─────────────  ────  ─────  ──────────  ──────
up/kernel                  5x7    io                2      3          24  30.77%
─────────────────────────  ─────  ─────────────  ────  ─────  ──────────  ──────
1 weight of 78 parameters                                             24  30.77%

left out    shape  because
──────────  ─────  ──────────────────────────────────────────────────────────────────────────────────────────
mask        5x5    dtype bool is not floating, nothing can be added to it
odd/kernel  7x1    rank 2 is larger than the smaller side 1; lower it, or give rank_pattern={'odd/kernel': 1}
""".strip("\n")


def test_the_summary_lists_what_is_left_out_below_the_table():
    params = {"mask": shape(5, 5, dtype=bool), "odd": {"kernel": shape(7, 1)}, "up": {"kernel": shape(5, 7)}}
    params["up"]["bias"] = shape(11)
    found = summary(params, init_lora(None, params, CONFIG), CONFIG)
    assert str(found) == repr(found) == TABLE
    rows = [[cell.text for cell in row] for row in ElementTree.fromstring(found._repr_html_()).iter("tr")]
    assert rows[3:] == [
        ["left out", "shape", "because"],
        *([one.path, "x".join(map(str, one.shape)), one.why] for one in found.left_out),
    ]


def test_a_long_list_is_cut_at_a_dozen():
    params = {f"mask{n:02}": shape(5, 5, dtype=bool) for n in range(15)} | {"up": shape(5, 7)}
    found = summary(params, init_lora(None, params, CONFIG), CONFIG)
    assert len(found.left_out) == 15
    assert str(found).splitlines()[-2:] == [
        "mask11      5x5    dtype bool is not floating, nothing can be added to it",
        "and 3 more",
    ]


def test_a_weight_without_an_adapter_at_hand_is_listed():
    params = {"a": shape(5, 7), "b": shape(7, 5)}
    adapters = init_lora(None, params, CONFIG) | {"b": None}
    (one,) = summary(params, adapters, CONFIG).left_out
    assert str(one) == "b (7, 5): no adapter at hand"
