"""What a loss returns: a value and metrics, each of a kind that says how the parts of a batch make up the whole."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jlora.errors import ConfigError
from jlora.paths import leaves_by_path
from jlora.products import common_dtype


class Mean(NamedTuple):
    """A mean that says what it is over, such as a loss over the tokens that are no padding.

    Over the parts of a batch (`make_train_step(accumulate=...)`) totals and weights are added and divided once, so
    that parts with few tokens count as little as they should. Gradients are of the total; the weight is a constant
    to them. A batch of weight 0 has no mean: NaN.

    Attributes:
      total: scalar, the sum.
      weight: scalar, what the sum is divided by.

    >>> losses, mask = jnp.array([[1.0, 2.0, 7.0], [3.0, 7.0, 7.0]]), jnp.array([[1, 1, 0], [1, 0, 0]])
    >>> Mean(jnp.sum(losses * mask), jnp.sum(mask))
    Mean(total=Array(6., dtype=float32), weight=Array(3, dtype=int32))
    """

    total: chex.Numeric
    weight: chex.Numeric


class ExpMean(NamedTuple):
    """The exponential of a mean, such as the perplexity of a text: exp(total / weight). A metric, never the loss.

    Attributes:
      total, weight: as of `Mean`.
    """

    total: chex.Numeric
    weight: chex.Numeric


class Sum(NamedTuple):
    """A value that is added over the parts of a batch, such as a count of tokens.

    Attributes:
      value: scalar; a whole number stays one.
    """

    value: chex.Numeric


Kind = Mean | ExpMean | Sum


class Returned(NamedTuple):
    """What a loss returned, for a batch or a part of one; the values of two parts are added leaf by leaf."""

    value: Mean | Sum
    metrics: dict[str, Kind]
    model_state: Any


def read_returned(found: Any, model_state: Any) -> Returned:
    """What a loss returned, each value as its kind; a plain number counts as the mean of its part.

    Raises:
      ConfigError: it is of another form, or the model state is not like the one that the loss was given.
    """
    parts = found if type(found) is tuple else (found, {})
    if model_state is not None:
        if len(parts) != 3 or type(found) is not tuple:
            raise ConfigError(f"the state has a model state: wanted (value, metrics, model_state), {_form(found)}")
        value, metrics, after = parts
        model_state = _like(after, model_state)
    else:
        if len(parts) != 2:
            raise ConfigError(f"wanted a scalar or (value, metrics), {_form(found)}")
        value, metrics = parts
    return Returned(_scalar(value), _named(metrics), model_state)


def numerator(kind: Mean | Sum) -> chex.Array:
    """What gradients are of."""
    return kind.total if isinstance(kind, Mean) else kind.value


def finished(kind: Kind) -> chex.Array:
    """The value of the whole batch."""
    if isinstance(kind, ExpMean):
        return jnp.exp(finished(Mean(*kind)))
    return divided(numerator(kind), kind)


def divided(total: chex.Array, kind: Mean | Sum) -> chex.Array:
    """A total of values or of gradients, over the weight where there is one."""
    if isinstance(kind, Sum):
        return total
    dtype = common_dtype(total.dtype, kind.weight.dtype, jnp.float32)
    return total.astype(dtype) / jax.lax.stop_gradient(kind.weight).astype(dtype)


def widened(leaf: chex.Numeric) -> chex.Array:
    """A number in a dtype that it can be added up in: float32 at least, whole numbers stay whole."""
    dtype = jnp.result_type(leaf)
    if dtype == jnp.bool_:
        return jnp.asarray(leaf, jnp.int32)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(leaf, dtype)
    return jnp.asarray(leaf, common_dtype(dtype, jnp.float32))


def _scalar(value: Any) -> Mean | Sum:
    kind = _kind(value)
    if isinstance(kind, ExpMean):
        raise ConfigError("the loss returned ExpMean(total, weight), which is for metrics; wanted Mean or Sum")
    for leaf in kind:
        if jnp.ndim(leaf):
            raise ConfigError(
                f"the loss returned a value of shape {jnp.shape(leaf)}; wanted a scalar: its mean, or "
                f"Mean(total, weight), or Sum(value)"
            )
    return kind


def _named(metrics: Any) -> dict[str, Kind]:
    if not isinstance(metrics, Mapping):
        raise ConfigError(f"the loss returned metrics of type {type(metrics).__name__}; wanted a dict, by name")
    for name in ("loss", "grad_norm"):
        if name in metrics:
            raise ConfigError(f"the loss returned a metric {name!r}, which the step itself gives; give it another name")
    return {name: _kind(value) for name, value in metrics.items()}


def _kind(found: Any) -> Kind:
    if isinstance(found, Kind):
        return type(found)(*map(widened, found))
    return Mean(widened(found), jnp.ones((), jnp.float32))


def _like(found: Any, wanted: Any) -> Any:
    """The model state after a step, which must be one that the next step can be given."""
    given, wished = _types(found), _types(wanted)
    structures = {str(jax.tree.structure(found)), str(jax.tree.structure(wanted))}
    if given != wished or len(structures) > 1:
        different = [path for path in given | wished if given.get(path) != wished.get(path)]
        first = ", ".join(f"{path} (found {given.get(path)}, wanted {wished.get(path)})" for path in different[:3])
        raise ConfigError(
            "the model state that the loss returned is not like the one it was given: "
            f"{first or ' against '.join(structures)}"
        )
    return found


def _types(tree: Any) -> dict[str, str]:
    return {path: jax.typeof(leaf).str_short() for path, leaf in leaves_by_path(tree).items()}


def _form(found: Any) -> str:
    if type(found) is tuple:
        return f"but the loss returned {len(found)} values"
    return f"but the loss returned {type(found).__name__}"
