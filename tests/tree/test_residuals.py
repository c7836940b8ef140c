"""Merges that are taken back to the bit, and entries beside A and B in a tree."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jlora import LoraConfig, TargetError, merge_params, merge_params_with_residual, unmerge_params
from jlora.contraction import Factorization
from jlora.residual import Residual
from jlora.tree import summary
from tests.reference import as64, assert_close, random_adapter, random_array, x64

SHAPES = {
    "io": (5, 7),
    "oi": (7, 5),
    "ioo": (5, 3, 7),
    "bio": (3, 5, 7),
    "boi": (3, 7, 5),
    "oiii": (7, 5, 2, 3),
    "ibo": (5, 2, 7),
}
PARTS = {
    "A+B": ("A",),
    "offset": ("offset",),
    "A+B+offset": ("A", "offset"),
    "value": ("value",),
    "DoRA": ("A", "magnitude"),
    "all": ("A", "offset", "value", "magnitude"),
}
DTYPES = ["bfloat16", "float16", "float32"]


def entry_for(rng: np.random.Generator, roles: str, names: Any, dtype: Any = "float32") -> dict[str, Any]:
    """An entry of these parts for a weight of `SHAPES[roles]`; A stands for A and B."""
    shape, split = SHAPES[roles], Factorization(roles)
    entry = {name: random_array(rng, shape, dtype) for name in ("value", "offset") if name in names}
    if "A" in names:
        entry |= random_adapter(rng, *split.adapter_shapes(shape, 2), dtype)
    if "magnitude" in names:
        entry["magnitude"] = random_array(rng, split.sizes(shape, "b") + split.sizes(shape, "o"), dtype)
    return entry


def case(rng: np.random.Generator, roles: str, names: Any, dtype: Any) -> tuple[Any, Any, LoraConfig]:
    """Params of two weights, entries for both, and the configuration."""
    params = {name: {"w": random_array(rng, SHAPES[roles], dtype), "bias": random_array(rng, (3,))} for name in "ab"}
    adapters = {name: {"w": entry_for(rng, roles, names), "bias": None} for name in "ab"}
    return params, adapters, LoraConfig(rank=2, alpha=3, target_modules="**/w", factorizations={"**/w": roles})


def assert_same_bits(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()


@pytest.mark.parametrize("names", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("roles", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_base_comes_back_to_the_bit(rng, dtype, roles, names):
    params, adapters, config = case(rng, roles, names, dtype)
    merged, residual = merge_params_with_residual(params, adapters, config)
    assert_same_bits(merged, merge_params(params, adapters, config))
    assert set(residual) == {"a/w", "b/w"}
    assert merged["a"]["bias"] is params["a"]["bias"]
    back = unmerge_params(merged, adapters, config, residual=residual)
    assert_same_bits(back, params)
    assert isinstance(back["a"]["w"], jax.Array)


def test_every_number_comes_back_to_the_bit(rng):
    raw = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    params = {"half": jnp.asarray(raw.view(np.float16)), "brain": jnp.asarray(raw.view(ml_dtypes.bfloat16))}
    adapters = {name: random_adapter(rng, (256, 2), (2, 256)) for name in params}
    config = LoraConfig(rank=2, factorizations={"**": "io"})
    merged, residual = merge_params_with_residual(params, adapters, config)
    assert_same_bits(unmerge_params(merged, adapters, config, residual=residual), params)


def test_float64(rng):
    with x64():
        params, adapters, config = case(rng, "io", ("A", "magnitude"), "float64")
        merged, residual = merge_params_with_residual(params, adapters, config)
        assert_same_bits(unmerge_params(merged, adapters, config, residual=residual), params)


def test_the_place_of_a_weight_is_kept(rng):
    params, adapters, config = case(rng, "io", ("A",), "bfloat16")
    sharding = SingleDeviceSharding(jax.devices()[0])
    merged, residual = merge_params_with_residual(jax.device_put(params, sharding), adapters, config)
    assert unmerge_params(merged, adapters, config, residual=residual)["a"]["w"].sharding == merged["a"]["w"].sharding


def test_params_of_numpy(rng):
    params, adapters, config = case(rng, "io", ("A",), "bfloat16")
    host = jax.tree.map(np.asarray, params)
    merged, residual = merge_params_with_residual(host, adapters, config)
    back = unmerge_params(jax.tree.map(np.asarray, merged), adapters, config, residual=residual)
    assert_same_bits(back, params)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.eval_shape], ids=["jit", "vmap", "eval_shape"])
def test_a_residual_under_a_transform_is_refused(rng, transform):
    params, adapters, config = case(rng, "bio", ("A",), "bfloat16")
    if transform is jax.vmap:
        config = config.replace(factorizations={"**/w": "io"})
    tree = {"a": {"w": params["a"]["w"]}}, {"a": {"w": adapters["a"]["w"]}}

    def merge(params: Any, adapters: Any) -> Any:
        return merge_params_with_residual(params, adapters, config)

    message = r"^a/w: a residual needs arrays of numbers: call outside jit, grad and vmap\b"
    run = (lambda fn: lambda *args: jax.eval_shape(fn, *args)) if transform is jax.eval_shape else transform
    with pytest.raises(TargetError, match=message):
        run(merge)(*tree)
    residual = {"a/w": Residual(b"", "")}
    with pytest.raises(TargetError, match=message):
        run(lambda *args: unmerge_params(*args, config, residual=residual))(*tree)


def test_a_residual_that_lacks_an_entry(rng):
    params, adapters, config = case(rng, "io", ("A",), "bfloat16")
    merged, residual = merge_params_with_residual(params, adapters, config)
    residual.pop("b/w")
    with pytest.raises(TargetError, match=r"^b/w: the residual has no entry for it; pass what merge_params returned"):
        unmerge_params(merged, adapters, config, residual=residual)
    with pytest.raises(TargetError, match=r"^a/w: the residual has no entry for it"):
        unmerge_params(merged, adapters, config, residual={})


def test_a_residual_of_another_merge(rng):
    params, adapters, config = case(rng, "io", ("A",), "bfloat16")
    merged, residual = merge_params_with_residual(params, adapters, config)
    message = r"^a/w: the residual does not lead back to the base: the weight or the adapters are not those that were"
    swapped = {"a/w": residual["b/w"], "b/w": residual["a/w"]}
    with pytest.raises(TargetError, match=message):
        unmerge_params(merged, adapters, config, residual=swapped)
    with pytest.raises(TargetError, match=message):
        unmerge_params(merged, adapters, config.replace(alpha=5), residual=residual)
    with pytest.raises(TargetError, match=message):
        unmerge_params(params, adapters, config, residual=residual)
    damaged = residual | {"a/w": Residual(residual["a/w"].packed[:9], residual["a/w"].digest)}
    with pytest.raises(TargetError, match=r"^a/w: the residual is cut short$"):
        unmerge_params(merged, adapters, config, residual=damaged)


@pytest.mark.parametrize(("names", "shown"), [(("value",), "value"), (("A", "magnitude"), "A, B, magnitude")])
def test_what_is_lost_cannot_be_taken_out_without_a_residual(rng, names, shown):
    params, adapters, config = case(rng, "io", names, "float32")
    config = config if "A" in names else config.replace(target_modules="**")
    merged = merge_params(params, adapters, config)
    message = f"^{re.escape(f'a/w: an update of {shown} cannot be taken out; keep the base, or a residual')}$"
    with pytest.raises(TargetError, match=message):
        unmerge_params(merged, adapters, config)


@pytest.mark.parametrize("names", [names for names in PARTS.values() if not {"value", "magnitude"} & set(names)])
@pytest.mark.parametrize("roles", SHAPES)
def test_without_a_residual_the_base_comes_back_up_to_rounding(rng, roles, names):
    params, adapters, config = case(rng, roles, names, "float32")
    back = unmerge_params(merge_params(params, adapters, config), adapters, config)
    jax.tree.map(lambda new, old: assert_close(new, as64(old)), back, params)


def test_the_table_of_all_kinds_of_entries(rng):
    params = {name: random_array(rng, (5, 7)) for name in ("dora", "plain", "saved", "shifted")}
    params["bias"] = random_array(rng, (7,))
    adapters = {
        "dora": entry_for(rng, "io", ("A", "magnitude")),
        "plain": entry_for(rng, "io", ("A",)),
        "saved": {"value": params["saved"]},
        "shifted": {"offset": params["saved"]},
        "bias": {"offset": params["bias"]},
    }
    table = summary(params, adapters, LoraConfig(rank=2, alpha=3, factorizations={"**": "io"}))
    assert [target.path for target in table.targets] == ["dora", "plain"]
    assert table.others == (("bias", (7,), "offset"), ("saved", (5, 7), "value"), ("shifted", (5, 7), "offset"))
    assert table.parameters == (2 * 5 + 2 * 7 + 7, 2 * 5 + 2 * 7, 7, 35, 35)
    assert table.total == 4 * 35 + 7
    *rows, total = table.rows()
    assert rows[0] == ("dora", "5x7", "io", "2", "3", "31", f"{31 / 147:.2%}")
    assert rows[2] == ("bias", "7", "offset", "", "", "7", f"{7 / 147:.2%}")
    assert total == ("5 weights of 147 parameters", "", "", "", "", "132", f"{132 / 147:.2%}")
    assert len({len(line) for line in str(table).splitlines() if line.strip()}) <= 2
    assert "shifted" in table._repr_html_()


def test_entries_that_do_not_fit_are_told_with_their_paths(rng):
    params, adapters, config = case(rng, "io", ("A", "magnitude"), "float32")
    adapters["a"]["w"]["magnitude"] = jnp.ones(5)
    adapters["b"]["w"] = {"offset": jnp.ones((7, 5))}
    message = (
        r"^2 problems:\n  a/w: magnitude \(5,\) does not fit the weight \(5, 7\): wanted \(7,\)\n"
        r"  b/w: offset \(7, 5\) does not fit the weight \(5, 7\): wanted \(5, 7\)$"
    )
    for call in (merge_params, unmerge_params, summary):
        with pytest.raises(TargetError, match=message):
            call(params, adapters, config)


def test_weights_that_are_no_floats(rng):
    params, adapters, config = case(rng, "io", ("offset",), "float32")
    params["a"]["w"] = jnp.ones((5, 7), jnp.int8)
    for call in (merge_params, unmerge_params):
        with pytest.raises(
            TargetError, match=r"^a/w: dtype int8 is not floating; cast or dequantize the weight first$"
        ):
            call(params, adapters, config)
