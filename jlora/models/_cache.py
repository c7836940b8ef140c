"""The keys and values of the tokens that a model has seen."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.errors import DataError
from jlora.models._config import DecoderConfig

__all__ = ["Cache", "init_cache"]


class Cache(NamedTuple):
    """Keys and values of the tokens that a model has seen, for each layer and row; a pytree.

    Attributes:
      keys, values: (layers, B, slots, kv_heads, head_dim); slot i of a row holds its token i.
      lengths: int32 (B,), how many tokens of each row they hold. What lies behind is overwritten before it is seen.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    def written(self, layer: jax.Array, slots: jax.Array, keys: jax.Array, values: jax.Array) -> "Cache":
        """With keys and values (B, T, kv_heads, head_dim) of a layer at slots (B, T); those past the last are lost."""
        at = (layer, jnp.arange(slots.shape[0])[:, None], slots)
        return self._replace(keys=self.keys.at[at].set(keys), values=self.values.at[at].set(values))


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens each.

    Args:
      config: of the model.
      batch, length: rows, and tokens of each, prompt and answer together.
      dtype: of the params, in which keys and values are computed.

    Raises:
      DataError: a length above `config.max_positions`.

    Example:
      >>> from jlora.models import parse_config
      >>> config = parse_config({"model_type": "llama", "num_hidden_layers": 2})
      >>> init_cache(config, batch=3, length=5).keys.shape
      (2, 3, 5, 32, 128)
    """
    check_length(config, length)
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))


def check_length(config: DecoderConfig, length: int) -> None:
    """Refuses rows that are longer than the model was made for."""
    if length > config.max_positions:
        raise DataError(
            f"rows of {length:,} tokens, and the model has {config.max_positions:,} positions "
            "(max_position_embeddings of its config.json): wanted shorter ones"
        )
