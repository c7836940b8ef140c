"""Losses of recipes: `loss(outputs, batch)` returns a scalar, or `(scalar, metrics)`, as in `jlora.train`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora.train import ExpMean, Mean


def cross_entropy(outputs: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean softmax cross-entropy of logits `(n, classes)` and `labels` `(n,)`, and the accuracy.

    >>> loss, metrics = cross_entropy(jnp.array([[9., 0.], [9., 0.]]), {'labels': jnp.array([0, 1])})
    >>> round(float(loss), 3), float(metrics['accuracy'])
    (4.5, 0.5)
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["labels"])
    return losses.mean(), {"accuracy": jnp.mean(outputs.argmax(-1) == batch["labels"])}


def next_token(outputs: jax.Array, batch: Mapping[str, Any]) -> tuple[Mean, dict[str, Mean | ExpMean]]:
    """The mean softmax cross-entropy of the token that follows, over the tokens that count, in float32.

    It is a mean over all tokens of a step that count, also where the step is computed in parts or on several devices.

    Args:
      outputs: logits (B, T, vocabulary).
      batch: `labels`, int32 (B, T), the tokens that follow, and `weights` (B, T), 1 where one counts and else 0.

    Returns:
      The loss in nats a token; the perplexity, exp of it, and the share of tokens that are the most likely one.

    >>> logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]))
    >>> loss, metrics = next_token(logits, {'labels': jnp.array([[1, 0]]), 'weights': jnp.array([[1, 0]])})
    >>> round(float(loss.total / loss.weight), 3), float(metrics['token_accuracy'].total)
    (1.386, 0.0)
    """
    labels, weights = batch["labels"], jnp.asarray(batch["weights"], jnp.float32)
    logits = outputs.astype(jnp.float32)
    # not by an index: on explicit meshes the gradient of that is refused
    of_labels = jnp.sum(jnp.where(labels[..., None] == jnp.arange(logits.shape[-1]), logits, 0), axis=-1)  # (B, T)
    losses = jax.nn.logsumexp(logits, axis=-1) - of_labels
    total, weight = jnp.sum(losses * weights), jnp.sum(weights)
    right = jnp.sum((outputs.argmax(-1) == labels) * weights)
    return Mean(total, weight), {"perplexity": ExpMean(total, weight), "token_accuracy": Mean(right, weight)}
