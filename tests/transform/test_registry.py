"""Which primitive has a rule: the object counts, whatever it is called; registering, twice, and what is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.sharding import AxisType, PartitionSpec

import jlora
from jlora import AdapterError, ConfigError, explain, lora, resolve_config
from jlora.transform import Multiplies, _primitives, register
from jlora.transform._registry import RULES
from jlora.transform._whole import UNKNOWN
from tests.reference import as64, assert_close, random_array
from tests.transform.test_register import CONFIG, no_rule_stays, primitive, updated, weights

__all__ = ["no_rule_stays"]

# Without a rule


@pytest.mark.parametrize("name", ["split", "scan", "add", "sin", "pvary", "shard_map", "remat2", "dot_general"])
def test_a_primitive_of_the_same_name_is_none_of_jaxs(rng, name):
    """Without a rule it is merged for; with one it is followed. It is not looked into, as a scan is."""
    made = primitive(name, lambda w, x: 2 * x @ w)
    params, adapters = weights(rng)
    x = random_array(rng, (3, 5))
    fn = lambda p, x: made.bind(p["w"], x)  # noqa: E731
    wanted = 2 * as64(x) @ updated(params, adapters)
    assert_close(lora(fn, CONFIG)(params, adapters, x), wanted, factor=3)
    with pytest.raises(AdapterError, match=rf"^w: {name} \(not JAX's\) at .* cannot be factored: {UNKNOWN}; leave"):
        lora(fn, CONFIG, strict=True)(params, adapters, x)
    assert "register" in UNKNOWN
    register(made, lambda w, x: Multiplies("mk,kn->mn", lambda x, a, b: 2 * (x @ a) @ b))
    assert_close(lora(fn, CONFIG, strict=True)(params, adapters, x), wanted, factor=3)
    assert resolve_config(fn, CONFIG, params, x).factorizations == (("w", "io"),)


def test_every_name_of_jaxs_may_be_taken():
    for name in RULES:
        made = Primitive(name)
        made.def_abstract_eval(lambda w: w)
        jax.eval_shape(lora(lambda p, made=made: made.bind(p["w"]), CONFIG), *weights(np.random.default_rng(0)))


def test_jaxs_own_are_found_wherever_they_are_first_met():
    """Within a shard_map too, where no other one may be traced."""
    mesh = jax.make_mesh((1,), ("z",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    found = {}

    def body(x):
        _primitives._traced.cache_clear()
        found.update({name: _primitives.primitive_of_jax(name) for name in _primitives._TINY})
        return x

    jax.make_jaxpr(jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec()))(1.0)
    assert [name for name in found if found[name] is None] in ([], ["mesh_cast"])  # which JAX 0.7 has alone


# Registering


def test_a_primitive_has_one_rule_unless_the_other_one_replaces_it(rng):
    made = primitive("fused", jnp.matmul)
    assert register(made, lambda x, w: "first")(None, None) == "first"
    with pytest.raises(
        ConfigError, match=r"^register: fused has a rule already; register\(.*, replace=True\) replaces"
    ):
        register(made, lambda x, w: "second")
    register(made, lambda x, w: "third", replace=True)
    (use,) = explain(lambda p, x: made.bind(x, p["w"]), CONFIG, {"w": jnp.ones((5, 7))}, jnp.ones((3, 5))).uses
    assert use.why == "third"


def test_a_rule_of_jloras_may_be_replaced_too(rng):
    product = lambda *_, **__: "mine"  # noqa: E731
    with pytest.raises(ConfigError, match=r"^register: dot_general has a rule already"):
        register(lax.dot_general_p, product)
    register(lax.dot_general_p, product, replace=True)
    (use,) = explain(lambda p, x: x @ p["w"], CONFIG, {"w": jnp.ones((5, 7))}, jnp.ones((3, 5))).uses
    assert use.why == "mine"


@pytest.mark.parametrize("found", ["dot_general", jnp.matmul, Primitive])
def test_what_is_no_primitive_is_refused(found):
    with pytest.raises(
        ConfigError, match=r"^register: found \w+ .*, wanted a jax.extend.core.Primitive; that of a func"
    ):
        register(found, lambda *_: "")


def test_a_rule_that_is_no_function_is_refused():
    with pytest.raises(ConfigError, match=r"^register: fused: found the rule 'mk,kn->mn', wanted a function rule\("):
        register(Primitive("fused"), "mk,kn->mn")


def test_it_decorates():
    made = primitive("fused", jnp.matmul)

    @register(made)
    def rule(x, w):
        return Multiplies("mk,kn->mn")

    assert rule(None, None) == Multiplies("mk,kn->mn")
    with pytest.raises(ConfigError, match=r"has a rule already"):
        register(made)(rule)
    register(made, replace=True)(rule)


def test_a_rule_holds_for_models_that_are_there_already(rng):
    """And for what was compiled within them before."""
    made = primitive("fused", jnp.matmul)
    params, adapters = weights(rng)
    model = lora(jax.jit(lambda p, x: made.bind(x, p["w"])), CONFIG)
    merged = model(params, adapters, jnp.ones((3, 5)))
    called = []

    def rule(x, w):
        called.append((x.shape, w.shape))
        return Multiplies("mk,kn->mn")

    register(made, rule)
    assert_close(model(params, adapters, jnp.ones((3, 5))), as64(merged))
    assert called == [((3, 5), (5, 7))]


def test_the_names_are_public():
    assert {"Moves", "Multiplies", "register"} <= set(jlora.transform.__all__)
