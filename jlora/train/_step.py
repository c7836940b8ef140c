"""The jitted train step: gradients of the trained tree alone, the frozen one an argument that is never returned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jlora.contraction import common_dtype
from jlora.errors import DataError
from jlora.fields import number, whole

Metrics = dict[str, chex.Array]
Loss = Callable[[Any, Any, Any, chex.PRNGKey], tuple[chex.Array, Metrics]]
_TINY = float(jnp.finfo(jnp.float32).tiny)
Step = Callable[["TrainState", Any, Any], tuple["TrainState", Metrics]]


class TrainState(NamedTuple):
    """What a step changes; a pytree that can be donated and checkpointed.

    Attributes:
      step: int32 scalar, the number of steps done.
      trained: the adapters, or whatever else is trained.
      opt_state: the optimizer's state for them.
    """

    step: chex.Array
    trained: Any
    opt_state: optax.OptState


def init_state(trained: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    The arrays are copied: a step donates its state, and what was passed in stays usable.
    """
    trained = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), trained)
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
    seed: int = 0,
) -> Step:
    """A jitted `step(state, frozen, batch) -> (state, metrics)`.

    Args:
      loss: `loss(trained, frozen, batch, key) -> (scalar, metrics)`; gradients are of `trained` alone, the key is
        another one at every step.
      optimizer: any optax optimizer; it sees the trained tree alone, so that weight decay cannot reach the base.
      accumulate: each batch is split into this many along its leading axis, and the gradients are averaged, in float32
        at least.
      clip_norm: the global norm, above 0, of the gradients of the trained tree beyond which they are scaled down.
      seed: of the keys.

    Returns:
      The step. Its state is donated; `metrics` are those of the loss, `loss` and `grad_norm` (before clipping).

    Raises:
      DataError: while tracing, where a batch cannot be split evenly.
    """
    accumulate = whole("accumulate", accumulate, 1)
    clip = optax.identity()
    if clip_norm is not None:
        clip = optax.clip_by_global_norm(number("clip_norm", clip_norm, _TINY, wanted="a number above 0, or None"))

    def gradients(trained: Any, frozen: Any, batch: Any, key: chex.PRNGKey) -> tuple[Any, Metrics]:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trained, frozen, batch, key)
        return grads, jax.tree.map(_at_least_float32, {"loss": value, **metrics})

    def averaged(trained: Any, frozen: Any, batch: Any, key: chex.PRNGKey) -> tuple[Any, Metrics]:
        if accumulate == 1:
            return gradients(trained, frozen, batch, key)

        def add(total: Any, item: Any) -> tuple[Any, None]:
            part, part_key = item
            found = jax.tree.map(_at_least_float32, gradients(trained, frozen, part, part_key))
            return jax.tree.map(jnp.add, total, found), None

        parts = jax.tree.map(lambda leaf: _split(leaf, accumulate), batch)
        keys = jax.random.split(key, accumulate)
        first = jax.tree.map(lambda leaf: leaf[0], parts)
        shapes = jax.eval_shape(gradients, trained, frozen, first, keys[0])
        zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, common_dtype(like.dtype, jnp.float32)), shapes)
        total, _ = jax.lax.scan(add, zeros, (parts, keys))
        return jax.tree.map(lambda leaf, like: (leaf / accumulate).astype(like.dtype), total, shapes)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics = averaged(state.trained, frozen, batch, key)
        metrics["grad_norm"] = optax.tree.norm(grads)
        grads, _ = clip.update(grads, clip.init(state.trained))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return TrainState(state.step + 1, trained, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def _at_least_float32(leaf: chex.Array) -> chex.Array:
    return jnp.asarray(leaf, common_dtype(jnp.result_type(leaf), jnp.float32))


def _split(leaf: chex.Array, parts: int) -> chex.Array:
    if leaf.shape[0] % parts:
        raise DataError(f"a batch of {leaf.shape[0]} examples cannot be split into accumulate = {parts} equal parts")
    return leaf.reshape(parts, leaf.shape[0] // parts, *leaf.shape[1:])
