"""Losses of recipes: `loss(outputs, batch)` returns a scalar, or `(scalar, metrics)`, as in `jlora.train`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def cross_entropy(outputs: jax.Array, batch: Mapping[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean softmax cross-entropy of logits `(n, classes)` and `labels` `(n,)`, and the accuracy.

    >>> loss, metrics = cross_entropy(jnp.array([[9., 0.], [9., 0.]]), {'labels': jnp.array([0, 1])})
    >>> round(float(loss), 3), float(metrics['accuracy'])
    (4.5, 0.5)
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["labels"])
    return losses.mean(), {"accuracy": jnp.mean(outputs.argmax(-1) == batch["labels"])}
