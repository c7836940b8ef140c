"""Keywords of jlora's own beside the arguments of the function."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import ConfigError, CostModel, LoraConfig, adapt, explain, init_lora, lora, resolve_config
from tests.reference import random_array, randomize

CONFIG = LoraConfig(rank=2, alpha=3, dropout=0.5)
X = jnp.ones((11, 5))


def noisy(params: Any, x: Any, dropout_key: Any = None) -> Any:
    y = x @ params["w"]
    return y if dropout_key is None else y + jax.random.normal(dropout_key, y.shape)


class Model:
    def method(self, params: Any, x: Any, *, dropout_key: Any) -> Any:
        return noisy(params, x, dropout_key)

    def __call__(self, params: Any, x: Any, dropout_key: Any = None) -> Any:
        return noisy(params, x, dropout_key)


def all_keywords(params: Any, x: Any, **kwargs: Any) -> Any:
    return x @ params["w"]


COLLIDING = {
    "function": noisy,
    "method": Model().method,
    "object": Model(),
    "partial": functools.partial(noisy, x=X),
    "compiled": jax.jit(noisy),
    "rematerialized": jax.checkpoint(noisy),
    "gradient": jax.grad(lambda params, x, dropout_key: noisy(params, x, dropout_key).sum()),
}
OTHERS = {
    "bound": functools.partial(noisy, dropout_key=jax.random.key(3)),
    "any keyword": all_keywords,
    "first": lambda dropout_key, x: x @ dropout_key["w"],
}


@pytest.fixture
def params(rng):
    return {"w": random_array(rng, (5, 7))}


@pytest.mark.parametrize("name", COLLIDING)
def test_an_argument_named_as_the_key_of_the_dropout_is_refused_at_once(name):
    message = (
        r"has an argument 'dropout_key', which it would never get: jlora.lora takes the keyword 'dropout_key' itself; "
        r"give that another name, as in jlora.lora\(fn, config, dropout_keyword='lora_dropout_key'\)$"
    )
    with pytest.raises(ConfigError, match=message):
        lora(COLLIDING[name], CONFIG)


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_shadowed_is_no_collision(name, params):
    adapters = init_lora(None, params, CONFIG)
    assert lora(OTHERS[name], CONFIG)(params, adapters, X, dropout_key=jax.random.key(0)).shape == (11, 7)


def test_under_another_name_both_get_their_keys(rng, params):
    adapters = randomize(rng, init_lora(None, params, CONFIG))
    model = lora(noisy, CONFIG, dropout_keyword="adapter_key")
    own, other = jax.random.split(jax.random.key(1))
    plain = model(params, adapters, X)
    noise = jax.random.normal(own, plain.shape)
    np.testing.assert_allclose(model(params, adapters, X, dropout_key=own), plain + noise, rtol=1e-5)
    dropped = model(params, adapters, X, adapter_key=other)
    assert not np.allclose(dropped, plain)
    np.testing.assert_allclose(
        model(params, adapters, X, dropout_key=own, adapter_key=other), dropped + noise, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("keyword", ["", "two words", "a-b", 3, None])
def test_a_name_that_is_none_is_refused(keyword):
    with pytest.raises(ConfigError, match=r"^dropout_keyword: found .*, wanted the name of an argument, such as"):
        lora(all_keywords, CONFIG, dropout_keyword=keyword)


def test_the_other_name_is_checked_too():
    with pytest.raises(ConfigError, match=r"'x', which .* dropout_keyword='lora_x'"):
        lora(noisy, CONFIG, dropout_keyword="x")


def strict_fn(params, x, strict=False, *, cost_model=None, key=None):
    assert (strict, cost_model, key) == ("theirs", "theirs", "theirs")
    return x @ params["w"]


TAKERS = {
    "strict": (resolve_config, "jlora.resolve_config"),
    "cost_model": (explain, "jlora.explain"),
    "key": (adapt, "jlora.adapt"),
    "dropout_keyword": (adapt, "jlora.adapt"),
}


@pytest.mark.parametrize("name", TAKERS)
def test_every_function_that_hands_arguments_on_has_the_same_rule(name, params):
    call, taker = TAKERS[name]
    scope: dict[str, Any] = {}
    exec(f"def theirs(params, x, {name}): return x @ params['w']", scope)
    way_out = rf"pass it by position, or .*: lambda params, \*args: fn\(params, \*args, {name}=\.\.\.\)$"
    with pytest.raises(ConfigError, match=rf"^theirs has an argument '{name}', which .* {taker} takes.*; {way_out}"):
        call(scope["theirs"], CONFIG, params, X)
    call(scope["theirs"], CONFIG, params, X, 3)


def test_arguments_by_position_or_in_a_function_of_ones_own_reach_it(params):
    def wrapped(params, x):
        return strict_fn(params, x, "theirs", cost_model="theirs", key="theirs")

    for call in (resolve_config, explain, adapt):
        call(wrapped, CONFIG, params, X)
    assert len(explain(wrapped, CONFIG, params, X, cost_model=CostModel()).uses) == 1


def test_arguments_may_be_called_as_those_of_jlora_that_stand_first(params):
    """fn, config, params and adapters are given by position alone."""

    def theirs(weights, x, fn, *, config, params, adapters):
        assert (fn, config, params, adapters) == ("a", "b", "c", "d")
        return x @ weights["w"]

    given = {"fn": "a", "config": "b", "params": "c", "adapters": "d"}
    for call in (resolve_config, explain):
        call(theirs, CONFIG, params, X, **given)
    model, adapters, *_ = adapt(theirs, CONFIG, params, X, **given)
    assert model(params, adapters, X, **given).shape == (11, 7)


def test_a_signature_that_cannot_be_read_is_no_obstacle(params):
    class Odd:
        __signature__ = "odd"

        def __call__(self, params: Any, x: Any) -> Any:
            return x @ params["w"]

    assert lora(Odd(), CONFIG)(params, init_lora(None, params, CONFIG), X).shape == (11, 7)
