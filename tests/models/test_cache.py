"""Tokens given bit by bit have the logits that they have all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import DataError
from jlora.models import decoder, init_cache
from tests.models.sizes import KINDS, config_of, random_params, random_tokens
from tests.reference import assert_close


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_at_a_time(kind: str, rng: np.random.Generator) -> None:
    config = config_of(kind)
    params, tokens = random_params(rng, config), random_tokens(rng, (2, 13))
    fn = decoder(config)
    wanted = np.asarray(jax.jit(fn)(params, tokens))

    step = jax.jit(lambda params, tokens, cache: fn(params, tokens, cache=cache))
    logits, cache = step(params, tokens[:, :7], init_cache(config, 2, 17))
    found = [logits]
    for t in range(7, 13):
        logits, cache = step(params, tokens[:, t : t + 1], cache)
        found.append(logits)
    np.testing.assert_array_equal(cache.lengths, [13, 13])
    assert_close(jnp.concatenate(found, axis=1), wanted)


@pytest.mark.parametrize("kind", ["plain", "alternating"])
def test_prompts_of_several_lengths_padded_on_the_right(kind: str, rng: np.random.Generator) -> None:
    config = config_of(kind)
    params = random_params(rng, config)
    rows, lengths = random_tokens(rng, (3, 12)), np.array([7, 2, 5], np.int32)
    fn = decoder(config)
    wanted = np.asarray(jax.jit(fn)(params, rows))

    prompts = np.where(np.arange(7) < lengths[:, None], np.asarray(rows)[:, :7], 36)
    logits, cache = fn(params, prompts, cache=init_cache(config, 3, 12), logits_at=jnp.asarray(lengths - 1))
    assert_close(logits, wanted[np.arange(3), lengths - 1])

    cache = cache._replace(lengths=jnp.asarray(lengths))
    for step in range(5):
        given = jnp.take_along_axis(rows, cache.lengths[:, None], axis=1)
        logits, cache = fn(params, given, cache=cache)
        assert_close(logits[:, 0], wanted[np.arange(3), lengths + step])


def test_a_cache_is_in_the_dtype_of_the_params(rng: np.random.Generator) -> None:
    config = config_of("plain")
    params = random_params(rng, config, "bfloat16")
    logits, cache = decoder(config)(params, random_tokens(rng, (1, 3)), cache=init_cache(config, 1, 5, jnp.bfloat16))
    assert logits.dtype == jnp.float32
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16


def test_refusals(rng: np.random.Generator) -> None:
    config = config_of("plain")
    params, tokens = random_params(rng, config), random_tokens(rng, (2, 5))
    fn = decoder(config)
    with pytest.raises(DataError, match="rows of 65 tokens, and the model has 64 positions"):
        init_cache(config, 2, 65)
    with pytest.raises(DataError, match="rows of 65 tokens, and the model has 64 positions"):
        fn(params, random_tokens(rng, (2, 65)))
    with pytest.raises(DataError, match=r"tokens of shape \(2, 5\), and the cache is for 2 rows of 4"):
        fn(params, tokens, cache=init_cache(config, 2, 4))
    with pytest.raises(DataError, match=r"tokens of shape \(2, 5\), and the cache is for 3 rows of 9"):
        fn(params, tokens, cache=init_cache(config, 3, 9))
    with pytest.raises(DataError, match="a cache and segments: wanted one of them"):
        fn(params, tokens, segments=jnp.ones((2, 5), jnp.int32), cache=init_cache(config, 2, 9))
    with pytest.raises(DataError, match=r"tokens of shape \(5,\): wanted \(batch, length\)"):
        fn(params, tokens[0])
