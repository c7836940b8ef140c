"""Entries of the adapters beside A and B: against float64, their gradients, and what they refuse."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

from jlora import AdapterError
from jlora.adapter import Entry, gain_of, is_adapter, is_entry, merged_weight, unmerged_weight
from jlora.contraction import Factorization
from tests.marks import some
from tests.reference import as64, assert_close, random_adapter, random_array, x64

SHAPES = {
    "io": (5, 7),
    "oi": (7, 5),
    "ioo": (5, 3, 7),
    "bio": (3, 5, 7),
    "boi": (3, 7, 5),
    "oiii": (7, 5, 2, 3),
    "iiio": (2, 3, 5, 7),
    "obio": (7, 2, 5, 3),
    "oib": (7, 5, 2),
}
COMBINATIONS = [
    names
    for count in range(1, 5)
    for names in itertools.combinations(("value", "offset", "A", "magnitude"), count)
    if "A" in names or "magnitude" not in names
]
SCALING = 1.3


def entry_for(rng: np.random.Generator, roles: str, names: Any, dtype: Any = "float32") -> dict[str, Any]:
    """A random entry of these parts for a weight of `SHAPES[roles]`; A stands for A and B."""
    shape, split = SHAPES[roles], Factorization(roles)
    entry = {name: random_array(rng, shape, dtype) for name in ("value", "offset") if name in names}
    if "A" in names:
        entry |= random_adapter(rng, *split.adapter_shapes(shape, 2), dtype)
    if "magnitude" in names:
        outs = tuple(n for wanted in "bo" for n, role in zip(shape, roles, strict=True) if role == wanted)
        entry["magnitude"] = random_array(rng, outs, dtype)
    return entry


def reference(weight: Any, entry: dict[str, Any], roles: str, norm_of: Any = None, xp: Any = np) -> Any:
    """The weight with the entry applied, by einsums over letters; the norm is that of `norm_of` where it is given."""
    letters = "abcdefgh"[: len(roles)]
    batch, ins, outs = (
        "".join(c for c, role in zip(letters, roles, strict=True) if role == wanted) for wanted in "bio"
    )
    total = entry.get("value", weight)
    if "offset" in entry:
        total = total + SCALING * entry["offset"]
    if "A" in entry:
        total = total + SCALING * xp.einsum(f"{batch}{ins}z,{batch}z{outs}->{letters}", entry["A"], entry["B"])
    if "magnitude" in entry:
        squares = xp.einsum(f"{letters},{letters}->{batch}{outs}", *[total if norm_of is None else norm_of] * 2)
        factor = entry["magnitude"] / xp.sqrt(squares)
        total = xp.einsum(f"{batch}{outs},{letters}->{letters}", factor, total)
    return total


def reference64(weight: Any, entry: dict[str, Any], roles: str) -> np.ndarray:
    return reference(as64(weight), {name: as64(part) for name, part in entry.items()}, roles)


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("roles", SHAPES)
def test_every_combination_of_parts(rng, roles, names):
    weight, entry = random_array(rng, SHAPES[roles]), entry_for(rng, roles, names)
    found = merged_weight(Entry(entry, SCALING, Factorization(roles)), weight)
    assert found.dtype == jnp.float32
    assert_close(found, reference64(weight, entry, roles))


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("parts", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_are_those_of_the_weight_and_sums_are_rounded_once(rng, names, dtype, parts):
    weight, entry = random_array(rng, (5, 7), dtype), entry_for(rng, "io", names, parts)
    found = merged_weight(Entry(entry, SCALING, Factorization("io")), weight)
    assert found.dtype == weight.dtype
    exact = reference64(weight, entry, "io")
    off = np.abs(as64(found) - exact)
    half = np.spacing(np.abs(np.asarray(found))).astype(np.float64) / 2
    slack = (20 if dtype == "float32" else 1.02) * half + 1e-5
    assert np.all(off <= slack)


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_under_jit_and_vmap(rng, names):
    weights = jnp.stack([random_array(rng, (5, 7)) for _ in range(3)])
    entries = [entry_for(rng, "io", names) for _ in range(3)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *entries)

    def apply(weight: Any, entry: Any) -> Any:
        return merged_weight(Entry(entry, SCALING, Factorization("io")), weight)

    wanted = [reference64(weight, entry, "io") for weight, entry in zip(weights, entries, strict=True)]
    assert_close(jax.jit(apply)(weights[0], entries[0]), wanted[0])
    assert_close(jax.vmap(apply)(weights, stacked), np.stack(wanted))
    assert_close(jax.jit(jax.vmap(apply))(weights, stacked), np.stack(wanted))


@pytest.mark.parametrize("names", [names for names in COMBINATIONS if "A" in names], ids="+".join)
@pytest.mark.parametrize("roles", ["io", "oi", "bio", "ioo"])
@pytest.mark.parametrize("wrap", some({"jit": jax.jit, "eager": lambda fn: fn}))
def test_the_norm_is_a_constant_to_gradients(rng, roles, names, wrap):
    weight, entry = random_array(rng, SHAPES[roles]), entry_for(rng, roles, names)
    direction = random_array(rng, SHAPES[roles])
    plain = {name: part for name, part in entry.items() if name != "magnitude"}
    constant = jnp.asarray(reference64(weight, plain, roles), jnp.float32)

    def loss(weight: Any, entry: Any) -> Any:
        return jnp.sum(direction * merged_weight(Entry(entry, SCALING, Factorization(roles)), weight) ** 2)

    def wanted_loss(weight: Any, entry: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return jnp.sum(direction * reference(weight, entry, roles, constant, jnp) ** 2)

    found = wrap(jax.grad(loss, (0, 1)))(weight, entry)
    wanted = jax.jit(jax.grad(wanted_loss, (0, 1)))(weight, entry)
    jax.tree.map(lambda new, old: assert_close(new, as64(old), factor=5), found, wanted)
    assert jnp.any(found[1]["A"])
    if "magnitude" in names:
        assert jnp.any(found[1]["magnitude"])
    if "magnitude" in names and "value" not in names:
        moving = jax.grad(lambda w: jnp.sum(direction * reference(w, entry, roles, None, jnp) ** 2))(weight)
        assert not np.allclose(moving, found[0], rtol=1e-2)


def test_a_scaling_that_is_traced_does_not_retrace(rng):
    weight, entry = random_array(rng, (5, 7)), entry_for(rng, "io", ("offset", "A", "magnitude"))
    apply = jax.jit(lambda scaling: merged_weight(Entry(entry, scaling, Factorization("io")), weight))
    for scaling in (0.5, SCALING):
        found = apply(scaling)
    assert apply._cache_size() == 1
    assert_close(found, reference64(weight, entry, "io"))


def test_what_is_zero_stays_zero_under_a_magnitude(rng):
    weight, entry = random_array(rng, (5, 7)).at[:, 2].set(0), entry_for(rng, "io", ("A", "magnitude"))
    entry["B"] = entry["B"].at[:, 2].set(0)

    def total(weight: Any, entry: Any) -> Any:
        return jnp.sum(merged_weight(Entry(entry, SCALING, Factorization("io")), weight) ** 2)

    found = merged_weight(Entry(entry, SCALING, Factorization("io")), weight)
    np.testing.assert_array_equal(found[:, 2], 0)
    assert_close(jnp.linalg.norm(found, axis=0), np.abs(as64(entry["magnitude"])) * (np.arange(7) != 2))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(total, (0, 1))(weight, entry)))


@pytest.mark.parametrize("names", [n for n in COMBINATIONS if not {"value", "magnitude"} & set(n)], ids="+".join)
@pytest.mark.parametrize("roles", SHAPES)
def test_undone_up_to_rounding(rng, roles, names):
    weight, entry = random_array(rng, SHAPES[roles]), entry_for(rng, roles, names)
    bound = Entry(entry, SCALING, Factorization(roles))
    assert bound.is_reversible
    assert_close(unmerged_weight(bound, merged_weight(bound, weight)), as64(weight))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_undone_is_rounded_once(rng, dtype):
    merged, entry = random_array(rng, (31, 29), dtype), entry_for(rng, "io", ())
    entry = random_adapter(rng, (31, 2), (2, 29)) | {"offset": random_array(rng, (31, 29))}
    found = unmerged_weight(Entry(entry, SCALING, Factorization("io")), merged)
    assert found.dtype == merged.dtype
    exact = as64(merged) - SCALING * (as64(entry["offset"]) + as64(entry["A"]) @ as64(entry["B"]))
    half = np.spacing(np.abs(np.asarray(found))).astype(np.float64) / 2
    assert np.all(np.abs(as64(found) - exact) <= 1.02 * half + 1e-5)


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_what_can_be_undone(rng, names):
    entry = Entry(entry_for(rng, "io", names), SCALING, Factorization("io"))
    assert entry.is_reversible == (not {"value", "magnitude"} & set(names))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("roles", SHAPES)
def test_the_gain_is_the_magnitude_over_the_norm(rng, roles, dtype):
    with x64():
        weight, entry = random_array(rng, SHAPES[roles], dtype), entry_for(rng, roles, ("A", "magnitude"), dtype)
        found = gain_of(Entry(entry, SCALING, Factorization(roles)), weight)
        total = reference64(weight, {name: entry[name] for name in "AB"}, roles)
        in_axes = tuple(axis for axis, role in enumerate(roles) if role == "i")
        norms = np.sqrt(np.sum(total**2, in_axes))
        magnitude = Factorization(roles).out_like(as64(entry["magnitude"]))
        wide = jnp.float64 if dtype == "float64" else jnp.float32
        assert found.dtype == wide
        assert_close(found, magnitude / norms)


def test_the_gain_of_what_is_zero_or_cancels_is_finite(rng):
    a, b = random_array(rng, (5, 2)), random_array(rng, (2, 7))
    entry = {"A": a, "B": b, "magnitude": random_array(rng, (7,))}
    bound = Entry(entry, 1.0, Factorization("io"))
    assert np.isfinite(gain_of(bound, -(a @ b))).all()
    assert np.isfinite(gain_of(Entry(entry | {"B": 0 * b}, 1.0, Factorization("io")), jnp.zeros((5, 7)))).all()
    assert np.isnan(gain_of(bound, jnp.full((5, 7), jnp.inf))).all()


ARRAY = np.ones((2, 2))
ENTRIES = [
    {"A": ARRAY, "B": ARRAY},
    {"value": ARRAY},
    {"offset": ARRAY},
    {"value": ARRAY, "offset": ARRAY},
    {"A": ARRAY, "B": ARRAY, "magnitude": ARRAY},
    {"A": ARRAY, "B": ARRAY, "magnitude": ARRAY, "offset": ARRAY, "value": ARRAY},
    {"B": jax.ShapeDtypeStruct((2, 2), "float32"), "A": jnp.ones((2, 2))},
    freeze({"offset": ARRAY}),
]
OTHERS = [
    {},
    None,
    ARRAY,
    [ARRAY, ARRAY],
    (("A", ARRAY), ("B", ARRAY)),
    "AB",
    {"A": ARRAY},
    {"B": ARRAY},
    {"magnitude": ARRAY},
    {"magnitude": ARRAY, "value": ARRAY},
    {"A": ARRAY, "magnitude": ARRAY},
    {"A": ARRAY, "B": ARRAY, "bias": ARRAY},
    {"A": ARRAY, "B": None},
    {"A": {"kernel": ARRAY}, "B": ARRAY},
    {"value": {"A": ARRAY, "B": ARRAY}},
    {"value": 1.0},
    {"offset": None},
    {"a": ARRAY, "b": ARRAY},
    {1: ARRAY},
]


@pytest.mark.parametrize("node", ENTRIES, ids=lambda node: "+".join(node))
def test_what_is_an_entry(node):
    assert is_entry(node)
    assert is_adapter(node) == (set(node) == {"A", "B"})


@pytest.mark.parametrize("node", OTHERS, ids=str)
def test_what_is_none(node):
    assert not is_entry(node)


CHECKS = {
    "value": ({"value": (7, 5)}, r"^value \(7, 5\) does not fit the weight \(5, 7\): wanted \(5, 7\)$"),
    "offset": ({"offset": (5,)}, r"^offset \(5,\) does not fit the weight \(5, 7\): wanted \(5, 7\)$"),
    "A": ({"A": (7, 2), "B": (2, 7)}, r"^A \(7, 2\) does not fit the weight \(5, 7\): wanted \(5, 2\)$"),
    "B": ({"A": (5, 2), "B": (3, 7)}, r"^B \(3, 7\) does not fit the weight \(5, 7\): wanted \(2, 7\)$"),
    "magnitude": (
        {"A": (5, 2), "B": (2, 7), "magnitude": (5,)},
        r"^magnitude \(5,\) does not fit the weight \(5, 7\): wanted \(7,\)$",
    ),
    "magnitude with kept axes": (
        {"A": (5, 2), "B": (2, 7), "magnitude": (1, 7)},
        r"^magnitude \(1, 7\) does not fit the weight \(5, 7\): wanted \(7,\)$",
    ),
}


@pytest.mark.parametrize(("shapes", "message"), CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("call", [merged_weight, unmerged_weight], ids=["merge", "unmerge"])
def test_parts_that_do_not_fit(shapes, message, call):
    entry = Entry({name: jnp.ones(shape) for name, shape in shapes.items()}, SCALING, Factorization("io"))
    with pytest.raises(AdapterError, match=message):
        entry.check((5, 7))
    with pytest.raises(AdapterError, match=message):
        call(entry, jnp.ones((5, 7)))


def test_a_factorization_of_other_axes():
    entry = {"A": jnp.ones((5, 2)), "B": jnp.ones((2, 7))}
    with pytest.raises(AdapterError, match=r"^factorization 'bio' is for weights of 3 axes; found shape \(5, 7\)$"):
        Entry(entry, SCALING, Factorization("bio")).check((5, 7))


def test_a_and_b_without_a_factorization():
    entry = {"A": jnp.ones((5, 2)), "B": jnp.ones((2, 7))}
    with pytest.raises(AdapterError, match=r"^A \(5, 2\) of a weight \(5, 7\): no factorization is given$"):
        merged_weight(Entry(entry, SCALING), jnp.ones((5, 7)))


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("call", [merged_weight, unmerged_weight], ids=["merge", "unmerge"])
def test_a_dtype_that_jax_would_narrow(rng, names, call):
    with pytest.raises(AdapterError, match=r"^a weight of dtype float64: set jax_enable_x64, or cast it first$"):
        call(Entry(entry_for(rng, "io", names), SCALING, Factorization("io")), np.ones((5, 7)))


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_float64(rng, names):
    with x64():
        weight, entry = jnp.asarray(rng.standard_normal((5, 7))), entry_for(rng, "io", names, "float64")
        found = merged_weight(Entry(entry, SCALING, Factorization("io")), weight)
        assert found.dtype == jnp.float64
        assert_close(found, reference64(weight, entry, "io"))
