"""Answers of a language model: the prompt in one pass, then a token at a time, from what the cache holds."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.errors import ConfigError, DataError, raise_all
from jlora.fields import integer, number
from jlora.models._cache import Cache, init_cache
from jlora.models._config import DecoderConfig
from jlora.models._filters import filtered, sample
from jlora.models._names import EMBEDDING_PATH
from jlora.paths import leaves_by_path

__all__ = ["Answer", "generate"]

_LEAST_BUCKET = 32


class Answer(NamedTuple):
    """What a model says to a prompt.

    Attributes:
      tokens: int32 (n,), without the one that ended it.
      stopped: whether a stop token ended it, and not the number of tokens.
    """

    tokens: np.ndarray[Any, Any]
    stopped: bool


def generate(
    fn: Callable[..., Any],
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    config: DecoderConfig,
    max_new_tokens: int,
    adapters: Any = None,
    stop: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    on_token: Callable[[int, np.ndarray[Any, Any]], None] | None = None,
) -> list[Answer]:
    """The answers of a language model to prompts, all at once.

    Prompts of other lengths are padded to the next power of two, and so is the cache, so that two programs are compiled
    for a bucket of lengths: one for the prompts and one for each token. They are kept with `fn`: keep that too.

    Args:
      fn: `decoder(config)`; with adapters `jlora.lora(decoder(config), lora_config)`; or one of that call.
      params: of the model, merged ones too; for a function of your own a pytree that holds them.
      prompts: the tokens of each prompt, at least one.
      config: of the model.
      max_new_tokens: how long an answer may get.
      adapters: of the params; None for none.
      stop: the tokens that end an answer.
      temperature: 0 takes the most likely token each time; else tokens are drawn from softmax(logits / temperature).
      top_k: they are drawn from the k most likely ones.
      top_p: and from the most likely ones that have this probability together; 0 < top_p <= 1.
      key: for drawing; a row's answer depends on it, the row's number and the prompt alone. Or a key a row, (B,).
      on_token: called after each step with its number and the new tokens int32 (B,), -1 in rows that have ended.

    Returns:
      an `Answer` for each prompt.

    Raises:
      ConfigError: settings that are not allowed, no key where one is needed.
      DataError: a prompt without tokens, with tokens that the model does not have, or too long for its positions.

    Example:
      >>> from jlora.models import decoder, init_params, parse_config
      >>> sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
      >>> config = parse_config({"model_type": "llama", "num_attention_heads": 2, **sizes})
      >>> params = init_params(jax.random.key(0), config)
      >>> answers = generate(decoder(config), params, [[1, 2, 3], [4]], config=config, max_new_tokens=5)
      >>> [answer.tokens.shape for answer in answers]
      [(5,), (5,)]
    """
    top_k = _checked(max_new_tokens, temperature, top_k, top_p, key)
    _check_prompts(prompts, config, max_new_tokens)
    if not prompts:
        return []
    tokens, lengths = _padded(prompts, config)
    call = _Call(fn, adapters is not None)
    slots = _bucket(int(lengths.max()) + max_new_tokens, config)
    draw = None
    if temperature > 0 and key is not None:
        draw = _Draw(_keys(key, len(prompts)), jnp.float32(temperature), None if top_p is None else jnp.float32(top_p))
    chosen, cache = _begin(call, config, slots, top_k, params, adapters, tokens, lengths, draw)
    answers: list[list[int]] = [[] for _ in prompts]
    ended = np.zeros(len(prompts), bool)
    for step in range(max_new_tokens):
        found = np.asarray(chosen)
        ended |= np.isin(found, np.asarray(stop, np.int32))
        for row in np.flatnonzero(~ended):
            answers[row].append(int(found[row]))
        if on_token is not None:
            on_token(step, np.where(ended, -1, found).astype(np.int32))
        if ended.all() or step + 1 == max_new_tokens:
            break
        chosen, cache = _continue(call, top_k, params, adapters, chosen, cache, draw, step + 1)
    return [Answer(np.asarray(own, np.int32), bool(end)) for own, end in zip(answers, ended, strict=True)]


def _keys(key: jax.Array, rows: int) -> jax.Array:
    """A key for each row (B,)."""
    if not (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim):
        return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
    if key.shape != (rows,):
        raise ConfigError(f"key: shape {list(key.shape)}, wanted one key or one for each of the {rows} prompts")
    return key


class _Draw(NamedTuple):
    """How tokens are drawn: a key for each row (B,), and what the distribution is made of."""

    keys: jax.Array
    temperature: jax.Array
    top_p: jax.Array | None


class _Call(NamedTuple):
    """How the model is called; static in jit, where equal ones share their programs."""

    fn: Callable[..., Any]
    adapted: bool

    def __call__(self, params: Any, adapters: Any, tokens: jax.Array, **options: Any) -> Any:
        if self.adapted:
            return self.fn(params, adapters, tokens, **options)
        return self.fn(params, tokens, **options)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _begin(
    call: _Call,
    config: DecoderConfig,
    slots: int,
    top_k: int | None,
    params: Any,
    adapters: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    draw: "_Draw | None",
) -> tuple[jax.Array, Cache]:
    """The first token (B,) after prompts (B, T) of these lengths, and the cache that holds the prompts."""
    cache = init_cache(config, tokens.shape[0], slots, _dtype_of(params))
    # Padding is nowhere behind its prompt: longrope turns all rows by the farthest position.
    positions = jnp.minimum(jnp.arange(tokens.shape[1]), lengths[:, None] - 1)  # (B, T)
    logits, cache = call(params, adapters, tokens, positions=positions, cache=cache, logits_at=lengths - 1)
    return _choose(logits, top_k, draw, 0), cache._replace(lengths=lengths)  # padding is overwritten unseen


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _continue(
    call: _Call,
    top_k: int | None,
    params: Any,
    adapters: Any,
    tokens: jax.Array,
    cache: Cache,
    draw: "_Draw | None",
    step: jax.Array,
) -> tuple[jax.Array, Cache]:
    """The token (B,) after the last ones (B,), and the cache that holds these too."""
    logits, cache = call(params, adapters, tokens[:, None], cache=cache)
    return _choose(logits[:, 0], top_k, draw, step), cache


def _dtype_of(params: Any) -> Any:
    """The dtype of the embedding, in which all of the model is computed."""
    return next(leaf.dtype for path, leaf in leaves_by_path(params).items() if path.endswith(EMBEDDING_PATH))


def _choose(logits: jax.Array, top_k: int | None, draw: "_Draw | None", step: Any) -> jax.Array:
    """A token for each row of logits (B, vocabulary)."""
    if draw is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    of_step = jax.vmap(lambda key: jax.random.fold_in(key, step))(draw.keys)
    return sample(filtered(logits, draw.temperature, top_k, draw.top_p), of_step)


def _bucket(length: int, config: DecoderConfig) -> int:
    """The next power of two, but no more than the model has positions."""
    return min(max(_LEAST_BUCKET, 1 << (length - 1).bit_length()), config.max_positions)


def _padded(prompts: Sequence[Sequence[int]], config: DecoderConfig) -> tuple[np.ndarray[Any, Any], Any]:
    """The prompts as one array int32 (B, T), and their lengths int32 (B,)."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), _bucket(int(lengths.max()), config)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _checked(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, key: jax.Array | None
) -> int | None:
    """Refuses settings that are not allowed; returns top_k, None where nothing is drawn."""
    integer("max_new_tokens", max_new_tokens, 1)
    number("temperature", temperature, 0.0)
    if top_k is not None:
        integer("top_k", top_k, 1)
    if top_p is not None and not 0 < number("top_p", top_p) <= 1:
        raise ConfigError(f"top_p = {top_p}: wanted 0 < top_p <= 1")
    if temperature > 0 and key is None:
        raise ConfigError(f"temperature = {temperature} draws tokens: give a key, such as jax.random.key(0)")
    return top_k if temperature > 0 else None


def _check_prompts(prompts: Sequence[Sequence[int]], config: DecoderConfig, max_new_tokens: int) -> None:
    problems = []
    for row, prompt in enumerate(prompts):
        length = len(prompt)
        if not length:
            problems.append(f"prompt {row}: has no tokens; begin with the tokenizer's first token")
            continue
        tokens = np.asarray(prompt)
        outside = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
        if outside.size:
            problems.append(
                f"prompt {row}: token {outside[0]}, and the model has {config.vocab_size:,}; take the tokenizer of its "
                "folder"
            )
        elif length + max_new_tokens > config.max_positions:
            left = config.max_positions - length
            way_out = f"wanted max_new_tokens <= {left:,}" if left > 0 else "wanted a shorter prompt"
            problems.append(
                f"prompt {row}: {length:,} tokens and {max_new_tokens:,} new ones, and the model has "
                f"{config.max_positions:,} positions: {way_out}"
            )
    raise_all(problems, DataError)
