"""`lora` with entries beside A and B: the same as the function of the merged params."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import AdapterError, CostModel, LoraConfig, TargetError, explain, lora, merge_params
from jlora.contraction import Factorization
from tests.marks import some
from tests.reference import as64, assert_close, random_adapter, random_array

SHAPES = {"up": (5, 7), "query": (7, 3, 2), "down": (11, 7)}
ROLES = {"up": "io", "query": "ioo", "down": "oi"}
CONFIG = LoraConfig(rank=2, alpha=3, factorizations=ROLES)
KINDS = {
    "A+B": ("A",),
    "offset": ("offset",),
    "value": ("value",),
    "A+B+offset": ("A", "offset"),
    "A+B+value": ("A", "value"),
    "DoRA": ("A", "magnitude"),
    "all": ("A", "offset", "value", "magnitude"),
}


def entry_for(rng: np.random.Generator, name: str, parts: Any) -> dict[str, Any]:
    shape, split = SHAPES[name], Factorization(ROLES[name])
    entry = {part: random_array(rng, shape) for part in ("value", "offset") if part in parts}
    if "A" in parts:
        entry |= random_adapter(rng, *split.adapter_shapes(shape, 2))
    if "magnitude" in parts:
        entry["magnitude"] = random_array(rng, split.sizes(shape, "b") + split.sizes(shape, "o"))
    return entry


def model(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["up"] + params["bias"])
    heads = jnp.einsum("...i,ihd->...hd", hidden, params["query"])
    return heads.sum((-1, -2))[..., None] * (hidden @ params["down"].T)


def case(rng: np.random.Generator, **kinds: Any) -> tuple[Any, Any]:
    """Params, and adapters with these kinds of entries."""
    params = {name: random_array(rng, shape) for name, shape in SHAPES.items()} | {"bias": random_array(rng, (7,))}
    entries = {name: entry_for(rng, name, parts) for name, parts in kinds.items()}
    return params, {name: entries.get(name) for name in params}


def patterns(adapters: Any) -> LoraConfig:
    """The configuration without the patterns that these adapters do not use."""
    targets = tuple(name for name in SHAPES if adapters.get(name))
    return CONFIG.replace(factorizations={name: ROLES[name] for name in targets}, target_modules=targets)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("parts", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("wrap", some({"eager": lambda fn: fn, "jit": jax.jit}))
def test_the_output_is_that_of_the_merged_params(rng, name, parts, wrap):
    params, adapters = case(rng, **{name: parts})
    config, x = patterns(adapters), random_array(rng, (13, 5))
    found = wrap(lora(model, config))(params, adapters, x)
    wanted = model(merge_params(params, adapters, config), x)
    assert_close(found, as64(wanted), factor=4)
    assert not np.allclose(found, model(params, x), rtol=1e-2)


def test_one_of_each_kind_and_a_bias(rng):
    params, adapters = case(rng, up=("A", "magnitude"), query=("A", "offset"), down=("value",))
    adapters["bias"] = {"offset": random_array(rng, (7,))}
    x = random_array(rng, (2, 13, 5))
    wanted = model(merge_params(params, adapters, CONFIG), x)
    assert_close(lora(model, CONFIG)(params, adapters, x), as64(wanted), factor=4)


def merged64(name: str, weight: Any, entry: Any) -> np.ndarray:
    """A weight with its entry applied, in float64, as the formulas have it; alpha / rank is 1.5."""
    if entry is None:
        return as64(weight)
    parts = {part: as64(array) for part, array in entry.items()}
    total = parts.get("value", as64(weight)) + 1.5 * parts.get("offset", 0)
    if "A" in parts:
        equation = {"io": "ir,ro->io", "ioo": "ir,rhd->ihd", "oi": "ir,ro->oi"}[ROLES[name]]
        total = total + 1.5 * np.einsum(equation, parts["A"], parts["B"])
    if "magnitude" in parts:
        axis = ROLES[name].index("i")
        norm = np.sqrt(np.sum(total**2, axis, keepdims=True))
        total = np.expand_dims(parts["magnitude"], axis) * total / norm
    return total


def model64(p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    hidden = np.tanh(x @ p["up"] + p["bias"])
    heads = np.einsum("ni,ihd->nhd", hidden, p["query"])
    return heads.sum((1, 2))[:, None] * (hidden @ p["down"].T)


PLAIN, DORA = ("A",), ("A", "magnitude")
MIXED = [{"up": PLAIN, "query": DORA}, {"up": DORA, "down": PLAIN}, {"up": PLAIN, "query": ("offset",), "down": PLAIN}]
MIXED += [{"up": PLAIN, "query": ("value",)}, {"up": ("A", "offset"), "query": DORA, "down": PLAIN}]


@pytest.mark.parametrize("kinds", MIXED, ids=lambda kinds: "-".join("+".join(parts) for parts in kinds.values()))
def test_plain_entries_beside_others_in_one_tree(rng, kinds):
    params, adapters = case(rng, **kinds)
    config, x = patterns(adapters), random_array(rng, (13, 5))
    merged = {name: merged64(name, params[name], adapters[name]) for name in params}
    found = merge_params(params, adapters, config)
    for name, wanted in merged.items():
        assert_close(found[name], wanted)
    assert_close(lora(model, config)(params, adapters, x), model64(merged, as64(x)), factor=4)


def reference_loss(adapters: Any, params: Any, x: Any, norms: Any) -> Any:
    """The loss with each weight written out; the norms are constants."""
    merged = dict(params)
    for name, entry in adapters.items():
        if entry is None:
            continue
        total = entry.get("value", params[name]) + 1.5 * entry.get("offset", 0)
        if "A" in entry:
            equation = {"io": "ir,ro->io", "ioo": "ir,rhd->ihd", "oi": "ir,ro->oi"}[ROLES[name]]
            total = total + 1.5 * jnp.einsum(equation, entry["A"], entry["B"], precision="highest")
        if "magnitude" in entry:
            axis = ROLES[name].index("i")
            norm = jnp.sqrt(jnp.sum(total**2, axis)) if norms is None else norms[name]
            total = jnp.expand_dims(entry["magnitude"] / norm, axis) * total
        merged[name] = total
    return jnp.mean(model(merged, x) ** 2)


def norms_of(adapters: Any, params: Any) -> Any:
    """The norms under the magnitudes."""
    found = {}
    for name, entry in adapters.items():
        if entry is not None and "magnitude" in entry:
            plain = {name: {part: array for part, array in entry.items() if part != "magnitude"}}
            total = merge_params({name: params[name]}, plain, patterns(plain))
            found[name] = jnp.sqrt(jnp.sum(total[name] ** 2, ROLES[name].index("i")))
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("parts", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("wrap", some({"jit": jax.jit, "eager": lambda fn: fn}))
def test_gradients_are_those_of_the_formula(rng, name, parts, wrap):
    params, adapters = case(rng, **{name: parts})
    config, x = patterns(adapters), random_array(rng, (13, 5))

    def loss(adapters: Any) -> Any:
        return jnp.mean(lora(model, config)(params, adapters, x) ** 2)

    found = wrap(jax.grad(loss))(adapters)
    wanted = jax.grad(reference_loss)(adapters, params, x, norms_of(adapters, params))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda new, old: assert_close(new, as64(old), factor=10), found, wanted)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found))


def scanned(params: Any, x: Any) -> Any:
    def layer(x: Any, weights: Any) -> Any:
        return jnp.tanh(x @ weights["w"] + weights["bias"]), None

    return jax.lax.scan(layer, x, params)[0]


@pytest.mark.parametrize("parts", KINDS.values(), ids=KINDS)
def test_under_scan(rng, parts):
    layers, shape, split = 3, (3, 5, 5), Factorization("bio")
    params = {"w": random_array(rng, shape), "bias": random_array(rng, (layers, 5))}
    entry = {part: random_array(rng, shape) for part in ("value", "offset") if part in parts}
    if "A" in parts:
        entry |= random_adapter(rng, *split.adapter_shapes(shape, 2))
    if "magnitude" in parts:
        entry["magnitude"] = random_array(rng, (layers, 5))
    adapters, x = {"w": entry, "bias": None}, random_array(rng, (13, 5))
    config = LoraConfig(rank=2, alpha=3, target_modules="w", factorizations={"w": "bio"})

    def loss(adapters: Any) -> Any:
        return jnp.mean(lora(scanned, config)(params, adapters, x) ** 2)

    def wanted_loss(adapters: Any) -> Any:
        return jnp.mean(scanned(merge_params(params, adapters, config), x) ** 2)

    (found, grads), (wanted, wanted_grads) = (jax.jit(jax.value_and_grad(fn))(adapters) for fn in (loss, wanted_loss))
    assert_close(found, as64(wanted), factor=4)
    jax.tree.map(lambda new, old: assert_close(new, as64(old), factor=20), grads, wanted_grads)


def test_one_call_for_several_adapters_under_vmap(rng):
    params, first = case(rng, up=("A", "magnitude"), down=("A", "offset"))
    second = case(rng, up=("A", "magnitude"), down=("A", "offset"))[1]
    config, x = patterns(first), random_array(rng, (13, 5))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    found = jax.vmap(lora(model, config), (None, 0, None))(params, stacked, x)
    for row, adapters in zip(found, (first, second), strict=True):
        assert_close(row, as64(model(merge_params(params, adapters, config), x)), factor=4)


def test_strict_takes_every_kind(rng):
    x = random_array(rng, (13, 5))
    for parts in KINDS.values():
        params, adapters = case(rng, query=parts)
        strict = lora(model, patterns(adapters), strict=True)
        assert_close(strict(params, adapters, x), as64(lora(model, patterns(adapters))(params, adapters, x)))


def test_strict_refuses_a_magnitude_that_meets_some_of_the_axes_that_are_contracted(rng):
    params, adapters = case(rng, query=("A", "magnitude"))
    strict = lora(lambda p, x: jnp.einsum("nih,ihd->nd", x, p["query"]), patterns(adapters), strict=True)
    message = (
        r"^query: \w+ at .* cannot be factored: it (sums over axes of the weight|contracts some of the axes of a mag)"
    )
    with pytest.raises(AdapterError, match=message):
        strict(params, adapters, random_array(rng, (13, 7, 3)))


@pytest.mark.parametrize("parts", [("A",), ("A", "magnitude")], ids=["A+B", "DoRA"])
def test_no_dense_delta_is_formed_for_the_value_or_the_gradients(rng, parts):
    params, adapters = case(rng, up=parts)
    adapted = lora(model, patterns(adapters), cost_model=CostModel(merge_from=float("inf")))

    def loss(adapters: Any) -> Any:
        return jnp.sum(adapted(params, adapters, random_array(rng, (13, 5))))

    for jaxpr in (jax.make_jaxpr(loss)(adapters), jax.make_jaxpr(jax.grad(loss))(adapters)):
        products = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "dot_general"]
        assert len(products) >= 5
        assert not [eqn for eqn in products if sorted(eqn.outvars[0].aval.shape) == [5, 7]]


def test_entries_that_do_not_fit(rng):
    params, adapters = case(rng, up=("A", "magnitude"))
    adapters["up"]["magnitude"] = jnp.ones(5)
    with pytest.raises(TargetError, match=r"up: magnitude \(5,\) does not fit the weight \(5, 7\): wanted \(7,\)$"):
        lora(model, patterns(adapters))(params, adapters, random_array(rng, (13, 5)))


def test_explain_tells_what_a_magnitude_has_to_be_merged_for(rng):
    params, adapters = case(rng, query=("A", "magnitude"))
    some, config = (lambda p, x: jnp.einsum("nih,ihd->nd", x, p["query"])), patterns(adapters)
    args = params, random_array(rng, (13, 7, 3))
    assert [use.factored for use in explain(some, config, *args).uses] == [True]
    (use,) = explain(some, config, *args, entries=adapters).uses
    assert (use.factored, use.why) == (False, "it contracts some of the axes of a magnitude (DoRA)")
    shapes = jax.eval_shape(lambda: adapters)
    assert str(explain(some, config, *args, entries=shapes)) == str(explain(some, config, *args, entries=adapters))
