"""Every primitive of the JAX at hand is decided: a rule follows a weight into it, or it takes the weight as a whole."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive

from jlora import AdapterError, LoraConfig, lora
from jlora.transform._primitives import primitive_of_jax
from jlora.transform._registry import RULES
from jlora.transform._whole import UNKNOWN, WHOLE

NAMES = """
import jax, jax.ad_checkpoint, jax.extend.core.primitives, jax.lax.linalg
from jax.extend.core import Primitive
from jax.interpreters import ad
found = {*ad.primitive_jvps, *ad.primitive_transposes}
for module in (jax.extend.core.primitives, jax.lax, jax.lax.linalg, jax.ad_checkpoint):
    found.update(value for value in vars(module).values() if isinstance(value, Primitive))
print(*sorted({primitive.name for primitive in found}))
"""


@functools.cache
def installed() -> set[str]:
    """The names of the primitives that JAX exports, or knows a derivative of; no other library's."""
    return set(subprocess.check_output([sys.executable, "-c", NAMES], text=True).split())


def test_every_primitive_is_decided_once():
    names = installed()
    assert len(names) > 200
    assert names - set(RULES) - set(WHOLE) == set(), (
        "add a rule to _registry.py, or the reason why there is none to _whole.py"
    )
    assert set(RULES) & set(WHOLE) == set()


def test_every_rule_of_jax_is_known_by_the_object():
    """A name alone would do for a primitive of another library too."""
    for name in (installed() | {"shard_map"}) & set(RULES):
        assert primitive_of_jax(name) is not None, name


REASONS = {
    "it is not linear in the weight": jnp.tanh,
    "it is linear algebra of the whole matrix": jnp.linalg.svd,
    "it sums over axes of the weight": jnp.sum,
    "it writes into a part of the weight": lambda w: w.at[0].set(1.0),
    "its numbers are complex": lambda w: jax.lax.complex(w, w),
    "nothing is known of what it computes": lambda w: jax.pure_callback(lambda w: w, w, w),
    "it asks for the bits or the place of the weight": lambda w: jax.lax.bitcast_convert_type(w, jnp.uint32),
}


@pytest.mark.parametrize("why", REASONS)
def test_strict_tells_the_reason(why):
    params, adapters = {"w": jnp.ones((5, 7))}, {"w": {"A": jnp.ones((5, 2)), "B": jnp.ones((2, 7))}}
    with pytest.raises(AdapterError, match=f"^w: .* cannot be factored: {why}; leave the weight out"):
        jax.eval_shape(lora(lambda p: REASONS[why](p["w"]), LoraConfig(rank=2), strict=True), params, adapters)


def test_a_primitive_that_nobody_knows_takes_the_merged_weight():
    mystery = Primitive("mystery")
    mystery.def_impl(lambda w: 2 * w)
    mystery.def_abstract_eval(lambda w: w)
    params, adapters = {"w": jnp.ones((5, 7))}, {"w": {"A": jnp.ones((5, 2)), "B": jnp.ones((2, 7))}}
    config = LoraConfig(rank=2, alpha=2)
    found = lora(lambda p: mystery.bind(p["w"]), config)(params, adapters)
    assert jnp.array_equal(found, jnp.full((5, 7), 6.0))
    with pytest.raises(AdapterError, match=f"^w: mystery at .* cannot be factored: {UNKNOWN}; "):
        lora(lambda p: mystery.bind(p["w"]), config, strict=True)(params, adapters)
