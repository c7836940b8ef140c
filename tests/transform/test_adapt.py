"""`adapt`: configuration, adapters, adapted function and report from a function and its arguments."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from jlora import AdapterError, JloraWarning, LoraConfig, TargetError, adapt, explain, init_lora, resolve_config
from tests.reference import as64, assert_close, random_array, randomize
from tests.transform.test_random_programs import delta_of

CONFIG = LoraConfig(rank=2, alpha=3)
X = (11, 5)


def tensor(*sizes: int, dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def model(p, x):
    """Own-named weights of three axes: one contracted, one taken whole; others added, narrow, integer, or unused."""
    h = jnp.einsum("td,dhk->thk", x[:, p["order"][0]], p["heads"]) + p["pos"]
    h = jnp.einsum("thk,hkd->td", h, jnp.sin(p["mixed"]))

    def layer(h, p):
        return jnp.tanh(h @ p["up"]) @ jnp.sin(p["down"]) * p["gain"], None

    h, _ = lax.scan(layer, h, p["layers"])
    return h, h @ p["value"]


SHAPES = {
    "order": tensor(5, 5, dtype="int32"),
    "heads": tensor(5, 2, 3),
    "pos": tensor(2, 3),
    "mixed": tensor(2, 3, 5),
    "layers": {"up": tensor(4, 5, 7), "down": tensor(4, 7, 5), "gain": tensor(4, 5)},
    "value": tensor(5, 1),
    "unused": {"kernel": tensor(3, 5, 7), "matrix": tensor(13, 17), "bias": tensor(7)},
}
LEFT_OUT = {
    "order": r"dtype int32 is not floating, nothing can be added to it",
    "pos": r"the function only adds it",
    "mixed": r"has no known factorization, and is used as a whole in sin at test_adapt.py:\d+: give one letter per "
    r"axis, b \(batch\), i \(in\) or o \(out\), as factorizations={'mixed': 'i...o'}",
    "layers/gain": r"it is a vector where the function uses it",
    "value": r"rank 2 is larger than the smaller side 1; lower it, or give rank_pattern={'value': 1}",
    "unused/kernel": r"the function never uses it",
    "unused/matrix": r"the function never uses it",
}
READ = {"heads": "ioo", "layers/up": "bio", "layers/down": "bio"}


@pytest.fixture
def params(rng):
    arrays = jax.tree.map(lambda leaf: random_array(rng, leaf.shape), SHAPES)
    return arrays | {"order": jnp.asarray(rng.permutation(25).reshape(5, 5) % 5)}


def check_left_out(left_out: Any) -> None:
    assert {one.path for one in left_out} == set(LEFT_OUT)
    for one in left_out:
        assert re.match(LEFT_OUT[one.path], one.why), one


def test_one_call_is_resolve_init_and_lora(rng, params):
    x, key = random_array(rng, X), jax.random.key(3)
    fn, adapters, config, report = adapt(model, CONFIG, params, x, key=key)
    assert config == resolve_config(model, CONFIG, params, x)
    for one, other in zip(jax.tree.leaves(adapters), jax.tree.leaves(init_lora(key, params, config)), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(fn(params, adapters, x), model(params, x), strict=True):
        np.testing.assert_array_equal(one, other)
    assert {t.path: t.factorization.roles for t in report.targets} == READ
    check_left_out(report.left_out)


def test_the_adapted_function_is_that_of_the_merged_weights(rng, params):
    x = random_array(rng, X)
    fn, adapters, config, _ = adapt(model, CONFIG, params, x)
    adapters = randomize(rng, adapters)
    merged = jlora.merge_params(params, adapters, config)
    for path, roles in READ.items():
        weight, found, entry = params, merged, adapters
        for name in path.split("/"):
            weight, found, entry = weight[name], found[name], entry[name]
        assert_close(found, as64(weight) + delta_of(entry, roles, 3))
    for one, other in zip(jax.jit(fn)(params, adapters, x), model(merged, x), strict=True):
        assert_close(one, as64(other), factor=30)


def test_every_way_of_calling_leaves_out_the_same():
    x = tensor(*X)
    check_left_out(adapt(model, CONFIG, SHAPES, x).report.left_out)
    check_left_out(explain(model, CONFIG, SHAPES, x).left_out)
    config = resolve_config(model, CONFIG, SHAPES, x)
    for adapters in (
        adapt(model, CONFIG, SHAPES, x).adapters,
        init_lora(None, SHAPES, CONFIG, fn=model, args=(x,)),
        init_lora(None, SHAPES, config),
    ):
        paths = {"/".join(k.key for k in path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(adapters)}
        assert paths == set(READ)
    assert resolve_config(model, config, SHAPES, x) == config
    table = jlora.summary(SHAPES, init_lora(None, SHAPES, config), config)
    assert {one.path for one in table.left_out} == {"order", "mixed"}


def test_a_narrow_weight_stays_out_where_its_name_says_something_else(tmp_path):
    """By their names these experts are heads of another size, which are wide enough."""

    def fn(p, x):
        return jnp.einsum("etd,edf->etf", x, p["out"]["kernel"])[..., 0] @ p["up"]

    params = {"out": {"kernel": tensor(3, 5, 1), "bias": tensor(5, 1)}, "up": tensor(11, 7)}
    assert jlora.tree.find_targets(params, CONFIG)["out/kernel"].factorization.roles == "ioo"
    args = (tensor(3, 11, 5),)
    found = adapt(fn, CONFIG, params, *args)
    assert [(one.path, one.why.split(";")[0]) for one in found.report.left_out] == [
        ("out/kernel", "rank 2 is larger than the smaller side 1")
    ]
    assert found.config == CONFIG.replace(exclude_modules=("out/bias", "out/kernel"), factorizations={"up": "io"})
    jlora.save_adapters(tmp_path / "adapters", found.adapters, found.config)
    assert init_lora(None, params, found.config)["out"] == {"kernel": None, "bias": None}


def test_what_one_call_made_is_saved_and_loaded(rng, params, tmp_path):
    found = adapt(model, CONFIG, params, random_array(rng, X))
    jlora.save_adapters(tmp_path / "adapters", found.adapters, found.config)
    adapters, config = jlora.load_adapters(tmp_path / "adapters", params=params)
    assert config == found.config
    for one, other in zip(jax.tree.leaves(adapters), jax.tree.leaves(found.adapters), strict=True):
        np.testing.assert_array_equal(one, other)


def test_explain_prints_the_reasons():
    shown = str(explain(model, CONFIG, SHAPES, tensor(*X)))
    for path, why in LEFT_OUT.items():
        assert re.search(rf"(?m)^{path} +[\dx]+ +{why}$", shown)
    assert re.search(r"(?m)^layers/down .* merged: it is not linear in the weight", shown)


@pytest.mark.parametrize("call", [adapt, resolve_config], ids=["adapt", "resolve_config"])
def test_strict_refuses_with_all_of_them(call):
    with pytest.raises(TargetError, match=rf"^{len(LEFT_OUT)} problems:") as caught:
        call(model, CONFIG, SHAPES, tensor(*X), strict=True)
    for path, why in LEFT_OUT.items():
        assert re.search(rf"(?m)^  strict, and not adapted: {path} \([\d, ]+\): {why}$", str(caught.value))
    with pytest.raises(TargetError, match=rf"^{len(LEFT_OUT)} problems:"):
        init_lora(None, SHAPES, CONFIG, fn=model, args=(tensor(*X),), strict=True)


def test_strict_refuses_what_would_be_merged_before_anything_is_called():
    config = CONFIG.replace(target_modules=("heads", "layers/down"))
    with pytest.raises(
        AdapterError, match=r"^layers/down: sin at .*test_adapt.py:\d+.* cannot be factored: it is not linear"
    ):
        adapt(model, config, SHAPES, tensor(*X), strict=True)
    found = adapt(model, CONFIG.replace(target_modules=("heads", "layers/up")), SHAPES, tensor(*X), strict=True)
    assert found.report.left_out == ()


def test_strict_holds_for_the_function_that_is_returned(rng, params):
    config = CONFIG.replace(target_modules="heads")
    fn, adapters, *_ = adapt(model, config, params, random_array(rng, X), strict=True)
    named = config.replace(target_modules="unused/matrix")
    with pytest.raises(AdapterError, match=r"^the adapters of unused/matrix reach nothing"):
        adapt(model, named, params, random_array(rng, X), strict=True)
    assert fn(params, adapters, random_array(rng, X))[0].shape == (11, 5)


NOTHING = {
    "unused": (lambda p, x: x, "the function never uses it"),
    "shapes alone": (lambda p, x: x * p["w"].shape[0], "the function never uses it"),
    "added": (lambda p, x: x + p["w"], "the function only adds it"),
    "subtracted": (lambda p, x: x - p["w"][None], "the function only adds it"),
    "rows": (lambda p, x: sum(x * p["w"][n] for n in range(11)), "it is a vector where the function uses it"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_is_left_the_error_says_what_is_true(name):
    fn, why = NOTHING[name]
    for call in (adapt, explain, resolve_config):
        with pytest.raises(TargetError, match=rf"^target_modules: '\*\*' adapts nothing:\n    w \(11, 5\): {why}$"):
            call(fn, CONFIG, {"w": tensor(11, 5)}, tensor(*X))


def test_a_pattern_of_what_the_function_does_not_use_says_why():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    params = {"w": tensor(5, 7), "head": {"kernel": tensor(7, 3)}}
    for field, value in (("target_modules", ("w", "head")), ("rank_pattern", {"head": 1})):
        with pytest.raises(TargetError, match=rf"^{field}: 'head' .* nothing.*:\n    head/kernel .* never uses it$"):
            resolve_config(fn, CONFIG.replace(**{field: value}), params, tensor(*X))


def test_a_scanned_weight_that_is_taken_whole_is_read_as_a_stack():
    """Two axes are left of it, and both readings are the same update."""

    def fn(p, x):
        return lax.scan(lambda x, w: (x @ jnp.sin(w.T), None), x, p["w"])[0]

    found = adapt(fn, CONFIG, {"w": tensor(3, 5, 5)}, tensor(*X))
    assert found.config.factorizations == (("w", "bio"),)
    (use,) = explain(fn, CONFIG, {"w": tensor(3, 5, 5)}, tensor(*X)).uses
    assert (use.factored, use.times, use.roles) == (False, 3, "")


def test_a_contraction_says_more_than_a_use_as_a_whole():
    def fn(p, x):
        return x @ p["w"].T + jnp.sin(p["w"]).sum()

    assert resolve_config(fn, CONFIG, {"w": tensor(7, 5)}, tensor(*X)).factorizations == (("w", "oi"),)


def test_explain_says_where_there_is_no_dropout():
    own = jax.custom_jvp(lambda w, x: x @ w)
    own.defjvp(lambda primals, tangents: (own(*primals), tangents[1] @ primals[0]))

    def fn(p, x):
        return own(p["own"], x) @ jax.nn.softmax(p["soft"]) @ p["plain"]

    params = {name: tensor(5, 5) for name in ("own", "soft", "plain")}
    why = {use.path: use.why for use in explain(fn, CONFIG.replace(dropout=0.5), params, tensor(101, 5)).uses}
    assert why["own"] == "a function with a derivative of its own; no dropout"
    assert why["soft"].endswith("; no dropout")
    assert why["plain"] == ""
    for use in explain(fn, CONFIG, params, tensor(101, 5)).uses:
        assert "dropout" not in use.why


def test_arguments_and_options_reach_their_functions(rng):
    def fn(p, x, *, kind):
        assert kind == "deep"
        return x @ p["w"]

    weights, x = {"w": random_array(rng, (5, 7))}, random_array(rng, X)
    options = {"cost_model": jlora.CostModel(merge_from=0.0), "dropout_keyword": "noise"}
    fn, adapters, *_ = adapt(fn, CONFIG.replace(dropout=0.5), weights, x, kind="deep", **options)
    merged = jax.make_jaxpr(lambda *args: fn(*args, kind="deep"))(weights, adapters, x)
    assert "custom_jvp_call" in {eqn.primitive.name for eqn in merged.eqns}
    adapters = randomize(rng, adapters)
    ys = [fn(weights, adapters, x, kind="deep", noise=jax.random.key(seed)) for seed in range(2)]
    assert not np.allclose(*ys)


def test_adapters_of_another_mode_are_told_of(rng):
    """Made for training, run as an encoder that has no head."""

    def fn(p, x, head):
        return x @ p["up"] @ p["head"] if head else x @ p["up"]

    params = {"up": random_array(rng, (5, 7)), "head": random_array(rng, (7, 3))}
    x = random_array(rng, X)
    found = adapt(fn, CONFIG, params, x, True)
    with pytest.warns(JloraWarning, match=r"^the adapters of head reach nothing: .* one of another mode"):
        found.model(params, found.adapters, x, False)
