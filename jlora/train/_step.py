"""The jitted train step: gradients of the trained tree alone, the frozen one an argument that is never returned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.fields import integer, number
from jlora.train._loss import Returned, divided, finished, numerator, read_returned
from jlora.train._parts import added
from jlora.train._placed import PlacedStep

Metrics = dict[str, chex.Array]
Loss = Callable[..., Any]
_TINY = float(jnp.finfo(jnp.float32).tiny)
Step = Callable[["TrainState", Any, Any], tuple["TrainState", Metrics]]


class TrainState(NamedTuple):
    """What a step changes; a pytree that can be donated and checkpointed.

    Attributes:
      step: int32 scalar, the number of steps done.
      trained: the adapters, or whatever else is trained.
      opt_state: the optimizer's state for them.
      model_state: what the model itself changes as it runs, such as batch statistics; `None` where it has none.
    """

    step: chex.Array
    trained: Any
    opt_state: optax.OptState
    model_state: Any = None


def init_state(trained: Any, optimizer: optax.GradientTransformation, model_state: Any = None) -> TrainState:
    """The state before the first step.

    The arrays are copied: a step donates its state, and what was passed in stays usable.

    Args:
      trained: the adapters, or whatever else is trained.
      optimizer: the one that `make_train_step` gets.
      model_state: a pytree of what the model changes as it runs (Flax's mutable collections, such as batch
        statistics); the loss is then called with it and returns it.
    """
    trained, model_state = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (trained, model_state))
    return _ready(TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), model_state))


def _ready(state: TrainState) -> TrainState:
    """The state as a step takes and gives it, so that the second step is no other program than the first.

    No array stands in it twice, which cannot be donated, and none has a weak type; optimizers make both (L-BFGS).
    Where what is trained lies on a mesh, steps and counts lie on all of it.
    """
    state, seen = jax.tree.map(jnp.asarray, state), set()
    meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(state) if isinstance(leaf.sharding, NamedSharding)}
    everywhere = NamedSharding(meshes.pop(), PartitionSpec()) if len(meshes) == 1 else None

    def own(leaf: chex.Array) -> chex.Array:
        if id(leaf) in seen or leaf.weak_type:
            leaf = jnp.array(leaf, leaf.dtype, copy=True)
        seen.add(id(leaf))
        return leaf if everywhere is None or leaf.committed else jax.device_put(leaf, everywhere)

    return jax.tree.map(own, state)


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
      loss: `loss(trained, frozen, batch, key)` returns a scalar, or a scalar and a dict of metrics. Where the state has
        a model state, `loss(trained, frozen, batch, key, model_state)` returns `(scalar, metrics, model_state)`, the
        last with the paths, shapes and dtypes that it was given. A scalar is a number, the mean of its examples, or
        says with `Mean(total, weight)` or `Sum(value)` how the parts of a batch make up the whole. Gradients are of
        `trained` alone, the key is another one at every step.
      optimizer: any optax optimizer, also one that wants `value`, `grad` or `value_fn` (`optax.lbfgs`,
        `optax.contrib.reduce_on_plateau`): these are of the whole batch, with the step's key and before clipping. It
        sees the trained tree alone, so that weight decay cannot reach the base.
      accumulate: each batch is split into this many parts along its leading axis, part k with the rows k,
        k + accumulate and so on, so that a batch that is sharded over devices stays where it is. The parts are
        computed one after the other and added up in float32 at least; every part has a key of its own, and gets the
        scalars and single random keys of the batch as they are.
      clip_norm: the global norm, above 0, of the gradients of the trained tree beyond which they are scaled down.
      seed: of the keys.

    Returns:
      The step. Its state is donated, and the new one lies on devices as the old one did; `metrics` are those of the
      loss, `loss` and `grad_norm` (before clipping). `step.lower` is that of `jax.jit`.

    Raises:
      ConfigError: while tracing, where the loss returns something else, or metrics of the names `loss` or `grad_norm`.
      DataError: while tracing, where a batch cannot be split evenly.

    >>> from jlora.train import Mean, Sum
    >>> def loss(w, _, batch, key):
    ...     errors = batch['mask'] * (batch['x'] @ w - 1) ** 2
    ...     return Mean(errors.sum(), batch['mask'].sum()), {'examples': Sum(batch['mask'].sum())}
    >>> step = make_train_step(loss, optax.sgd(0.1), accumulate=2)
    >>> batch = {'x': jnp.eye(4), 'mask': jnp.array([1, 1, 1, 0])}
    >>> state, metrics = step(init_state(jnp.zeros(4), optax.sgd(0.1)), None, batch)
    >>> float(metrics['loss']), int(metrics['examples'])
    (1.0, 3)
    """
    accumulate = integer("accumulate", accumulate, 1)
    clip = optax.identity()
    if clip_norm is not None:
        clip = optax.clip_by_global_norm(number("clip_norm", clip_norm, _TINY, wanted="a number above 0, or None"))
    optimizer = optax.with_extra_args_support(optimizer)

    def total(trained: Any, frozen: Any, batch: Any, key: chex.PRNGKey, model_state: Any) -> tuple[Any, Returned]:
        last = () if model_state is None else (model_state,)
        returned = read_returned(loss(trained, frozen, batch, key, *last), model_state)
        return numerator(returned.value), returned

    def gradients(trained: Any, frozen: Any, batch: Any, key: chex.PRNGKey, model_state: Any) -> tuple[Any, Returned]:
        def run(part: Any, key: chex.PRNGKey, model_state: Any) -> tuple[Any, Returned]:
            (_, returned), grads = jax.value_and_grad(total, has_aux=True)(trained, frozen, part, key, model_state)
            return grads, returned

        grads, returned = added(run, batch, key, model_state, accumulate)
        mean = jax.tree.map(lambda grad, leaf: divided(grad, returned.value).astype(leaf.dtype), grads, trained)
        return mean, returned

    def value(trained: Any, frozen: Any, batch: Any, key: chex.PRNGKey, model_state: Any) -> chex.Array:
        @jax.checkpoint
        def run(part: Any, key: chex.PRNGKey, model_state: Any) -> tuple[Any, Returned]:
            return (), total(trained, frozen, part, key, model_state)[1]

        _, returned = added(run, batch, key, model_state, accumulate)
        return finished(returned.value)

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        given = frozen, batch, key, state.model_state
        grads, returned = gradients(state.trained, *given)
        metrics = {name: finished(kind) for name, kind in returned.metrics.items()}
        metrics |= {"loss": finished(returned.value), "grad_norm": optax.tree.norm(grads)}
        clipped, _ = clip.update(grads, clip.init(state.trained))
        updates, opt_state = optimizer.update(
            clipped,
            state.opt_state,
            state.trained,
            value=metrics["loss"],
            grad=grads,
            value_fn=lambda trained: value(trained, *given),
        )
        trained = optax.apply_updates(state.trained, updates)
        return TrainState(state.step + 1, trained, opt_state, returned.model_state), metrics

    return PlacedStep(step)
